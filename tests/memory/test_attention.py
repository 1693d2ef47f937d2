"""Which attention kernel runs: against the rules that the trace applies to real calls, over a grid of facts."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from advisor.architecture import Architecture, architecture_from_config
from advisor.memory.attention import choose_kernel, mask_rows, needs_mask
from advisor.plan import LoraSettings, Plan, Quantization

CAPABILITIES = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
HEADS = [(8, 64), (8, 80), (8, 96), (8, 128), (8, 192), (8, 200), (8, 256), (4, 100), (4, 512)]


def arch_of(heads: int, head_dim: int, *, grouped: bool, window: int | None = None) -> Architecture:
    config = {
        "model_type": "phi3",
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if grouped else heads,
        "head_dim": head_dim,
        "sliding_window": window,
    }
    return architecture_from_config(config, origin="test")


def plan_of(**fields: Any) -> Plan:
    return Plan(**{"model": "x", "method": "lora", "lora": LoraSettings(), "seq_len": 128, "micro_batch": 2, **fields})


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_choice_is_that_of_the_rules_on_tensors(capability: tuple[int, int], dtype: Any) -> None:
    """Every rule has its source where the trace applies it, kernels/choice.py."""
    torch = pytest.importorskip("torch")
    from advisor.memory.kernels import AttentionCall, Gpu, choose_attention

    gpu = Gpu(capability=capability, prefers_cudnn=capability[0] in (9, 10))
    for (heads, size), grouped, padded in product(HEADS, (False, True), (False, True)):
        arch = arch_of(heads, size, grouped=grouped)
        plan = plan_of(dtype=dtype, padding="longest" if padded else "none")
        shares = grouped and not padded and size <= 256
        keys = heads // 2 if shares else heads
        query, key = (
            torch.empty(2, count, 128, size, dtype=getattr(torch, dtype), device="meta", requires_grad=True)
            for count in (heads, keys)
        )
        mask = torch.empty(2, 1, 128, 128, dtype=torch.bool, device="meta") if padded else None
        call = AttentionCall(
            query=query, key=key, value=key, mask=mask, dropout=0.0, causal=not padded, scale=None, grouped=shares
        )
        expected = choose_attention(call, gpu).name
        chosen, reason = choose_kernel(plan, arch, capability=capability, backend="cuda")
        assert chosen == expected, (capability, dtype, heads, size, grouped, padded, reason)
        assert reason


@pytest.mark.parametrize(
    ("fields", "capability", "grouped", "kernel"),
    [
        ({}, (8, 0), True, "flash"),
        ({"attention": "eager"}, (8, 0), False, "eager"),
        ({"attention": "flash_attention_2"}, (8, 0), True, "flash"),
        ({"dtype": "float16"}, (7, 5), False, "efficient"),
        ({"dtype": "float16"}, (7, 5), True, "math"),
        ({"padding": "longest"}, (8, 0), True, "efficient"),
        ({"dtype": "float32", "autocast": "bfloat16"}, (8, 0), False, "flash"),
        ({"method": "qlora", "quantization": Quantization(), "upcast_frozen": True}, (8, 0), True, "math"),
        ({}, (9, 0), True, "cudnn"),
        ({}, None, True, "flash"),
    ],
)
def test_kernels_that_people_meet(
    fields: dict[str, Any], capability: tuple[int, int] | None, grouped: bool, kernel: str
) -> None:
    chosen, _ = choose_kernel(plan_of(**fields), arch_of(8, 96, grouped=grouped), capability=capability, backend="cuda")
    assert chosen == kernel


@pytest.mark.parametrize(
    ("fields", "window", "rows"),
    [
        ({}, None, 0),
        ({"padding": "longest"}, None, 2),
        ({"padding": "longest", "micro_batch": 1}, None, 0),
        ({}, 128, 1),
        ({}, 129, 0),
        ({"attention": "eager"}, None, 2),
        ({"attention": "flash_attention_2", "padding": "longest"}, 64, 0),
    ],
)
def test_a_mask_exists_where_something_is_masked(fields: dict[str, Any], window: int | None, rows: int) -> None:
    plan, arch = plan_of(**fields), arch_of(8, 96, grouped=False, window=window)
    assert mask_rows(plan, arch) == rows
    assert needs_mask(plan, arch) == (rows > 0)
