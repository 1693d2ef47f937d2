"""Make tensors without storage behave as CUDA's do, or the CPU's.

`torch.autocast` refuses the meta device, and composite operations choose their CUDA form only for CUDA
tensors. Autocast on CUDA is a dispatch key above autograd; this module includes such a key (PrivateUse1's,
which nothing else uses) for the whole trace and puts there what CUDA does: autocast's casts, the fused
dropout, and scaled_dot_product_attention's choice of kernel. The CPU's autocast has other lists of operations.

Source: ATen/autocast_mode.h and autocast_mode.cpp (lists and cached_cast), ATen/native/Dropout.cpp.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from advisor.memory.kernels import AttentionCall, Cpu, Gpu, Hardware, choose_attention
from advisor.memory.trace.attention import attention_on_cpu, run_attention
from advisor.memory.trace.autocast_lists import CPU_FP32, CPU_LOWER, CPU_PROMOTE, FP32, FP32_RESULT, LOWER, PROMOTE
from advisor.memory.trace.experts import grouped_products
from advisor.memory.trace.libraries import (
    chunked_loss_options,
    device_lists_with_meta,
    flash_attention_package,
    paged_memory,
)

_KEY: Any = torch._C.DispatchKey.AutocastPrivateUse1  # type: ignore[attr-defined]
_KEYS = torch._C.DispatchKeySet(_KEY)


class DeviceSemantics:
    """A context in which meta tensors dispatch as tensors on `hardware` would."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._kind = "cpu" if isinstance(hardware, Cpu) else "cuda"
        self._casts: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._depth = 0
        self._stack = ExitStack()

    def __enter__(self) -> DeviceSemantics:
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(torch.library.fallthrough_kernel, _KEY.name)
        kernels = torch.library.Library("aten", "IMPL")
        for name, kernel in self._kernels():
            kernels.impl(name, kernel, _KEY.name)
        self._stack.callback(everything._destroy)
        self._stack.callback(kernels._destroy)
        torch.set_autocast_enabled("privateuseone", True)
        self._stack.callback(torch.set_autocast_enabled, "privateuseone", False)
        self._stack.enter_context(torch._C._IncludeDispatchKeyGuard(_KEY))
        self._stack.enter_context(device_lists_with_meta(self.hardware))
        self._stack.enter_context(self._autocast_for_meta())
        self._stack.enter_context(flash_attention_package())
        self._stack.enter_context(paged_memory(self.hardware))
        self._stack.enter_context(chunked_loss_options(self.hardware))
        self._stack.enter_context(grouped_products(self.hardware))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def autocast(self, dtype: torch.dtype, *, enabled: bool = True) -> Iterator[None]:
        """`torch.autocast` of the device with that dtype; `torch.is_autocast_enabled()` asks about CUDA's."""
        kind = self._kind
        before = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._casts.clear()
            torch.set_autocast_enabled(kind, before[0])
            torch.set_autocast_dtype(kind, before[1])

    def _kernels(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        yield "scaled_dot_product_attention", self._attention
        on_cpu = isinstance(self.hardware, Cpu)
        if not on_cpu:
            yield "dropout", self._dropout
        for names, adapt in (
            (CPU_LOWER if on_cpu else LOWER, self._lower),
            (CPU_FP32 if on_cpu else FP32, self._to_fp32),
            ([] if on_cpu else FP32_RESULT, self._to_fp32_result),
            (CPU_PROMOTE if on_cpu else PROMOTE, self._promote),
        ):
            for name in names:
                operation = _HALF_TO_FLOAT.get(name) or _overload(name)
                yield name, partial(_adapted, self._kind, operation, adapt)

    def _cast(self, dtype: torch.dtype, value: Any) -> Any:
        """autocast's cached_cast: fp32 parameters keep their 16-bit copy until the outermost exit."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(dtype, item) for item in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        keep = value.dtype == torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()
        if not (keep and dtype != torch.float32 and torch.is_autocast_cache_enabled()):
            return value.to(dtype)
        kept = self._casts.get(id(value))
        if kept is not None and kept[0]() is value:
            return kept[1]
        cast = value.to(dtype)
        self._casts[id(value)] = (weakref.ref(value), cast)
        return cast

    def _lower(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._all(torch.get_autocast_dtype(self._kind), args, kwargs)

    def _to_fp32(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._all(torch.float32, args, kwargs)

    def _all(
        self, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(self._cast(dtype, value) for value in args),
            {name: self._cast(dtype, value) for name, value in kwargs.items()},
        )

    def _to_fp32_result(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Reductions accumulate into an fp32 result unless the caller names a dtype."""
        first = args[0]
        named = kwargs.get("dtype") is not None or any(isinstance(arg, torch.dtype) for arg in args[1:])
        if not named and first.is_floating_point() and first.dtype in (torch.float16, torch.bfloat16):
            kwargs = {**kwargs, "dtype": torch.float32}
            args = tuple(arg for arg in args if arg is not None) if args[-1] is None else args
        return args, kwargs

    def _promote(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        each = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        tensors = [arg for arg in each if isinstance(arg, torch.Tensor)]
        widest = torch.float32 if any(t.dtype == torch.float32 for t in tensors) else None
        return self._all(widest, args, kwargs) if widest is not None else (args, kwargs)

    def _dropout(self, tensor: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        """CUDA's fused dropout saves a mask of one byte an element. Source: ATen/native/Dropout.cpp."""
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if train and 0 < p < 1 and tensor.numel() > 0:
                fused: tuple[torch.Tensor, torch.Tensor] = (
                    torch.native_dropout(tensor, p, train)
                    if tensor.requires_grad
                    else torch.ops.aten._fused_dropout.default(tensor, 1 - p)
                )
                return fused[0]
            plain: torch.Tensor = torch.ops.aten.dropout.default(tensor, p, train)
            return plain

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled(self._kind):
            dtype = torch.get_autocast_dtype(self._kind)
            query, key, value, attn_mask = (self._cast(dtype, t) for t in (query, key, value, attn_mask))
        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            mask=attn_mask,
            dropout=dropout_p,
            causal=is_causal,
            scale=scale,
            grouped=enable_gqa,
        )
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if isinstance(self.hardware, Gpu):
                return run_attention(call, choose_attention(call, self.hardware).name)
            return attention_on_cpu(call)

    @contextmanager
    def _autocast_for_meta(self) -> Iterator[None]:
        """torch.autocast of the meta device is this one, and checkpoint() saves and restores its state."""
        kind = self._kind
        saved: tuple[Any, ...] = (
            torch_checkpoint._get_autocast_kwargs,
            torch.amp.is_autocast_available,
            torch.amp.autocast,
        )

        def state(device_type: str = kind) -> Any:
            if device_type != "meta":
                return saved[0](device_type)
            on = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
            return on, saved[0]("cpu")[1]

        def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **rest: Any) -> Any:
            if device_type != "meta":
                return saved[2](device_type, dtype, enabled, **rest)
            return self.autocast(dtype or torch.get_autocast_dtype(kind), enabled=enabled)

        def asked_as_device(ask: Callable[..., Any]) -> Callable[..., Any]:
            # transformers asks for a query's own device (integrations/flash_attention.py, get_target_dtype).
            return lambda *kinds: ask(*(kind if each == "meta" else each for each in kinds))

        modules: tuple[tuple[Any, str, Any], ...] = (
            (torch_checkpoint, "_get_autocast_kwargs", state),
            (torch.amp, "is_autocast_available", lambda asked: asked == "meta" or saved[1](asked)),
            (torch.amp, "autocast", autocast),
            (torch, "autocast", autocast),
            (torch, "is_autocast_enabled", asked_as_device(torch.is_autocast_enabled)),
            (torch, "get_autocast_dtype", asked_as_device(torch.get_autocast_dtype)),
        )
        originals = [(module, name, getattr(module, name)) for module, name, _ in modules]
        for module, name, replacement in modules:
            setattr(module, name, replacement)
        try:
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _softmax(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """From float16 to fp32 in one kernel, without a copy. Source: ATen/native/SoftMax.cpp (softmax)."""
    fused = tensor.dtype == torch.float16 and dtype == torch.float32
    return torch._softmax(tensor, dim, True) if fused else torch.ops.aten.softmax.int(tensor, dim, dtype)


def _log_softmax(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """As `_softmax`."""
    fused = tensor.dtype == torch.float16 and dtype == torch.float32
    return torch._log_softmax(tensor, dim, True) if fused else torch.ops.aten.log_softmax.int(tensor, dim, dtype)


_HALF_TO_FLOAT: dict[str, Callable[..., torch.Tensor]] = {"softmax.int": _softmax, "log_softmax.int": _log_softmax}


def _adapted(
    kind: str,
    operation: Any,
    adapt: Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_KEYS):
        if torch.is_autocast_enabled(kind):
            args, kwargs = adapt(args, kwargs)
        return operation(*args, **kwargs)
