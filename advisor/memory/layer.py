"""One decoder layer, forward and backward, as a sequence of allocations and releases.

Each function follows one module of transformers, PEFT or bitsandbytes line by line, with sizes in place of tensors, and
returns what its backward does. Shapes: T tokens, H hidden, Q query width, K key width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from advisor.architecture import Linear
from advisor.memory import terms
from advisor.memory.attention import Kernel
from advisor.memory.ledger import Ledger

Backward = Callable[[int], int]
"""Takes the handle of the output's gradient, releases it, and returns the handle of the input's gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Everything that one layer's memory depends on, as plain numbers."""

    batch: int
    seq: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    linears: tuple[Linear, ...]
    fused: bool
    qk_norm: bool
    norm_in_fp32: bool
    kernel: Kernel
    repeat_kv: bool
    mask_rows: int
    trained: bool
    """Every weight is trained (full fine-tuning)."""

    quantized: bool
    double: bool
    autocast: bool
    storage: int
    """Itemsize of the stored 16-bit (or fp32) weights, and of what 4-bit weights are expanded to."""

    stream: int
    """Itemsize of the hidden states between layers."""

    rank: int
    adapted: frozenset[str]
    """Names of the linear modules that carry an adapter."""

    dropout: bool
    gradients_kept: bool
    """Gradients of an earlier micro-batch exist already."""

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.batch * self.seq


def keep_gradient(ledger: Ledger, s: Shapes, elements: int, itemsize: int) -> None:
    """Allocates a parameter's gradient; added to an earlier micro-batch's and released where there is one."""
    handle = ledger.new(terms.gradient, elements, itemsize)
    if s.gradients_kept:
        ledger.free(handle)


def norm(ledger: Ledger, s: Shapes, width: int, tokens: int, itemsize: int) -> tuple[int, int, Backward]:
    """RMSNorm: an fp32 copy, its square, its mean, the scaled copy, back to the input's dtype, times the weight.

    Args:
        width: features of a row.
        tokens: rows.
        itemsize: of the input.

    Returns:
        Output handle, output itemsize, backward. The input stays the caller's.
    """
    copy = ledger.new(terms.norm_input_copy, tokens, width) if itemsize == 2 else None
    square = ledger.new(terms.norm_temporary, tokens, width, 4)
    statistics = ledger.new(terms.norm_statistics, tokens)
    ledger.free(square)
    scaled = ledger.new(terms.norm_temporary, tokens, width, 4)
    weight_itemsize = 4 if s.norm_in_fp32 else (s.stream if not s.trained else s.storage)
    out_itemsize = itemsize if s.norm_in_fp32 else max(weight_itemsize, itemsize)
    kept = scaled
    if itemsize == 2 and not s.norm_in_fp32:
        kept = ledger.new(terms.norm_output, tokens, width, 2)
    out = ledger.new(terms.norm_output, tokens, width, out_itemsize)
    if kept != scaled:
        ledger.free(scaled)
    keeps = [h for h in (copy, statistics) if h is not None]
    if s.trained:
        keeps.append(kept)
    else:
        ledger.free(kept)

    def backward(gradient: int) -> int:
        weighted = ledger.new(terms.norm_temporary, tokens, width, out_itemsize)
        if s.trained:
            product = ledger.new(terms.norm_temporary, tokens, width, out_itemsize)
            keep_gradient(ledger, s, width, s.storage)
            ledger.free(product, kept)
        ledger.free(gradient)
        if itemsize == 2:
            wide = ledger.new(terms.norm_temporary, tokens, width, 4)
            ledger.free(weighted)
            weighted = wide
        direct = ledger.new(terms.norm_temporary, tokens, width, 4)
        through = ledger.new(terms.norm_temporary, tokens, width, 4)
        ledger.free(weighted)
        power = ledger.new(terms.norm_temporary, tokens, width, 4)
        total = ledger.new(terms.norm_temporary, tokens, width, 4)
        ledger.free(through, power, *([copy] if copy is not None else []), statistics)
        ledger.free(direct)
        if itemsize == 2:
            narrow = ledger.new(terms.hidden_states, tokens, width, 2)
            ledger.free(total)
            return narrow
        return total

    return out, out_itemsize, backward


def linear(ledger: Ledger, s: Shapes, module: Linear, itemsize: int) -> tuple[int, int, bool, Callable[[int], int]]:
    """A linear module with whatever stands in it: trained, frozen, quantised, adapted.

    Returns:
        Output handle, output itemsize, whether it keeps its own input for backward, backward.
    """
    adapted = module.name in s.adapted
    if s.trained:
        return _trained_linear(ledger, s, module, itemsize)
    if s.quantized:
        return _quantized_linear(ledger, s, module, itemsize, adapted)
    return _frozen_linear(ledger, s, module, itemsize, adapted)


