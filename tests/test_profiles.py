"""Profiles: every number has a source, every name resolves, and what resolves to nothing says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from advisor.errors import AdvisorError, EnvironmentLacksError, InputError, UnknownNameError
from advisor.plan import METHODS, LoraSettings, Quantization, plan_to_fields
from advisor.profiles import (
    Backend,
    Provenance,
    all_gpus,
    default_plan,
    gpu_ladder,
    gpu_names,
    load_gpu,
    load_model,
    load_recipe,
    match_gpu,
    model_names,
    profile_folder,
    read_json,
    read_toml,
    recipe_names,
)
from advisor.units import GIB, MIB

ROOT = Path(__file__).resolve().parents[1]

ASKED_FOR = [
    "t4",
    "p100",
    "v100-16gb",
    "v100-32gb",
    "rtx-3060-12gb",
    "rtx-3080-10gb",
    "rtx-3090",
    "rtx-4060-ti-16gb",
    "rtx-4070-ti",
    "rtx-4080",
    "rtx-4090",
    "rtx-5080",
    "rtx-5090",
    "a10",
    "l4",
    "a6000",
    "l40s",
    "a100-40gb",
    "a100-80gb",
    "h100",
    "h200",
    "b200",
]

MODELS_ASKED_FOR = [
    "phi-3-mini-4k",
    "phi-3-mini-128k",
    "phi-3-small-8k",
    "phi-3-small-128k",
    "phi-3-medium-4k",
    "phi-3-medium-128k",
    "phi-3.5-mini",
    "phi-3.5-moe",
    "phi-3-vision",
    "phi-3.5-vision",
    "phi-4",
    "phi-4-mini",
    "phi-4-reasoning",
]

SHORT_NAMES = {
    "phi-3-mini": "phi-3-mini-4k",
    "Phi-3-Mini": "phi-3-mini-4k",
    "phi_3_mini": "phi-3-mini-4k",
    "phi-3": "phi-3-mini-4k",
    "phi-3-medium": "phi-3-medium-4k",
    "phi-3-small": "phi-3-small-8k",
    "microsoft/Phi-3-mini-4k-instruct": "phi-3-mini-4k",
    "MICROSOFT/phi-3-mini-4k-INSTRUCT": "phi-3-mini-4k",
    "microsoft/phi-4": "phi-4",
    "microsoft/Phi-4-mini-instruct": "phi-4-mini",
}


def raw(kind: Any, name: str) -> dict[str, Any]:
    return read_toml(os.path.join(profile_folder(kind), f"{name}.toml"))


def test_every_gpu_and_model_that_people_have_is_there() -> None:
    assert set(ASKED_FOR) <= set(gpu_names())
    assert {gpu.vendor for gpu in all_gpus()} >= {"nvidia", "amd", "intel"}
    assert set(MODELS_ASKED_FOR) == set(model_names())


@pytest.mark.parametrize("name", gpu_names())
def test_a_gpus_facts_are_whole_and_consistent(name: str) -> None:
    gpu = load_gpu(name)
    assert gpu.name == name
    assert all((gpu.product, gpu.vendor, gpu.architecture, gpu.driver_names))
    assert gpu.backend in get_args(Backend)
    assert 4 * GIB <= gpu.usable_bytes <= gpu.driver_bytes <= 512 * GIB
    assert gpu.usable_bytes >= 0.9 * gpu.driver_bytes or gpu.backend == "mps"
    assert (gpu.capability is not None) == (gpu.backend == "cuda")
    if gpu.capability is not None:
        assert gpu.bfloat16 is (gpu.capability >= (8, 0))
    assert 5e12 <= gpu.dense_16bit_flops <= 5e15
    assert 1e11 <= gpu.bandwidth_bytes_per_s <= 1e13
    assert 0 < gpu.context_bytes <= 2 * GIB


@pytest.mark.parametrize("name", gpu_names())
def test_every_number_of_a_gpu_has_a_source_and_no_key_goes_unread(name: str) -> None:
    gpu = load_gpu(name)
    assert set(gpu.sources) == {"memory", "compute", "bandwidth", "context"}
    assert all(len(source) >= 8 for source in gpu.sources.values())
    assert gpu.context_provenance in get_args(Provenance)
    assert (gpu.context_provenance == "assumed") == gpu.sources["context"].startswith("assumed")
    known = {"name", "product", "aliases", "driver_names", "vendor", "backend", "architecture", "note", *gpu.sources}
    assert set(raw("gpus", name)) <= known


@pytest.mark.parametrize("kind", ["gpus", "models", "recipes"])
def test_no_two_profiles_answer_to_one_name(kind: Any) -> None:
    names = [entry.removesuffix(".toml") for entry in os.listdir(profile_folder(kind)) if entry.endswith(".toml")]
    assert [raw(kind, name)["name"] for name in names] == names
    everything = [alias for name in names for alias in (name, *raw(kind, name).get("aliases", ()))]
    assert [name for name, times in Counter(everything).items() if times > 1] == []
    assert all(name == name.lower() and " " not in name and "_" not in name for name in everything)


def test_every_alias_loads_its_profile() -> None:
    for name in gpu_names():
        assert all(load_gpu(alias).name == name for alias in raw("gpus", name).get("aliases", ()))
    for name in model_names():
        assert all(load_model(alias).name == name for alias in raw("models", name).get("aliases", ()))


def test_no_two_cards_of_one_driver_name_have_like_memory() -> None:
    for name in {driver_name for gpu in all_gpus() for driver_name in gpu.driver_names}:
        for gpu in [gpu for gpu in all_gpus() if name in gpu.driver_names]:
            assert match_gpu(name, gpu.driver_bytes) == gpu


def test_a_card_that_no_profile_names_stays_unknown() -> None:
    assert match_gpu("NVIDIA Imaginary 9000", 24 * GIB) is None
    assert match_gpu("Tesla T4", 80 * GIB) is None


def test_the_ladder_ascends_and_is_of_known_gpus() -> None:
    ladder = list(gpu_ladder())
    assert len(ladder) >= 8
    memories = [gpu.usable_bytes for gpu in ladder]
    assert memories == sorted(set(memories))
    assert memories[-1] > 150 * GIB


def test_all_gpus_come_the_smallest_first() -> None:
    memories = [gpu.usable_bytes for gpu in all_gpus()]
    assert memories == sorted(memories)
    assert len(memories) == len(gpu_names())


def test_a_t4_is_what_torch_sees_of_it() -> None:
    t4 = load_gpu("t4")
    assert (t4.driver_bytes, t4.usable_bytes) == (15360 * MIB, int(14.56 * GIB))
    assert (t4.capability, t4.bfloat16) == ((7, 5), False)


@pytest.mark.parametrize("name", model_names())
def test_a_model_has_a_source_and_says_whether_it_can_be_launched(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert "https://huggingface.co/" in model.source
    assert model.hub_id is not None
    assert model.hub_id.startswith("microsoft/")
    assert model.launchable != bool(model.launch_note)


@pytest.mark.parametrize(("written", "name"), SHORT_NAMES.items())
def test_a_model_goes_by_its_short_name_and_its_hub_id_in_any_case(written: str, name: str) -> None:
    assert load_model(written).name == name


@pytest.mark.parametrize(("written", "name"), [("T4", "t4"), ("Tesla T4", "t4"), ("RTX_4090", "rtx-4090")])
def test_a_gpu_goes_by_its_name_as_people_write_it(written: str, name: str) -> None:
    assert load_gpu(written).name == name


COOKBOOK_LORA = {
    "rank": 16,
    "alpha": 16,
    "dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
UNSAID_TRAINING = {
    "learning_rate": None,
    "schedule": "cosine",
    "warmup": 0.03,
    "weight_decay": 0.0,
    "epochs": 1.0,
    "max_steps": None,
    "validation": 0.05,
    "seed": 42,
    "compile": False,
}
COOKBOOK = {
    "cookbook-full": {
        "model": "phi-3-mini-4k",
        "method": "full",
        "dtype": "float32",
        "autocast": "bfloat16",
        "quantization": None,
        "upcast_frozen": False,
        "lora": None,
        "optimizer": "paged_adamw_32bit",
        "micro_batch": 7,
        "gradient_accumulation": 4,
        "seq_len": 128,
        "padding": "longest",
        "gradient_checkpointing": True,
        "attention": "eager",
        "loss": "standard",
        "hold_outputs": False,
        "packing": False,
        "optimizer_in_backward": False,
        "training": UNSAID_TRAINING,
        "gpu": None,
    },
    "cookbook-lora": {
        "model": "phi-3-mini-4k",
        "method": "lora",
        "dtype": "bfloat16",
        "autocast": "bfloat16",
        "quantization": None,
        "upcast_frozen": False,
        "lora": COOKBOOK_LORA,
        "optimizer": "adamw_torch",
        "micro_batch": 8,
        "gradient_accumulation": 4,
        "seq_len": 512,
        "padding": "longest",
        "gradient_checkpointing": False,
        "attention": "flash_attention_2",
        "loss": "standard",
        "hold_outputs": False,
        "packing": False,
        "optimizer_in_backward": False,
        "training": UNSAID_TRAINING,
        "gpu": None,
    },
}
COOKBOOK["cookbook-qlora"] = COOKBOOK["cookbook-lora"] | {
    "method": "qlora",
    "quantization": {"bits": 4, "type": "nf4", "double": True},
    "upcast_frozen": True,
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize("name", COOKBOOK)
def test_a_cookbook_recipe_is_its_notebook_field_by_field(name: str) -> None:
    from advisor.profiles import plan_with_defaults

    assert plan_to_fields(plan_with_defaults(load_recipe(name).fields)) == COOKBOOK[name]


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_default_is_rank_16_on_every_linear_and_checkpointed(method: Any) -> None:
    plan = default_plan(method, model="phi-3-mini-4k")
    assert plan.method == method
    assert plan.lora == (None if method == "full" else LoraSettings(rank=16, alpha=16, target_modules="all-linear"))
    assert plan.quantization == (Quantization() if method == "qlora" else None)
    assert (plan.optimizer, plan.gradient_checkpointing, plan.attention) == ("adamw_torch_fused", True, "sdpa")
    assert (plan.effective_batch, plan.seq_len) == (16, 2048)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_source(name: str) -> None:
    assert len(load_recipe(name).source) >= 8
    assert set(recipe_names()) == {*METHODS, *COOKBOOK}


@pytest.mark.parametrize(
    ("load", "name", "near"),
    [
        (load_model, "phi-3-mni", "phi-3-mini"),
        (load_model, "phi-5", "phi-4"),
        (load_gpu, "rtx-4091", "rtx-4090"),
        (load_gpu, "a100-80", "a100-80gb"),
        (load_recipe, "cookbook-ful", "cookbook-full"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(load: Any, name: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load(name)
    assert near in caught.value.nearest
    assert near in caught.value.why


@pytest.mark.parametrize("name", ["", " ", "../gpus/t4", "\0", "x" * 10_000, "ünïcödé", "a/b/c", "-", ".", "/"])
@pytest.mark.parametrize("load", [load_model, load_gpu, load_recipe])
def test_no_name_makes_anything_but_an_input_error(load: Any, name: str) -> None:
    with pytest.raises(InputError) as caught:
        load(name)
    assert caught.value.hint
    assert len(caught.value.what) < 10_500


def test_a_config_file_and_its_folder_are_the_same_model(tmp_path: Path) -> None:
    config = dict(load_model("phi-4-mini").architecture.config)
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in (str(folder), f"{folder}/", str(folder / "config.json")):
        model = load_model(name)
        assert model.architecture.parameters == 3_836_021_760
        assert model.label == "my-model"
        assert model.name == name
        assert model.launchable
        assert "config.json" in model.source


def test_a_folder_without_a_config_says_that_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path))
    assert str(tmp_path / "config.json") in caught.value.what


def test_a_local_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_model("out/model")
    assert "config.json cannot be read" in caught.value.what


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b'{"model_type": "phi3", "hidden_size": 30',
        b"[1, 2]",
        b"null",
        b"3",
        b"\x80\x02binary\xff",
        b"\x00" * 100,
        b'{"a": ' + b"[" * 100_000,
        b'{"model_type": "' + b"x" * (4 * 2**20) + b'"}',
        b'{"model_type": "phi3", "hidden_size": ' + b"9" * 5000 + b"}",
        b'{"model_type": "phi3", "hidden_size": NaN}',
        b'{"model_type": "phi3", "hidden_size": 1e400}',
        b'\xef\xbb\xbf{"model_type": "phi3"}',
    ],
    ids=[
        "empty",
        "words",
        "cut off",
        "list",
        "null",
        "number",
        "pickle",
        "zeros",
        "nested",
        "huge",
        "long number",
        "nan",
        "infinity",
        "byte order mark",
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_model(str(path))
    assert str(path) in caught.value.what
    assert caught.value.why or caught.value.hint
    assert len(caught.value.what) < len(str(path)) + 200


def test_a_file_of_a_few_megabytes_is_refused_unparsed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[" + "1," * (3 * 2**20) + "1]")
    with pytest.raises(InputError, match="larger than 4 MiB"):
        read_json(str(path))


HUB_ID = "acme/tiny-llama"


def cached_on_this_machine(cache: Path, config: dict[str, Any]) -> None:
    """A cache as huggingface_hub lays it out after it has downloaded one file."""
    commit, etag = "a" * 40, "b" * 40
    repository = cache / "models--acme--tiny-llama"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs" / etag).write_text(json.dumps(config))
    (snapshot / "config.json").symlink_to(Path("..", "..", "blobs", etag))


def offline(cache: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def unreachable(cache: Path) -> dict[str, str]:
    """A network on which nobody answers for the hub."""
    rerouted = ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    inherited = {name: value for name, value in os.environ.items() if name.upper() not in rerouted}
    return {**inherited, "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://hub.invalid:9"}


def advise_in_process(environment: dict[str, str], model: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "advisor", "--gpu", "t4", "--json", "--model", model]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("network", [offline, unreachable])
def test_a_hub_id_is_served_from_the_local_cache(tmp_path: Path, network: Callable[[Path], dict[str, str]]) -> None:
    cached_on_this_machine(
        tmp_path, {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 512, "vocab_size": 64}
    )
    done = advise_in_process(network(tmp_path), HUB_ID)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["model"] == HUB_ID


@pytest.mark.parametrize("network", [offline, unreachable])
def test_a_hub_id_that_is_not_cached_lacks_the_network(
    tmp_path: Path, network: Callable[[Path], dict[str, str]]
) -> None:
    done = advise_in_process(network(tmp_path), HUB_ID)
    assert done.returncode == EnvironmentLacksError.exit_code == 3
    assert done.stdout == ""
    assert HUB_ID in done.stderr
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("hub_id", ["acme/two--dashes", "acme/.hidden", "acme/ends-", "a.-/b"])
def test_a_hub_id_that_the_client_refuses_is_an_error_like_any_other(hub_id: str) -> None:
    with pytest.raises(AdvisorError) as caught:
        load_model(hub_id)
    assert caught.value.hint
