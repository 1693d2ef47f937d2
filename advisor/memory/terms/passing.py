"""Sizes of what a micro-batch makes: its inputs, activations, attention, logits, and what kernels need for them."""

from __future__ import annotations

from advisor.memory.ledger import term


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
