"""From what a person says to a job of which nothing is left to choose; one that goes on is resume.py's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from advisor.advise import Advice, Request, advise
from advisor.architecture import Architecture
from advisor.cautions import known_cautions
from advisor.errors import PlanError, UnsupportedError
from advisor.fit import Fit, check_fit
from advisor.hardware import Gpu, host
from advisor.hyperparameters import Hyperparameters
from advisor.launch.command import torch_device
from advisor.launch.data import DataFacts, Packing, choose_packing, read_data
from advisor.launch.folder import default_folder
from advisor.launch.model import download, locate_model
from advisor.launch.preflight import Preflight, preflight, raise_problems
from advisor.memory.estimate import Memory, estimate
from advisor.plan import Plan
from advisor.profiles import ModelSource, find_model, profile_of
from advisor.training.job import Job

DEFAULT_SEQ_LEN = 2048
"""Planned with until the data is known."""

_UNKNOWN_CONTEXT = 2**17
"""Context of a model whose description names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a person says about a run, beside what to train and where."""

    data: str
    out: str | None = None
    """None makes a folder under ./runs."""

    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Fields of the plan's training table that were given."""

    seq_len: int | None = None
    """None takes the data's 95th percentile."""

    packing: bool | None = None
    """None packs where it pays."""

    skip_bad_rows: bool = False
    report_to: tuple[str, ...] = ()
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A run that can start."""

    job: Job
    gpu: Gpu
    model: ModelSource
    architecture: Architecture | None
    """None for a model that the closed form does not know."""

    preflight: Preflight
    advice: Advice | None = None
    """None for a plan that was given."""

    memory: Memory | None = None
    fit: Fit | None = None
    """None where the memory is not known."""

    data: DataFacts | None = None
    """None for a run that is resumed."""

    packing: Packing | None = None
    notes: tuple[str, ...] = ()
    """What a person should hear of a plan that was given, or of a run that goes on."""

    @property
    def fits(self) -> bool:
        """Whether nothing is known against its memory."""
        return self.fit is None or self.fit.fits

    def with_plan(self, plan: Plan) -> Launch:
        """The same run by another plan, from the start."""
        memory, fit = judge(plan, self.architecture, self.gpu)
        job = replace(self.job, plan=plan, resume=False, probed_reserved_bytes=None)
        return replace(self, job=with_memory(job, memory, self.gpu), memory=memory, fit=fit)


Progress = Callable[[str], None]


def resolve_advised(model: str, gpu: Gpu, request: Request, settings: Settings, progress: Progress) -> Launch:
    """What the advice recommends for a data set, with every problem that stands in its way raised at once.

    Args:
        model: a profile's name, a folder or a hub id.
        gpu: where.
        request: what the advice is asked; its sequence length and packing come from the data.
        settings: what else was said.
        progress: called with the name of what begins.

    Raises:
        InputError: something that was given cannot be used.
        EnvironmentLacksError: this machine lacks something.
    """
    source = _find(model)
    model_path = locate_model(source)
    profile = replace(profile_of(source), name=source.name)
    request = replace(request, seq_len=settings.seq_len or DEFAULT_SEQ_LEN, packing=False)
    machine = host(settings.out or ".")
    first = advise(profile, gpu, request, host=machine)
    out = os.path.abspath(settings.out) if settings.out else default_folder(source.label, first.choice.method)
    job = _job(_with_hyperparameters(first.choice.plan, settings), model_path, out, gpu, settings)
    progress("checking disk, memory, device, model and data")
    read = partial(_read, job, settings.seq_len, profile.architecture.max_positions)
    found = preflight(job, gpu, profile.architecture, spilled_bytes=first.choice.spilled_bytes, read=read)
    raise_problems(found)
    progress("reading the data")
    facts = found.data or read()
    packing = choose_packing(
        facts,
        asked=settings.packing,
        micro_batch=first.choice.plan.micro_batch,
        effective_batch=request.effective_batch,
    )
    request = replace(request, seq_len=facts.seq_len, packing=packing.packs, effective_batch=packing.effective_batch)
    advice = advise(profile, gpu, request, host=machine)
    choice = advice.choice
    if settings.out is None:
        job = replace(job, out=default_folder(source.label, choice.method))
    job = replace(job, plan=_with_hyperparameters(choice.plan, settings))
    found = preflight(job, gpu, profile.architecture, spilled_bytes=choice.spilled_bytes, known=found)
    raise_problems(found)
    return Launch(
        job=with_memory(job, choice.memory, gpu),
        gpu=gpu,
        model=source,
        architecture=profile.architecture,
        preflight=found,
        advice=advice,
        memory=choice.memory,
        fit=choice.fit,
        data=facts,
        packing=packing,
    )


def resolve_plan(plan: Plan, gpu: Gpu, settings: Settings, progress: Progress) -> Launch:
    """A plan as it stands, on this machine's device.

    Raises:
        InputError: something that was given cannot be used.
        EnvironmentLacksError: this machine lacks something.
    """
    source = _find(plan.model)
    plan = replace(plan, model=source.name, gpu=gpu.profile.name if gpu.profile else None)
    model_path = locate_model(source)
    architecture = architecture_of(source)
    plan = _with_hyperparameters(plan, settings)
    memory, fit = judge(plan, architecture, gpu)
    out = os.path.abspath(settings.out) if settings.out else default_folder(source.label, plan.method)
    job = with_memory(_job(plan, model_path, out, gpu, settings), memory, gpu)
    progress("checking disk, memory, device, model and data")
    spilled = memory.host_bytes if memory is not None else 0
    read = partial(_read, job, plan.seq_len, architecture.max_positions if architecture else _UNKNOWN_CONTEXT)
    found = preflight(job, gpu, architecture, spilled_bytes=spilled, read=read)
    raise_problems(found)
    progress("reading the data")
    facts = found.data or read()
    return Launch(
        job=job,
        gpu=gpu,
        model=source,
        architecture=architecture,
        preflight=found,
        memory=memory,
        fit=fit,
        data=facts,
        notes=known_cautions(plan, source, gpu),
    )


def fetch_weights(launch: Launch) -> None:
    """Downloads what is missing of the model, in this process, where a person sees how far it is.

    Raises:
        EnvironmentLacksError: the download failed.
    """
    if launch.preflight.model is not None:
        download(launch.preflight.model)


def _find(name: str) -> ModelSource:
    """A model; a folder by its absolute path, so that the run's plan is good from anywhere."""
    source = find_model(name)
    if source.hub_id is None and os.path.exists(source.name):
        return replace(source, name=os.path.abspath(source.name))
    return source


