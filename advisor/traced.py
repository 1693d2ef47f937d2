"""One plan by trace: what the installed code allocates, whether a GPU survives it, and what the closed form says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod

from advisor.architecture import require_causal
from advisor.cautions import known_cautions
from advisor.errors import EnvironmentLacksError, PlanError, UnsupportedError
from advisor.fit import Fit, check_fit
from advisor.hardware import Gpu
from advisor.memory.allocator import Block, CachingAllocator
from advisor.memory.estimate import Memory, Parameters, estimate
from advisor.memory.ledger import COMPONENTS, Component
from advisor.memory.regime import Regime, regime_of
from advisor.memory.resident import PAGED_SMALLEST
from advisor.memory.trace import Trace
from advisor.memory.trace.replayed import walk
from advisor.plan import Plan
from advisor.profiles import ModelSource, profile_of

Progress = Callable[[str], None]

MOMENTS = (
    *("loading", "forward", "loss", "loss backward", "layer backward, first", "layer backward, last"),
    *("embedding backward", "optimizer step", "evaluation", "saving"),
)
"""A run's moments in their order; of the layers' backward, the first and the last to run."""

_ANY_LAYER = "layer backward"
"""How a trace calls the backward of any layer: the ends say as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """The trace's requests against what a GPU really has, cached segments released before giving up."""

    room_bytes: int
    """What the GPU has for this process's tensors."""

    released_bytes: int
    """Cached segments that had to be given back on the way."""

    failed_at: str | None
    """The moment of the request that could not be met; None where all were."""

    requested_bytes: int
    """That request."""

    left_bytes: int
    """What was left for it."""

    @property
    def survives(self) -> bool:
        """Whether every request was met."""
        return self.failed_at is None


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPlan:
    """A plan's memory by trace."""

    plan: Plan
    model: ModelSource
    gpu: Gpu
    memory: Memory
    """As every tier says it, under the trace's regime of the allocator."""

    trace: Trace
    fit: Fit | None
    """None where no GPU is known."""

    survival: Survival | None
    """None where no GPU is known."""

    closed_form: Memory | None
    """What the closed form says of the same plan."""

    unknown_to_closed_form: str
    """Why it says nothing, where it does."""

    warnings: tuple[str, ...]
    """What else to know of the plan; versions of the installed packages that were not tested."""

    @property
    def peak_moment(self) -> str:
        """The moment of the peak as `memory.moments` calls it: of the layers, only the ends are there."""
        if self.memory.at in self.memory.moments:
            return self.memory.at
        return next((name for name, peak in self.memory.moments.items() if peak == self.memory.allocated_bytes), "")

    @property
    def closed_form_error_bytes(self) -> int:
        """Allocated by the closed form less allocated by the trace: below zero is an under-prediction."""
        return self.closed_form.allocated_bytes - self.memory.allocated_bytes if self.closed_form else 0


def trace_plan(
    plan: Plan,
    model: ModelSource,
    gpu: Gpu,
    *,
    regime: Regime | None = None,
    progress: Progress | None = None,
) -> TracedPlan:
    """Run a plan's training on tensors without storage, and judge it on a GPU.

    Args:
        plan: what is traced.
        model: its model; any decoder-only one that transformers can build.
        gpu: whose kernels run, and whose memory is judged; one of no memory judges nothing.
        regime: how the allocator is run; by default as what runs such a plan does it.
        progress: called with the name of what begins.

    Raises:
        InputError: the plan or the model cannot be used.
        EnvironmentLacksError: a package is missing, or an operation cannot be traced; it is named.
    """
    require_causal(model.config, origin=model.origin)
    closed_form, unknown = _closed_form(plan, model, gpu)
    require_packages(plan)
    traced = _run(plan, model, gpu, regime or regime_of(plan), progress)
    memory = _memory(plan, traced, gpu)
    known = gpu.total_bytes > 0
    return TracedPlan(
        plan=plan,
        model=model,
        gpu=gpu,
        memory=memory,
        trace=traced,
        fit=check_fit(memory.reserved_bytes, gpu) if known else None,
        survival=replay_on(traced, gpu) if known else None,
        closed_form=closed_form,
        unknown_to_closed_form=unknown,
        warnings=(*known_cautions(plan, model, gpu), *_version_warnings()),
    )


def _closed_form(plan: Plan, model: ModelSource, gpu: Gpu) -> tuple[Memory | None, str]:
    """The closed form's number, or why there is none."""
    try:
        return estimate(plan, profile_of(model).architecture, gpu), ""
    except UnsupportedError as error:
        return None, error.what
    except PlanError as error:
        # PEFT takes names and patterns that the closed form does not, and refuses the rest itself.
        if error.field not in ("model", "lora.target_modules"):
            raise
        return None, error.what


