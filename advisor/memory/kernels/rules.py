"""Operations whose kernels allocate more than their outputs, and cuBLAS' workspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.memory.kernels.attention import efficient_backward, flash_backward, flash_backward_of_package
from advisor.memory.kernels.call import NOTHING, Call, Inside, Rule, copy_if_strided
from advisor.memory.kernels.hardware import Cpu, Gpu, Hardware
from advisor.memory.kernels.quantized import (
    adam_8bit_on_cpu,
    adam_32bit_on_cpu,
    gemm_4bit,
    gemm_4bit_on_cpu,
    quantize_4bit_on_cpu,
)
from advisor.units import KIB, MIB


def embedding_backward(call: Call) -> Inside:
    """Above 3,072 tokens: two sorted index lists, three segment lists and an fp32 row for each token.

    bytes = 6·8·N + 4·N·hidden. Source: cuda/Embedding.cu (embedding_dense_backward_cuda),
    cuda/EmbeddingBackwardKernel.cu (embedding_backward_cuda_kernel, grad_weight_per_segment).
    """
    gradient, indices = call.args[0], call.args[1]
    tokens = indices.numel()
    copies = copy_if_strided(gradient)
    if tokens <= 3072:
        return Inside(first=copies)
    lists = (8 * tokens,)
    rows = 4 * tokens * gradient.size(-1)
    return Inside(first=(*copies, *lists, *lists), then=(*(4 * lists), rows))


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


def promotion_in_place_on_cpu(call: Call) -> Inside:
    """As `promotion_on_cpu`; a result that is narrower is computed in the wider dtype beside the copy of its old value.

    Source: ATen/TensorIterator.cpp (cast_common_dtype_to_outputs).
    """
    import torch

    copies = promotion_on_cpu(call).first
    result, other = call.args[:2]
    if copies and torch.promote_types(result.dtype, other.dtype) != result.dtype:
        copies = (*copies, *copies)
    return Inside(first=copies)


def safe_softmax(call: Call) -> Inside:
    """Which scores are minus infinity: a byte each. Source: ATen/native/transformers/attention.cpp (_safe_softmax)."""
    return Inside(then=(call.args[0].numel(),))


def rules(hardware: Hardware) -> Mapping[Any, Rule]:
    """Operations whose kernels allocate more than their outputs."""
    return _cpu_rules() if isinstance(hardware, Cpu) else _gpu_rules()


def _cpu_rules() -> Mapping[Any, Rule]:
    import torch

    aten = torch.ops.aten
    found: dict[Any, Rule] = {}
    for name in ("add", "sub", "mul", "div"):
        found[getattr(aten, name).Tensor] = promotion_on_cpu
        found[getattr(aten, f"{name}_").Tensor] = promotion_in_place_on_cpu
    found[aten._safe_softmax.default] = safe_softmax
    bitsandbytes = getattr(torch.ops, "bitsandbytes", None)
    if bitsandbytes is not None and hasattr(bitsandbytes, "gemm_4bit"):
        found[bitsandbytes.gemm_4bit.default] = gemm_4bit_on_cpu
        found[bitsandbytes.quantize_4bit.default] = quantize_4bit_on_cpu
    if bitsandbytes is not None and hasattr(bitsandbytes, "optimizer_update_8bit_blockwise"):
        found[bitsandbytes.optimizer_update_8bit_blockwise.default] = adam_8bit_on_cpu
        found[bitsandbytes.optimizer_update_32bit.default] = adam_32bit_on_cpu
    return found


def _gpu_rules() -> Mapping[Any, Rule]:
    import torch

    aten = torch.ops.aten
    found: dict[Any, Rule] = {
        aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
        aten._flash_attention_backward.default: flash_backward_of_package,
        aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
        aten.embedding_dense_backward.default: embedding_backward,
        aten._safe_softmax.default: safe_softmax,
    }
    bitsandbytes = getattr(torch.ops, "bitsandbytes", None)
    if bitsandbytes is not None and hasattr(bitsandbytes, "gemm_4bit"):
        found[bitsandbytes.gemm_4bit.default] = gemm_4bit
    return found


def last_output_first(hardware: Hardware) -> frozenset[Any]:
    """Operations that make their last output before the others: bitsandbytes quantises into statistics, then codes.

    Which comes first decides which hole of the cache each takes.
    Source: bitsandbytes backends/cuda/ops.py (quantize_4bit, quantize_blockwise).
    """
    import torch

    bitsandbytes = getattr(torch.ops, "bitsandbytes", None)
    if isinstance(hardware, Cpu) or bitsandbytes is None or not hasattr(bitsandbytes, "quantize_4bit"):
        return frozenset()
    return frozenset({bitsandbytes.quantize_4bit.default, bitsandbytes.quantize_blockwise.default})


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
