"""The order of the rows, and the batches made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from advisor.errors import InputError
from advisor.plan import plan_from_fields
from advisor.training.data import Collator, LengthSampler
from advisor.training.data.collate import keeps_masks_below
from advisor.training.data.lengths import bucket_length
from advisor.training.data.tokens import MASKED

LENGTHS = np.random.default_rng(3).gamma(2.0, 100.0, 1003).astype(int).clip(2, 1000).tolist()


def sampler(seed: int = 1, batch_size: int = 4, accumulation: int = 2) -> LengthSampler:
    return LengthSampler(LENGTHS, batch_size=batch_size, accumulation=accumulation, seed=seed)


FULL = {"method": "full", "lora": None, "dtype": "float32"}


def batches(order: list[int], size: int = 4) -> list[list[int]]:
    return [order[at : at + size] for at in range(0, len(order), size)]


def longest(batch: list[int]) -> int:
    return max(LENGTHS[i] for i in batch)


def test_every_row_comes_once_and_the_order_is_that_of_seed_and_epoch() -> None:
    one = sampler()
    first = list(one)
    assert sorted(first) == list(range(len(LENGTHS))) == list(range(len(one)))
    assert first == list(one) == list(sampler())
    assert first != list(sampler(seed=2))
    one.set_epoch(1)
    again = sampler()
    again.set_epoch(1)
    assert list(one) == list(again) != first


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_first_optimizer_steps_are_the_longest(epoch: int) -> None:
    one = sampler()
    one.set_epoch(epoch)
    widths = [longest(batch) for batch in batches(list(one))]
    assert widths[0] == max(LENGTHS)
    assert min(widths[:4]) >= max(widths[4:])
    assert len(batches(list(one))[-1]) == len(LENGTHS) % 4


def test_rows_of_similar_length_share_a_batch_and_batches_are_shuffled() -> None:
    order = list(sampler())
    padded = sum(longest(batch) * len(batch) for batch in batches(order))
    shuffled = np.random.default_rng(0).permutation(len(LENGTHS)).tolist()
    at_random = sum(longest(batch) * len(batch) for batch in batches(shuffled))
    assert padded / sum(LENGTHS) < 1.1 < 1.4 < at_random / sum(LENGTHS)
    widths = [longest(batch) for batch in batches(order)][4:]
    assert abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.3


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5])
def test_few_rows_are_all_there(rows: int) -> None:
    assert sorted(LengthSampler([7] * rows, batch_size=4, accumulation=8, seed=0)) == list(range(rows))


def test_a_resumed_run_has_the_same_order() -> None:
    """With accelerate's loader and its skipping of batches, as transformers' Trainer resumes."""
    from accelerate import Accelerator, skip_first_batches
    from torch.utils.data import DataLoader

    def loader() -> Any:
        return Accelerator(cpu=True).prepare(
            DataLoader(range(len(LENGTHS)), batch_size=4, sampler=sampler())  # type: ignore[arg-type]
        )

    whole = loader()
    whole.set_epoch(2)
    expected = [batch.tolist() for batch in whole]
    rest = skip_first_batches(loader(), 100)
    rest.set_epoch(2)
    assert [batch.tolist() for batch in rest] == expected[100:]
    fresh = sampler()
    fresh.set_epoch(2)
    assert [index for batch in expected for index in batch] == list(fresh)


def plan(**fields: Any) -> Any:
    base = {"model": "small", "method": "lora", "lora": {}, "seq_len": 1000, "micro_batch": 2}
    return plan_from_fields({**base, **fields})


def row(length: int, masked: int = 1) -> dict[str, Any]:
    ids = list(range(10, 10 + length))
    return {"input_ids": ids, "labels": [MASKED] * masked + ids[masked:], "length": length}


def test_batches_have_one_of_few_lengths_at_most_the_plans() -> None:
    for seq_len in (10, 64, 100, 128, 1000, 2048, 4096):
        widths = {bucket_length(length, seq_len) for length in range(1, seq_len + 1)}
        assert max(widths) == seq_len
        assert len(widths) <= 17
        assert all(bucket_length(length, seq_len) >= length for length in range(1, seq_len + 1))


def test_padding_is_on_the_right_and_carries_no_loss() -> None:
    batch = Collator(plan(), 0)([row(70), row(5)])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (2, 128)
    assert batch["input_ids"][1, 5:].eq(0).all()
    assert batch["labels"][1, 5:].eq(MASKED).all()
    assert batch["labels"][1, 1:5].tolist() == [11, 12, 13, 14]


def test_there_is_a_mask_only_where_the_plan_counts_on_one() -> None:
    rows = [row(70), row(5)]
    mask = Collator(plan(padding="longest"), 0)(rows)["attention_mask"]
    assert mask.sum(1).tolist() == [70, 5]
    assert mask[1, :5].all()
    assert "attention_mask" not in Collator(plan(padding="longest", micro_batch=1), 0)(rows[:1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_mask_the_loss_and_its_gradients_are_those_with_one(attention: str, small_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        small_model, dtype=torch.float32, attn_implementation=attention, use_cache=False
    )
    found = []
    for padding in ("none", "longest"):
        model.zero_grad()
        loss = model(**Collator(plan(padding=padding), 0)([row(70), row(5)])).loss
        loss.backward()
        found.append((loss.detach(), model.model.layers[0].self_attn.qkv_proj.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_a_batch_in_which_nothing_carries_loss_is_refused() -> None:
    with pytest.raises(InputError, match="All labels of a batch are masked"):
        Collator(plan(), 0)([row(5, masked=5)])


def test_a_row_longer_than_the_plans_is_refused() -> None:
    with pytest.raises(InputError, match="seq_len is 1,000"):
        Collator(plan(), 0)([row(1001)])


def test_a_mask_that_masks_nothing_is_kept_where_the_kernel_without_one_needs_more(small_grouped_model: Any) -> None:
    """Causal, one for each row, and the same loss; transformers would drop the one that only says "no padding"."""
    from transformers import AutoModelForCausalLM

    rows, long = [row(64), row(64)], plan(padding="longest")
    kept = Collator(long, 0, keeps_masks_below=65)(rows)
    assert kept["attention_mask"].shape == (2, 1, 64, 64)
    assert torch.equal(kept["attention_mask"][1, 0], torch.ones(64, 64).tril().bool())
    # From the window on the model makes its own, and a padded batch has one anyway.
    assert Collator(long, 0, keeps_masks_below=64)(rows)["attention_mask"].dim() == 2
    assert Collator(long, 0, keeps_masks_below=65)([row(64), row(5)])["attention_mask"].dim() == 2
    model = AutoModelForCausalLM.from_pretrained(small_grouped_model, dtype=torch.float32, use_cache=False)
    torch.testing.assert_close(model(**kept).loss, model(**Collator(long, 0)(rows)).loss)


@pytest.mark.parametrize(
    ("capability", "grouped", "fields", "below"),
    [
        ((7, 5), True, {}, 1001),
        ((7, 5), False, {}, 0),
        ((8, 0), True, {}, 0),
        ((8, 0), True, FULL, 1001),
        ((8, 0), True, FULL | {"autocast": "bfloat16"}, 0),
        ((7, 5), True, {"attention": "eager"}, 0),
    ],
)
def test_masks_are_kept_for_grouped_heads_without_flash_attention(
    capability: tuple[int, int], grouped: bool, fields: dict[str, Any], below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the card's capability is made up: there is no card here."""
    from transformers import Phi3Config

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    config = Phi3Config(num_attention_heads=4, num_key_value_heads=2 if grouped else 4, hidden_size=64)
    assert keeps_masks_below(plan(padding="longest", **fields), config, torch.device("cuda")) == below
    config.sliding_window = 500
    assert keeps_masks_below(plan(padding="longest", **fields), config, torch.device("cuda")) == min(below, 500)
    assert keeps_masks_below(plan(**fields), config, torch.device("cpu")) == 0
