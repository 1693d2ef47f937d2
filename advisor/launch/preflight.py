"""Everything that would stop a run, found before anything is downloaded, in one list."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from advisor.architecture import Architecture
from advisor.errors import AdvisorError, EnvironmentLacksError, InputError, PlanError
from advisor.hardware import Gpu, Host, host
from advisor.launch.command import training_command
from advisor.launch.device_check import DeviceCheck, check_device
from advisor.launch.folder import occupied_by
from advisor.launch.host_ram import RamNeed, ram_need
from advisor.launch.model import ModelFiles, find_files
from advisor.launch.storage import SMALL_FILES_BYTES, DiskNeed, disk_need
from advisor.plan import Plan
from advisor.training.checkpoints import CHECKPOINTS, complete_checkpoints
from advisor.training.job import Job
from advisor.training.plan_refusals import refuse_products_in_fp32, refuse_scaling_on_the_processor
from advisor.units import gib, size

if TYPE_CHECKING:
    from advisor.launch.data import DataFacts

REPORTERS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""Where transformers can report to, and the packages of which one must be there."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that stops a run."""

    what: str
    hint: str
    exit_code: int
    """2 where what was given is wrong, 3 where this machine lacks something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What was looked at, and what is wrong."""

    problems: tuple[Problem, ...]
    disk: DiskNeed | None
    """None for a model that the closed form does not know."""

    model: ModelFiles | None
    """None where it is not to be had."""

    rows: int | None
    """Rows that can be used; None where the data cannot be read."""

    check: DeviceCheck
    data: DataFacts | None = None
    """The data as the model's tokenizer sees it; None where that is not here yet, or cannot read it."""

    ram: RamNeed | None = None
    """None on the processor, whose memory is the plan's."""

    ram_available_bytes: int | None = None

    @property
    def exit_code(self) -> int:
        """2 if anything that was given is wrong, else 3 if this machine lacks something, else 0."""
        return min((problem.exit_code for problem in self.problems), default=0)


def preflight(
    job: Job,
    gpu: Gpu,
    arch: Architecture | None,
    *,
    spilled_bytes: int = 0,
    read: Callable[[Any], DataFacts] | None = None,
    known: Preflight | None = None,
) -> Preflight:
    """Looks at disk, RAM, device, packages, model, data and output folder.

    Args:
        job: what would be trained.
        gpu: where.
        arch: the model in closed form; None where it is not known.
        spilled_bytes: paged optimizer states that the plan keeps in host RAM.
        read: reads the data with a tokenizer; without it, or where no tokenizer is here, its rows are only checked.
        known: what an earlier look at the same run found; only what depends on the plan is looked at again.
    """
    problems: list[Problem] = []

    def attempt(look: Callable[[], _T]) -> _T | None:
        try:
            return look()
        except AdvisorError as error:
            problems.append(_problem(error))
            return None

    model = known.model if known else attempt(lambda: find_files(job.model_path))
    data = known.data if known else None
    rows = known.rows if known else None
    if known is None:
        tokenizer = attempt(lambda: _tokenizer(job)) if read and model and not model.download_bytes else None
        if read is not None and tokenizer is not None:
            data = attempt(lambda: read(tokenizer))
            rows = data.train_samples + data.validation_samples if data is not None else None
        else:
            rows = attempt(lambda: _readable_rows(job))
    attempt(lambda: refuse_scaling_on_the_processor(job.plan, job.device))
    attempt(lambda: refuse_products_in_fp32(job.plan))
    problems += _folder_problems(job)
    check = known.check if known else check_device(job.device, training_command(job, gpu).environment)
    problems += _device_problems(job.plan, gpu, check)
    problems += _package_problems(job)
    need = disk_need(job.plan, arch, keep=job.keep_checkpoints) if arch is not None else None
    problems += disk_problems(job, need, model)
    machine = host()
    ram = ram_need(job.plan, arch, model, gpu, spilled_bytes=spilled_bytes, cpu_count=machine.cpu_count)
    problems += ram_problems(ram, machine)
    return Preflight(
        problems=tuple(problems),
        disk=need,
        model=model,
        rows=rows,
        check=check,
        data=data,
        ram=ram,
        ram_available_bytes=machine.ram_available_bytes,
    )


def _problem(error: AdvisorError) -> Problem:
    between = "\n" if "\n" in error.why else " "  # a list begins on a line of its own
    what = f"{error.what.rstrip('.')}.{between}{error.why}" if error.why else error.what
    return Problem(what=what, hint=error.hint, exit_code=error.exit_code)


def _tokenizer(job: Job) -> Any:
    from advisor.training.tokenizer import load_tokenizer

    return load_tokenizer(job.model_path, job.trust_remote_code)


def _readable_rows(job: Job) -> int:
    from advisor.training.data import check_rows

    return check_rows(job.data, skip_bad_rows=job.skip_bad_rows).rows


