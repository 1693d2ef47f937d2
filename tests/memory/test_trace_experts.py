"""A mixture's experts in every dtype and on every capability."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advisor.memory.trace import Trace, trace
from advisor.memory.trace.experts import grouped_product
from advisor.plan import plan_from_fields

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}


def traced(dtype: str, autocast: str = "none", capability: tuple[int, int] = (8, 0), method: str = "full") -> Trace:
    extra = {} if method == "full" else {"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}}
    plan = {"model": "x", "method": method, "dtype": dtype, "autocast": autocast, "seq_len": 128, "micro_batch": 2}
    return trace(plan_from_fields({**plan, **extra}), MIXTRAL, capability=capability)


def operations(found: Trace) -> set[str]:
    return {event.allocation.operation for event in found.events}


@pytest.mark.parametrize(
    "shapes", [((32, 16), (4, 16)), ((32, 16), (16,)), ((4, 32, 16), (4, 16)), ((4, 32, 16), (16,))]
)
def test_a_grouped_product_lies_in_memory_as_torchs_own(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    left = torch.empty(shapes[0], dtype=torch.bfloat16, device="meta")
    right = torch.empty((*shapes[1], 64), dtype=torch.bfloat16, device="meta")
    offsets = None if left.dim() == right.dim() == 3 else torch.empty(4, dtype=torch.int32, device="meta")
    expected = torch.ops.aten._grouped_mm.default(left, right, offsets)
    found = grouped_product((left, right, offsets), {})
    assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_float16_takes_what_bfloat16_takes() -> None:
    # CUDA multiplies group by group in either, and only torch's storage-less function refuses float16.
    assert traced("float16", method="lora").step_bytes == traced("bfloat16", method="lora").step_bytes


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_fp32_experts_are_multiplied_in_fp32(autocast: str) -> None:
    # transformers casts the input to the weight's dtype, since autocast does not know the operation.
    found = traced("float32", autocast)
    products = [e.allocation.dtype for e in found.events if e.allocation.operation == "aten._grouped_mm.default"]
    assert set(products) == {"float32"}


def test_before_ampere_transformers_multiplies_expert_by_expert() -> None:
    found = traced("float32", "float16", capability=(7, 5))
    assert "transformers.grouped_mm_fallback.default" in operations(found)
    assert "aten._grouped_mm.default" not in operations(found)
    # Its backward makes the gradient of the experts' weights, which are frozen here.
    frozen = [e.allocation for e in traced("float16", capability=(7, 5), method="lora").events]
    backward = "transformers.grouped_mm_fallback_backward.default"
    assert any(a.operation == backward and a.shape == (4, 256, 1024) for a in frozen)
