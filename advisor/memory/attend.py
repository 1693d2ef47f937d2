"""Attention itself, from rotated queries, keys and values to what the output projection takes, kernel by kernel.

Queries, keys and values are (batch, heads, tokens, head size). Where those dimensions lie in memory in another order,
a batched matmul over more than one sequence copies them first.
Source: transformers/integrations/sdpa_attention.py, models/llama/modeling_llama.py (eager_attention_forward);
aten/src/ATen/native/transformers/attention.cpp and cuda/attention_backward.cu.
"""

from __future__ import annotations

from functools import partial

from advisor.memory import terms
from advisor.memory.linear import convert
from advisor.memory.shapes import Shapes
from advisor.memory.tape import Gradients, Node, Storage, Tape, Value


def attend(tape: Tape, s: Shapes, q: Value, k: Value, v: Value) -> tuple[Value, Storage | None]:
    """The output as (batch, tokens, heads × head size), and eager attention's weights, which its callers hold."""
    if s.caches:
        itemsize = k.itemsize
        k, v = (_cache(tape, s, x, itemsize) for x in (k, v))
    if s.repeat_kv:
        k, v = (_repeat(tape, s, x) for x in (k, v))
    if s.kernel == "eager":
        return _eager(tape, s, q, k, v)
    if s.autocast or s.kernel == "flash":
        # Autocast, or transformers for flash-attn 2 over fp32 hidden states (fa_peft_integration_check).
        q = convert(tape, q, s.tokens, s.query, 2)
        k, v = (convert(tape, x, s.tokens, s.query if s.repeat_kv else s.kv, 2) for x in (k, v))
    if s.kernel == "math":
        return _in_order(tape, s, _math(tape, s, q, k, v)), None
    if s.packed:
        k, v, q = (_unpad(tape, s, x, width) for x, width in ((k, s.kv), (v, s.kv), (q, s.query)))
        return _pad(tape, s, _flash(tape, s, q, k, v)), None
    if s.kernel in ("flash", "cudnn"):
        out = _flash(tape, s, q, k, v)
        return (_in_order(tape, s, out) if s.fused else out), None
    return _efficient(tape, s, q, k, v), None


def _in_order(tape: Tape, s: Shapes, out: Value) -> Value:
    """`transpose(1, 2).contiguous()` of an output that lies head by head."""

    def rule(node: Node) -> Gradients:
        return (node.take(),)

    storage = tape.new(terms.attention_output, s.tokens, s.query, out.itemsize)
    return Value(storage, out.itemsize, tape.record(rule, out.node, views=True))


def _unpad(tape: Tape, s: Shapes, x: Value, width: int) -> Value:
    """The tokens that are no padding; at worst nearly all are.

    Source: transformers/modeling_flash_attention_utils.py, _upad_input and _index_first_axis.
    """
    itemsize = x.itemsize

    def rule(node: Node) -> Gradients:
        gradient = node.take()
        zeros = tape.new(terms.rotated, s.tokens, width, itemsize)
        back = tape.new(terms.rotated, s.tokens, width, itemsize)
        del zeros, gradient
        return (back,)

    return Value(tape.new(terms.rotated, s.tokens, width, itemsize), itemsize, tape.record(rule, x.node))


def _pad(tape: Tape, s: Shapes, x: Value) -> Value:
    """The output with the padding put back. Source: modeling_flash_attention_utils.py, _pad_input."""
    itemsize = x.itemsize

    def rule(_: Node) -> Gradients:
        return (tape.new(terms.attention_output, s.tokens, s.query, itemsize),)

    return Value(tape.new(terms.attention_output, s.tokens, s.query, itemsize), itemsize, tape.record(rule, x.node))


def _repeat(tape: Tape, s: Shapes, x: Value) -> Value:
    """Keys or values copied to all query heads (repeat_kv); a single one is only seen so many times."""

    def rule(_: Node) -> Gradients:
        return (tape.new(terms.rotated, s.tokens, s.kv, x_itemsize),)

    x_itemsize = x.itemsize
    single = s.kv_heads == 1
    storage = x.storage if single else tape.new(terms.repeated_heads, s.tokens, s.query, x_itemsize)
    return Value(storage, x_itemsize, tape.record(rule, x.node))


def _gradients(tape: Tape, s: Shapes, itemsize: int) -> Gradients:
    """Of queries, keys and values."""
    kv = s.query if s.repeat_kv else s.kv
    return tuple(tape.new(terms.rotated, s.tokens, width, itemsize) for width in (s.query, kv, kv))


