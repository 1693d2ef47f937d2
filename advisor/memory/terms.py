"""The sizes of everything that a training step allocates: one term, one function.

Each docstring says what it is, the formula in bytes, and where that was read. Shapes: `tokens` = micro-batch ×
sequence length; `width` = the last dimension; `itemsize` = bytes an element (2 for the 16-bit formats, 4 for fp32).
"""

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


@term("activations")
def token_ids(tokens: int, tensors: int) -> int:
    """Input ids, labels and mask, 8 bytes a token each.

    tokens × tensors × 8.
    Source: transformers' collators make int64.
    """
    return tokens * tensors * 8


@term("workspace")
def embedding_rows(tokens: int, width: int) -> int:
    """The embedding's gradient summed in fp32, a row for each token.

    tokens × width × 4.
    Source: aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu, grad_weight_per_segment.
    """
    return tokens * width * 4


@term("activations")
def rotary_table(positions: int, width: int, itemsize: int) -> int:
    """The cosines and sines of the rotary embedding.

    2 × positions × width × itemsize.
    Source: transformers models/phi3/modeling_phi3.py, Phi3RotaryEmbedding.forward.
    """
    return 2 * positions * width * itemsize


@term("activations")
def attention_mask(rows: int, seq: int, itemsize: int) -> int:
    """Which positions may look at which: padding or a sliding window.

    rows × seq² × itemsize.
    Source: transformers/masking_utils.py, sdpa_mask (1 byte) and eager_mask.
    """
    return rows * seq * seq * itemsize


@term("activations")
def hidden_states(tokens: int, width: int, itemsize: int) -> int:
    """What flows from layer to layer; under gradient checkpointing one is kept a layer.

    tokens × width × itemsize.
    Source: transformers models/phi3/modeling_phi3.py, Phi3DecoderLayer.forward.
    """
    return tokens * width * itemsize


@term("activations")
def norm_input_copy(tokens: int, width: int) -> int:
    """RMSNorm's fp32 copy of its input, kept for backward.

    tokens × width × 4.
    Source: transformers models/phi3/modeling_phi3.py, Phi3RMSNorm.forward.
    """
    return tokens * width * 4


@term("activations")
def norm_statistics(tokens: int) -> int:
    """RMSNorm's reciprocal root mean square, kept for backward.

    tokens × 4.
    Source: transformers models/phi3/modeling_phi3.py, Phi3RMSNorm.forward.
    """
    return tokens * 4


@term("activations")
def norm_temporary(tokens: int, width: int, itemsize: int) -> int:
    """One full-sized intermediate of RMSNorm, forward or backward.

    tokens × width × itemsize.
    Source: transformers models/phi3/modeling_phi3.py, Phi3RMSNorm.forward; torch/csrc/autograd/FunctionsManual.cpp.
    """
    return tokens * width * itemsize


@term("activations")
def norm_output(tokens: int, width: int, itemsize: int) -> int:
    """RMSNorm's output, before or after its weight.

    tokens × width × itemsize.
    Source: transformers models/phi3/modeling_phi3.py, Phi3RMSNorm.forward.
    """
    return tokens * width * itemsize


@term("activations")
def cast_input(tokens: int, width: int, itemsize: int) -> int:
    """A linear module's input converted to the dtype that it computes in.

    tokens × width × itemsize.
    Source: aten/src/ATen/autocast_mode.cpp; bitsandbytes/nn/modules.py, Linear4bit.forward.
    """
    return tokens * width * itemsize


@term("activations")
def projection(tokens: int, width: int, itemsize: int) -> int:
    """A linear module's output, or the gradient of its output or input.

    tokens × width × itemsize.
    Source: torch.nn.Linear; transformers models/phi3/modeling_phi3.py.
    """
    return tokens * width * itemsize


@term("activations")
def adapter_input(tokens: int, width: int, itemsize: int) -> int:
    """The adapter's own copy of a module's input, in the adapter's dtype.

    tokens × width × itemsize.
    Source: peft/tuners/lora/layer.py, Linear.forward, _cast_input_dtype.
    """
    return tokens * width * itemsize


