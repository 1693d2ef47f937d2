"""Every method against every known GPU: the largest micro-batch and the longest sequence of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from advisor.advise import Request, base_plan
from advisor.hardware import Gpu, what_if
from advisor.plan import METHODS, Method, Plan
from advisor.profiles import ModelProfile, all_gpus
from advisor.search import combinations, evaluate

LARGEST_MICRO_BATCH = 1024
LONGEST_SEQ_LEN = 2**20
SEQ_LEN_STEP = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far a method goes on a GPU, with the settings that need least memory; None where it does not fit."""

    micro_batch: int | None
    """Largest micro-batch at the requested sequence length."""

    seq_len: int | None
    """Longest sequence at micro-batch 1, in steps of 256 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyRow:
    """One GPU."""

    gpu: Gpu
    reach: dict[Method, Reach]


def survey(model: ModelProfile, request: Request | None = None) -> tuple[SurveyRow, ...]:
    """The reach of every method on every GPU profile, the smallest GPU first.

    Raises:
        PlanError: a setting that no plan can have.
    """
    request = request or Request()
    return tuple(_row(what_if(profile), model, request) for profile in all_gpus())


def _row(gpu: Gpu, model: ModelProfile, request: Request) -> SurveyRow:
    return SurveyRow(gpu=gpu, reach={method: measure_reach(method, gpu, model, request) for method in METHODS})


def measure_reach(method: Method, gpu: Gpu, model: ModelProfile, request: Request) -> Reach:
    """Largest micro-batch and longest sequence of a method on a GPU, under its frugal settings.

    Frugal: checkpointing, chunked loss, paged 8-bit states; nothing else reaches further. Gradients of earlier
    micro-batches are there, as they are wherever the effective batch takes more than one.
    """
    base = base_plan(method, model, gpu, request)
    frugal = next(
        plan
        for plan in combinations(base, ("sdpa",))
        if plan.gradient_checkpointing and plan.loss == "chunked" and plan.optimizer.startswith("paged")
    )

    def fits(plan: Plan) -> bool:
        return evaluate(plan, model.architecture, gpu).fit.fits

    return Reach(
        micro_batch=_largest(lambda n: fits(replace(frugal, micro_batch=n)), LARGEST_MICRO_BATCH),
        seq_len=_scaled(
            _largest(lambda n: fits(replace(frugal, seq_len=n * SEQ_LEN_STEP)), LONGEST_SEQ_LEN // SEQ_LEN_STEP)
        ),
    )


def _scaled(steps: int | None) -> int | None:
    return steps * SEQ_LEN_STEP if steps else None


def _largest(fits: Callable[[int], bool], limit: int) -> int | None:
    """The largest number from 1 to a limit that fits, doubling and then bisecting; None if 1 does not."""
    if not fits(1):
        return None
    low = 1
    while low < limit and fits(min(2 * low, limit)):
        low = min(2 * low, limit)
    high = min(2 * low, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


__all__ = ["Reach", "SurveyRow", "measure_reach", "survey"]
