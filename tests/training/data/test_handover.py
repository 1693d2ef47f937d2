"""Rows that one process tokenised reach the other whole, or are tokenised again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.training.data import leave_tokens, prepare_data, source_key, take_tokens, tokenize_source
from advisor.training.data.handover import TOKENS

Write = Callable[[str, Any], str]
PAIR = {"prompt": "What is LoRA?", "completion": "Two small matrices."}


@pytest.fixture
def source(write: Write) -> str:
    rows = [{**PAIR, "prompt": "word " * number + "?"} for number in range(1, 40)]
    return write("d/train.jsonl", [*rows, {"prompt": ""}])


def key_of(source: str, tokenizer: Any, **settings: Any) -> str:
    return source_key(source, tokenizer, **{"context": 4096, "skip_bad_rows": True, **settings})


def test_what_was_handed_over_is_what_would_be_tokenised(source: str, tokenizer: Any, tmp_path: Path) -> None:
    found = tokenize_source(source, tokenizer, context=4096, skip_bad_rows=True)
    leave_tokens(str(tmp_path), found, "key")
    taken = take_tokens(str(tmp_path), "key")
    assert taken is not None
    assert (taken.format, taken.bad, taken.notes) == (found.format, found.bad, found.notes)
    assert taken.bad.count == 1
    assert np.array_equal(taken.lengths.ordered, found.lengths.ordered)
    assert len(taken.rows) == len(found.rows)
    for one, other in zip(taken.rows, found.rows, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.learned, other.learned)
    settings: dict[str, Any] = {"seq_len": 64, "validation": 0.1, "seed": 1, "skip_bad_rows": True, "context": 4096}
    again, once = (prepare_data(source, tokenizer, packing=True, **settings, tokens=rows) for rows in (None, taken))
    assert again.train.to_dict() == once.train.to_dict()
    # Read once and gone.
    assert not (tmp_path / TOKENS).exists()
    assert take_tokens(str(tmp_path), "key") is None


def test_another_key_or_a_torn_file_is_not_taken(source: str, tokenizer: Any, tmp_path: Path) -> None:
    found = tokenize_source(source, tokenizer, context=4096, skip_bad_rows=True)
    leave_tokens(str(tmp_path), found, "key")
    assert take_tokens(str(tmp_path), "other") is None
    assert not (tmp_path / TOKENS).exists()
    leave_tokens(str(tmp_path), found, "key")
    whole = (tmp_path / TOKENS).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 30):
        (tmp_path / TOKENS).write_bytes(whole[:size])
        assert take_tokens(str(tmp_path), "key") is None


def test_the_key_changes_with_all_that_the_rows_depend_on(source: str, tokenizer: Any) -> None:
    key = key_of(source, tokenizer)
    assert key_of(source, tokenizer) == key
    assert key_of(source, tokenizer, context=512) != key
    assert key_of(source, tokenizer, skip_bad_rows=False) != key
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + " "
        assert key_of(source, tokenizer) != key
    finally:
        tokenizer.chat_template = template
    before = os.stat(source)
    text = Path(source).read_text().replace("LoRA", "LORA")
    Path(source).write_text(text.replace("word ", "Word ", 1))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert key_of(source, tokenizer) != key
    folder = str(Path(source).parent)
    key = key_of(folder, tokenizer)
    (Path(folder) / "more.jsonl").write_text(json.dumps(PAIR) + "\n")
    assert key_of(folder, tokenizer) != key


def test_a_full_disk_leaves_nothing_half_written(source: str, tokenizer: Any, tmp_path: Path) -> None:
    found = tokenize_source(source, tokenizer, context=4096, skip_bad_rows=True)
    leave_tokens(str(tmp_path / "not there"), found, "key")
    (tmp_path / TOKENS).symlink_to("/dev/full")
    leave_tokens(str(tmp_path), found, "key")
    assert not os.path.lexists(tmp_path / TOKENS)
