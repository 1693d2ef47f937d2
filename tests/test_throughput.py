"""The comparison of trainers: what is counted, and what is said of it."""

from __future__ import annotations

import itertools
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
import throughput
import torch
from contest import entries
from contest.entries import PADDING, Clock, Contest, packed_rows

OPTIONS = Namespace(rows=8, micro_batch=2, accumulation=2, rounds=2, device="cpu")


def run(entry: str, settings: str, number: int, speed: float | None, *, error: str = "") -> throughput.Run:
    return throughput.Run(
        method="lora",
        entry=entry,
        settings=settings,
        round=number,
        tokens_per_second=speed,
        peak_bytes=2**30,
        error=error,
    )


def test_rows_are_the_same_every_time_and_one_is_full() -> None:
    rows = throughput.make_rows(50, 2048)
    assert rows == throughput.make_rows(50, 2048)
    lengths = [len(row) for row in rows]
    assert max(lengths) == 2048
    assert min(lengths) >= 64
    assert all(PADDING not in row for row in rows)


def test_packed_rows_hold_every_sample_once_and_the_first_token_of_each_carries_no_loss() -> None:
    rows = throughput.make_rows(20, 256)
    packed = packed_rows(rows, 256)
    assert sum(len(row["input_ids"]) for row in packed) == sum(map(len, rows))
    assert all(len(row["input_ids"]) <= 256 for row in packed)
    for row in packed:
        firsts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        assert [at for at, label in enumerate(row["labels"]) if label == -100] == firsts


def test_the_clock_counts_the_second_epoch_and_no_padding() -> None:
    clock = Clock(device="cpu")
    batch = torch.tensor([[5, 6, PADDING], [7, PADDING, PADDING]])
    for step in (1, 2, 3, 4):
        clock.count(batch)
        clock.step_ended(step, 4)
    assert (clock.tokens, clock.computed, clock.steps) == (6, 12, 2)
    assert clock.seconds > 0


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((9, 0), "bfloat16")], ids=["t4", "h200"])
def test_all_compute_in_what_the_gpu_has(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert throughput.dtype_of("cuda") == dtype
    assert throughput.dtype_of("cpu") == "float32"
    shared: dict[str, Any] = {"model": "x", "method": "qlora", "rows": [], "seq_len": 8, "micro_batch": 1}
    contest = Contest(**shared, accumulation=1, device="cuda", folder="x", dtype=dtype)  # type: ignore[arg-type]
    assert entries._loading(contest)["dtype"] == getattr(torch, dtype)
    assert entries._loading(contest)["quantization_config"].bnb_4bit_compute_dtype == getattr(torch, dtype)
    assert entries._precision(contest).get("fp16", False) == (dtype == "float16")


def test_every_round_begins_with_another_entry_and_a_ratio_is_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, str, str]] = []

    def note(_: object, __: str, entry: str, settings: str, number: int, ___: object) -> throughput.Run:
        order.append((number, entry, settings))
        return run(entry, settings, number, 100.0 * number * (2 if entry == "ours" else 1))

    monkeypatch.setattr(throughput, "run_one", note)
    entries = ["ours", "transformers.Trainer"]
    runs = list(throughput.take_turns({}, ["lora"], entries, 2, None))  # type: ignore[arg-type]
    assert [one for one in order if one[0] == 1] != [(1, *one[1:]) for one in order if one[0] == 2]
    assert {one[1:] for one in order if one[0] == 1} == {one[1:] for one in order if one[0] == 2}
    assert throughput.ratios(runs, runs[0], ("transformers.Trainer", "defaults")) == [2.0, 2.0]


def test_no_run_begins_after_the_time_is_up_and_ctrl_c_ends_with_what_there_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def turns() -> Iterator[throughput.Run]:
        yield run("ours", "defaults", 1, 100.0)
        yield run("ours", "best", 1, 100.0)
        raise KeyboardInterrupt

    assert throughput.collect(turns(), 0.0) == []
    assert [one.settings for one in throughput.collect(turns(), time.monotonic() + 60)] == ["defaults", "best"]
    assert "Stopped." in capsys.readouterr().err
    assert len(throughput.collect(itertools.islice(turns(), 2), time.monotonic() + 60)) == 2


def test_a_trainer_that_failed_is_in_the_table_with_its_reason() -> None:
    runs = [
        run("ours", "defaults", 1, 300.0),
        run("ours", "defaults", 2, 200.0),
        run("transformers.Trainer", "defaults", 1, 100.0),
        run("transformers.Trainer", "defaults", 2, 200.0),
        run("trl.SFTTrainer", "best", 1, None, error="RuntimeError: no | room"),
    ]
    text = throughput.table(runs, OPTIONS)
    assert "| lora | ours | defaults | 250 (200 to 300) | 2.00 (1.00 to 3.00) | 1.00 GiB |  |" in text
    assert "| lora | trl.SFTTrainer | best | RuntimeError: no   room |" in text
