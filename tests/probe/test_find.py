"""The largest value that runs is found, in few tries, whatever the first guess was."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from advisor.errors import RunFailedError
from advisor.plan import Plan
from advisor.probe import find
from advisor.probe.find import bisect, find_largest, largest_by_estimate
from advisor.probe.measure import Subject
from advisor.probe.measurement import Measurement

from .conftest import small_plan


@pytest.mark.parametrize("limit", [1, 2, 7, 16])
def test_bisection_finds_every_answer_from_every_guess(limit: int) -> None:
    for answer in range(limit + 1):
        for start in range(1, limit + 1):
            tried: list[int] = []

            def runs(value: int, answer: int = answer, tried: list[int] = tried) -> bool:
                assert value not in tried
                tried.append(value)
                return value <= answer

            assert bisect(runs, start=start, limit=limit) == (answer or None)


def test_a_right_guess_takes_two_tries_and_a_wrong_one_few() -> None:
    for answer, most in ((8, 2), (9, 4), (7, 2), (100, 2 * math.ceil(math.log2(100)))):
        tried: list[int] = []

        def runs(value: int, answer: int = answer, tried: list[int] = tried) -> bool:
            tried.append(value)
            return value <= answer

        assert bisect(runs, start=8, limit=1024) == answer
        assert len(tried) <= most


def fake(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[Plan]:
    tried: list[Plan] = []

    def measure(plan: Plan, subject: Subject, _: Any) -> Measurement:
        tried.append(plan)
        assert subject.steps == 2
        return Measurement(outcome=outcome(plan), plan=plan, reserved_bytes=plan.tokens)

    monkeypatch.setattr(find, "measure", measure)
    return tried


def test_the_longest_sequence_is_a_multiple_of_64_and_no_longer_than_the_context(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fake(monkeypatch, lambda plan: "ran" if plan.seq_len <= 500 else "out_of_memory")
    found = find_largest("seq_len", small_plan(), subject)
    assert found.largest == 448
    assert found.measurement.plan.seq_len == 448
    assert all(plan.seq_len % 64 == 0 and plan.micro_batch == 2 for plan in tried)
    fake(monkeypatch, lambda _: "ran")
    assert find_largest("seq_len", small_plan(), subject).largest == 1024


def test_nothing_that_runs_is_an_answer_and_a_failure_is_not(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda _: "out_of_memory")
    found = find_largest("micro_batch", small_plan(), subject)
    assert found.largest is None
    assert found.measurement.plan.micro_batch == 1
    fake(monkeypatch, lambda _: "failed")
    with pytest.raises(RunFailedError):
        find_largest("micro_batch", small_plan(), subject)


def test_the_estimate_is_held_against_what_a_cap_leaves(subject: Subject) -> None:
    plan = small_plan(seq_len=1024)
    free = largest_by_estimate("micro_batch", plan, subject)
    capped = largest_by_estimate("micro_batch", plan, replace(subject, cap_bytes=2**30))
    assert free is not None
    assert capped is not None
    assert 1 <= capped < free
