"""Small text files, in and out: TOML and JSON that somebody else may have written."""

from __future__ import annotations

from typing import Any

from advisor.errors import InputError
from advisor.units import MIB

LARGEST_FILE_BYTES = 4 * MIB
"""Plan files and config.json files are a few KiB; anything above this is not one."""

MOST_DOTS_IN_A_LINE = 200
"""A TOML key of many dotted parts takes memory by the square of their number."""


def read_toml(path: str) -> dict[str, Any]:
    """A TOML file's values.

    Raises:
        InputError: no such file, too large, or not TOML.
    """
    import tomllib

    text = _read_text(path)
    if any(line.count(".") > MOST_DOTS_IN_A_LINE for line in text.splitlines()):
        raise InputError(
            f"{path} is not a file of settings.",
            why="A line of it has hundreds of dots.",
            hint=_NO_SETTINGS,
        )
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise InputError(
            f"{path} is not valid TOML.", why=f"{error}", hint="Mend that line and run it again."
        ) from error


def read_json(path: str) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        InputError: no such file, too large, or not a JSON object.
    """
    import json

    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not valid JSON.", why=f"{error}", hint="It may be cut off: fetch it again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object.", why="A config.json starts with { and ends with }.")
    return value


_NO_SETTINGS = "Give a plan that phi3-advise --save-plan wrote, or a model's config.json, not its weights."


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_FILE_BYTES + 1)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file.", why="It is not UTF-8.", hint=_NO_SETTINGS) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path} cannot be read.", why=f"{reason}.", hint="Check the path and the file's permissions."
        ) from error
    if len(text) > LARGEST_FILE_BYTES:
        raise InputError(
            f"{path} is larger than {LARGEST_FILE_BYTES // MIB} MiB.",
            why="No plan and no config.json is.",
            hint=_NO_SETTINGS,
        )
    return text
