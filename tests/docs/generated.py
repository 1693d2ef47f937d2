"""The parts of the pages that are made from the code."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advisor.memory import terms
from advisor.memory.ledger import COMPONENTS, Term

ROOT = Path(__file__).parents[2]


def terms_table() -> str:
    """Every term of the closed form from its docstring, by component."""
    found: list[Term] = [getattr(terms, name) for name in terms.__all__]
    parts = []
    for component in COMPONENTS:
        rows = [_row(term) for term in found if term.component == component]
        head = "| term | bytes | what and why | source |\n| --- | --- | --- | --- |"
        parts.append(f"### {component.capitalize()}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def _row(term: Term) -> str:
    summary = (inspect.getdoc(term.function) or "").partition("\n\n")[0]
    source = " ".join((inspect.getdoc(term.function) or "").partition("Source:")[2].split()).rstrip(".")
    return "| " + " | ".join([term.name, f"`{term.formula}`", " ".join(summary.split()), source]) + " |"


def schema_tables() -> str:
    """The fields of the schema's parts."""
    schema = json.loads((ROOT / "docs" / "schema.json").read_text(encoding="utf-8"))
    parts = []
    for name, part in schema["$defs"].items():
        rows = [
            f"| `{field}` | {_type(value)} | {value.get('description', '')} |"
            for field, value in part.get("properties", {}).items()
        ]
        if rows:
            parts.append(f"### {name}\n\n| field | type | what |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def _type(value: dict[str, Any]) -> str:
    """A schema's type in words."""
    if "$ref" in value:
        return "[{0}](#{0})".format(value["$ref"].rpartition("/")[2])
    if "anyOf" in value:
        return " or ".join(_type(one) for one in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{json.dumps(one)}`" for one in value["enum"])
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    kind = value.get("type", "any")
    if kind == "array":
        return f"list of {_type(value.get('items', {}))}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


GENERATED: dict[str, Callable[[], str]] = {"terms_table": terms_table, "schema_tables": schema_tables}