def require_packages(plan: Plan) -> None:
    """Raises what is missing for building this plan's model, without importing any of it.

    Raises:
        EnvironmentLacksError: packages that are not installed, with the command that installs them.
    """
    needed = ["torch", "transformers", "accelerate"]
    if plan.lora is not None:
        needed.append("peft")
    if plan.quantization is not None or "8bit" in plan.optimizer or plan.optimizer.startswith("paged"):
        needed.append("bitsandbytes")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise EnvironmentLacksError(
            f"A trace needs {' and '.join(missing)}, not installed here.",
            why="It runs the training code itself, on tensors that have shapes but no storage.",
            hint=f"pip install {' '.join(missing)}",
        )


def _run(plan: Plan, model: ModelSource, gpu: Gpu, regime: Regime, progress: Progress | None) -> Trace:
    """The trace; what a model's own code raises while it is built becomes an error that says so."""
    from advisor.memory.trace import hardware_of, trace

    # Without a limit, so that what is missing can be said; `replay_on` asks about the GPU's real size.
    hardware = replace(hardware_of(gpu), total_bytes=None)
    try:
        return trace(plan, model.config, gpu=hardware, regime=regime, progress=progress)
    except (ImportError, OSError) as error:
        name = getattr(error, "name", None) or "a package"
        raise EnvironmentLacksError(
            f"{name} is installed but cannot be imported.",
            why=f"{type(error).__name__}: {str(error)[:400]}",
            hint="pip install --force-reinstall it in this environment, or make a new one.",
        ) from error
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError) as error:
        raise EnvironmentLacksError(
            f"{model.label} cannot be traced: {type(error).__name__} while its model was built.",
            why=str(error)[:400],
            hint="Check the config.json against the installed transformers.",
        ) from error


def _memory(plan: Plan, traced: Trace, gpu: Gpu) -> Memory:
    """A trace in the words of every tier."""
    peaks = {"saving": traced.saving_bytes, **traced.peaks}
    order = [*MOMENTS, *(moment for moment in peaks if moment not in MOMENTS)]
    components: dict[Component, int] = {name: traced.components.get(name, 0) for name in COMPONENTS}
    return Memory(
        allocated_bytes=traced.allocated_bytes,
        reserved_bytes=traced.reserved_bytes,
        context_bytes=gpu.context_bytes,
        at=traced.at,
        components=components,
        moments={name: peaks[name] for name in order if name in peaks and name != _ANY_LAYER},
        parameters=Parameters(total=traced.total_parameters, trainable=traced.trainable_parameters),
        host_bytes=_paged_bytes(plan, traced),
    )


def _paged_bytes(plan: Plan, traced: Trace) -> int:
    """Optimizer states in managed memory: two for each trained tensor that is large enough, by its gradient's shape.

    Source: bitsandbytes/optim/optimizer.py, get_state_buffer.
    """
    if not plan.optimizer.startswith("paged"):
        return 0
    gradients = (event.allocation for event in traced.events if event.allocation.component == "gradients")
    elements = {gradient.module: prod(gradient.shape) for gradient in gradients}
    itemsize = 1 if "8bit" in plan.optimizer else 4
    return sum(2 * itemsize * number for number in elements.values() if number >= PAGED_SMALLEST)


def replay_on(traced: Trace, gpu: Gpu) -> Survival:
    """The trace's requests at a GPU's real size, under its regime of the allocator."""
    room = max(0, gpu.total_bytes - gpu.context_bytes - gpu.others_bytes)
    if traced.reserved_bytes <= room:
        return Survival(room_bytes=room, released_bytes=0, failed_at=None, requested_bytes=0, left_bytes=0)
    allocator = _PressedAllocator(total_bytes=room, expandable=traced.regime.expandable)
    failed = None
    for event, block in walk(traced.events, allocator, empties_cache=traced.regime.empties_cache):
        failed = event if block is None else None
    return Survival(
        room_bytes=room,
        released_bytes=allocator.released_under_pressure_bytes,
        failed_at=failed.moment if failed else None,
        requested_bytes=failed.allocation.nbytes if failed else 0,
        left_bytes=room - allocator.reserved_bytes if failed else 0,
    )


class _PressedAllocator(CachingAllocator):
    """Tells what was released because the GPU was full from what training releases by itself, once after loading."""

    released_under_pressure_bytes = 0

    def allocate(self, size_bytes: int) -> Block | None:
        before = self.released_bytes
        block = super().allocate(size_bytes)
        self.released_under_pressure_bytes += self.released_bytes - before
        return block


def _version_warnings() -> tuple[str, ...]:
    from advisor.memory.trace.versions import version_warnings

    return tuple(version_warnings())