def _cache(tape: Tape, s: Shapes, x: Value, itemsize: int) -> Value:
    """Keys or values joined to an empty cache, which the decoder holds until it ends, and held outputs longer.

    Args:
        itemsize: of the keys: the empty cache has their dtype, and values that are narrower are widened to it.

    Source: transformers/cache_utils.py, DynamicLayer.lazy_initialization and update.
    """
    before = x.itemsize

    def rule(node: Node) -> Gradients:
        gradient = node.take()
        return (gradient if before == itemsize else tape.new(terms.rotated, s.tokens, s.kv, before),)

    storage = tape.new(terms.rotated, s.tokens, s.kv, itemsize)
    if s.holds_cache or s.repeat_kv:
        tape.outlives.append(storage.keep())
    return Value(storage, itemsize, tape.record(rule, x.node, views=before == itemsize))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _flash(tape: Tape, s: Shapes, q: Value, k: Value, v: Value) -> Value:
    """Flash attention, or cuDNN's, which takes a mask and shares key heads; its workspace is assumed to be flash's.

    Source: flash_attn/flash_api.cpp, mha_fwd and mha_bwd.
    """
    itemsize = q.itemsize
    mask = _additive_mask(tape, s, itemsize) if s.mask_rows else None
    out = tape.new(terms.attention_output, s.tokens, s.query, itemsize)
    statistics = tape.new(terms.attention_statistics, s.tokens, s.heads)

    def rule(_: Node) -> Gradients:
        copies = s.fused and not s.packed
        copy = tape.new(terms.attention_output, s.tokens, s.query, itemsize) if copies else None
        gradients = _gradients(tape, s, itemsize)
        rows = s.tokens + 128 * s.samples if s.samples else s.batch * _round_up(s.seq, 128)
        head = _round_up(s.head_dim, 32 if s.head_dim <= 128 else 64)
        sums = tape.new(terms.attention_statistics, rows, s.heads)
        accumulated = tape.new(terms.attention_backward_accumulator, rows, s.heads * head)
        expanded = []
        if s.heads != s.kv_heads and s.kernel == "flash":
            expanded = [tape.new(terms.repeated_heads, s.tokens, s.query, itemsize) for _ in range(2)]
        del copy, sums, accumulated, expanded
        return gradients

    keeps = (q.storage, k.storage, v.storage, out, statistics) + ((mask,) if mask is not None else ())
    return Value(out, itemsize, tape.record(rule, q.node, k.node, v.node, keeps=keeps))


def _efficient(tape: Tape, s: Shapes, q: Value, k: Value, v: Value) -> Value:
    """Source: cuda/attention.cu and attention_backward.cu, _efficient_attention_forward and _backward."""
    itemsize = q.itemsize
    mask = _additive_mask(tape, s, itemsize) if s.mask_rows else None
    out = tape.new(terms.attention_output, s.tokens, s.query, itemsize)
    statistics = tape.new(terms.attention_statistics, s.batch * _round_up(s.seq, 32), s.heads)

    def rule(_: Node) -> Gradients:
        gradients = _gradients(tape, s, itemsize)
        first = _before_delta(tape, s, itemsize)
        delta = tape.new(terms.attention_statistics, s.tokens, s.heads)
        del first
        workspace = tape.new(terms.efficient_workspace, s.batch * s.heads * efficient_elements(s, itemsize))
        del delta, workspace
        return gradients

    keeps = (q.storage, k.storage, v.storage, out, statistics) + ((mask,) if mask is not None else ())
    return Value(out, itemsize, tape.record(rule, q.node, k.node, v.node, keeps=keeps))


def _before_delta(tape: Tape, s: Shapes, itemsize: int) -> list[Storage]:
    """Gradient × output and its row sums, where another kernel computes them; in 16 bits both factors in fp32.

    Source: mem_eff_attention/kernel_backward.h (kKernelComputesDelta).
    """
    capability = s.capability or (8, 0)
    queries, _, largest = _efficient_block(s.head_dim, itemsize, capability)
    if itemsize == 2 and (largest <= queries or capability >= (7, 5)):
        return []
    count = 3 if itemsize == 2 else 1
    products = [tape.new(terms.attention_backward_accumulator, s.tokens, s.query) for _ in range(count)]
    return [*products, tape.new(terms.attention_statistics, s.tokens, s.heads)]