def architecture_of(source: ModelSource) -> Architecture | None:
    """The model in closed form; None where that does not know it."""
    try:
        return profile_of(source).architecture
    except UnsupportedError:
        return None


def judge(plan: Plan, architecture: Architecture | None, gpu: Gpu) -> tuple[Memory | None, Fit | None]:
    """The plan's memory by the closed form, and whether the device has it; None where it is not known."""
    if architecture is None:
        return None, None
    try:
        memory = estimate(plan, architecture, gpu)
    except PlanError as error:
        if error.field == "model":
            return None, None
        raise
    return memory, check_fit(memory.reserved_bytes, gpu)


def _job(plan: Plan, model_path: str, out: str, gpu: Gpu, settings: Settings) -> Job:
    return Job(
        plan=plan,
        model_path=model_path,
        data=data_path(settings.data),
        out=out,
        device=torch_device(gpu),
        skip_bad_rows=settings.skip_bad_rows,
        report_to=settings.report_to,
        trust_remote_code=settings.trust_remote_code,
    )


def data_path(data: str) -> str:
    """A file or folder by its absolute path; a data set that comes with the package by its file; else a hub id."""
    from advisor.shipped_data import shipped_dataset

    expanded = os.path.expanduser(data)
    if os.path.exists(expanded):
        return os.path.abspath(expanded)
    return shipped_dataset(data) or data


def with_memory(job: Job, memory: Memory | None, gpu: Gpu) -> Job:
    """The job with what is predicted, and what it can have."""
    return replace(
        job,
        predicted_allocated_bytes=memory.allocated_bytes if memory is not None else None,
        predicted_reserved_bytes=memory.reserved_bytes if memory is not None else None,
        capacity_bytes=max(0, gpu.total_bytes - gpu.others_bytes - gpu.context_bytes),
    )


def _with_hyperparameters(plan: Plan, settings: Settings) -> Plan:
    return replace(plan, training=with_said(plan.training, settings.hyperparameters))


def with_said(training: Hyperparameters, said: Mapping[str, Any]) -> Hyperparameters:
    """Hyperparameters with those that a person says; epochs end a run where the plan had a number of steps."""
    clears = {"max_steps": None} if "epochs" in said else {}
    return replace(training, **{**clears, **said})


def _read(job: Job, seq_len: int | None, context: int, tokenizer: Any = None) -> DataFacts:
    return read_data(
        job.data,
        job.model_path,
        seq_len=seq_len,
        context=context,
        validation=job.plan.training.validation,
        seed=job.plan.training.seed,
        skip_bad_rows=job.skip_bad_rows,
        trust_remote_code=job.trust_remote_code,
        tokenizer=tokenizer,
    )


__all__ = ["Launch", "Settings", "fetch_weights", "resolve_advised", "resolve_plan"]
