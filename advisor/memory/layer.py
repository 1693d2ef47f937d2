"""One decoder layer: what its modules do, in their order, with sizes in place of tensors.

Source: transformers models/phi3/modeling_phi3.py, models/llama/modeling_llama.py and those that follow them.
"""

from __future__ import annotations

from advisor.architecture import Linear
from advisor.memory import terms
from advisor.memory.attend import attend
from advisor.memory.linear import (
    gradients_before,
    keeps_something,
    linear,
    quantized_gradient,
    start,
)
from advisor.memory.norm import norm
from advisor.memory.shapes import Shapes
from advisor.memory.tape import Gradients, Node, Storage, Tape, Value

Ends = tuple[Node | None, ...]
"""The operations at which a recomputed layer's backward goes on; `first_gradients` returns a gradient for each."""


def decoder_layer(tape: Tape, s: Shapes, x: Value) -> Value:
    """Forward of one layer."""
    middle, _weights = _attention(tape, s, x)
    tape.middle = len(tape.nodes)
    *projections, down = _mlp_linears(s)
    gated, normed = _gate(tape, s, projections, middle)
    branch = linear(tape, s, down, gated)
    del gated, normed
    return _add(tape, s, middle, branch)


def recomputed_layer(tape: Tape, s: Shapes, x: Value) -> tuple[Node | None, Ends]:
    """Forward of a checkpointed layer within its backward; it stops where nothing more is kept.

    Returns:
        What takes the gradient of the residual stream in the middle of the layer, and where the branch goes on.

    Source: torch/utils/checkpoint.py, _StopRecomputationError.
    """
    middle, _weights = _attention(tape, s, x)
    tape.middle = len(tape.nodes)
    *projections, down = _mlp_linears(s)
    runs = keeps_something(s, down)
    gated, _normed = _gate(tape, s, projections, middle, allocates=runs)
    if not runs:
        return middle.node, (gated.node,)
    started = start(tape, s, down, gated, stops=True)
    return middle.node, started.nodes


def first_gradients(tape: Tape, s: Shapes, gradient: Storage) -> Gradients:
    """The gradient of a layer's output → those of `Ends`: the part of backward that comes before the recomputation."""
    down = s.linears[-1]
    itemsize = branch_itemsize(s)
    if itemsize != s.stream:
        gradient = tape.new(terms.projection, s.tokens, s.hidden, itemsize)
    if not keeps_something(s, down):
        return (quantized_gradient(tape, s, down, gradient, itemsize),)
    return gradients_before(tape, s, down, gradient, itemsize)


def branch_itemsize(s: Shapes) -> int:
    """Itemsize of what the MLP adds to the stream: bitsandbytes' layers convert back to their input's dtype."""
    return 2 if s.autocast and not s.quantized else s.stream


def _add(tape: Tape, s: Shapes, residual: Value, branch: Value) -> Value:
    """The residual stream with a branch added; in backward both take the same gradient."""
    narrow = branch.itemsize if branch.itemsize < residual.itemsize else 0

    def rule(node: Node) -> Gradients:
        gradient = node.take()
        return gradient, tape.new(terms.projection, s.tokens, s.hidden, narrow) if narrow else gradient

    out = tape.new(terms.hidden_states, s.tokens, s.hidden, residual.itemsize)
    return Value(out, residual.itemsize, tape.record(rule, residual.node, branch.node, views=None))


def _attention(tape: Tape, s: Shapes, x: Value) -> tuple[Value, Storage | None]:
    """The first half of a layer, and eager attention's weights, which the layer's forward holds until it ends."""
    *projections, output = s.linears[: 2 if s.fused else 4]
    normed = norm(tape, s, x, s.tokens, s.hidden)
    make = _fused_heads if s.fused else _separate_heads
    q, k, v, held = make(tape, s, projections, normed)
    out, weights = attend(tape, s, q, k, v)
    branch = linear(tape, s, output, out)
    del out, q, k, v, held, normed
    return _add(tape, s, x, branch), weights


