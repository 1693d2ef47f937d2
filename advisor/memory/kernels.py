"""Memory that exists only inside CUDA kernels, and which attention kernel runs.

Sources are files of pytorch/pytorch (aten/src/ATen/native/...) and bitsandbytes 0.50.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from advisor.units import KIB, MIB

if TYPE_CHECKING:
    import torch

    from advisor import hardware

AttentionBackend = Literal["flash", "efficient", "cudnn", "math"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What kernels look at before they choose a path."""

    capability: tuple[int, int] = (8, 0)
    """Compute capability."""

    multiprocessors: int = 108
    """Streaming multiprocessors; bitsandbytes and flash attention split work by their number."""

    total_bytes: int | None = None
    """What a process may have; None replays without a limit."""

    has_flash: bool = True
    """torch's Windows builds have no flash attention."""

    prefers_cudnn: bool = False
    """cuDNN attention first, as torch built with a recent cuDNN does on Hopper."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """torch's CPU kernels, on which a trace can be held against real execution."""


Hardware = Gpu | Cpu

ASSUMED_CAPABILITY = (8, 0)
"""Of a GPU about which nobody said more than its memory."""

ASSUMED_MULTIPROCESSORS = 108
"""An A100's, where no profile counts them. They decide only how bitsandbytes multiplies few tokens."""

_CUDNN_FIRST = (9, 10)
"""Majors of the capabilities on which torch asks cuDNN first, given cuDNN 9.15.1 or newer (torch 2.10 on).

Source: transformers/cuda/sdp_utils.cpp (check_prefer_cudnn_attention).
"""


