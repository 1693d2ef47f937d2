"""Rows that a reader could take for something else without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from advisor.errors import InputError
from advisor.training.data import check_rows

Write = Callable[[str, Any], str]

PAIR = {"prompt": "a", "completion": "b"}
TWICE = '{"prompt": "a", "completion": "b", "completion": "c"}'
TWICE_INSIDE = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'


def refusal(source: str) -> str:
    with pytest.raises(InputError) as caught:
        check_rows(source)
    return f"{caught.value.what}\n{caught.value.why}"


def test_an_object_with_a_key_twice_is_a_bad_row(write: Write) -> None:
    lines = write("a.jsonl", f"{json.dumps(PAIR)}\n{TWICE}\n{TWICE_INSIDE}\n".encode())
    said = refusal(lines)
    assert "2 of 3 rows" in said
    assert "a.jsonl, line 2: the key 'completion' is there more than once" in said
    assert "a.jsonl, line 3: the key 'content' is there more than once" in said
    assert check_rows(lines, skip_bad_rows=True).rows == 1


@pytest.mark.parametrize("filler", ["", "x" * 2**18])
def test_in_an_array_such_an_object_does_not_spoil_the_others(filler: str, write: Write) -> None:
    inside = f'{{"first": {TWICE}, "second": "{filler}"}}'
    array = write("a.json", f"[{json.dumps(PAIR)},\n{inside},\n{TWICE}, {json.dumps(PAIR)}]".encode())
    said = refusal(array)
    assert "a.json, line 2: the key 'completion' is there more than once" in said
    assert "a.json, line 3: the key 'completion' is there more than once" in said
    found = check_rows(array, skip_bad_rows=True)
    assert (found.rows, found.bad.count) == (2, 2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_first_row_of_no_format_does_not_speak_for_the_others(name: str, write: Write) -> None:
    rows = [{"version": 1, "by": "me"}, PAIR, PAIR]
    path = write(name, rows if name == "a.jsonl" else json.dumps(rows))
    said = refusal(path)
    assert "1 of 3 rows" in said
    assert f"{name}, line 1: its columns are not understood: 'version', 'by'" in said
    found = check_rows(path, skip_bad_rows=True)
    assert (found.rows, found.format, found.bad.count) == (2, "prompt/completion", 1)


def test_rows_none_of_which_has_a_format_are_refused_by_their_columns(write: Write) -> None:
    strange = {"question": "a", "answer": "b"}
    for rows in ([strange], [strange, {"other": 1}], [strange] * 5000):
        path = write("a.jsonl", rows)
        for skips in (False, True):
            with pytest.raises(InputError, match=r"The columns of a\.jsonl, line 1 are not understood: 'question', 'a"):
                check_rows(path, skip_bad_rows=skips)
    with pytest.raises(InputError, match="2 of 2 rows"):
        check_rows(write("b.jsonl", b'{"question": "a"}\n{\n'), skip_bad_rows=True)
