"""Host RAM while weights load: what is computed, and what a process really holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from advisor.hardware import Gpu, Host, what_if
from advisor.launch.host_ram import PROCESS_BYTES, RamNeed, largest_tensor, ram_need
from advisor.launch.model import ModelFiles
from advisor.launch.preflight import ram_problems
from advisor.plan import Plan
from advisor.profiles import default_plan, load_gpu, load_model
from advisor.training.tensor_files import SHARD_BYTES
from advisor.units import GIB, MIB

MINI = load_model("phi-3-mini-4k").architecture
T4 = what_if(load_gpu("t4"))
FILES = ModelFiles(path="x", weight_bytes=7_642_159_104, largest_file_bytes=4_972_489_328, download_bytes=0)
COLAB = Host(ram_bytes=12_700_000_000, ram_available_bytes=11 * GIB, disk_free_bytes=None, cpu_count=2)

# A process that loads a model as load_model does. What the device would hold is made on the host, as a copy to CUDA
# makes it, and let go: there is no GPU here.
LOADING = """
import json, sys, threading, time
import torch, transformers.core_model_loading as loading
from transformers import AutoModelForCausalLM
import transformers.models.phi3.modeling_phi3

def copy(tensor, device=None, dtype=None):
    return torch.max(tensor[...].to(dtype)).to("meta").expand(tensor.get_shape())

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

def watch():
    while not done:
        for name, value in resident().items():
            peak[name] = max(peak[name], value)
        time.sleep(0.001)

loading._materialize_copy = copy
torch.set_num_threads(1)
done, before = False, resident()
peak = dict(before)
thread = threading.Thread(target=watch)
thread.start()
AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=getattr(torch, sys.argv[2]), device_map={"": "cpu"}, use_safetensors=True
)
done = True
thread.join()
print(json.dumps({name: peak[name] - before[name] for name in peak} | {"threads": loading.GLOBAL_WORKERS}))
"""


# A process that saves a model as the training does: as a checkpoint, or as it is left. There is no GPU here: what
# safetensors would copy from one is copied where it takes its bytes.
SAVING = """
import json, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import safetensors.torch, torch
from transformers import AutoModelForCausalLM, Phi3Config
from advisor.architecture import architecture_from_config
from advisor.launch import host_ram
from advisor.plan import plan_from_fields
from advisor.training import artefacts, trainer

fields, folder, limit = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
artefacts.SHARD_BYTES = trainer.SHARD_BYTES = host_ram.SHARD_BYTES = limit
plan = plan_from_fields({"model": "small", "method": "full", "seq_len": 64, **fields})
torch.set_num_threads(1)
config = json.loads(sys.argv[4])
expected = host_ram.saved_at_once(plan, architecture_from_config(config, origin="small"))
del config["model_type"]
model = AutoModelForCausalLM.from_config(Phi3Config(**config), dtype=getattr(torch, plan.dtype))
take = safetensors.torch._to_ndarray
safetensors.torch._to_ndarray = lambda tensor: take(tensor.clone() if tensor.dtype == model.dtype else tensor)

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

def save(folder):
    if sys.argv[5] == "checkpoint":
        subject = SimpleNamespace(_built=SimpleNamespace(model=model))
        trainer.PlanTrainer._save(subject, str(folder))
    else:
        folder.mkdir()
        artefacts._save_model(model, folder, plan)

