"""JSON whose objects have each key once: Python's own decoder keeps the last of several, without a word."""

from __future__ import annotations

import json
from typing import Any

from advisor.errors import shown


class TwinKeyError(ValueError):
    """An object has a key more than once."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise TwinKeyError(f"the key {shown(twin, 24)} is there more than once")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Raises `TwinKeyError` beside json.JSONDecodeError."""
