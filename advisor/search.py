"""The search behind the advice: of one method's plans, the fastest that fits, or else the smallest.

Every knob is tried: micro-batch (the effective batch stays), checkpointing, loss, optimizer, attention. Plans are
taken in the order of the speed they could reach at best, so the first ones that fit end the search, and what is known
of their memory rules most others out uncomputed; a test holds the result equal to trying everything.

What is known of memory: it grows with the micro-batch, except at either end. A batch without accumulation keeps no
gradients of earlier ones; one sequence alone has no mask, which grouped-query heads may pay for with the math kernel.
Nothing is known of checkpointing: a few tokens keep less than what it recomputes. And the largest micro-batch need not
be the fastest, where it pushes paged states to host RAM.

Only where none of these plans fits, plans of full fine-tuning that step in backward are searched (in_backward.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from advisor.architecture import Architecture
from advisor.fit import Fit, check_fit
from advisor.hardware import Gpu
from advisor.in_backward import can_step_in_backward, largest_that, stepping_in_backward
from advisor.memory.estimate import reserved_bytes, simulate
from advisor.memory.ledger import Ledger
from advisor.memory.step import paged_bytes
from advisor.plan import Attention, Loss, Optimizer, Plan
from advisor.speed import relative_seconds

OPTIMIZERS: tuple[Optimizer, ...] = ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")
"""Each needs less of the GPU than the one before."""

LOSSES: tuple[Loss, ...] = ("standard", "chunked")
"""Each needs less than the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan with what was computed of it."""

    plan: Plan
    ledger: Ledger
    fit: Fit
    seconds: float
    """Relative step time, for comparing plans; seconds only where the GPU's rates are known."""

    spilled_bytes: int
    """Paged optimizer states that do not fit beside the rest and so live in host RAM."""


def divisors(number: int) -> tuple[int, ...]:
    """Micro-batches that divide an effective batch, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def evaluate(plan: Plan, arch: Architecture, gpu: Gpu) -> Candidate:
    """Peak, fit and relative step time of one plan."""
    ledger = simulate(plan, arch, gpu)
    fit = check_fit(reserved_bytes(ledger, gpu), gpu)
    paged = paged_bytes(plan, arch)
    spilled = max(0, min(paged, fit.needed_bytes + paged - gpu.total_bytes))
    seconds = relative_seconds(plan, arch, gpu, spilled_bytes=spilled)
    return Candidate(plan=plan, ledger=ledger, fit=fit, seconds=seconds, spilled_bytes=spilled)


def combinations(base: Plan, attentions: tuple[Attention, ...]) -> tuple[Plan, ...]:
    """The base plan with every combination of the knobs, at micro-batch 1."""
    knobs = product((False, True), LOSSES, OPTIMIZERS, attentions)
    return tuple(
        replace(
            base,
            gradient_checkpointing=checkpointing,
            loss=loss,
            optimizer=optimizer,
            attention=attention,
            micro_batch=1,
            gradient_accumulation=base.effective_batch,
        )
        for checkpointing, loss, optimizer, attention in knobs
    )


def runs_on(optimizer: Optimizer, gpu: Gpu) -> bool:
    """Whether an optimizer does on a device what its name says: a processor has no other memory to page to.

    Source: bitsandbytes/optim/optimizer.py, get_state_buffer ("Paged optimizers are not supported on CPU").
    """
    return gpu.backend != "cpu" or not optimizer.startswith("paged")


def at_micro_batch(plan: Plan, micro_batch: int) -> Plan:
    """The same effective batch in larger or smaller pieces; a smaller one where backward steps the weights."""
    if plan.optimizer_in_backward:
        return stepping_in_backward(plan, micro_batch)
    return replace(plan, micro_batch=micro_batch, gradient_accumulation=plan.effective_batch // micro_batch)


def search(base: Plan, arch: Architecture, gpu: Gpu, *, attentions: tuple[Attention, ...] = ("sdpa",)) -> Candidate:
    """The fastest of a method's plans that fits the GPU; one that steps in backward, or the smallest, if none does.

    Args:
        base: method, model, dtype, sequence length, adapters; its effective batch is kept, where gradients are.
        arch: the model.
        gpu: the GPU.
        attentions: implementations that can be used there.
    """
    trials = _Trials(base, arch, gpu, attentions)
    offers = [
        (relative_seconds(at_micro_batch(plan, size), arch, gpu), plan, size)
        for plan in trials.plans
        for size in trials.sizes
    ]
    best = None
    for at_best, plan, size in sorted(offers, key=lambda offer: offer[0]):
        if best is not None and at_best >= best.seconds:
            break
        if size in trials.reach(plan):
            found = trials.evaluate(plan, size)
            if best is None or found.seconds < best.seconds:
                best = found
    return best or search_in_backward(base, arch, gpu, attentions=attentions) or trials.smallest()


def search_in_backward(
    base: Plan, arch: Architecture, gpu: Gpu, *, attentions: tuple[Attention, ...] = ("sdpa",)
) -> Candidate | None:
    """The plan that steps in backward with the largest micro-batch that fits, up to the effective batch.

    Of plans with that micro-batch the fastest; None where none fits, or the method has no such plans.
    """
    if not can_step_in_backward(base):
        return None
    trials = _Trials(base, arch, gpu, attentions, in_backward=True)
    most = largest_that(trials.fits_somehow, base.effective_batch, _irregular(arch))
    if most is None:
        return None
    fitting = [trials.evaluate(plan, most) for plan in trials.plans if trials.fits(plan, most)]
    return min(fitting, key=lambda candidate: candidate.seconds)


def smallest_plan(
    base: Plan, arch: Architecture, gpu: Gpu, *, attentions: tuple[Attention, ...] = ("sdpa",)
) -> Candidate:
    """The method's plan that needs least memory, whether or not it fits; one that steps in backward if only such do."""
    smallest = _Trials(base, arch, gpu, attentions).smallest()
    if smallest.fit.fits:
        return smallest
    return search_in_backward(base, arch, gpu, attentions=attentions) or smallest