done, before, peak = False, resident(), 0
thread = threading.Thread(target=watch)
thread.start()
save(folder)
done = True
thread.join()
print(json.dumps({"rose": peak - before, "expected": expected}))
"""


def need(plan: Plan, gpu: Gpu = T4, *, spilled_bytes: int = 0) -> RamNeed:
    found = ram_need(plan, MINI, FILES, gpu, spilled_bytes=spilled_bytes, cpu_count=2)
    assert found is not None
    return found


def plan(method: str) -> Plan:
    return default_plan(method, model="phi-3-mini-4k", dtype="float16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "staging"),
    [
        ("lora", 2 * 32064 * 3072 * 2),  # Colab's two processors: two threads, the embedding each, in fp16
        ("qlora", 32064 * 3072 * 2),  # quantised while loading: one thread
        ("full", 2 * 32064 * 3072 * 4),  # fp32 on a T4
    ],
)
def test_phi_3_mini_loads_within_colab_s_ram_by_every_method(method: str, staging: int) -> None:
    found = need(plan(method))
    assert found.staging_bytes == staging
    loading = replace(found, saved_bytes=0)
    assert loading.required_bytes == PROCESS_BYTES + staging
    assert loading.required_bytes < 4 * GIB
    # Even where the system takes no page back.
    assert loading.resident_bytes < 12_700_000_000
    assert ram_problems(loading, COLAB) == []


def test_of_a_model_that_is_saved_one_file_is_in_host_ram() -> None:
    adapter, whole = need(plan("lora")), need(replace(plan("full"), dtype="bfloat16", autocast="none"))
    assert adapter.saved_bytes == 25_165_824 * 4
    assert whole.saved_bytes == SHARD_BYTES
    assert ram_problems(adapter, COLAB) == ram_problems(whole, COLAB) == []


def test_of_a_model_trained_in_fp32_its_16_bit_copy_is_in_host_ram_whole() -> None:
    found = need(plan("full"))
    assert found.saved_bytes == 3_821_079_552 * 2 + 32064 * 3072 * 4
    assert found.required_bytes == PROCESS_BYTES + found.saved_bytes
    (problem,) = ram_problems(found, replace(COLAB, ram_available_bytes=10 * GIB))
    assert "7.48 GiB for what is being saved" in problem.what


def test_paged_states_are_in_host_ram_after_loading(cpu: Gpu) -> None:
    found = need(plan("lora"), spilled_bytes=9 * GIB)
    assert found.required_bytes == PROCESS_BYTES + 9 * GIB + found.saved_bytes
    (problem,) = ram_problems(found, COLAB)
    assert "9.00 GiB of paged" in problem.what
    assert ram_need(plan("lora"), MINI, FILES, cpu, spilled_bytes=9 * GIB) is None


def test_too_little_ram_for_the_process_is_said() -> None:
    (problem,) = ram_problems(need(plan("lora")), replace(COLAB, ram_available_bytes=2 * GIB))
    assert "2.00 GiB of host RAM is free" in problem.what
    assert "on their way to the GPU" in problem.what


def test_a_model_of_unknown_form_takes_its_largest_file() -> None:
    found = ram_need(plan("lora"), None, FILES, T4)
    assert found is not None
    assert found.staging_bytes == FILES.largest_file_bytes


def test_windows_sets_memory_aside_for_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    found = need(plan("lora"))
    assert found.required_bytes > PROCESS_BYTES + FILES.weight_bytes  # type: ignore[operator]
    assert found.mapped_bytes == 0


def test_the_largest_tensor_is_the_embedding_or_the_widest_matrix() -> None:
    assert largest_tensor(MINI) == 32064 * 3072
    wide = load_model("phi-4").architecture
    assert largest_tensor(wide) == 100352 * 5120


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory by kind is Linux's to tell")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loading_holds_a_few_converted_tensors_and_maps_every_file(tmp_path: Path, dtype: str) -> None:
    from small_model import VOCABULARY, small_config
    from transformers import AutoModelForCausalLM, Phi3Config

    config = small_config(hidden=512, layers=8)
    del config["model_type"]
    import torch

    model = AutoModelForCausalLM.from_config(Phi3Config(**config), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="40MB")
    files = list((tmp_path / "model").glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in files)
    done = subprocess.run(
        [sys.executable, "-c", LOADING, tmp_path / "model", dtype], capture_output=True, text=True, check=True
    )
    rose = json.loads(done.stdout)
    staging = rose["threads"] * VOCABULARY * 512 * {"float16": 2, "float32": 4}[dtype]
    assert len(files) > 2
    assert rose["RssFile"] > 0.95 * stored  # all files at once, not one of them
    # What the C library keeps of freed tensors under its 32 MiB threshold comes on top; the model itself would be
    # 99 or 198 MiB.
    assert rose["RssAnon"] < staging + 16 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory by kind is Linux's to tell")
@pytest.mark.parametrize(
    ("fields", "limit", "what"),
    [
        ({"dtype": "float32"}, 80 * 10**6, "checkpoint"),  # two tensors of 66 MB, and 77 MB of layers
        ({"dtype": "bfloat16"}, 10**6, "checkpoint"),  # each tensor is larger than a file is to be
        ({"dtype": "float32", "autocast": "bfloat16"}, 10**6, "artefacts"),
    ],
)
def test_saving_holds_what_is_computed(fields: dict[str, str], limit: int, what: str, tmp_path: Path) -> None:
    from small_model import VOCABULARY, small_config

    config = json.dumps(small_config(hidden=512, layers=8))
    words = [sys.executable, "-c", SAVING, json.dumps(fields), str(tmp_path / "out"), str(limit), config, what]
    # Freed tensors go back to the system at once, or the C library would keep up to 64 MiB of them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    # The tensor that a GPU's copy makes first when it changes the dtype is not there on a processor.
    made_first = VOCABULARY * 512 * 4 if what == "artefacts" else 0
    assert 0.8 * (found["expected"] - made_first) < found["rose"] < found["expected"] + 16 * MIB
