"""How much memory a plan needs, in closed form: from the architecture's numbers, in milliseconds, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from advisor.architecture import Architecture
from advisor.errors import PlanError
from advisor.hardware import Gpu
from advisor.memory.ledger import COMPONENTS, Component, Ledger
from advisor.memory.regime import regime_of
from advisor.memory.step import layer_shapes, paged_bytes, run_step, trained_elements
from advisor.plan import Plan

WORKSPACE_BYTES = 8_519_680
"""What cuBLAS keeps for each thread that uses it (cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize)."""

LARGE_WORKSPACE_BYTES = 33_554_432
LARGE_WORKSPACES = (9, 10)
"""Majors of the capabilities on which it keeps the larger one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How many parameters there are, and how many of them are trained."""

    total: int
    trainable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of one plan on one GPU, in bytes."""

    allocated_bytes: int
    """Peak of what tensors take, as torch.cuda.max_memory_allocated counts."""

    reserved_bytes: int
    """Peak of what the allocator holds, as torch.cuda.max_memory_reserved counts."""

    context_bytes: int
    """What the driver takes for the process beside that."""

    at: str
    """The moment of the peak."""

    components: Mapping[Component, int]
    """What is allocated at that moment, by kind; the sum is `allocated_bytes`."""

    moments: Mapping[str, int]
    """The highest allocation within each moment of the step."""

    parameters: Parameters

    host_bytes: int
    """Optimizer states that may move to host RAM (paged optimizers)."""

    @property
    def total_bytes(self) -> int:
        """What the GPU must have for this process."""
        return self.reserved_bytes + self.context_bytes


def estimate(plan: Plan, arch: Architecture, gpu: Gpu) -> Memory:
    """The memory of a plan in closed form.

    Raises:
        PlanError: a field that the closed form cannot honour; it names the field.
    """
    return summarise(simulate(plan, arch, gpu), plan, arch, gpu)


def summarise(ledger: Ledger, plan: Plan, arch: Architecture, gpu: Gpu) -> Memory:
    """A simulated step's peak, with what was allocated then."""
    components: dict[Component, int] = dict.fromkeys(COMPONENTS, 0)
    for entry in ledger.alive_at_peak():
        components[entry.component] += entry.size_bytes
    return Memory(
        allocated_bytes=ledger.peak_bytes,
        reserved_bytes=reserved_bytes(ledger, gpu),
        context_bytes=gpu.context_bytes,
        at=ledger.peak_moment,
        components=components,
        moments=ledger.moment_peaks(),
        host_bytes=paged_bytes(plan, arch),
        parameters=Parameters(total=arch.parameters, trainable=trained_elements(plan, arch)),
    )


def simulate(plan: Plan, arch: Architecture, gpu: Gpu) -> Ledger:
    """The step's ledger: every allocation of a plan on a GPU."""
    check_plan(plan, arch, gpu)
    shapes = layer_shapes(
        plan,
        arch,
        capability=gpu.capability,
        backend=gpu.backend,
        multiprocessors=gpu.profile.multiprocessors if gpu.profile is not None else None,
    )
    ledger = Ledger(whole_segments=gpu.backend == "cuda" and not regime_of(plan).expandable)
    run_step(ledger, plan, arch, shapes, workspace_bytes=workspace_bytes(gpu))
    return ledger


def workspace_bytes(gpu: Gpu) -> int:
    """cuBLAS' workspace of one thread; a processor has no cuBLAS."""
    if gpu.backend == "cpu":
        return 0
    large = gpu.backend == "cuda" and gpu.capability is not None and gpu.capability[0] in LARGE_WORKSPACES
    return LARGE_WORKSPACE_BYTES if large else WORKSPACE_BYTES


def check_plan(plan: Plan, arch: Architecture, gpu: Gpu) -> None:
    """Refuses what the closed form would get wrong, by the field's name.

    Raises:
        PlanError: the field, why, and what to do instead.
    """
    if not arch.family.closed_form:
        raise PlanError(
            "model",
            f"the closed form does not know what {arch.model_type}'s layers keep for backward",
            why="Its experts are not linear modules, and how many tokens each takes depends on the data.",
            hint="Trace it instead: phi3-advise trace --plan FILE",
        )
    old = gpu.backend == "cuda" and gpu.capability is not None and gpu.capability < (8, 0)
    if plan.attention == "flash_attention_2" and old:
        raise PlanError(
            "attention",
            f"flash_attention_2 does not run on {gpu.name}",
            why=f"flash-attn 2 needs compute capability 8.0; this is {'.'.join(map(str, gpu.capability or ()))}.",
            hint='Write attention = "sdpa".',
        )


def reserved_bytes(ledger: Ledger, gpu: Gpu) -> int:
    """What the allocator must hold at the peak, with expandable segments, as our training sets them.

    The peak allocated, in whole pages; a processor's allocator holds none.
    On a GPU with room to spare the allocator holds more, because freed blocks
    that nothing fits into stay mapped (traced: 0.5 to 35 %, only the replay can say); on a full GPU it unmaps them and
    uses their pages again. What is left then are pages of which a part is in use, replayed at 0.4 to 6.8 % in 36
    plans, 1.1 % in the median: the margin is there for them.
    Source: c10/cuda/CUDACachingAllocator.cpp, release_cached_blocks and unmap_block.
    """
    if gpu.backend == "cpu":
        return ledger.peak_bytes
    return -(-ledger.peak_bytes // PAGE_BYTES) * PAGE_BYTES


PAGE_BYTES = 20 * 2**20
"""Expandable segments grow by this for tensors above 1 MiB (kLargeBuffer, c10/cuda/CUDACachingAllocator.cpp)."""