def any_fits(base: Plan, arch: Architecture, gpu: Gpu, *, attentions: tuple[Attention, ...] = ("sdpa",)) -> bool:
    """Whether any of a method's plans fits that keeps the effective batch and clips its gradients."""
    trials = _Trials(base, arch, gpu, attentions)
    return any(trials.fits(plan, size) for plan, size in trials.frugal())


class _Trials:
    """One search's plans, each computed at most once, and how far each combination of knobs goes.

    Args:
        base: what every plan has in common.
        arch: the model.
        gpu: the GPU.
        attentions: implementations that can be used there.
        in_backward: only plans that step in backward.
    """

    def __init__(
        self,
        base: Plan,
        arch: Architecture,
        gpu: Gpu,
        attentions: tuple[Attention, ...],
        *,
        in_backward: bool = False,
    ) -> None:
        self.plans = tuple(plan for plan in combinations(base, attentions) if runs_on(plan.optimizer, gpu))
        if in_backward:
            self.plans = tuple(stepping_in_backward(plan, 1) for plan in self.plans)
        self.sizes = divisors(base.effective_batch)
        self._arch, self._gpu = arch, gpu
        self._candidates: dict[tuple[Plan, int], Candidate] = {}
        self._reaches: dict[Plan, frozenset[int]] = {}
        self._hopeless: set[tuple[Optimizer, bool]] = set()

    def evaluate(self, plan: Plan, size: int) -> Candidate:
        """A combination at a micro-batch."""
        if (plan, size) not in self._candidates:
            self._candidates[plan, size] = evaluate(at_micro_batch(plan, size), self._arch, self._gpu)
        return self._candidates[plan, size]

    def fits(self, plan: Plan, size: int) -> bool:
        """Whether a combination fits at a micro-batch.

        What is there before the step begins depends on the optimizer, and on whether gradients are kept between
        micro-batches: where that alone does not fit, nothing else of the kind is computed.
        """
        kind = plan.optimizer, size == self.sizes[-1]
        if kind in self._hopeless:
            return False
        candidate = self.evaluate(plan, size)
        if not candidate.fit.fits:
            at_start = next(iter(candidate.ledger.moment_peaks().values()))
            if not check_fit(at_start, self._gpu).fits:
                self._hopeless.add(kind)
        return candidate.fit.fits

    def fits_somehow(self, size: int) -> bool:
        """Whether a micro-batch fits under the knobs that need least."""
        return any(self.fits(plan, size) for plan in reversed(self.plans) if not self._frugal_sisters(plan))

    def reach(self, plan: Plan) -> frozenset[int]:
        """The micro-batches at which a combination fits: none where a more frugal sister does not."""
        if plan not in self._reaches:
            sizes = self.sizes
            for sister in self._frugal_sisters(plan):
                sizes = tuple(size for size in sizes if size in self.reach(sister))
            self._reaches[plan] = self._fitting(plan, sizes)
        return self._reaches[plan]

    def smallest(self) -> Candidate:
        """The plan that needs least."""
        tried = [self.evaluate(plan, size) for plan, size in self.frugal()]
        return min(tried, key=lambda candidate: candidate.fit.needed_bytes)

    def frugal(self) -> Iterator[tuple[Plan, int]]:
        """Combinations and micro-batches of which one needs least, likely ones first."""
        plans = [plan for plan in reversed(self.plans) if not self._frugal_sisters(plan)]
        return product(plans, dict.fromkeys((*self.sizes[: _irregular(self._arch)], self.sizes[-1])))

    def _fitting(self, plan: Plan, sizes: tuple[int, ...]) -> frozenset[int]:
        """Those of some micro-batches at which a combination fits: the ends one by one, the others by bisection."""
        regular = self.sizes[_irregular(self._arch) - 1 : -1]
        growing = [size for size in sizes if size in regular]
        ends = {size for size in sizes if size not in regular and self.fits(plan, size)}
        low, high = 0, len(growing)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.fits(plan, growing[middle]) else (low, middle)
        return frozenset({*ends, *growing[:low]})

    def _frugal_sisters(self, plan: Plan) -> tuple[Plan, ...]:
        """The same knobs with the next smaller states that run here, which never need more.

        Losses are not compared: the chunked one needs less of many tokens, and more of a few, because it makes the
        gradient of the head while the forward still runs.
        """
        smaller = OPTIMIZERS[OPTIMIZERS.index(plan.optimizer) + 1 :]
        return tuple(replace(plan, optimizer=name) for name in smaller if runs_on(name, self._gpu))[:1]


def _irregular(arch: Architecture) -> int:
    """How many of the smallest micro-batches have to be looked at one by one: memory grows from the last of them on.

    Grouped-query heads without a mask may fall to the math kernel, so one sequence can need more than two.
    """
    return 2 if arch.heads != arch.kv_heads else 1