def _trained_linear(
    ledger: Ledger, s: Shapes, module: Linear, itemsize: int
) -> tuple[int, int, bool, Callable[[int], int]]:
    """torch.nn.Linear whose weight is trained; under autocast over 16-bit copies of input and weight."""
    tokens = s.tokens
    keeps = []
    cast_input = s.autocast and itemsize == 4
    cast_weight = s.autocast and s.storage == 4
    if cast_input:
        keeps.append(ledger.new(terms.cast_input, tokens, module.inputs, 2))
    if cast_weight:
        keeps.append(ledger.new(terms.cast_weight, module.weights))
    out_itemsize = 2 if s.autocast else itemsize
    out = ledger.new(terms.projection, tokens, module.outputs, out_itemsize)

    def backward(gradient: int) -> int:
        back = ledger.new(terms.projection, tokens, module.inputs, out_itemsize)
        if cast_weight:
            narrow = ledger.new(terms.gradient, module.weights, 2)
            ledger.free(gradient, *keeps)
            keep_gradient(ledger, s, module.parameters, s.storage)
            ledger.free(narrow)
        else:
            keep_gradient(ledger, s, module.parameters, s.storage)
            ledger.free(gradient, *keeps)
        if cast_input:
            wide = ledger.new(terms.projection, tokens, module.inputs, 4)
            ledger.free(back)
            back = wide
        return back

    return out, out_itemsize, not cast_input, backward


def _frozen_linear(
    ledger: Ledger, s: Shapes, module: Linear, itemsize: int, adapted: bool
) -> tuple[int, int, bool, Callable[[int], int]]:
    """torch.nn.Linear whose weight is frozen, under PEFT's LoRA layer where it is adapted."""
    tokens = s.tokens
    cast = ledger.new(terms.cast_input, tokens, module.inputs, 2) if s.autocast and itemsize == 4 else None
    copied_weight = ledger.new(terms.cast_weight, module.weights) if s.autocast and s.storage == 4 else None
    out_itemsize = 2 if s.autocast else itemsize
    out = ledger.new(terms.projection, tokens, module.outputs, out_itemsize)
    if cast is not None:
        ledger.free(cast)
    keeps_input = False
    adapter = None
    if adapted:
        out, keeps_input, adapter = _adapter(ledger, s, module, itemsize, out, out_itemsize, converts=True)

    def backward(gradient: int) -> int:
        through, gradient = adapter(gradient) if adapter else (None, gradient)
        back = ledger.new(terms.projection, tokens, module.inputs, out_itemsize)
        ledger.free(gradient, *([copied_weight] if copied_weight is not None else []))
        if s.autocast and itemsize == 4:
            wide = ledger.new(terms.projection, tokens, module.inputs, 4)
            ledger.free(back)
            back = wide
        if through is not None:
            ledger.free(back)
            return through
        return back

    return out, out_itemsize, keeps_input, backward


def _quantized_linear(
    ledger: Ledger, s: Shapes, module: Linear, itemsize: int, adapted: bool
) -> tuple[int, int, bool, Callable[[int], int]]:
    """bitsandbytes' Linear4bit: the input in the compute dtype, the weight expanded, the output converted back."""
    tokens = s.tokens
    converts = itemsize != s.storage
    cast = ledger.new(terms.cast_input, tokens, module.inputs, s.storage) if converts else None
    expanded = _expand(ledger, s, module)
    out = ledger.new(terms.projection, tokens, module.outputs, s.storage)
    ledger.free(*expanded)
    if converts:
        wide = ledger.new(terms.projection, tokens, module.outputs, itemsize)
        ledger.free(out, *([cast] if cast is not None else []))
        out = wide
    keeps_input = False
    adapter = None
    if adapted:
        clone = ledger.new(terms.projection, tokens, module.outputs, itemsize)
        ledger.free(out)
        out, keeps_input, adapter = _adapter(ledger, s, module, itemsize, clone, itemsize, converts=not s.autocast)

    def backward(gradient: int) -> int:
        through, gradient = adapter(gradient) if adapter else (None, gradient)
        if converts:
            narrow = ledger.new(terms.projection, tokens, module.outputs, s.storage)
            ledger.free(gradient)
            gradient = narrow
        expanded = _expand(ledger, s, module)
        back = ledger.new(terms.projection, tokens, module.inputs, s.storage)
        ledger.free(*expanded, gradient)
        if converts:
            wide = ledger.new(terms.projection, tokens, module.inputs, itemsize)
            ledger.free(back)
            back = wide
        if through is not None:
            ledger.free(back)
            return through
        return back

    return out, itemsize, keeps_input, backward


