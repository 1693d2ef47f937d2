"""Which GPUs are here, how much of their memory is free and who holds the rest; host RAM and disk.

NVML answers for NVIDIA. Only where it is absent is torch asked, for ROCm, XPU and MPS.
"""

from __future__ import annotations

from advisor.hardware.cpu import read_cpu
from advisor.hardware.gpu import ASSUMED_CONTEXT_BYTES, Detection, Gpu, GpuProcess, choose, what_if
from advisor.hardware.host import Host, host, peak_ram_bytes


def detect() -> Detection:
    """Every GPU that a training process started here could use.

    No GPU is an answer; a driver that does not work is a warning. Nothing is raised.
    """
    from advisor.hardware.nvml import read_nvml_gpus

    found = read_nvml_gpus()
    if found is None:
        from advisor.hardware.torch_devices import read_torch_gpus

        found = read_torch_gpus()
    return found


__all__ = [
    "ASSUMED_CONTEXT_BYTES",
    "Detection",
    "Gpu",
    "GpuProcess",
    "Host",
    "choose",
    "detect",
    "host",
    "peak_ram_bytes",
    "read_cpu",
    "what_if",
]
