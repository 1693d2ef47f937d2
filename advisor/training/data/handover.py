"""Tokenised rows, from the process that showed them to the one that trains on them: tokenising takes longest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from advisor.training.data.lengths import LengthSummary
from advisor.training.data.rows import BadRow, BadRows, Place
from advisor.training.data.source import Files, find_source
from advisor.training.data.survey import TokenizedSource
from advisor.training.data.tokens import TokenizedRow

TOKENS = ".tokens.npz"
"""In the run folder, until the training process has read it."""


def source_key(source: str, tokenizer: Any, *, context: int, skip_bad_rows: bool) -> str:
    """The same for two readings that give the same rows: of the files, the tokenizer and the settings.

    Raises:
        InputError: there is no such source.
    """
    origin = find_source(source)
    files = []
    if isinstance(origin, Files):
        for path in origin.paths:
            found = path.stat()
            files.append((str(path), found.st_size, found.st_mtime_ns))
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    said = (source, files, special, str(tokenizer.chat_template), context, skip_bad_rows)
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def leave_tokens(folder: str, tokens: TokenizedSource, key: str) -> None:
    """Writes the rows where `take_tokens` finds them; where the disk refuses, they will be tokenised again."""
    path = os.path.join(folder, TOKENS)
    said = {"key": key, "format": tokens.format, "bad": asdict(tokens.bad), "notes": tokens.notes}
    try:
        with open(path, "wb") as file:
            np.savez(
                file,
                ids=np.concatenate([row.ids for row in tokens.rows]),
                learned=np.concatenate([row.learned for row in tokens.rows]),
                lengths=np.array([len(row.ids) for row in tokens.rows], dtype=np.int64),
                said=np.frombuffer(json.dumps(said).encode(), dtype=np.uint8),
            )
    except OSError:
        drop_tokens(folder)


def take_tokens(folder: str, key: str) -> TokenizedSource | None:
    """The rows of that key, and removes their file; None where there are none."""
    try:
        with open(os.path.join(folder, TOKENS), "rb") as file, np.load(file, allow_pickle=False) as stored:
            said = json.loads(stored["said"].tobytes())
            if said["key"] != key:
                return None
            ids, learned, lengths = stored["ids"], stored["learned"], stored["lengths"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    finally:
        drop_tokens(folder)
    ends = np.cumsum(lengths)[:-1]
    rows = map(TokenizedRow, np.split(ids, ends), np.split(learned, ends))
    bad = said["bad"]
    shown = tuple(BadRow(place=Place(**row["place"]), why=row["why"]) for row in bad["shown"])
    return TokenizedSource(
        rows=tuple(rows),
        format=said["format"],
        lengths=LengthSummary(np.sort(lengths)),
        bad=BadRows(count=bad["count"], shown=shown),
        notes=tuple(said["notes"]),
    )


def drop_tokens(folder: str) -> None:
    """Removes what `leave_tokens` left."""
    with contextlib.suppress(OSError):
        Path(folder, TOKENS).unlink()


__all__ = ["drop_tokens", "leave_tokens", "source_key", "take_tokens"]
