"""Packed rows: attention stays inside a sample, under every attention implementation and beside other rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import modeling_flash_attention_utils as flash

from advisor.plan import Plan, most_packed_samples
from advisor.training.build import build_model
from advisor.training.data.packing import pack
from advisor.training.packing import sample_borders
from advisor.training.step import make_batch

LENGTHS = ((5, 9, 2), (16,), (1, 14, 1))
"""Of the samples in each row: short ones, one that fills its row, single tokens."""


def positions_of(rows: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def variable_length_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, causal: bool, **rest: Any
) -> torch.Tensor:
    """What flash_attn_varlen_func computes, sample by sample; tensors are (tokens, heads, head size)."""
    assert cu_seqlens_q.dtype == torch.int32
    borders = cu_seqlens_q.tolist()
    assert rest["max_seqlen_q"] == max(end - start for start, end in pairwise(borders))
    parts = []
    for start, end in pairwise(borders):
        one = (x[start:end].transpose(0, 1) for x in (q, k, v))
        mixed = functional.scaled_dot_product_attention(*one, is_causal=causal, enable_gqa=True)
        parts.append(mixed.transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def flash_attention_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def variable(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, **rest: Any
    ) -> Any:
        del cu_seqlens_k, max_seqlen_k
        return variable_length_reference(q, k, v, cu_seqlens_q, max_seqlen_q=max_seqlen_q, **rest)

    def dense(*_: Any, **__: Any) -> Any:
        raise AssertionError("the kernel that knows nothing of samples was called")

    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (dense, variable, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)


@pytest.mark.usefixtures("flash_attention_on_the_cpu")
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("rows", [LENGTHS, LENGTHS[:1], LENGTHS[1:2]], ids=["three-rows", "one-row", "one-sample"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_sample_in_a_packed_row_is_computed_as_if_it_were_alone(
    attention: Any, rows: tuple[tuple[int, ...], ...], kv_heads: int, make_plan: Any, architecture: dict[str, Any]
) -> None:
    architecture = {**architecture, "num_key_value_heads": kv_heads}
    torch.manual_seed(0)
    alone = build_model(make_plan("full", dtype="float32", attention="sdpa"), architecture, "cpu").model
    # 16-bit by its name only: the reference computes in what it is given.
    plan = make_plan("full", dtype="bfloat16", attention=attention, packing=True, micro_batch=len(rows), seq_len=16)
    packed = build_model(plan, architecture, "cpu").model.float()
    packed.load_state_dict(alone.state_dict())
    tokens = torch.randint(0, architecture["vocab_size"], (len(rows), 16))
    found = packed(input_ids=tokens, position_ids=positions_of(rows), use_cache=False).logits
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            one = alone(input_ids=tokens[row : row + 1, start : start + length], use_cache=False).logits[0]
            torch.testing.assert_close(found[row, start : start + length], one, rtol=1e-4, atol=1e-5)
            start += length


def test_borders_are_where_positions_restart_in_all_rows() -> None:
    borders, longest = sample_borders(positions_of(LENGTHS))
    assert borders.tolist() == [0, 5, 14, 16, 32, 33, 47, 48]
    assert borders.dtype == torch.int32
    assert longest == 16


@pytest.mark.parametrize(("rows", "seq_len"), [(1, 2048), (3, 512), (2, 200), (1, 40)])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_the_worst_packed_batch_has_as_many_samples_as_the_plan_allows(
    attention: str, rows: int, seq_len: int, make_plan: Any
) -> None:
    fields = {"dtype": "bfloat16", "attention": attention, "packing": True, "micro_batch": rows, "seq_len": seq_len}
    plan: Plan = make_plan("full", **fields)
    batch = make_batch(plan, 512, "cpu")
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].shape == ((1, rows * seq_len) if attention == "flash_attention_2" else (rows, seq_len))
    starts = batch["position_ids"].reshape(rows, seq_len) == 0
    assert starts[:, 0].all()
    assert rows * most_packed_samples(seq_len) * 0.8 <= int(starts.sum()) <= plan.samples
    # The first token of a sample is predicted from none of its own.
    assert torch.equal(batch["labels"].reshape(rows, seq_len) == -100, starts)


def test_the_packer_begins_another_row_rather_than_take_more_samples_than_were_counted() -> None:
    rows = pack([8] * 1000, 512)
    assert max(map(len, rows)) == most_packed_samples(512)
    assert sorted(index for row in rows for index in row) == list(range(1000))
