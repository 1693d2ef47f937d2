"""What kernels allocate inside, against sums worked by hand from torch's headers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from advisor.memory.kernels import Call, Gpu, Inside  # noqa: E402
from advisor.memory.kernels.attention import efficient_backward  # noqa: E402


def backward_of(dtype: str, capability: tuple[int, int], *, batch: int, heads: int, tokens: int, size: int) -> Inside:
    """The memory-efficient backward of contiguous (batch, tokens, heads, head size)."""
    made = torch.empty(batch, tokens, heads, size, dtype=getattr(torch, dtype), device="meta").transpose(1, 2)
    args = (made, made, made, made, None, made, None, None, None, 0.0, [True] * 3 + [False], False)
    return efficient_backward(Call(args, {}, Gpu(capability=capability)))


def test_keys_are_split_at_most_200_times_for_all_sequences_and_heads() -> None:
    found = backward_of("float16", (7, 5), batch=2, heads=32, tokens=2048, size=96)
    # 64 sequences: 3 splits of 64 keys, dk and dv 128 wide; 32 × 2 tiles of 64 × 64 and a lock for dq.
    assert found == Inside(then=(4 * 64 * 2048, 4 * 64 * (3 * 64 * (128 + 128) + 32 * 2 * (64 * 64 + 4))))


def test_where_registers_hold_dk_and_dv_only_dq_is_gathered() -> None:
    found = backward_of("bfloat16", (8, 0), batch=2, heads=32, tokens=2048, size=96)
    assert found == Inside(then=(4 * 64 * 2048, 4 * 64 * 16 * (128 * 128 + 4)))


@pytest.mark.parametrize(("dtype", "capability", "copies"), [("float32", (8, 0), 0), ("float16", (7, 0), 2)])
def test_delta_that_no_kernel_computes_is_there_before_the_workspace(
    dtype: str, capability: tuple[int, int], copies: int
) -> None:
    found = backward_of(dtype, capability, batch=1, heads=4, tokens=512, size=256)
    product, delta = 4 * 512 * 4 * 256, 4 * 4 * 512
    assert found.brief == (*[product] * copies, product, delta, delta)
    assert found.then[0] == delta
