"""What the estimate and the trace say of a case on the GPU that measured it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

from advisor.errors import AdvisorError
from advisor.hardware import Gpu
from advisor.memory.attention import choose_kernel
from advisor.memory.estimate import estimate
from advisor.memory.trace import Trace, hardware_of, trace
from advisor.probe.prediction import measurable_moments
from advisor.profiles import find_model, profile_of
from campaign.grid import Case
from campaign.order import STEPS, plan_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One tier's numbers for one case."""

    step_bytes: int
    """Peak allocated over the training steps."""

    allocated_bytes: int | None
    """Peak allocated from loading to saving; the closed form knows the steps alone."""

    reserved_bytes: int
    moments: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Both tiers' numbers, or why there are none."""

    estimate: Prediction | None = None
    trace: Prediction | None = None
    refused: tuple[str, ...] = ()


def predict(case: Case, gpu: Gpu) -> Predicted:
    """Both tiers on one case."""
    warnings.simplefilter("ignore")
    said: dict[str, Prediction] = {}
    refused = []
    for tier, ask in (("estimate", by_estimate), ("trace", by_trace)):
        try:
            said[tier] = ask(case, gpu)
        except AdvisorError as error:
            refused.append(f"{tier}: {error.what}")
    return Predicted(**said, refused=tuple(refused))


def predict_all(cases: Iterable[Case], gpu: Gpu, *, workers: int) -> dict[str, Predicted]:
    """Every case by its name; traces run side by side."""
    cases = list({case.name: case for case in cases}.values())
    if workers <= 1:
        return {case.name: predict(case, gpu) for case in cases}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(predict, case, gpu): case.name for case in cases}
        try:
            return {waiting[future]: future.result() for future in as_completed(waiting)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def by_estimate(case: Case, gpu: Gpu) -> Prediction:
    """The closed form, where the case leaves attention to the kernel that it counts.

    Raises:
        AdvisorError: the closed form does not know the plan, or the kernel is another one.
    """
    plan, model = plan_of(case), find_model(case.fields["model"])
    arch = profile_of(model).architecture
    kernel, _ = choose_kernel(plan, arch, capability=gpu.capability, backend=gpu.backend)
    ruled_out = {"efficient": ("flash", "cudnn"), "flash": ("cudnn",)}
    if case.sdpa is not None and kernel in ruled_out[case.sdpa]:
        raise AdvisorError(f"torch would choose the {kernel} kernel, and the closed form follows it")
    memory = estimate(plan, arch, gpu)
    return Prediction(
        step_bytes=memory.allocated_bytes,
        allocated_bytes=None,
        reserved_bytes=memory.reserved_bytes,
        moments=measurable_moments(memory),
    )


def by_trace(case: Case, gpu: Gpu) -> Prediction:
    """The trace, with the attention kernels that the case allows."""
    traced = trace_case(case, gpu)
    return Prediction(
        step_bytes=traced.step_bytes,
        allocated_bytes=traced.allocated_bytes,
        reserved_bytes=traced.reserved_bytes,
        moments={**traced.peaks, "saving": traced.saving_bytes},
    )


def trace_case(case: Case, gpu: Gpu) -> Trace:
    """The trace, with the attention kernels that the case allows; on the CPU, with the CPU's."""
    plan, config = plan_of(case), find_model(case.fields["model"]).config
    if gpu.backend == "cpu":
        return _trace_on_cpu(case)
    hardware = replace(hardware_of(gpu), total_bytes=None)
    if case.sdpa is not None:
        hardware = replace(hardware, prefers_cudnn=False, has_flash=case.sdpa == "flash")
    return trace(plan, config, gpu=hardware)


def _trace_on_cpu(case: Case) -> Trace:
    from advisor.memory.kernels import Cpu
    from advisor.memory.kernels import Gpu as AnyGpu
    from advisor.memory.trace.run import record, summarize

    events, built = record(plan_of(case), find_model(case.fields["model"]).config, Cpu(), steps=min(STEPS, 2))
    return summarize(events, built, AnyGpu())


__all__ = ["Predicted", "Prediction", "predict", "predict_all", "trace_case"]
