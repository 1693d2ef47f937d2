"""What the words of the screens mean: the glossary's entries whose words a screen used, and no others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from advisor.files import read_toml
from advisor.profiles import profile_folder

if TYPE_CHECKING:
    from advisor.memory.ledger import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A word, and what it means in a sentence or two."""

    name: str
    text: str
    words: tuple[str, ...]
    """As screens spell it; a text of several words may be a part of a sentence."""


@cache
def glossary() -> tuple[Entry, ...]:
    """Every entry, in the order in which they are told."""
    return tuple(Entry(name=term["name"], text=term["text"], words=tuple(term["words"])) for term in _tables()["term"])


def components() -> Mapping[Component, str]:
    """Where each component's bytes come from."""
    told: Mapping[Component, str] = _tables()["component"]
    return told


def entries_for(shown: Iterable[str]) -> tuple[Entry, ...]:
    """The entries of words that stand in what a screen showed."""
    said = "\n".join(shown).replace("\N{NO-BREAK SPACE}", " ")
    return tuple(entry for entry in glossary() if any(_stands_in(word, said) for word in entry.words))


def _stands_in(word: str, said: str) -> bool:
    """Whether it is there as a whole word, and not only as a part of an option, a name or another word."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", said) is not None


@cache
def _tables() -> dict[str, Any]:
    return read_toml(os.path.join(os.path.dirname(profile_folder("gpus")), "glossary.toml"))


__all__ = ["Entry", "components", "entries_for", "glossary"]
