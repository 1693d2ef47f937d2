"""Every method against every known GPU: the largest micro-batch and the longest sequence of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from advisor.advise import Request, base_plan
from advisor.hardware import Gpu, what_if
from advisor.in_backward import can_step_in_backward, stepping_in_backward
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

    in_backward: bool = False
    """Only by stepping in backward, so that the micro-batch is the effective batch."""


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

    A mask changes the attention kernel, and grouped-query heads may need less with one than without: so two sequences
    are tried before one, and sequences that reach a sliding window before shorter ones.

    Frugal: checkpointing, chunked loss, paged 8-bit states; nothing else reaches further. Gradients of earlier
    micro-batches are there, as they are wherever the effective batch takes more than one; where not even one sequence
    fits then, full fine-tuning steps in backward.
    """
    base = base_plan(method, model, gpu, request)
    frugal = next(
        plan
        for plan in combinations(base, ("sdpa",))
        if plan.gradient_checkpointing and plan.loss == "chunked" and plan.optimizer.startswith("paged")
    )

    reach = _reach_of(frugal, model, gpu)
    if reach.micro_batch is None and can_step_in_backward(base):
        stepping = _reach_of(stepping_in_backward(frugal, 1), model, gpu)
        return stepping if stepping.micro_batch is not None else reach
    return reach


def _reach_of(frugal: Plan, model: ModelProfile, gpu: Gpu) -> Reach:
    def fits(plan: Plan) -> bool:
        return evaluate(plan, model.architecture, gpu).fit.fits

    def fits_tokens(steps: int) -> bool:
        return fits(replace(frugal, seq_len=steps * SEQ_LEN_STEP))

    windowed = -(-(model.architecture.window or 0) // SEQ_LEN_STEP)
    micro_batch = _largest(lambda n: fits(replace(frugal, micro_batch=n)), (2, 1), LARGEST_MICRO_BATCH)
    steps = _largest(fits_tokens, (max(1, windowed), 1), LONGEST_SEQ_LEN // SEQ_LEN_STEP)
    return Reach(
        micro_batch=micro_batch,
        seq_len=steps * SEQ_LEN_STEP if steps else None,
        in_backward=frugal.optimizer_in_backward,
    )


def _largest(fits: Callable[[int], bool], starts: tuple[int, ...], limit: int) -> int | None:
    """The largest number up to a limit that fits, doubling from the first start that does and then bisecting."""
    low = next((start for start in starts if fits(start)), None)
    if low is None:
        return None
    while low < limit and fits(min(2 * low, limit)):
        low = min(2 * low, limit)
    high = min(2 * low, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


__all__ = ["Reach", "SurveyRow", "measure_reach", "survey"]