def _expand(ledger: Ledger, s: Shapes, module: Linear) -> list[int]:
    """The expanded weight; the scales, expanded first, are gone when it is used."""
    scales = ledger.new(terms.dequantized_scales, module.weights) if s.double else None
    expanded = ledger.new(terms.dequantized_weight, module.weights, s.storage)
    if scales is not None:
        ledger.free(scales)
    return [expanded]


def _adapter(
    ledger: Ledger, s: Shapes, module: Linear, itemsize: int, out: int, out_itemsize: int, *, converts: bool
) -> tuple[int, bool, Callable[[int], tuple[int, int]]]:
    """LoRA's path beside a frozen module: convert, drop out, two products, scale, add.

    Args:
        out: handle of the module's own output; replaced by the sum.
        converts: the input is first converted to the adapter's fp32, whatever autocast does then.

    Returns:
        Handle of the sum, whether the adapter keeps the module's own input, and a backward that takes the gradient of
        the sum and returns the gradient of the module's input and that of the module's own output.
    """
    tokens, rank, inner = s.tokens, s.rank, 2 if s.autocast else 4
    small = module.inputs * rank, module.outputs * rank
    copies: list[int] = []
    keeps: list[int] = []
    width = itemsize
    if converts and itemsize == 2:
        copies.append(ledger.new(terms.adapter_input, tokens, module.inputs, 4))
        width = 4
    if s.dropout:
        dropped = ledger.new(terms.adapter_input, tokens, module.inputs, width)
        keeps.append(ledger.new(terms.adapter_dropout_mask, tokens, module.inputs))
        copies.append(dropped)
    casts = s.autocast and width == 4
    if casts:
        keeps.append(ledger.new(terms.adapter_input, tokens, module.inputs, 2))
    if s.autocast:
        keeps += [ledger.new(terms.cast_adapter_weight, elements) for elements in small]
    keeps.append(ledger.new(terms.adapter_inner, tokens, rank, inner))
    product = ledger.new(terms.adapter_output, tokens, module.outputs, inner)
    scaled = ledger.new(terms.adapter_output, tokens, module.outputs, inner)
    ledger.free(product)
    narrows_first = s.quantized and inner > out_itemsize
    if narrows_first:
        narrow = ledger.new(terms.adapter_output, tokens, module.outputs, out_itemsize)
        ledger.free(scaled)
        scaled = narrow
    sum_itemsize = out_itemsize if narrows_first else max(inner, out_itemsize)
    total = ledger.new(terms.adapter_output, tokens, module.outputs, sum_itemsize)
    ledger.free(scaled, out)
    if sum_itemsize > out_itemsize:
        narrow = ledger.new(terms.projection, tokens, module.outputs, out_itemsize)
        ledger.free(total)
        total = narrow
    keeps_input = False
    if casts:
        ledger.free(*copies)
    elif copies:
        keeps.append(copies[-1])
        ledger.free(*copies[:-1])
    else:
        keeps_input = True

    def backward(gradient: int) -> tuple[int, int]:
        own = ledger.share(gradient)
        if inner != out_itemsize:
            wide = ledger.new(terms.adapter_output, tokens, module.outputs, inner)
            ledger.free(gradient)
            if inner > out_itemsize and not narrows_first:
                ledger.free(own)
                own = ledger.new(terms.projection, tokens, module.outputs, out_itemsize)
            gradient = wide
        scaled = ledger.new(terms.adapter_output, tokens, module.outputs, inner)
        ledger.free(gradient)
        hidden = ledger.new(terms.adapter_inner, tokens, rank, inner)
        keep_gradient(ledger, s, small[1], 4)
        ledger.free(scaled)
        back = ledger.new(terms.adapter_input, tokens, module.inputs, inner)
        keep_gradient(ledger, s, small[0], 4)
        ledger.free(hidden, *keeps)
        if inner != width:
            cast = ledger.new(terms.adapter_input, tokens, module.inputs, width)
            ledger.free(back)
            back = cast
        if s.dropout:
            undropped = ledger.new(terms.adapter_input, tokens, module.inputs, width)
            ledger.free(back)
            back = undropped
        if width != itemsize:
            cast = ledger.new(terms.adapter_input, tokens, module.inputs, itemsize)
            ledger.free(back)
            back = cast
        return back, own

    return total, keeps_input, backward