def hardware_of(gpu: hardware.Gpu) -> Gpu:
    """What kernels look at, of a GPU as the rest of the project knows it.

    A capability or a number of multiprocessors that nobody said is an A100's. Flash attention is this
    machine's matter, not the card's: torch's Windows builds leave it out.
    """
    count = gpu.profile.multiprocessors if gpu.profile is not None else None
    return Gpu(
        capability=gpu.capability or ASSUMED_CAPABILITY,
        multiprocessors=count or ASSUMED_MULTIPROCESSORS,
        total_bytes=gpu.total_bytes,
        has_flash=sys.platform != "win32",
        prefers_cudnn=(gpu.capability or ASSUMED_CAPABILITY)[0] in _CUDNN_FIRST,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """The arguments of scaled_dot_product_attention; tensors are (batch, heads, tokens, head size)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """An attention kernel and why the better ones were passed over."""

    name: AttentionBackend
    reason: str


def choose_attention(call: AttentionCall, gpu: Gpu) -> Choice:
    """The kernel that scaled_dot_product_attention runs, and the reason.

    Source: transformers/cuda/sdp_utils.cpp (priority_order, can_use_flash_attention,
    can_use_mem_efficient_attention, can_use_cudnn_attention) and sdp_utils_cpp.h.
    """
    tried: list[str] = []
    checks: list[tuple[AttentionBackend, str | None]] = [
        ("flash", _why_not_flash(call, gpu)),
        ("efficient", _why_not_efficient(call, gpu)),
    ]
    if gpu.prefers_cudnn:
        checks.insert(0, ("cudnn", _why_not_cudnn(call, gpu)))
    for backend, refusal in checks:
        if refusal is None:
            return Choice(backend, "; ".join(tried) or "the first choice")
        tried.append(f"no {backend}: {refusal}")
    return Choice("math", "; ".join(tried))


def _grouped_without_support(call: AttentionCall) -> bool:
    return call.query.size(1) != call.key.size(1)


def _wrong_heads(call: AttentionCall) -> bool:
    """Unequal heads that no kernel with grouped-query support may share."""
    return _grouped_without_support(call) and not call.grouped


def _why_not_flash(call: AttentionCall, gpu: Gpu) -> str | None:
    import torch

    size = call.query.size(-1)
    if not gpu.has_flash:
        return "this torch was built without it"
    if gpu.capability < (8, 0):
        return "needs compute capability 8.0"
    if call.mask is not None:
        return "takes no mask"
    if call.query.dtype not in (torch.float16, torch.bfloat16):
        return "computes in 16 bits only"
    if size > 256 or call.value.size(-1) != size or call.key.size(-1) != size:
        return "needs one head size, at most 256"
    if _no_flash_backward(call, gpu):
        return "has no backward for this head size on this capability"
    if call.causal and call.query.size(2) != call.key.size(2):
        return "needs as many keys as queries when causal"
    if _wrong_heads(call):
        return "needs as many key heads as query heads"
    return None


def _no_flash_backward(call: AttentionCall, gpu: Gpu) -> bool:
    """Heads above 192 on consumer Ampere, Ada and Blackwell."""
    size = call.query.size(-1)
    narrow = (8, 6) <= gpu.capability <= (8, 9) or (12, 0) <= gpu.capability <= (12, 1)
    return narrow and _needs_gradient(call) and size > 192 and not (call.dropout == 0 and size > 224)


def _needs_gradient(call: AttentionCall) -> bool:
    import torch

    return torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, call.key, call.value))


def _why_not_efficient(call: AttentionCall, gpu: Gpu) -> str | None:
    import torch

    dtype = call.query.dtype
    if dtype not in (torch.float16, torch.float32, torch.bfloat16):
        return "does not compute in this dtype"
    if dtype == torch.bfloat16 and gpu.capability < (8, 0):
        return "bfloat16 needs compute capability 8.0"
    if _grouped_without_support(call):
        return "needs as many key heads as query heads"
    alignment = _gemm_alignment(dtype.itemsize, gpu)
    if call.query.size(-1) % alignment or call.value.size(-1) % alignment:
        return f"needs head sizes that are multiples of {alignment}"
    return None


def _gemm_alignment(itemsize: int, gpu: Gpu) -> int:
    """Elements that a tensor-core load takes. Source: sdp_utils.cpp, minimum_gemm_alignment."""
    tensor_cores = gpu.capability >= (8, 0) or (gpu.capability >= (7, 0) and itemsize == 2)
    alignment = 4 if gpu.capability >= (8, 0) else 1
    return max(alignment, 16 // itemsize) if tensor_cores else alignment


def _why_not_cudnn(call: AttentionCall, gpu: Gpu) -> str | None:
    import torch

    if gpu.capability < (8, 0):
        return "needs compute capability 8.0"
    if call.query.dtype not in (torch.float16, torch.bfloat16):
        return "computes in 16 bits only"
    sizes = (call.query.size(-1), call.value.size(-1))
    if max(sizes) > 128 or any(size % 8 for size in sizes):
        return "needs head sizes that are multiples of 8, at most 128"
    if _wrong_heads(call):
        return "needs as many key heads as query heads"
    return None


@dataclass(frozen=True, slots=True)
class Inside:
    """Sizes in bytes of what a kernel allocates and frees; `first` comes before its outputs."""

    first: tuple[int, ...] = ()
    then: tuple[int, ...] = ()


NOTHING = Inside()


@dataclass(frozen=True, slots=True)
class Call:
    """An operation's arguments, and the hardware it runs on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hardware: Hardware

    @property
    def gpu(self) -> Gpu:
        """The hardware of a rule for GPUs."""
        assert isinstance(self.hardware, Gpu)
        return self.hardware


Rule = Callable[[Call], Inside]
"""What an operation's kernel allocates."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy_if_strided(tensor: torch.Tensor) -> tuple[int, ...]:
    """What `tensor.contiguous()` allocates."""
    return () if tensor.is_contiguous() else (_bytes(tensor),)


def flash_backward(call: Call) -> Inside:
    """Arguments as (batch, heads, tokens, head size).

    bytes = softmax_d 4·B·H·⌈S⌉₁₂₈ + dq_accum 4·B·⌈S⌉₁₂₈·H·⌈D⌉ + dk, dv for every query head if grouped
    + contiguous copies of the gradient and the output.
    Source: flash_attn/flash_api.cpp (mha_bwd), attention_backward.cu (_flash_attention_backward).
    """
    gradient, query, key, _, output = (tensor.transpose(1, 2) for tensor in call.args[:5])
    return _flash_backward_inside(gradient, query, key, output)


def flash_backward_of_package(call: Call) -> Inside:
    """As `flash_backward`, arguments as (batch, tokens, heads, head size)."""
    gradient, query, key, _, output = call.args[:5]
    if query.dim() == 3:
        return _flash_packed_backward(call.args)
    return _flash_backward_inside(gradient, query, key, output)


def _flash_packed_backward(args: tuple[Any, ...]) -> Inside:
    """Sequences one after the other, as (tokens, heads, head size): 128 rows more for each.

    Source: flash_attn/flash_api.cpp (mha_varlen_bwd).
    """
    gradient, query, key, _, output, _, lengths = args[:7]
    tokens, heads, size = query.shape
    rows = tokens + 128 * (lengths.numel() - 1)
    head = _round_up(size, 32 if size <= 128 else 64)
    expanded = 2 * (key.size(0) * heads * size * query.element_size(),)
    return Inside(
        first=(*_copy_if_strided(gradient), *_copy_if_strided(output)),
        then=(4 * heads * rows, 4 * rows * heads * head, *(expanded if key.size(1) != heads else ())),
    )


def _flash_backward_inside(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, output: torch.Tensor
) -> Inside:
    batch, tokens, heads, size = query.shape
    rounded = _round_up(tokens, 128)
    head = _round_up(size, 32 if size <= 128 else 64)
    expanded = 2 * (batch * key.size(1) * heads * size * query.element_size(),)
    return Inside(
        first=(*_copy_if_strided(gradient), *_copy_if_strided(output)),
        then=(
            4 * batch * heads * rounded,
            4 * batch * rounded * heads * head,
            *(expanded if key.size(2) != heads else ()),
        ),
    )


def efficient_backward(call: Call) -> Inside:
    """The row sums of gradient × output, and fp32 accumulators for what registers cannot hold.

    bytes = delta 4·B·H·S (in fp32 its product 4·B·S·H·D too) + `_efficient_workspace`.
    Source: attention_backward.cu (_efficient_attention_backward).
    """
    gradient, query, key, value = (tensor.transpose(1, 2) for tensor in call.args[:4])
    batch, tokens, heads, size = query.shape
    delta = 4 * batch * heads * tokens
    product = (4 * batch * tokens * heads * value.size(3), delta) if query.element_size() == 4 else ()
    block = _efficient_block(query.element_size() == 2, max(size, value.size(3)), float(call.args[9]) > 0, call.gpu)
    workspace = _efficient_workspace(
        batch * heads, tokens, key.size(1), (size, value.size(3)), block, query.element_size() == 2
    )
    return Inside(first=_copy_if_strided(gradient), then=(*product, delta, workspace))


@dataclass(frozen=True, slots=True)
class _Block:
    """The tile of a memory-efficient backward kernel, and the head size it is compiled for."""

    queries: int
    keys: int
    largest_head: int


_SMALL_SHARED_MEMORY = ((7, 5), (8, 6), (8, 9), (12, 0), (12, 1))
"""Capabilities whose shared memory does not hold the tiles of 128 queries."""


def _efficient_block(is_half: bool, head_size: int, dropout: bool, gpu: Gpu) -> _Block:
    """The first compiled kernel that takes this head size and fits into shared memory.

    Source: mem_eff_attention/kernels/generate_kernels.py (BwdKernel.get_all, its sort order).
    """
    largest = next(limit for limit in (32, 64, 128, 2**16) if head_size <= limit)
    if is_half and not dropout and 64 < head_size <= 96 and gpu.capability in ((8, 6), (8, 9)):
        return _Block(128, 64, 96)
    wide = gpu.capability >= (8, 0) or (gpu.capability >= (7, 0) and is_half)
    if not (wide and largest > 64 and is_half) or gpu.capability in _SMALL_SHARED_MEMORY:
        return _Block(64, 64, largest)
    in_registers = largest <= 128 and gpu.capability >= (8, 0)
    return _Block(128, 128 if in_registers else 64, largest)


def _efficient_workspace(
    sequences: int, queries: int, keys: int, head_sizes: tuple[int, int], block: _Block, is_half: bool
) -> int:
    """bytes = 4·B·H·(dk, dv rows where they are not in registers + dq tiles with a 16-byte lock each).

    Source: mem_eff_attention/kernel_backward.h (workspace_elements_gk, _gv, _gq, kNeedsAccumGradK).
    """
    size, value_size = head_sizes
    rows = _round_up(keys, block.keys)
    elements = 0
    if is_half and block.largest_head > block.queries:
        elements += rows * (_round_up(size, block.queries) + _round_up(value_size, block.queries))
    tiles = -(-queries // block.queries) * -(-size // block.queries)
    elements += tiles * (block.queries * block.queries + 4)
    return 4 * sequences * _round_up(elements, 4)


def embedding_backward(call: Call) -> Inside:
    """Above 3,072 tokens: two sorted index lists, three segment lists and an fp32 row for each token.

    bytes = 6·8·N + 4·N·hidden. Source: cuda/Embedding.cu (embedding_dense_backward_cuda),
    cuda/EmbeddingBackwardKernel.cu (embedding_backward_cuda_kernel, grad_weight_per_segment).
    """
    gradient, indices = call.args[0], call.args[1]
    tokens = indices.numel()
    copies = _copy_if_strided(gradient)
    if tokens <= 3072:
        return Inside(first=copies)
    lists = (8 * tokens,)
    rows = 4 * tokens * gradient.size(-1)
    return Inside(first=(*copies, *lists, *lists), then=(*(4 * lists), rows))


def gemm_4bit(call: Call) -> Inside:
    """Many tokens: the whole weight in 16 bits, and two fp32 copies of the scales if they are nested.

    bytes = N·K·itemsize + 2·4·⌈N·K/64⌉. Few tokens: a fused kernel that dequantises in registers.
    Source: bitsandbytes backends/cuda/ops.py (gemm_4bit, _dequant_linear_fallback).
    """
    inputs, _, shape, _, blocksize = call.args[:5]
    tokens = inputs.numel() // inputs.size(-1)
    if uses_fused_4bit(tokens, shape[0], shape[1], blocksize, inputs.dtype, call.gpu):
        return Inside(first=_copy_if_strided(inputs))
    nested = call.kwargs.get("absmax_8bit")
    scales = () if nested is None else 2 * (4 * nested.numel(),)
    return Inside(first=(*scales, shape[0] * shape[1] * inputs.element_size()))


def uses_fused_4bit(tokens: int, rows: int, columns: int, blocksize: int, dtype: Any, gpu: Gpu) -> bool:
    """bitsandbytes' own choice, asked with this GPU's properties.

    Versions without it multiply from 4 bits for a single token only, and never where a gradient is needed.
    """
    if tokens > _FUSED_4BIT_LIMIT or columns % blocksize:
        return False
    choose = _bitsandbytes_choice((gpu.multiprocessors, *gpu.capability))
    return choose is not None and bool(choose(0, dtype, tokens, rows, columns))


_FUSED_4BIT_LIMIT = 1536
"""bitsandbytes dequantises above this many tokens on every GPU. Source: _gemm_4bit_custom_max_m."""


@cache
def _bitsandbytes_choice(properties: tuple[int, int, int]) -> Callable[..., bool] | None:
    """The installed `_gemm_4bit_use_custom_cuda`; its module imports only where torch has CUDA."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

    import torch

    package = find_spec("bitsandbytes")
    if package is None or package.origin is None:
        return None
    source = Path(package.origin).parent / "backends" / "cuda" / "ops.py"
    if not source.exists():
        return None
    wanted = [node for node in ast.parse(source.read_text()).body if _defines_4bit_choice(node)]
    if len(wanted) < 2:
        return None
    scope: dict[str, Any] = {
        "torch": torch,
        "functools": functools,
        "_gpu_dispatch_props": lambda _: properties,
    }
    exec(compile(ast.Module(wanted, []), str(source), "exec"), scope)
    choice: Callable[..., bool] = scope["_gemm_4bit_use_custom_cuda"]
    return choice


def _defines_4bit_choice(node: Any) -> bool:
    """The function, and the constant it compares with."""
    if getattr(node, "name", None) == "_gemm_4bit_use_custom_cuda":
        return True
    targets = getattr(node, "targets", ())
    return any(getattr(target, "id", None) == "_GEMM_4BIT_CUSTOM_FLOOR_M" for target in targets)


def gemm_4bit_on_cpu(call: Call) -> Inside:
    """The whole weight in the input's dtype and one fp32 copy of nested scales.

    Source: bitsandbytes backends/default/ops.py (_gemm_4bit_default_impl).
    """
    inputs, _, shape = call.args[:3]
    nested = call.kwargs.get("absmax_8bit")
    scales = () if nested is None else (4 * nested.numel(),)
    return Inside(first=(*scales, shape[0] * shape[1] * inputs.element_size()))


def promotion_on_cpu(call: Call) -> Inside:
    """Elementwise operations on two dtypes copy the narrower operand; CUDA converts in registers.

    Source: ATen/TensorIterator.cpp (promote_inputs_to_common_dtype).
    """
    import torch

    tensors = [arg for arg in call.args[:2] if isinstance(arg, torch.Tensor) and arg.dim() > 0]
    if len(tensors) < 2 or tensors[0].dtype == tensors[1].dtype:
        return NOTHING
    common = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    return Inside(first=tuple(t.numel() * common.itemsize for t in tensors if t.dtype != common))


def rules(hardware: Hardware) -> Mapping[Any, Rule]:
    """Operations whose kernels allocate more than their outputs."""
    return _cpu_rules() if isinstance(hardware, Cpu) else _gpu_rules()


def _cpu_rules() -> Mapping[Any, Rule]:
    import torch

    aten = torch.ops.aten
    names = ("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_")
    found: dict[Any, Rule] = {getattr(aten, name).Tensor: promotion_on_cpu for name in names}
    bitsandbytes = getattr(torch.ops, "bitsandbytes", None)
    if bitsandbytes is not None and hasattr(bitsandbytes, "gemm_4bit"):
        found[bitsandbytes.gemm_4bit.default] = gemm_4bit_on_cpu
    return found


def _gpu_rules() -> Mapping[Any, Rule]:
    import torch

    aten = torch.ops.aten
    found: dict[Any, Rule] = {
        aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
        aten._flash_attention_backward.default: flash_backward_of_package,
        aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
        aten.embedding_dense_backward.default: embedding_backward,
    }
    bitsandbytes = getattr(torch.ops, "bitsandbytes", None)
    if bitsandbytes is not None and hasattr(bitsandbytes, "gemm_4bit"):
        found[bitsandbytes.gemm_4bit.default] = gemm_4bit
    return found


def cublas_operations() -> frozenset[Any]:
    """Operations that use a cuBLAS handle, and so its workspace."""
    import torch

    aten = torch.ops.aten
    names = ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot")
    found = {getattr(aten, name).default for name in names}
    bitsandbytes = getattr(torch.ops, "bitsandbytes", None)
    if bitsandbytes is not None and hasattr(bitsandbytes, "gemm_4bit"):
        found.add(bitsandbytes.gemm_4bit.default)
    return frozenset(found)


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """One workspace a thread: 8 MiB and 8 × 16 KiB, or 32 MiB on Hopper and later data-centre cards.

    Source: cuda/CublasHandlePool.cpp (parseChosenWorkspaceSize).
    """
    if gpu.capability[0] in (9, 10):
        return 32 * MIB
    return 2 * 4096 * KIB + 8 * 16 * KIB