def _additive_mask(tape: Tape, s: Shapes, itemsize: int) -> Storage:
    """A boolean mask as what is added to the scores, for every sequence. Source: convert_boolean_attn_mask."""
    inverted = tape.new(terms.attention_mask, s.batch, s.seq, 1)
    mask = tape.new(terms.attention_mask, s.batch, s.seq, itemsize)
    del inverted
    return mask


_LITTLE_SHARED_MEMORY = ((7, 5), (8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities whose shared memory does not hold tiles of 128 queries."""


def efficient_elements(s: Shapes, itemsize: int) -> int:
    """fp32 accumulators of the memory-efficient backward for one sequence and head.

    A tile of dk and of dv, where registers do not hold them, for each of at most 200 splits of all keys, and dq in
    tiles with a lock of four elements each.
    Source: mem_eff_attention/kernel_backward.h (workspace_elements_gk, _gv, _gq), kernels/generate_kernels.py,
    attention_backward.cu (num_splits_key).
    """
    queries, keys, largest = _efficient_block(s.head_dim, itemsize, s.capability or (8, 0))
    elements = 0
    if itemsize == 2 and largest > queries:
        sequences = s.batch * s.heads
        splits = max(1, min(-(-s.seq // keys), 200 // sequences))
        if sequences >= 256 and s.seq <= 2 * keys:
            splits = 1
        elements += 2 * splits * keys * _round_up(s.head_dim, queries)
    elements += -(-s.seq // queries) * -(-s.head_dim // keys) * (queries * keys + 4)
    return _round_up(elements, 4)


def _efficient_block(head: int, itemsize: int, capability: tuple[int, int]) -> tuple[int, int, int]:
    """Queries and keys in a tile of the kernel that is chosen, and the largest head it is compiled for."""
    largest = next(limit for limit in (32, 64, 128, 2**16) if head <= limit)
    if itemsize == 2 and 64 < head <= 96 and capability in ((8, 6), (8, 9)):
        return 128, 64, 96
    tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and itemsize == 2)
    if not (tensor_cores and largest > 64 and itemsize == 2) or capability in _LITTLE_SHARED_MEMORY:
        return 64, 64, largest
    return 128, 128 if largest <= 128 and capability >= (8, 0) else 64, largest


def _math(tape: Tape, s: Shapes, q: Value, k: Value, v: Value) -> Value:
    """In fp32 inside, whatever the inputs; keys and values repeated here where heads are grouped.

    Source: attention.cpp, _scaled_dot_product_attention_math; aten/src/ATen/native/SoftMax.cpp, _safe_softmax.
    """
    itemsize = q.itemsize
    wide_q = convert(tape, q, s.tokens, s.query, 4)
    wide_k, wide_v = (convert(tape, x, s.tokens, s.kv, 4) for x in (k, v))
    new = partial(tape.new, terms.rotated, s.tokens, s.query, 4)
    grouped = s.heads != s.kv_heads
    scaled_q = kept_q = new()
    mask = tape.new(terms.attention_mask, 1, s.seq, 4)
    kept_k, kept_v = (new(), new()) if grouped else (wide_k.storage, wide_v.storage)
    kept_k = new()
    if s.batch > 1 and not s.fused:
        kept_q = new()
        if not (grouped or s.caches):
            kept_k = new()
    square = (s.batch, s.heads, s.seq)
    scores = tape.new(terms.attention_scores, *square, 4)
    softmax = tape.new(terms.attention_scores, *square, 4)
    infinite = tape.new(terms.attention_scores, *square, 1)
    del scores, infinite
    narrow = tape.new(terms.attention_scores, *square, 2) if itemsize == 2 else None
    if s.batch > 1 and not (grouped or s.caches):
        kept_v = new()
    out = new()
    if itemsize == 2:
        out = tape.new(terms.attention_output, s.tokens, s.query, itemsize)
    del narrow, mask, scaled_q
    keeps = (kept_q, kept_k, kept_v, softmax)

    def rule(node: Node) -> Gradients:
        return _math_backward(tape, s, node, itemsize)

    return Value(out, itemsize, tape.record(rule, wide_q.node, wide_k.node, wide_v.node, keeps=keeps))


def _math_backward(tape: Tape, s: Shapes, node: Node, itemsize: int) -> Gradients:
    kept_q, kept_k, kept_v, softmax = node.keeps
    node.keeps = ()
    square = (s.batch, s.heads, s.seq)
    grouped = s.heads != s.kv_heads
    new = partial(tape.new, terms.rotated, s.tokens, s.query, 4)
    gradient = node.take()
    if itemsize == 2:
        gradient = new()
    if s.batch > 1:
        gradient = new()
    of_v = new()
    of_softmax = tape.new(terms.attention_scores, *square, 4)
    del gradient, kept_v
    of_scores = tape.new(terms.attention_scores, *square, 4)
    del of_softmax, softmax
    of_k, of_q = new(), new()
    del of_scores, kept_k, kept_q
    of_k = new()
    if grouped:
        of_v = tape.new(terms.rotated, s.tokens, s.kv, 4)
        of_k = tape.new(terms.rotated, s.tokens, s.kv, 4)
    of_q = new()
    return of_q, of_k, of_v


def _eager(tape: Tape, s: Shapes, q: Value, k: Value, v: Value) -> tuple[Value, Storage]:
    """Scores in the compute dtype, softmax in fp32, weights in the queries' dtype.

    float16 scores go into the fp32 softmax in one kernel (aten/src/ATen/native/SoftMax.cpp, softmax).
    """
    grouped, many = s.heads != s.kv_heads, s.batch > 1
    before, of_values = q.itemsize, v.itemsize
    if s.autocast:
        q, k = (convert(tape, x, s.tokens, w, 2) for x, w in ((q, s.query), (k, _width(s))))
    itemsize = q.itemsize
    new = partial(tape.new, terms.repeated_heads, s.tokens, s.query, itemsize)
    kept_q = new() if many and not s.fused else q.storage
    strided = many and (not grouped or s.kv_heads == 1)
    kept_k = new() if strided and not (s.fused or s.caches) else k.storage
    nodes = (q.node, k.node, v.node)
    square = (s.batch, s.heads, s.seq)
    scores = tape.new(terms.attention_scores, *square, itemsize)
    kept = (kept_q, kept_k) if tape.records else ()
    del q, k, kept_q, kept_k
    scores = tape.new(terms.attention_scores, *square, itemsize)
    masked = max(itemsize, s.stream)
    scores = tape.new(terms.attention_scores, *square, masked)
    copies = masked == 2 and not s.half
    wide = tape.new(terms.attention_scores, *square, 4) if copies else None
    softmax = tape.new(terms.attention_scores, *square, 4)
    del wide
    weights = tape.new(terms.attention_scores, *square, 2) if before == 2 else softmax
    del scores
    cast = weights
    if itemsize == 2 and before == 4:
        cast = tape.new(terms.attention_scores, *square, 2)
    # The values are cast only here, so their gradient is cast back before that of the scores is computed.
    values = tape.new(terms.cast_input, s.tokens, _width(s), itemsize) if of_values != itemsize else v.storage
    kept_v = new() if strided and not s.caches else values
    out = tape.new(terms.attention_output, s.tokens, s.query, itemsize)

    def rule(node: Node) -> Gradients:
        return _eager_backward(tape, s, node, itemsize, masked, of_values)

    node = tape.record(rule, *nodes, keeps=(*kept, kept_v, softmax, cast))
    out = tape.new(terms.attention_output, s.tokens, s.query, itemsize)
    return Value(out, itemsize, node), weights


def _width(s: Shapes) -> int:
    return s.query if s.repeat_kv else s.kv


def _eager_backward(tape: Tape, s: Shapes, node: Node, itemsize: int, masked: int, of_values: int) -> Gradients:
    kept_q, kept_k, kept_v, softmax, cast = node.keeps
    node.keeps = ()
    square = (s.batch, s.heads, s.seq)
    new = partial(tape.new, terms.repeated_heads, s.tokens, s.query, itemsize)
    gradient = node.take()
    if s.batch > 1:
        gradient = new()
    of_v = new()
    of_weights = tape.new(terms.attention_scores, *square, itemsize)
    del gradient, kept_v, cast
    if of_values != itemsize:
        of_v = tape.new(terms.repeated_heads, s.tokens, s.query, of_values)
    if itemsize == 2:
        of_weights = tape.new(terms.attention_scores, *square, 4)
    of_scores = tape.new(terms.attention_scores, *square, 2 if s.half and masked == 2 else 4)
    del of_weights, softmax
    if itemsize == 2 and not (s.half and masked == 2):
        of_scores = tape.new(terms.attention_scores, *square, 2)
    of_scores = tape.new(terms.attention_scores, *square, itemsize)
    of_k, of_q = new(), new()
    del of_scores, kept_q, kept_k
    return of_q, of_k, of_v
