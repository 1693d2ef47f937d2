"""`phi3-advise merge` as a process: what it states, what it holds, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from advisor.units import MIB

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "schema.json").read_text())
HIDDEN, LAYERS, RANK = 1024, 12, 16


def write_base(folder: Path) -> int:
    """A Phi-3 of 300 MiB in several shards, without transformers; its size in bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    shapes = {
        "self_attn.qkv_proj": (3 * HIDDEN, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_up_proj": (5 * HIDDEN, HIDDEN),
        "mlp.down_proj": (HIDDEN, 5 * HIDDEN // 2),
    }
    weight_map, total = {}, 0
    for layer in range(LAYERS):
        name = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        tensors = {
            f"model.layers.{layer}.{module}.weight": torch.zeros(shape, dtype=torch.bfloat16)
            for module, shape in shapes.items()
        }
        if layer == 0:
            tensors["model.embed_tokens.weight"] = torch.zeros(16000, HIDDEN, dtype=torch.bfloat16)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * 2 for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3", "dtype": "bfloat16"}))
    return total


def write_adapter(folder: Path, base: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    modules = {"qkv_proj": (3 * HIDDEN, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
    tensors = {}
    for layer in range(LAYERS):
        for module, (outputs, inputs) in modules.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.ones(RANK, inputs)
            tensors[f"{prefix}.lora_B.weight"] = torch.ones(outputs, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run over the larger base, and the base's size."""
    folder = tmp_path_factory.mktemp("larger")
    size = write_base(folder / "base")
    write_adapter(folder / "run", folder / "base")
    return folder / "run", size


def merge(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "advisor", "merge", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process held at the most")
@pytest.mark.parametrize("dtype", [[], ["--dtype", "float32"]])
def test_a_merge_stays_within_the_ram_that_it_states(
    dtype: list[str], larger: tuple[Path, int], tmp_path: Path
) -> None:
    run, size = larger
    assert size > 300 * MIB
    done = merge(run, "--out", tmp_path / "out", "--json", *dtype)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, SCHEMA)
    assert answer["peak_ram_bytes"] <= answer["needed_ram_bytes"]
    baseline = subprocess.run(
        [sys.executable, "-c", "import torch, psutil; print(psutil.Process().memory_info().rss)"],
        capture_output=True,
        text=True,
        check=True,
    )
    held = answer["peak_ram_bytes"] - int(baseline.stdout)
    assert held < size // 2, "the model was in RAM"
    assert "of RAM" in done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert answer["disk_bytes"] == size * (2 if dtype else 1)
    assert 0 <= written - answer["disk_bytes"] < MIB


def test_the_screen_states_the_ram_before_and_the_folder_after(larger: tuple[Path, int], tmp_path: Path) -> None:
    run, _ = larger
    done = merge(run, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("of RAM and") < done.stdout.index("Merged in")
    assert str(tmp_path / "out") in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_merge_that_is_stopped_leaves_nothing(
    number: signal.Signals, code: int, larger: tuple[Path, int], tmp_path: Path
) -> None:
    run, _ = larger
    command = [sys.executable, "-m", "advisor", "merge", str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert os.listdir(tmp_path) == []


def test_errors_have_their_exit_codes(tmp_path: Path, small_model: Path) -> None:
    done = merge(tmp_path / "nowhere")
    assert done.returncode == 2
    assert "There is no folder" in done.stderr
    done = merge(small_model)
    assert done.returncode == 2
    assert "nothing to merge" in " ".join(done.stderr.split())


def test_a_merge_that_is_refused_imports_no_torch(tmp_path: Path) -> None:
    script = "import sys; from advisor.cli import _run; _run(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, "merge", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "False"
