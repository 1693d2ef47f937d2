"""Sizes of what lasts: weights, their statistics, adapters, gradients, optimizer states, workspaces."""

from __future__ import annotations

from advisor.memory.ledger import term

_NF4_BLOCK = 64
_ABSMAX_BLOCK = 256


@term("weights")
def weight(elements: int, itemsize: int) -> int:
    """A stored parameter that is not quantised.

    elements × itemsize.
    Source: torch.nn.Parameter.
    """
    return elements * itemsize


@term("weights")
def cast_weight(elements: int) -> int:
    """The 16-bit copy of an fp32 parameter that autocast makes and its matmul keeps for backward.

    elements × 2.
    Source: aten/src/ATen/autocast_mode.cpp, cached_cast.
    """
    return elements * 2


@term("quantization")
def packed_weight(elements: int) -> int:
    """A weight matrix in 4 bits, two elements a byte.

    ⌈elements ÷ 2⌉.
    Source: bitsandbytes.functional.quantize_4bit.
    """
    return (elements + 1) // 2


@term("quantization")
def block_scales(elements: int, itemsize: int) -> int:
    """One scale (absmax) for every 64 weights: fp32, or 8 bits under double quantisation.

    ⌈elements ÷ 64⌉ × itemsize.
    Source: bitsandbytes.functional.quantize_4bit, blocksize 64.
    """
    return -(-elements // _NF4_BLOCK) * itemsize


@term("quantization")
def nested_scales(elements: int) -> int:
    """Double quantisation's fp32 scale for every 256 scales.

    ⌈elements ÷ 64 ÷ 256⌉ × 4.
    Source: bitsandbytes.functional.quantize_blockwise, blocksize 256.
    """
    return -(-elements // (_NF4_BLOCK * _ABSMAX_BLOCK)) * 4


@term("quantization")
def codebook(values: int) -> int:
    """The table of the values that a code stands for: 16 for the weights, 256 for their scales.

    values × 4.
    Source: bitsandbytes.functional.QuantState.code.
    """
    return values * 4


@term("quantization")
def nested_offset() -> int:
    """Double quantisation's mean of the scales, one fp32 scalar a matrix.

    4.
    Source: bitsandbytes.functional.QuantState.offset.
    """
    return 4


@term("workspace")
def dequantized_weight(elements: int, itemsize: int) -> int:
    """A 4-bit matrix expanded to compute with: a temporary of every forward and every backward.

    elements × itemsize.
    Source: bitsandbytes/autograd/_functions.py, MatMul4Bit; backends/cuda/ops.py, gemm_4bit.
    """
    return elements * itemsize


@term("workspace")
def dequantized_scales(elements: int) -> int:
    """The fp32 scales of a matrix under double quantisation, while it is dequantised.

    ⌈elements ÷ 64⌉ × 4.
    Source: bitsandbytes.functional.dequantize_4bit.
    """
    return -(-elements // _NF4_BLOCK) * 4


@term("adapters")
def adapter_weight(elements: int) -> int:
    """An adapter's matrix, fp32 whatever the base model's dtype.

    elements × 4.
    Source: peft, autocast_adapter_dtype = True.
    """
    return elements * 4


@term("adapters")
def cast_adapter_weight(elements: int) -> int:
    """The 16-bit copy of an adapter's matrix under autocast.

    elements × 2.
    Source: aten/src/ATen/autocast_mode.cpp, cached_cast.
    """
    return elements * 2


@term("gradients")
def gradient(elements: int, itemsize: int) -> int:
    """The gradient of a parameter, in the parameter's dtype.

    elements × itemsize.
    Source: torch/csrc/autograd/functions/accumulate_grad.h.
    """
    return elements * itemsize


@term("optimizer")
def moments(elements: int, itemsize: int) -> int:
    """Adam's two running averages of a parameter.

    2 × elements × itemsize.
    Source: torch/optim/adamw.py; bitsandbytes/optim/optimizer.py, init_state.
    """
    return 2 * elements * itemsize


@term("optimizer")
def moment_scales(elements: int) -> int:
    """The fp32 scales of 8-bit running averages, two for every 256 elements.

    2 × ⌈elements ÷ 256⌉ × 4.
    Source: bitsandbytes/optim/optimizer.py, Optimizer2State.init_state, blocksize 256.
    """
    return 2 * -(-elements // 256) * 4


@term("optimizer")
def moment_codebooks() -> int:
    """The two tables that 8-bit running averages are coded with.

    2 × 256 × 4.
    Source: bitsandbytes/optim/optimizer.py, fill_qmap.
    """
    return 2 * 256 * 4


@term("optimizer")
def step_counters(tensors: int) -> int:
    """One fp32 step count a parameter tensor, in a block of 512 bytes of its own.

    tensors × 512.
    Source: torch/optim/adamw.py, _init_group (on the device where the kernel is fused or capturable).
    """
    return tensors * 512


@term("workspace")
def foreach_temporary(elements: int, itemsize: int) -> int:
    """The denominator that the foreach step holds for all parameters at once.

    elements × itemsize.
    Source: torch/optim/adamw.py, _multi_tensor_adamw: torch._foreach_sqrt.
    """
    return elements * itemsize


@term("workspace")
def matmul_workspace(threads: int, workspace_bytes: int) -> int:
    """What cuBLAS keeps for each thread that multiplies matrices: the forward's and autograd's.

    threads × workspace_bytes (8,519,680; 33,554,432 on Hopper).
    Source: aten/src/ATen/cuda/CUDABlas.cpp, parseChosenWorkspaceSize.
    """
    return threads * workspace_bytes
