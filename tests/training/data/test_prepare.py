"""From a file to what is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from advisor.errors import InputError
from advisor.training.data import prepare_data
from advisor.training.data.lengths import LengthSummary
from advisor.training.data.tokens import MASKED

Write = Callable[[str, Any], str]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prepare(source: str, tokenizer: Any, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "seq_len": None,
        "validation": 0.1,
        "seed": 1,
        "skip_bad_rows": False,
        "packing": False,
        "context": 4096,
    }
    return prepare_data(source, tokenizer, **{**defaults, **settings})


def test_the_data_set_that_comes_with_the_package_is_prepared_whole(tokenizer: Any) -> None:
    data = prepare("phi3-advise-qa", tokenizer)
    assert (data.train_samples, data.validation_samples, data.bad.count) == (270, 30, 0)
    assert data.lengths.rows == 300
    for row in data.train:
        assert row["input_ids"][-2:] == [32007, 32000] or row["length"] == data.seq_len
        assert row["labels"][-1] == row["input_ids"][-1]
        assert row["labels"][0] == MASKED
        assert all(label in (MASKED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_the_split_depends_on_the_seed_alone(tokenizer: Any) -> None:
    one, same, other = (prepare("phi3-advise-qa", tokenizer, seed=seed) for seed in (1, 1, 2))
    assert one.train["input_ids"][:] == same.train["input_ids"][:]
    assert one.validation["input_ids"][:] == same.validation["input_ids"][:]
    assert one.validation["input_ids"][:] != other.validation["input_ids"][:]
    held_out = {tuple(ids) for ids in one.validation["input_ids"]}
    assert not held_out & {tuple(ids) for ids in one.train["input_ids"]}


@pytest.mark.parametrize(("rows", "share", "expected"), [(1, 0.5, 0), (2, 0.05, 1), (100, 0.05, 5), (100, 0.0, 0)])
def test_a_share_is_held_out(rows: int, share: float, expected: int, write: Write, tokenizer: Any) -> None:
    data = prepare(write("a.jsonl", [chat(str(n), "b") for n in range(rows)]), tokenizer, validation=share)
    assert (len(data.train), data.validation_samples) == (rows - expected, expected)
    assert (data.validation is None) == (expected == 0)


def test_packing_keeps_every_token_and_label(tokenizer: Any) -> None:
    alone = prepare("phi3-advise-qa", tokenizer, seq_len=512)
    packed = prepare("phi3-advise-qa", tokenizer, seq_len=512, packing=True)
    assert packed.fill > 0.95 > alone.fill
    assert sum(packed.train["length"]) == sum(alone.train["length"])
    samples = []
    for row in packed.train:
        assert row["length"] == len(row["input_ids"]) <= 512
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][at] == MASKED for at in starts)
        for start, stop in zip(starts, [*starts[1:], row["length"]], strict=True):
            assert row["position_ids"][start:stop] == list(range(stop - start))
            samples.append((tuple(row["input_ids"][start:stop]), tuple(row["labels"][start:stop])))
    expected = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in alone.train]
    assert sorted(samples) == sorted(expected)


def test_rows_are_cut_and_those_without_loss_left_out_and_counted(write: Write, tokenizer: Any) -> None:
    rows = [chat("a", "b")] * 8 + [chat("a", "b " * 100), chat("a " * 100, "b")]
    data = prepare(write("a.jsonl", rows), tokenizer, seq_len=50, validation=0)
    assert (data.seq_len, data.truncated, data.unlearnable, len(data.train)) == (50, 2, 1, 9)
    assert max(data.train["length"]) == 50
    with pytest.raises(InputError, match="within the first 3 tokens"):
        prepare(write("a.jsonl", rows), tokenizer, seq_len=3)
    with pytest.raises(InputError, match="more than the model's context"):
        prepare(write("a.jsonl", rows), tokenizer, seq_len=5000)


def test_bad_rows_of_reading_and_of_tokenising_are_listed_together(write: Write, tokenizer: Any) -> None:
    path = write("a.jsonl", [chat("a", "b"), chat("a", ""), chat("a", "b " * 300), chat("c", "d")])
    with pytest.raises(InputError) as caught:
        prepare(path, tokenizer, context=200)
    assert caught.value.what.startswith("2 of 4 rows")
    assert "line 2: turn 2: the assistant's content is empty" in caught.value.why
    assert "tokens; the model's context is 200" in caught.value.why
    data = prepare(path, tokenizer, context=200, skip_bad_rows=True)
    assert (data.bad.count, data.train_samples + data.validation_samples) == (2, 2)


def test_percentiles_say_how_long_rows_are_and_the_95th_is_rounded_up() -> None:
    import numpy as np

    lengths = LengthSummary(np.arange(1, 1001))
    assert [lengths.percentile(percent) for percent in (50, 90, 95, 99, 100)] == [500, 900, 950, 990, 1000]
    assert lengths.longest == 1000
    assert lengths.truncated(990) == 10
    assert lengths.fitting_seq_len(4096) == 960
    assert lengths.fitting_seq_len(512) == 512


def test_the_first_example_is_shown_as_the_model_sees_it(write: Write, tokenizer: Any) -> None:
    data = prepare(write("a.jsonl", [chat("Q 1", "A 日本"), chat("c", "d")]), tokenizer, validation=0)
    assert data.first.pieces == (
        ("<|user|> Q 1<|end|><|assistant|>", False),
        (" A 日本<|end|><|endoftext|>", True),
    )
    assert data.first.tokens == 12
    assert data.first.learned == 6


def test_a_hundred_thousand_rows_are_read_in_seconds(write: Write) -> None:
    import time

    from advisor.training.data import check_rows

    row = json.dumps(chat("What is a question? " * 10, "This is an answer. " * 20))
    path = write("a.jsonl", (row + "\n") * 100_000)
    started = time.process_time()
    assert check_rows(path).rows == 100_000
    assert time.process_time() - started < 20  # about 2 s on one core of 2024
