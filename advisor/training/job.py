"""`Job`: everything that the training process is told, in a file of the run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from advisor.errors import InputError, shown
from advisor.plan import Plan, plan_from_fields, plan_to_fields

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training, resolved: nothing is left to choose."""

    plan: Plan
    """What is trained, and how."""

    model_path: str
    """A folder or a hub id, as `from_pretrained` takes it."""

    data: str
    """A file, a folder or a hub id."""

    out: str
    """The run folder."""

    device: str = "cuda"
    """What torch calls the device: cuda, cuda:1, cpu, mps, xpu."""

    resume: bool = False
    """Go on from the run folder's last complete checkpoint."""

    skip_bad_rows: bool = False
    """Leave out the rows that cannot be read, and count them."""

    report_to: tuple[str, ...] = ()
    """Where transformers reports to: tensorboard, wandb, trackio."""

    save_steps: int | None = None
    """Optimizer steps between checkpoints; None lets the trainer choose."""

    keep_checkpoints: int = 2
    """How many checkpoints stay."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    predicted_allocated_bytes: int | None = None
    """Peak that the advice computed."""

    predicted_reserved_bytes: int | None = None
    """Peak that torch holds, as the advice computed it."""

    probed_reserved_bytes: int | None = None
    """Peak that the dry run measured; None where there was none."""

    capacity_bytes: int | None = None
    """Memory that this process can have on the device."""

    random_weights: bool = False
    """Make the weights on the device instead of loading them: the dry run downloads nothing."""


def write_job(job: Job, path: str) -> None:
    """Writes a job as JSON, aside and then renamed: the file is complete or absent."""
    import json

    values: dict[str, Any] = {"schema": SCHEMA}
    for field in fields(Job):
        value = getattr(job, field.name)
        values[field.name] = plan_to_fields(value) if isinstance(value, Plan) else value
    aside = f"{path}.{os.getpid()}.part"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
    os.replace(aside, path)


def read_job(path: str) -> Job:
    """The job in a file that `write_job` wrote.

    Raises:
        InputError: no such file, or not a job.
    """
    from advisor.profiles import read_json

    values = read_json(path)
    schema = values.pop("schema", None)
    if schema != SCHEMA:
        raise InputError(
            f"{path} is not a job of this version.",
            why=f"Its schema is {shown(schema)}; this version writes {SCHEMA}.",
            hint="Start the run again with phi3-advise train.",
        )
    return _job_from_values(values, path)


def _job_from_values(values: Mapping[str, Any], path: str) -> Job:
    known = {field.name for field in fields(Job)}
    required = {field.name for field in fields(Job) if field.default is MISSING}
    wrong = sorted(set(values) - known) or sorted(required - set(values))
    if wrong or not isinstance(values.get("plan"), Mapping):
        raise InputError(
            f"{path} is not a job: {', '.join(wrong) or 'plan'} is missing or unknown.",
            hint="Start the run again with phi3-advise train.",
        )
    report_to = tuple(values.get("report_to", ()))
    return Job(**{**values, "plan": plan_from_fields(values["plan"]), "report_to": report_to})


__all__ = ["SCHEMA", "Job", "read_job", "write_job"]
