"""Packed samples do not see each other: the logits of a packed row are those of each sample alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advisor.plan import plan_from_fields
from advisor.training.data import Collator, packing_gain
from advisor.training.data.packing import pack
from advisor.training.data.tokens import MASKED

TOLERANCE = 1e-5
"""float32; the same sums are taken in another order."""

SAMPLES = ([5, 17, 19, 300, 42], [7, 8], [900, 31, 31, 8, 12, 77, 21], [4, 4, 4])


def packed_row(samples: tuple[list[int], ...]) -> dict[str, Any]:
    ids = [token for sample in samples for token in sample]
    labels = [MASKED if at == 0 else token for sample in samples for at, token in enumerate(sample)]
    positions = [at for sample in samples for at in range(len(sample))]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "length": len(ids)}


def packing_plan(**fields: Any) -> Any:
    return plan_from_fields(
        {"model": "small", "method": "lora", "lora": {}, "packing": True, "seq_len": 128, "micro_batch": 2, **fields}
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_logits_are_those_of_each_sample_alone(
    attention: str, grouped: bool, small_model: Path, small_grouped_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = small_grouped_model if grouped else small_model
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_cache=False, attn_implementation=attention
    ).eval()
    rows = [packed_row(SAMPLES), packed_row(SAMPLES[::-1] + SAMPLES[:1])]
    batch = Collator(packing_plan(attention=attention), 0)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    with torch.no_grad():
        together = model(**batch).logits
        for row, order in enumerate((SAMPLES, SAMPLES[::-1] + SAMPLES[:1])):
            start = 0
            for sample in order:
                alone = model(input_ids=torch.tensor([sample])).logits[0]
                torch.testing.assert_close(
                    together[row, start : start + len(sample)], alone, atol=TOLERANCE, rtol=TOLERANCE
                )
                start += len(sample)


def test_the_packed_loss_is_the_mean_over_the_tokens_of_the_samples_alone(small_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32, use_cache=False).eval()
    with torch.no_grad():
        together = model(**Collator(packing_plan(), 0)([packed_row(SAMPLES)])).loss
        alone = [model(input_ids=torch.tensor([s]), labels=torch.tensor([s])).loss * (len(s) - 1) for s in SAMPLES]
    expected = sum(alone) / sum(len(s) - 1 for s in SAMPLES)
    torch.testing.assert_close(together, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_flash_attention_gets_one_row_whose_positions_show_every_sample() -> None:
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    rows = [packed_row(SAMPLES), packed_row(SAMPLES[:2])]
    batch = Collator(packing_plan(attention="flash_attention_2"), 0)(rows)
    assert batch["input_ids"].shape == (1, 128)
    assert _is_packed_sequence(batch["position_ids"], 1)
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert starts.tolist() == [0, 5, 7, 14, 17, 64, 69, 71, 128]
    assert longest == 57


def test_rows_are_full_and_hold_every_sample_once() -> None:
    lengths = np.random.default_rng(0).gamma(2.0, 120.0, 20_000).astype(np.int64).clip(1, 2048)
    rows = pack(lengths, 2048)
    assert sorted(index for row in rows for index in row) == list(range(20_000))
    filled = np.array([lengths[row].sum() for row in rows])
    assert filled.max() <= 2048
    assert filled.sum() / (len(rows) * 2048) > 0.99
    assert rows == pack(lengths.copy(), 2048)


def test_packing_pays_where_rows_are_short_and_not_where_they_are_full() -> None:
    short = packing_gain([20, 30, 40] * 100, seq_len=512, micro_batch=4)
    assert short.pays
    assert short.saved > 0.4
    assert short.fill > 0.8  # as many samples as a row may hold
    full = packing_gain([512] * 100, seq_len=512, micro_batch=4)
    assert not full.pays
    assert full.saved == 0
