"""What a probe is asked, and what it measured; both travel between two processes as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from advisor.plan import Plan, plan_from_fields, plan_to_fields

SCHEMA = 1

Outcome = Literal["ran", "out_of_memory", "failed", "stopped"]
Meter = Literal["cuda allocator", "xpu allocator", "profiler", "none"]

LARGEST_ACCUMULATION = 2
"""Micro-batches to a probe's step: the second finds the first one's gradients, a third would find nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """One dry run."""

    plan: Plan
    """What is tried, as it would be trained."""

    architecture: Mapping[str, Any]
    """The keys of the model's config.json: nothing is downloaded."""

    device: str = "cuda"
    """What torch calls the device."""

    uuid: str | None = None
    """The GPU's, by which the driver is asked about it."""

    steps: int = 3
    """Optimizer steps; from the second on there are optimizer states."""

    longest: int | None = None
    """Tokens of the data's longest row; None takes rows of the plan's length."""

    cap_bytes: int | None = None
    """The most that tensors may take; None is whatever there is."""

    without_flash: bool = False
    """Rule flash and cuDNN attention out, as the GPU that is imitated does."""

    saves: bool = True
    """Write a checkpoint and the artefacts, and delete them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a probe found. Unknown is None."""

    outcome: Outcome
    plan: Plan
    model: str = ""
    """A fingerprint of the architecture: a plan names its model in more than one way."""

    device_name: str = ""
    as_gpu: str | None = None
    """The GPU that was imitated."""

    meter: Meter = "none"
    """What counted the memory."""

    allocated_bytes: int | None = None
    """Peak of what tensors took, from loading to saving."""

    reserved_bytes: int | None = None
    """Peak of what the allocator held; on a CPU, which has none, the same as allocated."""

    step_allocated_bytes: int | None = None
    """Peak over the training steps alone."""

    step_reserved_bytes: int | None = None
    driver_bytes: int | None = None
    """What NVML says that the process held at the end."""

    context_bytes: int | None = None
    """`driver_bytes` less what the allocator held at that moment."""

    at: str = ""
    """The moment of the peak."""

    failed_at: str = ""
    """What was being done where it did not run to its end."""

    moments: Mapping[str, int] = field(default_factory=dict)
    """The highest allocation within each moment."""

    total_parameters: int | None = None
    trainable_parameters: int | None = None
    micro_step_seconds: float | None = None
    """Forward and backward of one micro-batch."""

    optimizer_seconds: float | None = None
    """The rest of an optimizer step: clipping, stepping, logging."""

    seconds: float | None = None
    """All of it, from the command to the verdict."""

    host_peak_bytes: int | None = None
    """Most RAM that the process held."""

    steps: int = 0
    """Optimizer steps that were taken."""

    tokens_a_micro_step: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    """torch, transformers, peft, bitsandbytes, accelerate; the driver."""

    date: str = ""
    """When, ISO 8601."""

    released: bool | None = None
    """Whether the process is off the GPU: the driver lists it no more, or no more is in use than before it; None where
    neither can be told."""

    message: str = ""
    hint: str = ""
    exit_code: int = 4
    """The command's, where it failed: a plan that is refused is bad input."""

    log: str = ""
    """The end of what the process and its libraries printed, where it failed."""

    notes: tuple[str, ...] = ()

    @property
    def seconds_per_step(self) -> float | None:
        """One optimizer step of the plan: all its micro-batches, and the update."""
        if self.micro_step_seconds is None or self.optimizer_seconds is None:
            return None
        return self.plan.gradient_accumulation * self.micro_step_seconds + self.optimizer_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of a full batch over the time of a step."""
        seconds = self.seconds_per_step
        if not seconds or self.tokens_a_micro_step is None:
            return None
        return self.plan.gradient_accumulation * self.tokens_a_micro_step / seconds


_SIZES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "num_local_experts", "sliding_window"),
)


def model_fingerprint(architecture: Mapping[str, Any]) -> str:
    """Of the keys of a config.json that say how large the model is: a profile and the hub's file have it alike."""
    from hashlib import sha256

    sizes = {name: architecture[name] for name in _SIZES if architecture.get(name) is not None}
    return sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]


def write_request(request: ProbeRequest, path: str) -> None:
    """Writes a request, complete or not at all."""
    values = {**_values(request), "architecture": dict(request.architecture)}
    write_whole(path, values)


def read_request(path: str) -> ProbeRequest:
    """The request in a file that `write_request` wrote."""
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    values["plan"] = plan_from_fields(values["plan"])
    return ProbeRequest(**values)


def measurement_values(measurement: Measurement) -> dict[str, Any]:
    """Plain values of a measurement; the inverse of `measurement_of`."""
    return {"schema": SCHEMA, **_values(measurement)}


def measurement_of(values: Any) -> Measurement | None:
    """The measurement that plain values say; None for values of another version, or of nothing at all."""
    if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
        return None
    known = {one.name for one in fields(Measurement)}
    try:
        found = {name: value for name, value in values.items() if name in known}
        found["plan"] = plan_from_fields(found["plan"])
        found["notes"] = tuple(found.get("notes", ()))
        measurement = Measurement(**found)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    except Exception as error:
        from advisor.errors import AdvisorError

        if isinstance(error, AdvisorError):
            return None
        raise
    return measurement if measurement.outcome in get_args(Outcome) and _is_sound(measurement) else None


def _is_sound(measurement: Measurement) -> bool:
    """Whether every number is one, bytes and counts are whole, and every text is a text."""
    if not isinstance(measurement.moments, Mapping) or not isinstance(measurement.versions, Mapping):
        return False
    counts = [getattr(measurement, one.name) for one in fields(Measurement) if one.name.endswith("_bytes")]
    counts += [measurement.steps, measurement.tokens_a_micro_step, *measurement.moments.values()]
    counts += [measurement.total_parameters, measurement.trainable_parameters, measurement.exit_code]
    times = [measurement.micro_step_seconds, measurement.optimizer_seconds, measurement.seconds]
    texts = [measurement.device_name, measurement.date, measurement.model, measurement.at, measurement.meter]
    texts += [measurement.as_gpu or "", *measurement.versions.values()]
    texts += [measurement.message, measurement.hint, measurement.log]
    return (
        all(value is None or (type(value) is int and 0 <= value <= _LARGEST) for value in counts)
        and all(value is None or (type(value) in (int, float) and 0 <= value <= _LARGEST) for value in times)
        and all(isinstance(text, str) for text in texts)
    )


_LARGEST = 2**60
"""No machine has so many bytes or seconds."""


def _values(thing: ProbeRequest | Measurement) -> dict[str, Any]:
    return {
        one.name: plan_to_fields(value) if isinstance(value := getattr(thing, one.name), Plan) else value
        for one in fields(thing)
    }


def write_whole(path: str, values: Mapping[str, Any]) -> None:
    """Writes JSON aside, to the disk, and renames it: a reader finds the old file or the new one, never half of one.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    import secrets

    aside = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        import contextlib

        with contextlib.suppress(OSError):
            os.remove(aside)
        raise


__all__ = [
    "LARGEST_ACCUMULATION",
    "Measurement",
    "Meter",
    "Outcome",
    "ProbeRequest",
    "measurement_of",
    "measurement_values",
    "model_fingerprint",
    "read_request",
    "write_request",
    "write_whole",
]