@term("activations")
def adapter_dropout_mask(tokens: int, width: int) -> int:
    """Which elements of the adapter's input were dropped, one byte each.

    tokens × width.
    Source: aten native_dropout on CUDA.
    """
    return tokens * width


@term("activations")
def adapter_inner(tokens: int, rank: int, itemsize: int) -> int:
    """The product with the adapter's first matrix.

    tokens × rank × itemsize.
    Source: peft/tuners/lora/layer.py, Linear.forward.
    """
    return tokens * rank * itemsize


@term("activations")
def adapter_output(tokens: int, width: int, itemsize: int) -> int:
    """The adapter's output: the product, the scaled product, or the sum with the module's own output.

    tokens × width × itemsize.
    Source: peft/tuners/lora/layer.py, Linear.forward.
    """
    return tokens * width * itemsize


@term("activations")
def rotated(tokens: int, width: int, itemsize: int) -> int:
    """Queries or keys after the rotary embedding, or an intermediate of it.

    tokens × width × itemsize.
    Source: transformers models/phi3/modeling_phi3.py, apply_rotary_pos_emb.
    """
    return tokens * width * itemsize


@term("activations")
def repeated_heads(tokens: int, width: int, itemsize: int) -> int:
    """Keys or values repeated to all query heads, where the kernel cannot share them.

    tokens × width × itemsize.
    Source: transformers/integrations/sdpa_attention.py, repeat_kv.
    """
    return tokens * width * itemsize


@term("activations")
def attention_output(tokens: int, width: int, itemsize: int) -> int:
    """What attention gives, kept for its own backward and as the input of the output projection.

    tokens × width × itemsize.
    Source: aten/src/ATen/native/transformers/cuda/attention.cu.
    """
    return tokens * width * itemsize


@term("activations")
def attention_statistics(rows: int, heads: int) -> int:
    """The log-sum-exp of every row of scores, fp32.

    rows × heads × 4, rows = tokens rounded up as the kernel needs.
    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp; mem_eff_attention/kernel_forward.h.
    """
    return rows * heads * 4


@term("activations")
def attention_scores(batch: int, heads: int, seq: int, itemsize: int) -> int:
    """All scores of one layer at once: what the fused kernels avoid and math and eager attention keep.

    batch × heads × seq² × itemsize.
    Source: aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math.
    """
    return batch * heads * seq * seq * itemsize


@term("workspace")
def attention_backward_accumulator(tokens: int, width: int) -> int:
    """The fp32 sums in which a fused attention backward gathers a gradient.

    tokens × width × 4.
    Source: flash_attn/flash_api.cpp, dq_accum; mem_eff_attention/kernel_backward.h, workspace.
    """
    return tokens * width * 4


@term("workspace")
def efficient_workspace(elements: int) -> int:
    """The memory-efficient backward's fp32 accumulators.

    elements × 4.
    Source: mem_eff_attention/kernel_backward.h, workspace_size.
    """
    return elements * 4


@term("activations")
def activated(tokens: int, width: int, itemsize: int) -> int:
    """An intermediate-sized tensor of the gated MLP: the activation, its product with the other half, a gradient.

    tokens × width × itemsize.
    Source: transformers models/phi3/modeling_phi3.py, Phi3MLP.forward.
    """
    return tokens * width * itemsize


@term("logits")
def logits(tokens: int, vocabulary: int, itemsize: int) -> int:
    """One score a vocabulary entry for every token, or a tensor of that shape in the loss and its backward.

    tokens × vocabulary × itemsize.
    Source: transformers/loss/loss_utils.py, ForCausalLMLoss; aten log_softmax and nll_loss backward.
    """
    return tokens * vocabulary * itemsize


@term("workspace")
def matmul_workspace(threads: int, workspace_bytes: int) -> int:
    """What cuBLAS keeps for each thread that multiplies matrices: the forward's and autograd's.

    threads × workspace_bytes (8,519,680; 33,554,432 on Hopper).
    Source: aten/src/ATen/cuda/CUDABlas.cpp, parseChosenWorkspaceSize.
    """
    return threads * workspace_bytes
