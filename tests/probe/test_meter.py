"""Peaks within moments as CUDA's allocator tells them, without CUDA: its counters, its limits, its driver."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from advisor.probe import driver
from advisor.probe.child import _process_facts
from advisor.probe.driver import Departure, OwnShare
from advisor.probe.limits import limited
from advisor.probe.measurement import ProbeRequest
from advisor.probe.meter import AllocatorMeter, ProfilerMeter
from advisor.probe.metered import StepClock, Timing
from advisor.probe.scratch import find_scratch
from advisor.units import GIB

from .conftest import SMALL, small_plan


class Counters:
    """torch.cuda's memory counters."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def init(self) -> None:
        pass

    def hold(self, change: int) -> None:
        self.now += change
        self.peak = max(self.peak, self.now)

    def reset_peak_memory_stats(self, _: Any) -> None:
        self.peak = self.now

    def memory_stats_as_nested_dict(self, _: Any) -> dict[str, Any]:
        both = {"all": {"peak": self.peak, "current": self.now}}
        return {"allocated_bytes": both, "reserved_bytes": {"all": {"peak": self.peak + 10}}}


def test_a_moment_keeps_its_highest_peak_and_none_of_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    monkeypatch.setattr(torch, "cuda", counters)
    meter = AllocatorMeter(torch.device("cuda"))
    counters.hold(1000)
    counters.hold(-1000)
    meter.enter("forward")
    counters.hold(100)
    counters.hold(-60)
    meter.enter("backward")
    counters.hold(20)
    meter.enter("forward")
    counters.hold(5)
    assert meter.peaks() == {"forward": 100, "backward": 60}
    counters.hold(200)
    assert meter.peaks() == {"forward": 265, "backward": 60}
    assert meter.reserved_peaks() == {"forward": 275, "backward": 70}


def test_a_moment_that_goes_on_costs_the_step_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of layer after layer is one: every reading makes hundreds of numbers, while a GPU may wait."""
    counters = Counters()
    monkeypatch.setattr(torch, "cuda", counters)
    meter = AllocatorMeter(torch.device("cuda"))
    meter.enter("loss backward")
    reads = []
    read = counters.memory_stats_as_nested_dict
    monkeypatch.setattr(counters, "memory_stats_as_nested_dict", lambda device: reads.append(1) or read(device))
    for _ in range(32):
        meter.enter("layer backward")
        counters.hold(10)
        counters.hold(-9)
    assert len(reads) == 1
    assert meter.peaks() == {"loss backward": 0, "layer backward": 31 + 10}


def test_the_profiler_cuts_a_run_into_moments_and_goes_on_after_a_pause() -> None:
    meter = ProfilerMeter()
    meter.enter("loading")
    kept = torch.ones(1000)
    meter.enter("forward")
    more = torch.ones(2000)
    del more
    meter.pause()
    uncounted = torch.ones(10_000)
    del uncounted
    meter.enter("saving")
    copy = kept.clone()
    peaks = meter.peaks()
    assert peaks == {"loading": 4000, "forward": 12_000, "saving": 8000}
    del copy


def test_a_cap_and_an_older_gpus_attention_are_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.update(share=share, device=device)
    )
    monkeypatch.setattr(torch.backends.cuda, "enable_flash_sdp", lambda on: asked.update(flash=on))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: asked.update(cudnn=on))
    plan = small_plan()
    with limited(ProbeRequest(plan=plan, architecture=SMALL, cap_bytes=16 * GIB, without_flash=True)):
        assert asked == {"share": 0.2, "device": 0, "flash": False, "cudnn": False}
    asked.clear()
    with limited(ProbeRequest(plan=plan, architecture=SMALL)):
        assert asked == {}


def test_an_optimizer_step_is_its_micro_batches_and_the_rest() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(3):
        clock.begin()
        for _ in range(2):
            clock.micro_step()
        clock.update()
        clock.end()
    clock.timings[1:] = [
        Timing(micro_step_seconds=1.0, optimizer_seconds=0.2),
        Timing(micro_step_seconds=3.0, optimizer_seconds=0.4),
    ]
    typical = clock.typical(1)
    assert typical is not None
    assert (typical.micro_step_seconds, typical.optimizer_seconds) == (2.0, pytest.approx(0.3))
    assert clock.typical(3) is None


def test_gradient_scaling_begins_where_no_step_is_skipped() -> None:
    from advisor.probe.dry_run import _never_skip_a_step

    scaler = torch.amp.GradScaler("cpu")
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler))
    assert scaler.get_scale() > 1
    _never_skip_a_step(trainer)
    assert scaler.get_scale() == 1.0
    scaler.scale(torch.ones(1))
    assert scaler.get_scale() == 1.0


class Nvml:
    """A driver with one GPU, in the words of nvidia-ml-py."""

    def __init__(self) -> None:
        self.used = 1 * GIB
        self.listed: dict[int, int] | None = {}

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-1":
            raise ValueError(uuid)
        return uuid

    def nvmlDeviceGetMemoryInfo(self, _: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, _: str) -> Any:  # noqa: N802
        if self.listed is None:
            raise ValueError("not supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.listed.items()]


@pytest.fixture
def nvml_here(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_the_drivers_view_of_this_process_is_by_its_id_or_else_by_difference(nvml_here: Nvml) -> None:
    share = OwnShare("GPU-1")
    nvml_here.used = 4 * GIB
    nvml_here.listed = {os.getpid(): 2 * GIB, 1: 1 * GIB}
    assert share.held_bytes() == 2 * GIB
    # A container, whose process ids are others.
    nvml_here.listed = {4711: 2 * GIB}
    assert share.held_bytes() == 3 * GIB
    assert OwnShare("GPU-2").held_bytes() is None
    assert OwnShare(None).held_bytes() is None


def test_an_id_that_was_listed_before_is_another_processs(nvml_here: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container counts its processes for itself, and the driver the machine's."""
    monkeypatch.setattr(driver, "RELEASE_SECONDS", 0.2)
    nvml_here.listed = {os.getpid(): GIB, 7: GIB}
    share, departure = OwnShare("GPU-1"), Departure("GPU-1")
    nvml_here.used = 4 * GIB
    assert share.held_bytes() == 3 * GIB
    departure.look(7)
    nvml_here.used = 1 * GIB
    assert departure.is_over(7) is True