Heads = tuple[Value, Value, Value, Storage | None]
"""Rotated queries and keys, values, and what the attention module holds until it returns."""


def _fused_heads(tape: Tape, s: Shapes, projections: list[Linear], normed: Value) -> Heads:
    """One projection, cut into queries, keys and values."""
    joined = linear(tape, s, projections[0], normed)
    width, itemsize = projections[0].outputs, joined.itemsize

    def cut(_: Node) -> Gradients:
        return (tape.new(terms.projection, s.tokens, width, itemsize),)

    widths = (s.query, s.kv, s.kv)
    parts = [Value(joined.storage, itemsize, tape.record(cut, joined.node)) for _ in widths]
    q, k, v = (_as_heads(tape, s, part, w, w_is_v) for part, w, w_is_v in zip(parts, widths, (0, 0, 1), strict=True))
    passed: list[Storage] = []
    q, k = (_cut_rotary(tape, s, x, w, passed) for x, w in ((q, s.query), (k, s.kv)))
    q = _rotate(tape, s, q, s.heads, passed)
    k = _rotate(tape, s, k, s.kv_heads, passed)
    return q, k, v, joined.storage


def _separate_heads(tape: Tape, s: Shapes, projections: list[Linear], normed: Value) -> Heads:
    """Three projections; in some families queries and keys pass a norm a head."""
    widths = ((s.query, s.heads), (s.kv, s.kv_heads), (s.kv, 0))
    made = []
    for module, (width, heads) in zip(projections, widths, strict=True):
        made.append(_head_norm(tape, s, _as_heads(tape, s, linear(tape, s, module, normed), width, not heads), heads))
    q, k, v = made
    rotated = _rotate(tape, s, q, s.heads, None), _rotate(tape, s, k, s.kv_heads, None)
    return *rotated, v, None


def _head_norm(tape: Tape, s: Shapes, x: Value, heads: int) -> Value:
    if not (s.qk_norm and heads):
        return x
    return norm(tape, s, x, s.tokens * heads, s.head_dim)


def _as_heads(tape: Tape, s: Shapes, x: Value, width: int, is_value: bool | int) -> Value:
    """`view(...).transpose(1, 2)`: in backward a copy, unless the gradient lies token by token already."""
    in_order = bool(is_value) and s.kernel in ("flash", "efficient") and not s.repeat_kv
    itemsize = x.itemsize

    def rule(node: Node) -> Gradients:
        gradient = node.take()
        return (gradient if in_order else tape.new(terms.rotated, s.tokens, width, itemsize),)

    return Value(x.storage, itemsize, tape.record(rule, x.node, views=True))


def _cut_rotary(tape: Tape, s: Shapes, x: Value, width: int, passed: list[Storage]) -> Value:
    """Heads cut into what is rotated and what passes, whose gradients are spread over the whole width again."""
    itemsize = x.itemsize

    def rule(node: Node) -> Gradients:
        rotated = node.take()
        whole = tape.new(terms.rotated, s.tokens, width, itemsize)
        passed.pop(0)
        if s.rotary_dim < s.head_dim:
            rotated = tape.new(terms.rotated, s.tokens, width, itemsize)
        del whole
        return (rotated,)

    return Value(x.storage, itemsize, tape.record(rule, x.node))


