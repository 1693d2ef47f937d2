"""A GPU as everything else sees it: found by a driver, or described by someone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from advisor.errors import EnvironmentLacksError, InputError
from advisor.plan import Dtype
from advisor.profiles import Backend, GpuProfile, Provenance
from advisor.units import MIB, gib

ASSUMED_CONTEXT_BYTES = 512 * MIB
"""Context of a GPU that no profile describes; nobody measured it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds memory of a GPU."""

    pid: int
    name: str | None = None
    used_bytes: int | None = None
    """None where the driver does not say (Windows, WSL, another user's container)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, or one MIG slice: what CUDA would offer as a device."""

    name: str
    """As the driver spells it, or a profile's product."""

    backend: Backend
    total_bytes: int
    """What processes can have: the driver's total less what the driver keeps for itself."""

    driver_bytes: int
    """The total as the driver reports it."""

    detected: bool
    """Whether it is in this machine; False for a what-if GPU."""

    index: int | None = None
    """As NVML counts; slices carry their card's. None for a what-if GPU."""

    uuid: str | None = None
    driver: str | None = None
    """Version of the driver."""

    capability: tuple[int, int] | None = None
    """CUDA compute capability."""

    bfloat16: bool | None = None
    """Whether the hardware computes in bfloat16; emulation does not count."""

    free_bytes: int | None = None
    """None where nobody said: assumed wholly free."""

    processes: tuple[GpuProcess, ...] = ()
    """The largest holder first."""

    mig: bool = False
    display_attached: bool | None = None
    unified: bool = False
    """Whether its memory is the host's."""

    profile: GpuProfile | None = None
    context_bytes: int = ASSUMED_CONTEXT_BYTES
    context_provenance: Provenance = "assumed"
    notes: tuple[str, ...] = ()
    """What a person should know about it, a sentence each."""

    @property
    def dtype(self) -> Dtype:
        """The number format that training computes in here, unless a plan says otherwise.

        fp16 where bfloat16 is only emulated. A processor has instructions for fp32, and few have any for 16 bits: a
        product in bfloat16 took one with AVX2 alone sixty times as long as in fp32.
        """
        if self.backend == "cpu":
            return "float32"
        return "float16" if self.bfloat16 is False else "bfloat16"

    @property
    def others_bytes(self) -> int:
        """Memory that others hold now: the total less what is free."""
        return 0 if self.free_bytes is None else max(0, self.total_bytes - self.free_bytes)

    def with_profile(self, profile: GpuProfile | None) -> Gpu:
        """The same GPU with what its profile knows: the CUDA context, and the rates."""
        return replace(
            self,
            profile=profile,
            context_bytes=profile.context_bytes if profile else ASSUMED_CONTEXT_BYTES,
            context_provenance=profile.context_provenance if profile else "assumed",
            notes=(*self.notes, profile.note) if profile and profile.note else self.notes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What was found, and what went wrong on the way."""

    gpus: tuple[Gpu, ...] = ()
    warnings: tuple[str, ...] = ()


def choose(gpus: Sequence[Gpu], device: int | None = None) -> Gpu:
    """The GPU with that index, or the one with the most free memory.

    Of several MIG slices of one card, the one with the most free memory.

    Raises:
        InputError: no GPU has that index.
        EnvironmentLacksError: there is none at all.
    """
    if not gpus and device is None:
        raise EnvironmentLacksError(
            "No GPU was found.",
            hint="Name one (--gpu t4; `phi3-advise gpus` lists them), or give its memory (--vram 12GiB).",
        )
    offered = [gpu for gpu in gpus if device is None or gpu.index == device]
    if not offered:
        there = ", ".join(sorted({str(gpu.index) for gpu in gpus if gpu.index is not None}))
        raise InputError(
            f"There is no GPU {device}.",
            why=f"GPUs are counted as nvidia-smi counts them; here: {there}." if there else "No GPU was found.",
            hint="Leave --device out for the one with the most free memory.",
        )
    return max(offered, key=lambda gpu: gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes)


def what_if(
    profile: GpuProfile | None = None,
    *,
    vram_bytes: int | None = None,
    free_bytes: int | None = None,
    base: Gpu | None = None,
) -> Gpu:
    """A GPU as someone describes it, over a profile, else over a detected GPU, else over nothing.

    Args:
        profile: the named GPU; wins over `base`.
        vram_bytes: its memory, all of which a process can have.
        free_bytes: how much of that is free; all of it where left out and the memory is not as detected.
        base: the detected GPU whose other facts hold where no profile is named.

    Raises:
        InputError: more free than there is, an amount below zero, or nothing that says how large the GPU is.
    """
    if vram_bytes is not None and vram_bytes <= 0:
        raise InputError("--vram has to be more than nothing.", hint="Write it like --vram 12GiB.")
    gpu = _sized(_named(profile) if profile is not None else base, vram_bytes)
    if free_bytes is None:
        return gpu
    if not 0 <= free_bytes <= gpu.total_bytes:
        raise InputError(
            f"{gib(free_bytes)} cannot be free on a GPU of {gib(gpu.total_bytes)}.",
            why=f"That is what a process can have of {gpu.name}.",
            hint="Give --free between 0 and the GPU's memory, or a larger --vram.",
        )
    note = f"{gib(free_bytes)} is free because the command line says so."
    return replace(gpu, free_bytes=free_bytes, processes=(), notes=(*gpu.notes, note))


def _named(profile: GpuProfile) -> Gpu:
    return Gpu(
        name=profile.product,
        backend=profile.backend,
        total_bytes=profile.usable_bytes,
        driver_bytes=profile.driver_bytes,
        detected=False,
        capability=profile.capability,
        bfloat16=profile.bfloat16,
    ).with_profile(profile)


def _sized(gpu: Gpu | None, vram_bytes: int | None) -> Gpu:
    """That GPU with that much memory, all of it free."""
    if vram_bytes is None:
        if gpu is None:
            raise InputError(
                "Nothing says how large the GPU is.",
                why="None was found here, and none is named.",
                hint="Add --gpu t4 or --vram 12GiB.",
            )
        return gpu
    size = gib(vram_bytes)
    if gpu is None:
        context = f"a CUDA context of {ASSUMED_CONTEXT_BYTES // MIB} MiB"
        note = f"Nothing is known of it but its {size}: bfloat16 and {context} are assumed."
        gpu = Gpu(
            name=f"GPU with {size}",
            backend="cuda",
            total_bytes=vram_bytes,
            driver_bytes=vram_bytes,
            detected=False,
            bfloat16=True,
        )
    else:
        note = f"Its memory is taken to be {size}; everything else is {gpu.name}'s."
    return replace(
        gpu,
        index=None,
        uuid=None,
        total_bytes=vram_bytes,
        driver_bytes=vram_bytes,
        free_bytes=None,
        processes=(),
        detected=False,
        notes=(note,),
    )
