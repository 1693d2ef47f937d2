"""A campaign's file: the GPU, the versions, and every plan with what was measured; written after each, read back."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from advisor.errors import InputError
from advisor.hardware import Gpu
from advisor.probe.measurement import Measurement, measurement_of, measurement_values, write_whole
from advisor.profiles import load_gpu
from campaign.grid import Case, case_of
from campaign.order import Skipped

SCHEMA = 1
FOLDER = Path(__file__).parents[3] / "profiles" / "measurements"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One plan, measured once."""

    name: str
    """The case's line of the grid."""

    cap_bytes: int | None = None
    """The total of the smaller GPU that was imitated; None is the whole card."""

    fresh: bool
    """Whether it was its process's first plan: only then is `context_bytes` that of a training."""

    left_bytes: int | None = None
    """What was still allocated once it was over; of a plan that ended its process, None."""

    measurement: Measurement

    @property
    def case(self) -> Case:
        """The plan's case."""
        return case_of(self.name)


@dataclass(slots=True, kw_only=True)
class Campaign:
    """What a GPU was seen to do."""

    gpu: dict[str, Any]
    """Name, bytes, capability and driver, as found."""

    environment: dict[str, str]
    """Python, platform, and the versions of the packages."""

    records: list[Record] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def context_bytes(self) -> int | None:
        """The CUDA context of a process that ran one plan: the largest that was seen."""
        found = [r.measurement.context_bytes for r in self.records if r.fresh and r.measurement.outcome == "ran"]
        return max((size for size in found if size is not None), default=None)

    def done(self) -> set[tuple[str, int | None]]:
        """What need not be measured again: what failed may have failed for want of something that is there now."""
        return {(record.name, record.cap_bytes) for record in self.records if record.measurement.outcome != "failed"}

    def put(self, record: Record) -> None:
        """In the place of an older one of the same plan under the same cap."""
        name = (record.name, record.cap_bytes)
        self.records[:] = [one for one in self.records if (one.name, one.cap_bytes) != name]
        self.records.append(record)


def new_campaign(gpu: Gpu, *, expandable: bool) -> Campaign:
    """Of a GPU and the packages that are installed."""
    facts = {
        "name": gpu.name,
        "profile": gpu.profile.name if gpu.profile else None,
        "backend": gpu.backend,
        "total_bytes": gpu.total_bytes,
        "driver_bytes": gpu.driver_bytes,
        "capability": list(gpu.capability) if gpu.capability else None,
        "driver": gpu.driver,
        "expandable_segments": expandable,
    }
    return Campaign(gpu=facts, environment=environment())


def environment() -> dict[str, str]:
    """Versions; what is not installed is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def versions_differ(campaign: Campaign) -> list[str]:
    """Packages of which another version, or none, is installed here than the campaign ran under."""
    here = environment()
    return [name for name in PACKAGES if campaign.environment.get(name) != here.get(name)]


def gpu_of(campaign: Campaign, total_bytes: int | None = None) -> Gpu:
    """The GPU as the tiers are asked about it: wholly free, and of another size where one is named."""
    facts = campaign.gpu
    capability = facts["capability"]
    return Gpu(
        name=facts["name"],
        backend=facts["backend"],
        total_bytes=total_bytes or facts["total_bytes"],
        driver_bytes=total_bytes or facts["driver_bytes"],
        detected=False,
        driver=facts["driver"],
        capability=tuple(capability) if capability else None,
        bfloat16=capability is None or tuple(capability) >= (8, 0),
    ).with_profile(load_gpu(facts["profile"]) if facts["profile"] else None)


def default_path(gpu: Gpu, folder: Path = FOLDER) -> Path:
    """The newest file of this GPU under these versions, to go on with; else a new one of today."""
    name = gpu.profile.name if gpu.profile else re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    for path in sorted(folder.glob(f"{name}-????-??-??.json"), reverse=True):
        if not versions_differ(read_campaign(path)):
            return path
    return folder / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"


def write_campaign(campaign: Campaign, path: Path, *, command: str) -> None:
    """Writes all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(
        str(path),
        {
            "schema": SCHEMA,
            "what": "Plans that advisor/probe ran with random weights: bytes and seconds, as measured.",
            "command": command,
            "gpu": campaign.gpu,
            "environment": campaign.environment,
            "skipped": [asdict(one) for one in campaign.skipped],
            "rows": [_row(record) for record in campaign.records],
        },
    )


def _row(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "cap_bytes": record.cap_bytes,
        "fresh": record.fresh,
        "left_bytes": record.left_bytes,
        "measurement": measurement_values(record.measurement),
    }


def read_campaign(path: Path) -> Campaign:
    """The campaign in a file.

    Raises:
        InputError: no such file, or not a campaign of this version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read.", why=str(error)) from error
    if not isinstance(values, Mapping) or values.get("schema") != SCHEMA or "rows" not in values:
        raise InputError(f"{path} is no campaign of this version.", hint="Measure again into another file: --out.")
    return Campaign(
        gpu=values["gpu"],
        environment=values["environment"],
        skipped=[Skipped(**one) for one in values["skipped"]],
        records=[_record(row, path) for row in values["rows"]],
    )


def _record(row: Mapping[str, Any], path: Path) -> Record:
    measurement = measurement_of(row["measurement"])
    if measurement is None:
        raise InputError(f"{path}: the measurement of {row['name']!r} is not of this version.")
    return Record(
        name=row["name"],
        cap_bytes=row["cap_bytes"],
        fresh=row["fresh"],
        left_bytes=row["left_bytes"],
        measurement=measurement,
    )


def landed(folder: Path = FOLDER) -> Iterable[Path]:
    """Every campaign's file that is there."""
    return sorted(folder.glob("*-????-??-??.json"))


__all__ = [
    "FOLDER",
    "Campaign",
    "Record",
    "default_path",
    "environment",
    "gpu_of",
    "landed",
    "new_campaign",
    "read_campaign",
    "versions_differ",
    "write_campaign",
]
