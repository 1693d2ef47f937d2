"""Detection over a real NVML library (a stub) in a process of its own, and the GPUs that people describe instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import EnvironmentLacksError, InputError
from advisor.hardware import ASSUMED_CONTEXT_BYTES, Gpu, GpuProcess, choose, host, read_cpu, what_if
from advisor.hardware.host import _container_memory
from advisor.hardware.torch_devices import _torch_builds
from advisor.profiles import load_gpu
from advisor.units import GIB, MIB

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "numpy", "psutil", "pynvml")
Environment = Callable[[str], dict[str, str]]

_DETECT = """
import json, sys
from dataclasses import asdict
from advisor.hardware import detect
{before}
found = detect()
gpus = [{{**asdict(gpu), "others_bytes": gpu.others_bytes}} for gpu in found.gpus]
print(json.dumps({{"gpus": gpus, "warnings": found.warnings, "modules": sorted(sys.modules)}}))
"""


def detect_in(environment: dict[str, str], *, before: str = "") -> dict[str, Any]:
    """What `detect()` returns in a fresh process with that environment."""
    command = [sys.executable, "-c", _DETECT.format(before=before)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def only_gpu(environment: dict[str, str]) -> dict[str, Any]:
    found = detect_in(environment)
    assert found["warnings"] == []
    assert len(found["gpus"]) == 1
    gpu: dict[str, Any] = found["gpus"][0]
    return gpu


def test_importing_hardware_imports_nothing_heavy() -> None:
    script = f"import sys, advisor.hardware; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_detecting_an_nvidia_gpu_imports_neither_torch_nor_psutil(nvml: Environment) -> None:
    modules = detect_in(nvml("t4"))["modules"]
    assert [name for name in HEAVY if name in modules] == ["pynvml"]


def test_a_t4_has_what_the_driver_does_not_reserve(nvml: Environment) -> None:
    gpu = only_gpu(nvml("t4"))
    assert gpu["name"] == "Tesla T4"
    assert gpu["driver_bytes"] == 15360 * MIB
    assert gpu["total_bytes"] == gpu["free_bytes"] == (15360 - 451) * MIB
    assert gpu["others_bytes"] == 0
    assert (gpu["index"], gpu["driver"], gpu["capability"]) == (0, "580.82.07", [7, 5])
    assert (gpu["detected"], gpu["mig"], gpu["unified"], gpu["display_attached"]) == (True, False, False, False)
    assert gpu["notes"] == []


def test_a_t4_has_no_bfloat16_and_its_profiles_context(nvml: Environment) -> None:
    gpu = only_gpu(nvml("t4"))
    assert gpu["bfloat16"] is False
    assert gpu["profile"]["name"] == "t4"
    assert gpu["context_bytes"] == load_gpu("t4").context_bytes
    assert gpu["context_provenance"] == load_gpu("t4").context_provenance


def test_every_gpu_is_listed_with_who_holds_its_memory(nvml: Environment) -> None:
    busy, free = detect_in(nvml("two_a100"))["gpus"]
    assert (busy["index"], free["index"]) == (0, 1)
    assert busy["bfloat16"] is True
    assert busy["others_bytes"] == 30720 * MIB
    assert free["others_bytes"] == 0
    assert busy["uuid"] != free["uuid"]


def test_a_process_is_named_without_its_command_line(nvml: Environment) -> None:
    busy, _ = detect_in(nvml("two_a100"))["gpus"]
    assert busy["processes"] == [{"pid": 4194401, "name": "python3", "used_bytes": 30720 * MIB}]


def test_compute_and_graphics_processes_are_listed_once_the_largest_first(nvml: Environment) -> None:
    gpu = only_gpu(nvml("busy_4090"))
    assert gpu["processes"] == [
        {"pid": 4194404, "name": "python.exe", "used_bytes": 9216 * MIB},
        {"pid": 4194403, "name": "Xorg", "used_bytes": 412 * MIB},
        {"pid": 4194405, "name": None, "used_bytes": None},
    ]
    assert gpu["others_bytes"] == (24564 - 480 - 14392) * MIB


def test_a_display_is_noticed(nvml: Environment) -> None:
    gpu = only_gpu(nvml("busy_4090"))
    assert gpu["display_attached"] is True
    assert any("display" in note for note in gpu["notes"])


def test_a_card_in_mig_mode_is_its_slices(nvml: Environment) -> None:
    small, large = detect_in(nvml("mig"))["gpus"]
    assert small["total_bytes"] == (4864 - 13) * MIB
    assert large["total_bytes"] == (19968 - 37) * MIB
    assert large["others_bytes"] == (19968 - 37 - 17883) * MIB
    assert [process["pid"] for process in large["processes"]] == [4194402]
    assert small["processes"] == []
    for gpu, label in ((small, "1g.5gb"), (large, "3g.20gb")):
        assert gpu["mig"] is True
        assert gpu["index"] == 0
        assert gpu["uuid"].startswith("MIG-")
        assert label in gpu["notes"][0]
        assert (gpu["capability"], gpu["bfloat16"]) == ([8, 0], True)


def test_a_slice_has_its_share_of_the_cards_rates(nvml: Environment) -> None:
    _, large = detect_in(nvml("mig"))["gpus"]
    card = load_gpu("a100-40gb")
    assert large["profile"]["dense_16bit_flops"] == pytest.approx(card.dense_16bit_flops * 3 / 7)
    assert large["profile"]["bandwidth_bytes_per_s"] == pytest.approx(card.bandwidth_bytes_per_s * 19968 / 40960)
    assert large["profile"]["usable_bytes"] == large["total_bytes"]
    assert large["context_provenance"] == "assumed"


@pytest.mark.parametrize("case", ["mig_slice_only", "mig_card_without_figures"])
def test_a_slice_is_offered_although_its_card_does_not_tell_its_memory(nvml: Environment, case: str) -> None:
    gpu = only_gpu(nvml(case))
    assert gpu["total_bytes"] == (4864 - 13) * MIB
    assert gpu["unified"] is False
    assert gpu["profile"] is None


def test_mig_mode_without_a_slice_leaves_no_gpu_and_says_so(nvml: Environment) -> None:
    found = detect_in(nvml("mig_without_slices"))
    assert found["gpus"] == []
    assert "MIG mode" in found["warnings"][0]


@pytest.mark.parametrize("case", ["no_memory_figures", "zero_memory"])
def test_a_gpu_without_memory_of_its_own_has_the_hosts(nvml: Environment, case: str) -> None:
    gpu = only_gpu(nvml(case))
    assert gpu["name"] == "NVIDIA GB10"
    assert gpu["unified"] is True
    assert gpu["total_bytes"] == gpu["driver_bytes"] == host().ram_bytes
    assert 0 < gpu["free_bytes"] <= gpu["total_bytes"]
    assert any("shared with the host" in note for note in gpu["notes"])


def test_memory_that_cannot_be_read_is_the_profiles_and_its_free_part_unknown(nvml: Environment) -> None:
    gpu = only_gpu(nvml("memory_fails"))
    assert gpu["total_bytes"] == load_gpu("l4").usable_bytes
    assert gpu["free_bytes"] is None
    assert gpu["unified"] is False
    assert "Unknown Error" in gpu["notes"][0]


def test_an_old_driver_counts_what_it_reserves_as_used(nvml: Environment) -> None:
    gpu = only_gpu(nvml("old_driver"))
    assert gpu["driver_bytes"] == 15360 * MIB
    assert gpu["total_bytes"] == load_gpu("t4").usable_bytes
    assert gpu["others_bytes"] == gpu["total_bytes"] - 13885 * MIB
    assert [process["used_bytes"] for process in gpu["processes"]] == [1024 * MIB]


def test_a_card_that_answers_nothing_but_its_memory_is_still_offered(nvml: Environment) -> None:
    gpu = only_gpu(nvml("silent"))
    assert gpu["total_bytes"] == 10000 * MIB
    assert gpu["others_bytes"] == 1000 * MIB
    unknown = ("uuid", "capability", "bfloat16", "display_attached", "profile")
    assert {gpu[fact] for fact in unknown} == {None}
    assert gpu["context_bytes"] == ASSUMED_CONTEXT_BYTES
    assert gpu["context_provenance"] == "assumed"
    assert any("capability is unknown" in note for note in gpu["notes"])


def test_a_name_that_is_not_text_does_not_hide_the_card(nvml: Environment) -> None:
    gpu = only_gpu(nvml("unheard_of"))
    assert gpu["total_bytes"] == 64 * GIB
    assert gpu["capability"] == [13, 0]
    assert gpu["profile"] is None


def test_a_lost_card_is_a_warning_and_the_others_stay(nvml: Environment) -> None:
    found = detect_in(nvml("one_lost"))
    assert [gpu["index"] for gpu in found["gpus"]] == [1]
    assert len(found["warnings"]) == 1
    assert "GPU 0" in found["warnings"][0]
    assert "GPU is lost" in found["warnings"][0]


@pytest.mark.parametrize(
    ("case", "said", "remedy"),
    [("broken", "Driver/library version mismatch", "restart"), ("broken_unknown", "Unknown Error", "nvidia-smi")],
)
def test_a_broken_driver_is_a_warning_with_what_nvml_said(nvml: Environment, case: str, said: str, remedy: str) -> None:
    found = detect_in(nvml(case))
    assert found["gpus"] == []
    assert len(found["warnings"]) == 1
    assert said in found["warnings"][0]
    assert remedy in found["warnings"][0]
    assert "torch" not in found["modules"]


@pytest.mark.parametrize("case", ["not_loaded", "no_gpu"])
def test_no_gpu_is_not_an_error(nvml: Environment, case: str, tmp_path: Path) -> None:
    found = detect_in({**nvml(case), "PYTHONPATH": str(fake_torch(tmp_path, built_for=""))})
    assert (found["gpus"], found["warnings"]) == ([], [])


def test_a_machine_without_nvml_asks_no_further_than_it_has_to(nvml: Environment, tmp_path: Path) -> None:
    environment = {**nvml("not_loaded"), "PYTHONPATH": str(fake_torch(tmp_path, built_for="hip"))}
    found = detect_in(environment, before=_devices(kfd=tmp_path / "absent", render=tmp_path / "absent"))
    assert (found["gpus"], found["warnings"]) == ([], [])


@pytest.mark.parametrize(
    ("case", "visible", "left"),
    [
        ("two_a100", "1", [1]),
        ("two_a100", "1,0", [1, 0]),
        ("two_a100", " 0 , 0", [0]),
        ("two_a100", "0,-1,1", [0]),
        ("two_a100", "7", []),
        ("two_a100", "", []),
        ("two_a100", "NoDevFiles", []),
        ("two_a100", "GPU-bbbb", [1]),
        ("two_a100", "gpu-BBBBBBBB-1111-1111-1111-111111111111,0", [1, 0]),
        ("mig_and_t4", "MIG-3333", [0]),
        ("mig_and_t4", "GPU-cccc", [0, 0]),
        ("mig_and_t4", "0", [0, 0]),
        ("mig_and_t4", "1", [1]),
    ],
)
def test_a_gpu_that_cuda_may_not_see_is_not_offered(
    nvml: Environment, case: str, visible: str, left: list[int]
) -> None:
    found = detect_in({**nvml(case), "CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert [gpu["index"] for gpu in found["gpus"]] == left
    hidden = len(detect_in(nvml(case))["gpus"]) - len(left)
    assert len(found["warnings"]) == (1 if hidden else 0)
    for warning in found["warnings"]:
        assert "CUDA_VISIBLE_DEVICES" in warning
        assert warning.count("GPU ") == hidden


def test_an_index_among_unlike_cards_is_ambiguous_unless_counted_by_slot(nvml: Environment) -> None:
    hidden = detect_in({**nvml("unlike_cards"), "CUDA_VISIBLE_DEVICES": "1"})["warnings"]
    assert any("CUDA_DEVICE_ORDER" in warning for warning in hidden)
    by_slot = {**nvml("unlike_cards"), "CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert not any("CUDA_DEVICE_ORDER" in warning for warning in detect_in(by_slot)["warnings"])


def fake_torch(folder: Path, *, built_for: str, module: str = 'raise AssertionError("torch was imported")') -> Path:
    """A folder for PYTHONPATH with a torch whose version.py says what it was built for."""
    package = folder / "torch"
    package.mkdir()
    versions = {"hip": None, "xpu": None} | ({built_for: "6.4"} if built_for else {})
    fields = "\n".join(f"{name}: Optional[str] = {version!r}" for name, version in versions.items())
    (package / "version.py").write_text(f"from typing import Optional\n{fields}\n")
    (package / "__init__.py").write_text(module)
    return folder


def _devices(*, kfd: Path, render: Path) -> str:
    module = "advisor.hardware.torch_devices"
    return f"import {module} as devices; devices._AMD_DEVICE, devices._RENDER_DEVICES = {str(kfd)!r}, {str(render)!r}"


_DEVICES = """
from types import SimpleNamespace as Space
def _refuse(*_): raise RuntimeError("no memory figures here")
_properties = Space(name={name!r}, total_memory={total}, driver_version="1.2", has_bfloat16_conversions=True)
{module} = Space(
    is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: _properties,
    mem_get_info={mem_get_info}, is_bf16_supported=lambda: True,
)
"""


@pytest.mark.parametrize("case", ["not_loaded", "no_gpu"])
def test_rocm_is_asked_through_torch_where_nvml_has_no_gpu(nvml: Environment, tmp_path: Path, case: str) -> None:
    profile = load_gpu("rx-7900-xtx")
    total_bytes = profile.driver_bytes
    module = _DEVICES.format(
        name=profile.driver_names[0],
        total=total_bytes,
        module="cuda",
        mem_get_info=f"lambda index: ({total_bytes - 2 * GIB}, {total_bytes})",
    )
    environment = {**nvml(case), "PYTHONPATH": str(fake_torch(tmp_path, built_for="hip", module=module))}
    gpu = detect_in(environment, before=_devices(kfd=tmp_path, render=tmp_path / "absent"))["gpus"][0]
    assert (gpu["backend"], gpu["index"], gpu["bfloat16"], gpu["capability"]) == ("rocm", 0, True, None)
    assert gpu["profile"]["name"] == "rx-7900-xtx"
    assert gpu["others_bytes"] == 2 * GIB


def test_an_intel_gpu_without_free_memory_figures_is_assumed_free(nvml: Environment, tmp_path: Path) -> None:
    module = _DEVICES.format(name="Intel(R) Something", total=16 * GIB, module="xpu", mem_get_info="_refuse")
    environment = {**nvml("not_loaded"), "PYTHONPATH": str(fake_torch(tmp_path, built_for="xpu", module=module))}
    gpu = detect_in(environment, before=_devices(kfd=tmp_path / "absent", render=tmp_path))["gpus"][0]
    assert (gpu["backend"], gpu["driver"], gpu["bfloat16"]) == ("xpu", "1.2", True)
    assert (gpu["total_bytes"], gpu["free_bytes"], gpu["others_bytes"]) == (16 * GIB, None, 0)


def test_an_apple_gpu_shares_the_hosts_memory(nvml: Environment, tmp_path: Path) -> None:
    module = (
        "from types import SimpleNamespace as Space\n"
        'mps = Space(is_available=lambda: True, get_name=lambda: "Apple M9", is_macos_or_newer=lambda *_: True)\n'
        "backends = Space(mps=mps)\n"
        f"mps = Space(recommended_max_memory=lambda: {GIB})\n"
    )
    environment = {**nvml("not_loaded"), "PYTHONPATH": str(fake_torch(tmp_path, built_for="", module=module))}
    darwin = (
        _devices(kfd=tmp_path, render=tmp_path) + "; devices.sys = type(sys)('sys'); devices.sys.platform = 'darwin'"
    )
    gpu = detect_in(environment, before=darwin)["gpus"][0]
    assert (gpu["name"], gpu["backend"], gpu["unified"], gpu["bfloat16"]) == ("Apple M9", "mps", True, True)
    assert gpu["total_bytes"] == GIB
    assert gpu["driver_bytes"] == host().ram_bytes


def test_a_torch_that_cannot_be_imported_is_a_warning(nvml: Environment, tmp_path: Path) -> None:
    broken = 'raise OSError("libamdhip64.so: cannot open shared object file")'
    environment = {**nvml("not_loaded"), "PYTHONPATH": str(fake_torch(tmp_path, built_for="hip", module=broken))}
    found = detect_in(environment, before=_devices(kfd=tmp_path, render=tmp_path))
    assert found["gpus"] == []
    assert "libamdhip64.so" in found["warnings"][0]


def test_the_installed_torch_says_what_it_was_built_for() -> None:
    import torch

    built_for = {"torch"} | ({"hip"} if torch.version.hip else set()) | ({"xpu"} if torch.version.xpu else set())
    assert _torch_builds() == built_for


def gpu_with(index: int, total_gib: int, free_gib: int | None, **facts: Any) -> Gpu:
    free_bytes = None if free_gib is None else free_gib * GIB
    return Gpu(
        name=f"GPU {index}",
        backend="cuda",
        total_bytes=total_gib * GIB,
        driver_bytes=total_gib * GIB,
        detected=True,
        index=index,
        free_bytes=free_bytes,
        **facts,
    )


def test_the_gpu_with_the_most_free_memory_is_chosen() -> None:
    gpus = (gpu_with(0, 40, 10), gpu_with(1, 24, 24), gpu_with(2, 24, 24))
    assert choose(gpus).index == 1


def test_a_gpu_that_does_not_say_what_is_free_counts_as_wholly_free() -> None:
    assert choose((gpu_with(0, 24, 20), gpu_with(1, 22, None))).index == 1


def test_a_device_is_chosen_by_its_index_however_full() -> None:
    assert choose((gpu_with(3, 40, 1), gpu_with(5, 40, 40)), device=3).index == 3


@pytest.mark.parametrize("device", [-1, 1, 7])
def test_a_device_that_is_not_there_is_answered_with_those_that_are(device: int) -> None:
    with pytest.raises(InputError) as caught:
        choose((gpu_with(0, 40, 1), gpu_with(2, 40, 40)), device=device)
    assert str(device) in caught.value.what
    assert "0, 2" in caught.value.why


def test_choosing_among_no_gpus_lacks_something_and_naming_one_is_wrong() -> None:
    with pytest.raises(EnvironmentLacksError):
        choose(())
    with pytest.raises(InputError):
        choose((), device=0)


def test_a_named_gpu_is_its_profile_and_wholly_free() -> None:
    profile = load_gpu("t4")
    gpu = what_if(profile, base=gpu_with(0, 80, 10))
    assert (gpu.name, gpu.detected, gpu.index) == (profile.product, False, None)
    assert (gpu.total_bytes, gpu.driver_bytes) == (profile.usable_bytes, profile.driver_bytes)
    assert (gpu.capability, gpu.bfloat16, gpu.context_bytes) == ((7, 5), False, profile.context_bytes)
    assert gpu.others_bytes == 0


def test_vram_over_a_detected_gpu_keeps_its_other_facts() -> None:
    holder = GpuProcess(pid=1, used_bytes=GIB)
    base = gpu_with(0, 24, 10, capability=(8, 9), bfloat16=True, processes=(holder,)).with_profile(load_gpu("rtx-4090"))
    gpu = what_if(vram_bytes=12 * GIB, base=base)
    assert (gpu.total_bytes, gpu.free_bytes, gpu.others_bytes) == (12 * GIB, None, 0)
    assert (gpu.capability, gpu.bfloat16, gpu.profile) == ((8, 9), True, base.profile)
    assert (gpu.detected, gpu.index, gpu.processes) == (False, None, ())
    assert "12.00 GiB" in gpu.notes[0]


def test_vram_alone_says_what_it_assumes() -> None:
    gpu = what_if(vram_bytes=8 * GIB)
    assert (gpu.total_bytes, gpu.capability, gpu.bfloat16, gpu.profile) == (8 * GIB, None, True, None)
    assert gpu.context_bytes == ASSUMED_CONTEXT_BYTES
    assert "assumed" in gpu.notes[0]


def test_free_over_a_detected_gpu_changes_only_what_others_hold() -> None:
    base = gpu_with(0, 24, 10, processes=(GpuProcess(pid=1),))
    gpu = what_if(free_bytes=20 * GIB, base=base)
    assert (gpu.others_bytes, gpu.total_bytes, gpu.detected, gpu.index) == (4 * GIB, 24 * GIB, True, 0)
    assert gpu.processes == ()


def test_free_and_vram_go_together() -> None:
    assert what_if(load_gpu("t4"), vram_bytes=16 * GIB, free_bytes=12 * GIB).others_bytes == 4 * GIB


def test_nothing_given_is_the_detected_gpu() -> None:
    base = gpu_with(0, 24, 10)
    assert what_if(base=base) is base


@pytest.mark.parametrize(
    "given",
    [
        {"vram_bytes": 8 * GIB, "free_bytes": 9 * GIB},
        {"vram_bytes": 8 * GIB, "free_bytes": -1},
        {"vram_bytes": 0},
        {"vram_bytes": -GIB},
        {"free_bytes": GIB},
        {},
    ],
)
def test_a_gpu_that_cannot_be_is_refused_with_a_hint(given: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        what_if(**given)
    assert caught.value.hint


def test_the_host_knows_its_ram_disk_and_processors(tmp_path: Path) -> None:
    here = host(str(tmp_path))
    assert here.ram_bytes is not None
    assert here.ram_available_bytes is not None
    assert 0 < here.ram_available_bytes <= here.ram_bytes
    assert here.disk_free_bytes is not None
    assert here.cpu_count == os.cpu_count()


def test_a_container_s_limit_is_its_ram_and_pages_of_files_can_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {GIB}\nfile {2 * GIB}\nactive_file {GIB}\ninactive_file {GIB}\n")
    assert _container_memory(str(tmp_path)) == (4 * GIB, GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_memory(str(tmp_path)) is None


def test_the_processor_is_a_device_whose_memory_is_the_host_s() -> None:
    cpu = read_cpu()
    assert (cpu.backend, cpu.detected, cpu.unified, cpu.index) == ("cpu", True, True, None)
    assert cpu.total_bytes == host().ram_bytes
    assert cpu.free_bytes is not None
    assert cpu.free_bytes < cpu.total_bytes
    assert cpu.dtype == "float32"


@pytest.mark.parametrize(("bfloat16", "dtype"), [(True, "bfloat16"), (None, "bfloat16"), (False, "float16")])
def test_what_a_gpu_computes_in(bfloat16: bool | None, dtype: str) -> None:
    gpu = Gpu(name="x", backend="cuda", total_bytes=0, driver_bytes=0, detected=False, bfloat16=bfloat16)
    assert gpu.dtype == dtype


def test_a_host_without_a_figure_cannot_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(EnvironmentLacksError, match="How much RAM"):
        read_cpu()


def test_free_disk_is_that_of_the_nearest_parent_that_exists(tmp_path: Path) -> None:
    assert host(str(tmp_path / "to" / "be" / "made")).disk_free_bytes is not None


def test_a_host_that_does_not_say_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    here = host()
    assert (here.ram_bytes, here.ram_available_bytes, here.disk_free_bytes) == (None, None, None)


def test_the_peak_of_ram_is_this_processs_own_and_not_that_of_the_one_that_started_it() -> None:
    """getrusage's would be the parent's: what starts a process lends it its pages until exec."""
    script = "from advisor.hardware import peak_ram_bytes; print(peak_ram_bytes())"
    parent = f"held = b'x' * {400 * MIB}; import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True)
    assert MIB < int(done.stdout) < 200 * MIB