def test_the_context_is_what_the_driver_counts_beside_torch_and_unknown_with_managed_memory(
    nvml_here: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1 * GIB)
    share = OwnShare("GPU-1")
    nvml_here.listed = {os.getpid(): 3 * GIB}
    for optimizer, context in (("adamw_torch_fused", 2 * GIB), ("paged_adamw_8bit", None)):
        request = ProbeRequest(plan=small_plan("full", optimizer=optimizer), architecture={})
        facts = _process_facts(share, request)
        assert (facts["driver_bytes"], facts["context_bytes"]) == (3 * GIB, context)


def test_what_another_process_took_meanwhile_is_no_context(nvml_here: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, where the difference to what was in use before is all that there is."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1 * GIB)
    share = OwnShare("GPU-1")
    request = ProbeRequest(plan=small_plan("full", optimizer="adamw_torch_fused"), architecture={})
    for used, context in ((2 * GIB + GIB // 2, GIB // 2), (9 * GIB, None), (2 * GIB, None)):
        nvml_here.used = used
        assert _process_facts(share, request)["context_bytes"] == context


def test_a_gpu_is_looked_at_until_a_process_that_was_on_it_is_off_it(
    nvml_here: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "RELEASE_SECONDS", 0.2)
    departure = Departure("GPU-1")
    nvml_here.listed, nvml_here.used = {7: GIB}, 2 * GIB
    departure.look(7)
    assert departure.is_over(7) is False
    # What another process took meanwhile does not matter: this one was seen to go.
    nvml_here.listed = {8: GIB}
    assert departure.is_over(7) is True
    nvml_here.listed = None
    assert departure.is_over(7) is None


def test_a_process_that_the_driver_never_listed_is_off_the_gpu_only_where_no_more_is_in_use_than_before(
    nvml_here: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container an empty list says nothing."""
    monkeypatch.setattr(driver, "RELEASE_SECONDS", 0.2)
    departure = Departure("GPU-1")
    nvml_here.used = 3 * GIB
    departure.look(7)
    assert departure.is_over(7) is None
    nvml_here.used = 1 * GIB
    assert departure.is_over(7) is True
    assert Departure("GPU-2").is_over(7) is None
    assert Departure(None).is_over(7) is None


def test_scratch_is_what_a_product_takes_and_gives_back() -> None:
    """An output stays, and so does what was taken before the product or after it."""
    changes = [(0, 8), (10, 64), (11, 32), (12, 8), (13, -32), (14, -8), (20, 32), (21, -32), (31, 16), (39, -16)]
    assert find_scratch(changes, [(9, 15), (30, 40)]) == {2, 3, 4, 5, 8, 9}
    assert find_scratch(changes, []) == set()


def test_a_product_in_bfloat16_counts_its_output_and_no_scratch() -> None:
    """oneDNN repacks bfloat16 matrices where the processor has instructions for them."""
    left, right = torch.ones(300, 700, dtype=torch.bfloat16), torch.ones(700, 500, dtype=torch.bfloat16)
    left @ right
    meter = ProfilerMeter()
    meter.enter("forward")
    product = left @ right
    assert meter.peaks() == {"forward": product.nbytes}
