"""Elementwise results that the tracker makes itself are those of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advisor.memory.trace.tracker import _like_first

X = torch.empty(2, 3, 4, device="meta")


@pytest.mark.parametrize(
    "other",
    [X, 2.0, 3, X[:1], X[:, :1], torch.empty(4, device="meta"), torch.empty((), device="meta")],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value),
)
def test_it_has_torchs_shape_dtype_and_layout(other: Any) -> None:
    found, expected = _like_first((X, other), {}), torch.mul(X, other)
    assert found is not None
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize(
    "args",
    [
        (X.transpose(0, 1), X.transpose(0, 1)),
        (X[:, :1], X),
        (X.bfloat16(), X),
        (X, X.bfloat16()),
        (X.int(), 2.0),
        (torch.empty((), device="meta"), X),
        (torch.empty(2), torch.empty(2)),
    ],
)
def test_anything_else_is_torchs(args: tuple[Any, ...]) -> None:
    assert _like_first(args, {}) is None
