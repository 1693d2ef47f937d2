"""Parts of libraries that look at a device, made to see the traced one behind a tensor without storage."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from advisor.memory.kernels import Cpu, Gpu, Hardware


def import_bitsandbytes() -> None:
    """Import it, where it is installed, without the compiler that its CPU operations ask torch for.

    That takes a second, and a trace runs none of them. They stay what they were before compilation.
    Source: bitsandbytes backends/default/ops.py (_try_torch_compile).
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    compile_ = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile_


@contextmanager
def device_lists_with_meta(hardware: Hardware) -> Iterator[None]:
    """torch picks foreach and fused optimizers, and foreach norms, by device type."""
    names = ["_get_fused_kernels_supported_devices"]
    if isinstance(hardware, Gpu):
        names.append("_get_foreach_kernels_supported_devices")
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    saved = []
    for module in (optimizer, _foreach_utils):
        for name in names:
            original = getattr(module, name)
            saved.append((module, name, original))
            setattr(module, name, lambda original=original: [*original(), "meta"])
    try:
        yield
    finally:
        for module, name, original in saved:
            setattr(module, name, original)


@contextmanager
def flash_attention_package() -> Iterator[None]:
    """Give transformers' flash_attention_2 torch's own flash kernel, which allocates the same.

    Source: transformers modeling_flash_attention_utils.py; flash-attn flash_attn_interface.py.
    """
    from transformers import modeling_flash_attention_utils as utils

    loaded = (utils._loaded_implementation, utils._lazy_imports)

    def functions(*_: Any, **__: Any) -> tuple[Any, ...]:
        return _flash_dense, _flash_packed, None, utils._pad_input, utils._unpad_input

    utils._loaded_implementation, utils._lazy_imports = None, functions
    try:
        yield
    finally:
        utils._loaded_implementation, utils._lazy_imports = None, loaded[1]


def _flash_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),  # noqa: ARG001 - transformers asks whether the package takes it
    softcap: float = 0.0,  # noqa: ARG001 - the same
) -> torch.Tensor:
    """flash_attn_func; tensors are (batch, tokens, heads, head size)."""
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.size(1), k.size(1), dropout_p, causal, False, scale=softmax_scale
    )[0]
    return output


def _flash_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),  # noqa: ARG001 - transformers asks whether the package takes it
    softcap: float = 0.0,  # noqa: ARG001 - the same
) -> torch.Tensor:
    """flash_attn_varlen_func; tensors are (tokens, heads, head size)."""
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False, scale=softmax_scale
    )[0]
    return output


@contextmanager
def paged_memory(hardware: Hardware) -> Iterator[None]:
    """bitsandbytes' paged states are CUDA managed memory, which torch's allocator never sees; a CPU pages nothing.

    Source: bitsandbytes optim/optimizer.py (get_state_buffer).
    """
    try:
        from bitsandbytes import functional
    except ImportError:
        yield
        return
    saved = (functional.get_paged, functional.prefetch_tensor, functional.fill)

    def get_paged(*shape: int, dtype: torch.dtype = torch.float32, **_: Any) -> torch.Tensor:
        if isinstance(hardware, Cpu):
            return torch.empty(shape, dtype=dtype, device="meta")
        with _disable_current_modes():
            tensor = torch.empty(shape, dtype=dtype, device="meta")
        tensor.is_paged = True  # type: ignore[attr-defined]
        return tensor

    functional.get_paged = get_paged
    functional.prefetch_tensor = lambda *_, **__: None
    functional.fill = lambda *_, **__: None
    try:
        yield
    finally:
        functional.get_paged, functional.prefetch_tensor, functional.fill = saved


@contextmanager
def chunked_loss_options(hardware: Hardware) -> Iterator[None]:
    """linear_cross_entropy picks its accumulation and its chunks by device and dtype.

    Source: torch/nn/modules/linear_cross_entropy_options.py (_AUTO_DEFAULTS, _resolve_auto_acc_dtype).
    """
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        yield
        return
    saved = (options._adjust, options.__dict__["_resolve_auto_acc_dtype"])
    kind = torch.device("cpu" if isinstance(hardware, Cpu) else "cuda")

    def adjust(self: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        return saved[0](self, *args, device=kind if device is not None else None, **kwargs)

    def accumulated_in(dtype: torch.dtype, _: Any) -> torch.dtype | None:
        if isinstance(hardware, Gpu):
            lowest = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}.get(dtype)
            return torch.float32 if lowest is not None and hardware.capability >= lowest else None
        return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None

    options._adjust, options._resolve_auto_acc_dtype = adjust, staticmethod(accumulated_in)
    try:
        yield
    finally:
        options._adjust, options._resolve_auto_acc_dtype = saved


class _CudaName(str):
    """The name of the meta device, which says that it is CUDA when code asks for its type."""

    __slots__ = ()
    type = "cuda"


class _OnCuda:
    """A tensor that says it is on CUDA; for code that asks, not for operations."""

    device = _CudaName("meta")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def chunked_loss_operation() -> Any:
    """torch's chunked linear_cross_entropy as an operator, or None where torch has none."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    try:
        from torch.nn.modules import linear_cross_entropy  # noqa: F401 - registers it

        return torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default
    except (ImportError, AttributeError):
        return None


def run_chunked_loss(args: tuple[Any, ...], hardware: Hardware) -> Any:
    """The operation's own loop, so that what it allocates is seen; it branches on CUDA.

    Source: torch/nn/modules/linear_cross_entropy.py (_linear_cross_entropy_batch_chunked, _ChunkContext.build).
    """
    from torch.nn.modules import linear_cross_entropy

    given = list(args)
    del given[-4]  # allow_retain_graph
    if isinstance(hardware, Gpu):
        given[0] = _OnCuda(given[0])
    return linear_cross_entropy._linear_cross_entropy_batch_chunked_accumulator(*given)