def attention(ledger: Ledger, s: Shapes, itemsize: int) -> tuple[int, int, Callable[[int], None]]:
    """Scores, softmax and weighted sum over rotated queries and keys, by the kernel that runs.

    Returns:
        Output handle, output itemsize, and a backward that leaves the gradients of queries, keys and values to the
        caller (it allocates only what the kernel needs beside them, and releases what it kept).
    """
    compute = 2 if s.autocast else itemsize
    tokens, query, kv = s.tokens, s.heads * s.head_dim, s.kv_heads * s.head_dim
    keeps: list[int] = []
    if compute != itemsize:
        keeps += [ledger.new(terms.cast_input, tokens, width, compute) for width in (query, kv, kv)]
    if s.repeat_kv:
        keeps += [ledger.new(terms.repeated_heads, tokens, query, compute) for _ in range(2)]
    if s.kernel in ("flash", "efficient"):
        return _fused_attention(ledger, s, compute, keeps)
    return _unfused_attention(ledger, s, compute, keeps)


def _fused_attention(
    ledger: Ledger, s: Shapes, compute: int, keeps: list[int]
) -> tuple[int, int, Callable[[int], None]]:
    tokens, query = s.tokens, s.heads * s.head_dim
    rows = tokens if s.kernel == "flash" else s.batch * -(-s.seq // 32) * 32
    if s.kernel == "efficient" and s.mask_rows:
        keeps.append(ledger.new(terms.attention_mask, s.mask_rows, s.seq, compute))
    out = ledger.new(terms.attention_output, tokens, query, compute)
    keeps.append(ledger.new(terms.attention_statistics, rows, s.heads))

    def backward(gradient: int) -> None:
        rounded = s.batch * -(-s.seq // 128) * 128
        delta = ledger.new(terms.attention_statistics, rounded, s.heads)
        sums = []
        if compute == 2:
            widths = (query,) if s.kernel == "flash" else (query, query, query)
            sums = [ledger.new(terms.attention_backward_accumulator, rounded, width) for width in widths]
        ledger.free(delta, *sums, *keeps, gradient)

    return out, compute, backward


def _unfused_attention(
    ledger: Ledger, s: Shapes, compute: int, keeps: list[int]
) -> tuple[int, int, Callable[[int], None]]:
    """Math (in fp32 inside) and eager (16-bit scores, fp32 softmax) keep batch × heads × seq² tensors."""
    tokens, query = s.tokens, s.heads * s.head_dim
    square = (s.batch, s.heads, s.seq)
    inner = 4 if s.kernel == "math" else compute
    if s.kernel == "math" and compute == 2:
        keeps += [ledger.new(terms.rotated, tokens, query, 4) for _ in range(3)]
    scores = ledger.new(terms.attention_scores, *square, inner)
    masked = ledger.new(terms.attention_scores, *square, inner)
    ledger.free(scores)
    softmax = ledger.new(terms.attention_scores, *square, 4)
    keeps.append(softmax)
    ledger.free(masked)
    if s.kernel == "eager" and compute == 2:
        keeps.append(ledger.new(terms.attention_scores, *square, 2))
    out = ledger.new(terms.attention_output, tokens, query, compute)

    def backward(gradient: int) -> None:
        first = ledger.new(terms.attention_scores, *square, inner)
        ledger.free(gradient)
        second = ledger.new(terms.attention_scores, *square, 4)
        third = ledger.new(terms.attention_scores, *square, inner)
        ledger.free(first, second, third, *keeps)

    return out, compute, backward


def decoder_layer(ledger: Ledger, s: Shapes) -> Backward:
    """Forward of one layer, as far as the last tensor that backward needs; the input stays the caller's.

    Under gradient checkpointing this is the recomputation, which stops there too (torch/utils/checkpoint.py,
    early stop); without it the output is the next layer's input, which the caller accounts for.
    """
    tokens = s.tokens
    attend = _attention_block(ledger, s)
    middle = ledger.new(terms.hidden_states, tokens, s.hidden, s.stream)
    feed = _mlp_block(ledger, s)
    if s.stream == 2:
        ledger.free(middle)
        middle = -1

    def backward(gradient: int) -> int:
        through = feed(gradient)
        ledger.free(through, *([middle] if middle >= 0 else []))
        through = attend(gradient)
        ledger.free(through)
        return gradient

    return backward


def _attention_block(ledger: Ledger, s: Shapes) -> Backward:
    tokens = s.tokens
    ledger.at("attention forward")
    *projections, output_module = s.linears[: 2 if s.fused else 4]
    normed, itemsize, norm_backward = norm(ledger, s, s.hidden, tokens, s.stream)
    outputs, backwards, keeps_input = [], [], False
    for module in projections:
        out, out_itemsize, keeps, back = linear(ledger, s, module, itemsize)
        outputs.append(out)
        backwards.append(back)
        keeps_input = keeps_input or keeps
    rotated = _rotate(ledger, s, out_itemsize)
    if not s.fused:
        ledger.free(*outputs[:2])
        outputs = outputs[2:]
    attended, attended_itemsize, attention_backward = attention(ledger, s, out_itemsize)
    result, result_itemsize, keeps_attended, output_backward = linear(ledger, s, output_module, attended_itemsize)
    if not keeps_input:
        ledger.free(normed)
    ledger.free(result)

    def backward(gradient: int) -> int:
        ledger.at("attention backward")
        back = output_backward(_branch_gradient(ledger, s, gradient, result_itemsize))
        attention_backward(back)
        ledger.free(attended)
        widths = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
        gradients = [ledger.new(terms.rotated, tokens, width, out_itemsize) for width in widths]
        ledger.free(*rotated, *outputs)
        if s.fused:
            joined = ledger.new(terms.projection, tokens, sum(widths), out_itemsize)
            ledger.free(*gradients)
            gradients = [joined]
        total = -1
        for back_of, output_gradient in zip(reversed(backwards), reversed(gradients), strict=True):
            part = back_of(output_gradient)
            if total >= 0:
                ledger.free(part)
            else:
                total = part
        if keeps_input:
            ledger.free(normed)
        return norm_backward(total)

    return backward


def _branch_gradient(ledger: Ledger, s: Shapes, gradient: int, itemsize: int) -> int:
    """The residual's gradient as the branch takes it: the same tensor, or a copy in the branch's dtype."""
    if itemsize == s.stream:
        return ledger.share(gradient)
    return ledger.new(terms.projection, s.tokens, s.hidden, itemsize)


def _rotate(ledger: Ledger, s: Shapes, itemsize: int) -> list[int]:
    """Rotary embedding of queries, then of keys: two products, their sum, joined with what is not rotated."""
    rotated = []
    for heads in (s.heads, s.kv_heads):
        sizes = (s.tokens, heads * s.head_dim, itemsize)
        temporaries = [ledger.new(terms.rotated, *sizes) for _ in range(3)]
        rotated.append(ledger.new(terms.rotated, *sizes))
        ledger.free(*temporaries)
    return rotated


def _mlp_block(ledger: Ledger, s: Shapes) -> Backward:
    tokens, inner = s.tokens, s.intermediate
    ledger.at("MLP forward")
    *projections, down = s.linears[2 if s.fused else 4 :]
    normed, itemsize, norm_backward = norm(ledger, s, s.hidden, tokens, s.stream)
    outputs, backwards, keeps_input = [], [], False
    for module in projections:
        out, out_itemsize, keeps, back = linear(ledger, s, module, itemsize)
        outputs.append(out)
        backwards.append(back)
        keeps_input = keeps_input or keeps
    activated = ledger.new(terms.activated, tokens, inner, out_itemsize)
    product = ledger.new(terms.activated, tokens, inner, out_itemsize)
    result, result_itemsize, keeps_product, down_backward = linear(ledger, s, down, out_itemsize)
    ledger.free(result)
    if not keeps_product:
        ledger.free(product)
    if not keeps_input:
        ledger.free(normed)

    def backward(gradient: int) -> int:
        ledger.at("MLP backward")
        back = down_backward(_branch_gradient(ledger, s, gradient, result_itemsize))
        if keeps_product:
            ledger.free(product)
        of_up = ledger.new(terms.activated, tokens, inner, out_itemsize)
        of_activated = ledger.new(terms.activated, tokens, inner, out_itemsize)
        ledger.free(back, activated)
        of_gate = ledger.new(terms.activated, tokens, inner, out_itemsize)
        ledger.free(of_activated, *outputs)
        gradients = [of_gate, of_up]
        if s.fused:
            joined = ledger.new(terms.projection, tokens, 2 * inner, out_itemsize)
            ledger.free(*gradients)
            gradients = [joined]
        total = -1
        for back_of, output_gradient in zip(reversed(backwards), reversed(gradients), strict=True):
            part = back_of(output_gradient)
            if total >= 0:
                ledger.free(part)
            else:
                total = part
        if keeps_input:
            ledger.free(normed)
        return norm_backward(total)

    return backward
