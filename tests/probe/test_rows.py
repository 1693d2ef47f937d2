"""The rows of a probe make the worst batch that a plan allows, through the training's own sampler and collator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advisor.probe.dry_run import PADDING_ID, WorstRows, probed_plan
from advisor.training.data import Collator

from .conftest import small_plan


def batches(rows: WorstRows) -> list[dict[str, torch.Tensor]]:
    order, size = list(rows.order()), rows.plan.micro_batch
    collate = Collator(rows.plan, PADDING_ID)
    return [collate([rows[index] for index in order[at : at + size]]) for at in range(0, len(order), size)]


@pytest.mark.parametrize("seq_len", [2, 16, 65, 128, 1000])
@pytest.mark.parametrize("settings", [{}, {"padding": "longest"}, {"packing": True}], ids=["full", "padded", "packed"])
def test_every_batch_is_as_wide_as_can_be(seq_len: int, settings: dict[str, Any]) -> None:
    plan = probed_plan(small_plan(micro_batch=3, seq_len=seq_len, gradient_accumulation=9, **settings), steps=4)
    assert plan.gradient_accumulation == 2
    rows = WorstRows(plan, seq_len, 2048, plan.effective_batch * 4)
    made = batches(rows)
    assert len(made) == 8
    for batch in made:
        assert batch["input_ids"].shape == (3, seq_len)
        assert (batch["labels"][:, 1:] != -100).any()
        if plan.padding == "longest":
            # One row is full and the others are not, or transformers would leave the mask out.
            assert sorted(batch["attention_mask"].sum(1).tolist()) == [seq_len - 1, seq_len - 1, seq_len]
        else:
            assert "attention_mask" not in batch
        if plan.packing:
            samples = (batch["position_ids"] == 0).sum(1)
            assert samples.max() <= plan.samples // plan.micro_batch


def test_rows_of_the_data_are_no_wider_than_the_trainings_bucket() -> None:
    plan = probed_plan(small_plan(seq_len=1000), steps=2)
    rows = WorstRows(plan, 100, 2048, plan.effective_batch * 2)
    assert {batch["input_ids"].shape[1] for batch in batches(rows)} == {128}


def test_a_row_is_the_same_each_time_and_leaves_torchs_random_state_alone() -> None:
    rows = WorstRows(small_plan(), 64, 2048, 4)
    before = torch.get_rng_state()
    assert torch.equal(rows[1]["input_ids"], rows[1]["input_ids"])
    assert not torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])
    assert torch.equal(before, torch.get_rng_state())
