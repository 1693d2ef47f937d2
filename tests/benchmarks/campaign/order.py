"""Which plans of the grid a GPU can run, and in which order: most pairs of settings a second first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from advisor.errors import AdvisorError
from advisor.hardware import Gpu
from advisor.memory.estimate import Memory, estimate
from advisor.plan import Plan
from advisor.profiles import find_model, plan_with_defaults, profile_of, without_bfloat16
from advisor.speed import relative_seconds
from advisor.traced import require_packages
from advisor.units import gib
from campaign.grid import Case

STEPS = 3
"""Optimizer steps of a measurement."""

SNAPSHOT_STEPS = 2
"""Optimizer steps of a recording: the second has the optimizer's states."""

_OVERHEAD_SECONDS = 3.0
"""Around the steps of a plan: adapters, evaluation, saving; assumed. It only decides the order."""

_SECONDS_A_PARAMETER = 0.5e-9
"""To make random weights; assumed. It only decides the order."""

_SECONDS_A_PROCESS = 15.0
"""To start Python and import torch and transformers, for plans that need a process of their own; assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A plan that is not measured here."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A case with what was worked out before it is measured."""

    case: Case
    plan: Plan
    memory: Memory
    """By the closed form, with the attention kernel that torch would choose."""

    seconds: float
    """That it is expected to take."""


def plan_of(case: Case) -> Plan:
    """The plan of a case."""
    return plan_with_defaults(case.fields)


def for_gpu(case: Case, gpu: Gpu) -> Case:
    """The case as the tool would have it on a GPU without bfloat16: fp16 under a gradient scaler.

    Raises:
        PlanError: it cannot be had in fp16.
    """
    if gpu.bfloat16 is not False:
        return case
    plan = plan_of(case)
    if "bfloat16" not in (plan.dtype, plan.autocast):
        return case
    halved = without_bfloat16(plan)
    return replace(case, fields={**case.fields, "dtype": halved.dtype, "autocast": halved.autocast})


def needs_own_process(plan: Plan) -> bool:
    """bitsandbytes never gives managed memory back: a later plan in the same process would find less of it."""
    return plan.optimizer.startswith("paged")


def turns(cases: Sequence[Case], gpu: Gpu) -> tuple[list[Turn], list[Skipped]]:
    """What can be measured on a GPU, in order; and the rest, with the reasons."""
    possible, skipped = [], []
    for case in cases:
        turn = _turn(case, gpu)
        (possible if isinstance(turn, Turn) else skipped).append(turn)
    return by_coverage(possible), skipped


def _turn(case: Case, gpu: Gpu) -> Turn | Skipped:
    try:
        case = for_gpu(case, gpu)
        plan = plan_of(case)
        require_packages(plan)
        arch = profile_of(find_model(plan.model)).architecture
        memory = estimate(plan, arch, gpu)
    except AdvisorError as error:
        return Skipped(name=case.name, reason=error.what)
    room = gpu.total_bytes - gpu.context_bytes
    if memory.allocated_bytes > room:
        reason = f"the estimate allocates {gib(memory.allocated_bytes)}, and tensors can have {gib(room)}"
        return Skipped(name=case.name, reason=reason)
    # More managed memory than the card has free can hang it.
    if memory.host_bytes and memory.allocated_bytes + memory.host_bytes > room:
        return Skipped(name=case.name, reason=f"its paged states of {gib(memory.host_bytes)} would leave the GPU")
    steps = relative_seconds(plan, arch, gpu, spilled_bytes=memory.host_bytes) / plan.gradient_accumulation
    seconds = _OVERHEAD_SECONDS + _SECONDS_A_PARAMETER * arch.parameters + (STEPS + 1) * steps
    if needs_own_process(plan):
        seconds += _SECONDS_A_PROCESS
    return Turn(case=case, plan=plan, memory=memory, seconds=seconds)


def by_coverage(possible: Sequence[Turn]) -> list[Turn]:
    """Greedy: next comes what adds most pairs of settings not yet seen, for each second that it takes.

    Ties go by the grid's order, so the same GPU always has the same order.
    """
    pairs = {turn.case.name: _pairs(turn.case) for turn in possible}
    left, seen, ordered = list(possible), set(), []
    while left:
        best = max(left, key=lambda turn: len(pairs[turn.case.name] - seen) / turn.seconds)
        left.remove(best)
        seen |= pairs[best.case.name]
        ordered.append(best)
    return ordered


def _pairs(case: Case) -> set[frozenset[tuple[str, object]]]:
    return {frozenset(pair) for pair in combinations(case.settings, 2)}


def covered(ordered: Sequence[Turn], seconds: float) -> float:
    """The share of all pairs that the plans of the first so many expected seconds have."""
    everything = set().union(*(_pairs(turn.case) for turn in ordered))
    seen: set[frozenset[tuple[str, object]]] = set()
    spent = 0.0
    for turn in ordered:
        spent += turn.seconds
        if spent > seconds:
            break
        seen |= _pairs(turn.case)
    return len(seen) / len(everything) if everything else 1.0


__all__ = [
    "SNAPSHOT_STEPS",
    "STEPS",
    "Skipped",
    "Turn",
    "by_coverage",
    "covered",
    "for_gpu",
    "needs_own_process",
    "plan_of",
    "turns",
]
