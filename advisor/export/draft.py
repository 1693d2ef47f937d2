"""What an export consists of, and the draft that a tool's module fills field by field."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from advisor.errors import PlanError
from advisor.plan import Plan, plan_to_fields

DATA_FILE = "train.jsonl"
"""What the configurations call the data, which a plan does not name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One line of a tool's configuration."""

    name: str
    value: Any
    """A text, a number, a truth value, or lists and tables of those."""

    note: str = ""
    """What a reader should know about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A field of a plan that has no line of its own, and what becomes of it."""

    field: str
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A plan in the words of another tool."""

    tool: str
    checked_against: str
    """The release whose schema or parser the mapping was held against."""

    plan: Plan
    commands: tuple[str, ...]
    """What runs it, a line each."""

    settings: tuple[Setting, ...]
    kept: tuple[Told, ...]
    """Fields that the tool meets without being told."""

    lost: tuple[Told, ...]
    """Fields that the tool cannot be told, so the run differs from the plan there."""

    as_run: Plan | None
    """What the tool really runs, as far as a plan can say it; None where no such plan is possible."""

    fields: frozenset[str]
    """Every field of the plan that a setting, `kept` or `lost` accounts for."""


class Draft:
    """Gathers an export; `finish` turns it into one.

    Args:
        plan: what is exported.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._settings: list[Setting] = []
        self._kept: list[Told] = []
        self._lost: list[Told] = []
        self._fields: set[str] = set()
        self._changes: dict[str, Any] = {}

    def set(self, name: str, value: Any, *fields: str, note: str = "") -> None:
        """A line of the configuration, and the plan's fields that it carries."""
        self._settings.append(Setting(name=name, value=value, note=note))
        self._fields.update(fields)

    def keep(self, field: str, said: str) -> None:
        """The tool does so without being told."""
        self._kept.append(Told(field=field, said=said))
        self._fields.add(field)

    def lose(self, field: str, said: str, **instead: Any) -> None:
        """The tool has no such setting; what it does instead, also as fields of a plan where there are such."""
        self._lost.append(Told(field=field, said=said))
        self._fields.add(field)
        self._changes.update(instead)

    def finish(self, tool: str, checked_against: str, commands: tuple[str, ...]) -> Export:
        """The export."""
        return Export(
            tool=tool,
            checked_against=checked_against,
            plan=self._plan,
            commands=commands,
            settings=tuple(self._settings),
            kept=tuple(self._kept),
            lost=tuple(self._lost),
            as_run=self._as_run(),
            fields=frozenset(self._fields),
        )

    def _as_run(self) -> Plan | None:
        try:
            return replace(self._plan, **self._changes)
        except PlanError:
            return None


def field_names(plan: Plan) -> tuple[str, ...]:
    """The fields that a plan says something with, tables opened: `"lora.rank"`, `"training.seed"`."""
    names: list[str] = []
    for name, value in plan_to_fields(plan).items():
        if isinstance(value, Mapping):
            names += [f"{name}.{inner}" for inner in value]
        elif value is not None or name == "gpu":
            names.append(name)
    return tuple(names)


def model_reference(name: str) -> str:
    """What `from_pretrained` takes for a plan's model: a hub id or a folder."""
    from advisor.profiles import find_model

    if os.path.isfile(name):
        return os.path.dirname(name) or "."
    if os.path.isdir(name) or "/" in name:
        return name
    return find_model(name).hub_id or name
