"""What a probe's process does to itself before it begins: less memory, fewer kernels, first to be killed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from advisor.probe.measurement import ProbeRequest
from advisor.units import MIB

CPU_ALLOWANCE_BYTES = 512 * MIB
"""What the process may map beside tensors, once it has imported everything: thread stacks, heaps, libraries' buffers.

Assumed. The profiler's peak decides; this is there so that a machine's RAM is not filled to find out.
"""


def die_first() -> None:
    """Where RAM runs out, Linux kills this process before the one that waits for it."""
    if sys.platform == "linux":
        try:
            with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("1000")
        except OSError:
            return


@contextmanager
def limited(request: ProbeRequest) -> Iterator[None]:
    """As much memory as the request allows, and the kernels of the GPU that it imitates."""
    if request.device.startswith("cuda"):
        _limit_cuda(request)
        yield
    elif request.device == "cpu" and request.cap_bytes is not None and sys.platform == "linux":
        with _limited_data(request.cap_bytes + CPU_ALLOWANCE_BYTES):
            yield
    else:
        yield


def _limit_cuda(request: ProbeRequest) -> None:
    """All that is asked of CUDA for it: torch's allocator refuses beyond the cap, and two attentions are off."""
    import torch

    if not torch.cuda.is_available():
        # The run itself says what is lacking, before it begins.
        return
    if request.cap_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, request.cap_bytes / total), 0)
    if request.without_flash:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def _limited_data(more_bytes: int) -> Iterator[None]:
    """The kernel refuses this process more private memory than it has now and so much more.

    Source: Linux, setrlimit(2), RLIMIT_DATA: since 4.7 it counts private writable mappings.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + more_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        # What was found has still to be written.
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))


__all__ = ["die_first", "limited"]