def _folder_problems(job: Job) -> Iterator[Problem]:
    """A new run never writes over anything; a resumed one needs its job."""
    occupied = occupied_by(job.out)
    if occupied is not None and not job.resume:
        hint = "Go on with it (--resume), or name another folder: --out DIR" if "run" in occupied else "Name another."
        yield Problem(what=f"The output folder {job.out} is not free: {occupied}.", hint=hint, exit_code=2)
    parent = job.out
    while not os.path.lexists(parent) and os.path.dirname(parent) != parent:
        parent = os.path.dirname(parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        yield Problem(what=f"{parent} cannot be written to.", hint="Name another folder: --out DIR", exit_code=2)


def _device_problems(plan: Plan, gpu: Gpu, check: DeviceCheck) -> Iterator[Problem]:
    if check.torch_error is not None:
        hint = "Install a torch built for this GPU (pytorch.org), or train on the processor: --device cpu"
        yield Problem(what=f"torch cannot use {gpu.name}: {check.torch_error}", hint=hint, exit_code=3)
    needs = plan.quantization is not None or "8bit" in plan.optimizer or plan.optimizer.startswith("paged")
    if needs and check.bitsandbytes_error is not None:
        yield Problem(
            what=f"bitsandbytes does not compute on {gpu.name}: {check.bitsandbytes_error}",
            hint="Install it for this device (pip install -U bitsandbytes), or take a plan without it: --method lora",
            exit_code=3,
        )
    if gpu.bfloat16 is False and "bfloat16" in (plan.dtype, plan.autocast):
        yield Problem(
            what=f"The plan computes in bfloat16, which {gpu.name} only emulates.",
            hint='Write dtype = "float16" and autocast = "float16" (full fine-tuning: dtype = "float32").',
            exit_code=2,
        )


def _package_problems(job: Job) -> Iterator[Problem]:
    if job.plan.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        yield Problem(
            what="The plan wants flash-attn 2, which is not installed.",
            hint='pip install flash-attn --no-build-isolation, or write attention = "sdpa".',
            exit_code=3,
        )
    for name in job.report_to:
        packages = REPORTERS.get(name)
        if packages is None:
            known = ", ".join(REPORTERS)
            yield Problem(what=f"Nothing is known of reporting to {name!r}.", hint=f"Choose {known}.", exit_code=2)
        elif not any(find_spec(package) for package in packages):
            hint = f"pip install {packages[0]}, or leave --report-to {name} out."
            yield Problem(what=f"--report-to {name} needs a package that is missing.", hint=hint, exit_code=3)


def disk_problems(job: Job, need: DiskNeed | None, model: ModelFiles | None) -> list[Problem]:
    """Each file system against what the run writes there: the run folder's, and the download cache's.

    Of a run that goes on, the checkpoints that are there are part of what it takes.
    """
    wanted: dict[str, int] = {}
    places: dict[str, tuple[str, int]] = {}
    held = sum(one.size_bytes for one in complete_checkpoints(Path(job.out, CHECKPOINTS))) if job.resume else 0
    writes = [(job.out, max(need.total_bytes - held, SMALL_FILES_BYTES) if need is not None else SMALL_FILES_BYTES)]
    if model is not None and model.cache is not None and model.download_bytes:
        writes.append((model.cache, model.download_bytes))
    for folder, amount in writes:
        device, free = _file_system(folder)
        if free is not None:
            wanted[device] = wanted.get(device, 0) + amount
            places.setdefault(device, (folder, free))
    return [
        _disk_problem(folder, wanted[device], free, need, model)
        for device, (folder, free) in places.items()
        if wanted[device] > free
    ]


def _disk_problem(folder: str, wanted: int, free: int, need: DiskNeed | None, model: ModelFiles | None) -> Problem:
    parts = []
    if need is not None:
        parts.append(f"{need.checkpoints} checkpoints of {size(need.checkpoint_bytes)}")
        parts.append(f"{size(need.final_bytes)} at the end")
    if model is not None and model.download_bytes:
        parts.append(f"{size(model.download_bytes)} of download")
    what = f"The disk of {folder} has {size(free)} free, and the run takes up to {size(wanted)}"
    return Problem(
        what=f"{what}: {', '.join(parts)}." if parts else f"{what}.",
        hint="Free some, name a folder on another disk (--out DIR; HF_HOME for downloads), or take --method lora.",
        exit_code=3,
    )


def _file_system(folder: str) -> tuple[str, int | None]:
    """Which file system a folder is or would be on, and what is free there."""
    path = os.path.abspath(folder)
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return str(os.stat(path).st_dev), host(path).disk_free_bytes


def ram_problems(need: RamNeed | None, machine: Host) -> list[Problem]:
    """Host RAM for loading the weights, for paged optimizer states and for checkpoints."""
    available = machine.ram_available_bytes
    if need is None or available is None or need.required_bytes <= available:
        return []
    parts = [f"{gib(need.process_bytes)} for the process itself"]
    if need.spilled_bytes + need.saved_bytes <= need.staging_bytes:
        parts.append(f"{gib(need.staging_bytes)} for weights on their way to the GPU")
    else:
        if need.spilled_bytes:
            parts.append(f"{gib(need.spilled_bytes)} of paged optimizer states")
        parts.append(f"{gib(need.saved_bytes)} for what is being saved")
    what = f"{gib(available)} of host RAM is free, and the run takes up to {gib(need.required_bytes)}"
    return [
        Problem(
            what=f"{what}: {', '.join(parts)}.",
            hint="Close other programs, or take a method with smaller states: --method lora",
            exit_code=3,
        )
    ]


def raise_problems(found: Preflight) -> None:
    """Refuses a run that has problems, all of them in one error.

    Raises:
        InputError: something that was given is wrong.
        EnvironmentLacksError: this machine lacks something.
    """
    if not found.problems:
        return
    kind = InputError if found.exit_code == PlanError.exit_code else EnvironmentLacksError
    number = len(found.problems)
    raise kind(
        "The run cannot start." if number == 1 else f"The run cannot start: {number} problems.",
        why="\n".join(f"{mark}{problem.what}" for mark, problem in _numbered(found.problems)),
        hint="\n".join(f"{mark}{problem.hint}" for mark, problem in _numbered(found.problems) if problem.hint),
    )


def _numbered(problems: tuple[Problem, ...]) -> list[tuple[str, Problem]]:
    marks = [""] if len(problems) == 1 else [f"{number}. " for number in range(1, len(problems) + 1)]
    return list(zip(marks, problems, strict=True))


__all__ = ["Preflight", "Problem", "preflight", "raise_problems"]
