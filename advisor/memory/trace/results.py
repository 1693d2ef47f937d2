"""Results without storage, kept by what they were computed from.

Many of torch's meta functions are written in Python and take half a trace's time, and a model asks the same of
them in every layer: the shape, strides and dtype of a product follow from those of its factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_META = torch.device("meta")
_PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


def is_pure(func: Any) -> bool:
    """Whether an operator, by its schema, neither changes its arguments nor returns views of them."""
    schema = getattr(func, "_schema", None)  # a higher-order operator has none
    return (
        schema is not None
        and not schema.is_mutable
        and all(one.alias_info is None for one in (*schema.arguments, *schema.returns))
    )


def returns_views(func: Any) -> bool:
    """Whether an operator returns only views of its arguments; one that torch composes of others may copy."""
    schema = getattr(func, "_schema", None)
    if schema is None or schema.is_mutable or not schema.returns:
        return False
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(func._name, "CompositeImplicitAutograd")
    return not composed and all(one.alias_info is not None for one in schema.returns)


class Results:
    """Calls pure operators on meta tensors, each once for the same shapes, strides, dtypes and numbers."""

    def __init__(self) -> None:
        self._known: dict[Any, Callable[[], Any]] = {}

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func(*args, **kwargs)` returns."""
        try:
            key = (func._name, _described(args), _described(kwargs.items()) if kwargs else None)
        except _UndescribedError:
            return func(*args, **kwargs)
        make = self._known.get(key)
        if make is None:
            result = func(*args, **kwargs)
            make = _maker(result, _storages((args, tuple(kwargs.values()))))
            # Known as what cannot be made: the operator is asked again.
            self._known[key] = make or (lambda: NotImplemented)
            return result
        made = make()
        return func(*args, **kwargs) if made is NotImplemented else made


class _UndescribedError(Exception):
    """Among the arguments is what its description does not determine."""


def _described(values: Iterable[Any]) -> tuple[Any, ...]:
    """All that a meta function can know of its arguments; hashable, and equal only for what is alike."""
    described: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if not value.is_meta:
                raise _UndescribedError
            described += (value.shape, value.stride(), value.dtype)
        elif isinstance(value, (tuple, list)):
            described.append(_described(value))
        elif isinstance(value, _PLAIN):
            described += (value.__class__, value)  # 1, 1.0 and True are equal, and promote differently
        else:
            raise _UndescribedError
    return tuple(described)


def _storages(args: Any) -> set[int]:
    if isinstance(args, torch.Tensor):
        return {args.untyped_storage()._cdata}
    if isinstance(args, (tuple, list)):
        return set().union(*map(_storages, args))
    return set()


def _maker(result: Any, taken: set[int]) -> Callable[[], Any] | None:
    """What makes another such result, or None where that is not plain; `taken` are storages that are not its own."""
    if isinstance(result, torch.Tensor):
        return _tensor_maker(result, taken)
    if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
        makers = []
        for item in result:
            maker = _maker(item, taken)
            if maker is None:
                return None
            makers.append(maker)
            taken = taken | _storages(item)
        kind = type(result)
        return lambda: kind([make() for make in makers])
    if isinstance(result, _PLAIN):
        return lambda: result
    return None


def _tensor_maker(tensor: torch.Tensor, taken: set[int]) -> Callable[[], torch.Tensor] | None:
    shape, stride, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
    storage = tensor.untyped_storage()
    own = type(tensor) is torch.Tensor and tensor.is_meta and storage._cdata not in taken
    if not own or tensor.is_complex() or tensor.is_sparse or tensor.storage_offset():
        return None

    def make() -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=_META)

    return make if make().untyped_storage().nbytes() == storage.nbytes() else None
