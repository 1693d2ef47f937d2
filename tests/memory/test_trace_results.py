"""Results that are made again without asking torch are those of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advisor.memory.trace.results import Results, is_pure, returns_views

aten = torch.ops.aten
X = torch.empty(2, 3, 4, device="meta")


def described(value: Any) -> Any:
    """All of a result that a program could see, its storage's size included."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.storage_offset(), value.untyped_storage().nbytes()
    if isinstance(value, (tuple, list)):
        return type(value), [described(item) for item in value]
    return type(value), value


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.mul.Tensor, (X, 2.0), {}),
        (aten.mul.Tensor, (X.int(), 2.0), {}),
        (aten.mul.Tensor, (X.int(), 2), {}),
        (aten.mul.Tensor, (X.bool(), True), {}),
        (aten.mul.Tensor, (X.bool(), 1), {}),
        (aten.mul.Tensor, (X.bfloat16(), X), {}),
        (aten.mul.Tensor, (X.transpose(0, 2), X.transpose(0, 2)), {}),
        (aten.mul.Tensor, (X.bfloat16(), torch.empty((), device="meta")), {}),
        (aten.add.Tensor, (X[:, :1], X), {}),
        (aten.add.Tensor, (X.expand(5, 2, 3, 4), 1), {}),
        (aten.mm.default, (X[0], X[0].t()), {}),
        (aten.cat.default, ([X, X], -1), {}),
        (aten.cat.default, ([X, X, X], -1), {}),
        (aten.sum.dim_IntList, (X, [-1], True), {"dtype": torch.float64}),
        (aten._to_copy.default, (X,), {"dtype": torch.bfloat16}),
        (aten.native_layer_norm.default, (X, [4], None, None, 1e-5), {}),
        (aten._unsafe_view.default, (X, [6, 4]), {}),  # a view, though its schema does not say so
    ],
)
def test_what_is_made_again_is_what_torch_makes(func: Any, args: Any, kwargs: Any) -> None:
    results = Results()
    expected = func(*args, **kwargs)
    for _ in range(3):
        found = results.of(func, args, kwargs)
        assert described(found) == described(expected)
        shares = isinstance(found, torch.Tensor) and found.untyped_storage()._cdata == X.untyped_storage()._cdata
        assert shares == (func is aten._unsafe_view.default)


def test_arguments_that_are_equal_but_not_alike_are_told_apart() -> None:
    results = Results()
    integers = X.int()
    dtypes = [results.of(aten.mul.Tensor, (integers, factor), {}).dtype for factor in (2, 2.0, 2, 2.0)]
    assert dtypes == [torch.int32, torch.float32] * 2
    assert results.of(aten.add.Tensor, (X, X), {}).dtype != results.of(aten.add.Tensor, (X, X.double()), {}).dtype


def test_real_tensors_are_computed() -> None:
    results = Results()
    assert [results.of(aten.add.Tensor, (torch.tensor(value), 1), {}).item() for value in (1, 2)] == [2, 3]


def test_each_result_is_a_new_tensor() -> None:
    results = Results()
    made = [results.of(aten.mul.Tensor, (X, 2.0), {}) for _ in range(3)]
    assert len({tensor.untyped_storage()._cdata for tensor in made}) == 3


@pytest.mark.parametrize(
    ("func", "pure", "views"),
    [
        (aten.mul.Tensor, True, False),
        (aten.mul_.Tensor, False, False),
        (aten.add.out, False, False),
        (aten.view.default, False, True),
        (aten.split.Tensor, False, True),
        (aten.reshape.default, False, False),  # a view or a copy
        (aten.resize_.default, False, False),
    ],
)
def test_an_operators_schema_says_what_it_returns(func: Any, pure: bool, views: bool) -> None:
    assert (is_pure(func), returns_views(func)) == (pure, views)
