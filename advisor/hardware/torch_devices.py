"""GPUs of other vendors, asked of torch: ROCm, XPU and MPS.

torch takes seconds to import, so it is imported only where its build and the machine say that one could be there.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Literal

from advisor.hardware.gpu import Detection, Gpu
from advisor.hardware.host import ram
from advisor.hardware.query import ask, attempt, first_line, text
from advisor.profiles import match_gpu

_Backend = Literal["rocm", "xpu", "mps"]

_AMD_DEVICE = "/dev/kfd"
_RENDER_DEVICES = "/dev/dri"


def read_torch_gpus() -> Detection:
    """The GPUs of the first of ROCm, XPU and MPS that has any."""
    warnings: list[str] = []
    for backend in _plausible_backends():
        gpus, error = attempt(_read_gpus, backend)
        if gpus:
            return Detection(gpus=gpus, warnings=tuple(warnings))
        if error is not None:
            warnings.append(f"torch failed to look for a GPU ({backend}). It says: {first_line(error)}.")
    return Detection(warnings=tuple(warnings))


def _plausible_backends() -> tuple[_Backend, ...]:
    """What the installed torch was built for and this machine has a device file for."""
    builds = attempt(_torch_builds)[0] or frozenset()
    windows = sys.platform == "win32"
    plausible: dict[_Backend, bool] = {
        "rocm": "hip" in builds and (windows or os.path.exists(_AMD_DEVICE)),
        "xpu": "xpu" in builds and (windows or os.path.exists(_RENDER_DEVICES)),
        "mps": "torch" in builds and sys.platform == "darwin",
    }
    return tuple(backend for backend, is_plausible in plausible.items() if is_plausible)


def _torch_builds() -> frozenset[str]:
    """What torch/version.py says: "hip" or "xpu", and "torch" itself."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return frozenset()
    with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
        built_for = re.findall(r"^(hip|xpu)\b[^=\n]*=\s*['\"]", file.read(), re.MULTILINE)
    return frozenset({"torch", *built_for})


def _read_gpus(backend: _Backend) -> tuple[Gpu, ...]:
    torch = import_module("torch")
    if backend == "mps":
        return tuple(_read_mps(torch))
    # ROCm answers under torch's name for CUDA.
    return tuple(_read_devices(torch.cuda if backend == "rocm" else torch.xpu, backend))


def _read_devices(devices: Any, backend: Literal["rocm", "xpu"]) -> Iterator[Gpu]:
    for index in range(devices.device_count() if devices.is_available() else 0):
        properties = devices.get_device_properties(index)
        driver_bytes = int(properties.total_memory)
        free_bytes, total_bytes = ask(devices, "mem_get_info", index) or (None, driver_bytes)
        if backend == "rocm":
            bfloat16 = ask(devices, "is_bf16_supported")
        else:
            bfloat16 = getattr(properties, "has_bfloat16_conversions", None)
        yield Gpu(
            index=index,
            name=str(properties.name),
            backend=backend,
            driver=text(getattr(properties, "driver_version", None)),
            bfloat16=bfloat16,
            total_bytes=total_bytes,
            driver_bytes=driver_bytes,
            free_bytes=free_bytes,
            detected=True,
        ).with_profile(match_gpu(str(properties.name), driver_bytes))


def _read_mps(torch: Any) -> Iterator[Gpu]:
    mps = torch.backends.mps
    if not mps.is_available():
        return
    total_bytes = int(torch.mps.recommended_max_memory())
    ram_bytes, available_bytes = ram()
    name = text(ask(mps, "get_name")) or "Apple GPU"
    yield Gpu(
        index=0,
        name=name,
        backend="mps",
        bfloat16=ask(mps, "is_macos_or_newer", 14, 0),
        total_bytes=total_bytes,
        driver_bytes=ram_bytes or total_bytes,
        free_bytes=None if available_bytes is None else min(available_bytes, total_bytes),
        unified=True,
        detected=True,
        notes=("Its memory is shared with the host.",),
    ).with_profile(match_gpu(name, ram_bytes))