def _rotate(tape: Tape, s: Shapes, x: Value, heads: int, passed: list[Storage] | None) -> Value:
    """Rotary embedding: x·cos + rotated half·sin, joined with what is not rotated where heads were cut.

    The cosines have the stream's dtype, and so does the result where x is narrower.
    """
    part, before = heads * s.rotary_dim, x.itemsize
    after = max(before, s.stream)
    with_cosine = tape.new(terms.rotated, s.tokens, part, after)
    negative = tape.new(terms.rotated, s.tokens, part // 2, before)
    turned = tape.new(terms.rotated, s.tokens, part, before)
    del negative
    with_sine = tape.new(terms.rotated, s.tokens, part, after)
    del turned
    out = tape.new(terms.rotated, s.tokens, part, after)
    del with_cosine, with_sine
    if passed is not None:
        out = tape.new(terms.rotated, s.tokens, heads * s.head_dim, after)

    def rule(node: Node) -> Gradients:
        gradient = node.take()
        turned = _scaled_back(tape, s, part, before, after)
        negative = tape.new(terms.rotated, s.tokens, part // 2, before)
        total = tape.new(terms.rotated, s.tokens, part, before)
        del negative
        other = tape.new(terms.rotated, s.tokens, part, before)
        del turned, other
        direct = _scaled_back(tape, s, part, before, after)
        del direct
        if passed is not None:
            passed.append(gradient)
        return (total,)

    return Value(out, after, tape.record(rule, x.node))


def _scaled_back(tape: Tape, s: Shapes, part: int, before: int, after: int) -> Storage:
    """A gradient times the cosines or sines, in the dtype that the heads had before."""
    out = tape.new(terms.rotated, s.tokens, part, after)
    return out if before == after else tape.new(terms.rotated, s.tokens, part, before)


def _mlp_linears(s: Shapes) -> tuple[Linear, ...]:
    return s.linears[2 if s.fused else 4 :]


def _gate(
    tape: Tape, s: Shapes, projections: list[Linear], middle: Value, *, allocates: bool = True
) -> tuple[Value, Storage]:
    """Norm, projections, activation of one half, product with the other; and the norm's output, which the MLP holds.

    Args:
        allocates: False where a recomputation stops before the product.
    """
    normed = norm(tape, s, middle, s.tokens, s.hidden)
    make = _fused_gate if s.fused else _separate_gate
    return make(tape, s, projections, normed, allocates), normed.storage


def _fused_gate(tape: Tape, s: Shapes, projections: list[Linear], normed: Value, allocates: bool) -> Value:
    joined = linear(tape, s, projections[0], normed)
    itemsize = joined.itemsize
    activated = tape.new(terms.activated, s.tokens, s.intermediate, itemsize)

    def rule(node: Node) -> Gradients:
        gradient = node.take()
        of_up = tape.new(terms.activated, s.tokens, s.intermediate, itemsize)
        of_activated = tape.new(terms.activated, s.tokens, s.intermediate, itemsize)
        node.keeps = node.keeps[:1]
        del gradient
        of_gate = tape.new(terms.activated, s.tokens, s.intermediate, itemsize)
        del of_activated
        node.keeps = ()
        total = tape.new(terms.projection, s.tokens, 2 * s.intermediate, itemsize)
        del of_up, of_gate
        return (total,)

    node = tape.record(rule, joined.node, keeps=(joined.storage, activated))
    if not allocates:
        return Value(activated, itemsize, node)
    return Value(tape.new(terms.activated, s.tokens, s.intermediate, itemsize), itemsize, node)


def _separate_gate(tape: Tape, s: Shapes, projections: list[Linear], normed: Value, allocates: bool) -> Value:
    gate = linear(tape, s, projections[0], normed)
    itemsize = gate.itemsize

    def one(_: Node) -> Gradients:
        return (tape.new(terms.activated, s.tokens, s.intermediate, itemsize),)

    def both(node: Node) -> Gradients:
        return one(node) + one(node)

    storage = tape.new(terms.activated, s.tokens, s.intermediate, itemsize)
    activated = Value(storage, itemsize, tape.record(one, gate.node, keeps=(gate.storage,)))
    del gate, storage
    up = linear(tape, s, projections[1], normed)
    node = tape.record(both, activated.node, up.node, keeps=(activated.storage, up.storage))
    if not allocates:
        return Value(up.storage, itemsize, node)
    return Value(tape.new(terms.activated, s.tokens, s.intermediate, itemsize), itemsize, node)
