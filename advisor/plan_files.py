"""A plan as the text of a plan file, and that file written."""

from __future__ import annotations

from typing import Any

from advisor.errors import InputError
from advisor.plan import Plan, plan_to_fields


def plan_to_toml(plan: Plan) -> str:
    """A plan as the text of a plan file."""
    lines = [f"{name} = {_toml(value)}" for name, value in plan_to_fields(plan).items() if value is not None]
    return "\n".join(lines) + "\n"


def save_plan_file(plan: Plan, path: str) -> None:
    """Writes a plan as TOML, for every command that takes --plan. An existing file is never overwritten.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    try:
        text = plan_to_toml(plan).encode()
        with open(path, "xb") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(f"{path} exists already.", hint="Name another file, or move that one away.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path} cannot be written.", why=f"{reason}.", hint="Name a file in a folder of yours."
        ) from error


def _toml(value: Any) -> str:
    """A plan's value as TOML: JSON's strings, numbers and booleans are TOML's too."""
    import json

    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items() if inner is not None) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
