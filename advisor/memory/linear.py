"""A linear module with whatever stands in it: trained, frozen, quantised, adapted.

Source: torch.nn.Linear; peft/tuners/lora/layer.py and bnb.py; bitsandbytes/nn/modules.py and autograd/_functions.py.
"""

from __future__ import annotations

from functools import partial

from advisor.architecture import Linear
from advisor.memory import terms
from advisor.memory.shapes import Shapes
from advisor.memory.tape import Gradients, Node, Storage, Tape, Value


def linear(tape: Tape, s: Shapes, module: Linear, x: Value) -> Value:
    """The module's output."""
    return finish(tape, s, module, start(tape, s, module, x))


class Started:
    """A linear module as far as the last operation that keeps something for backward."""

    __slots__ = ("base", "held", "nodes")

    def __init__(self, base: Value, nodes: tuple[Node | None, ...], held: Storage | None = None) -> None:
        self.base = base
        """The module's own output, where an adapter's is still to be added; else the output."""

        self.nodes = nodes
        """What `gradients_before` returns gradients for."""

        self.held = held
        """The adapter's input, which PEFT's forward holds until it returns."""


def keeps_something(s: Shapes, module: Linear) -> bool:
    """Whether a checkpointed layer runs the module again: bitsandbytes' own autograd function saves nothing."""
    return not s.quantized or module.name in s.adapted


def start(tape: Tape, s: Shapes, module: Linear, x: Value, *, stops: bool = False) -> Started:
    """Runs the module up to the last operation that keeps something.

    Args:
        stops: a checkpointed layer's recomputation, which ends there (torch/utils/checkpoint.py, early stop).
    """
    adapted = module.name in s.adapted
    if s.quantized:
        base = _quantized(tape, s, module, x)
    else:
        run = _trained if s.trained else _frozen
        base = run(tape, s, module, x, allocates=adapted or not stops)
    if not adapted:
        return Started(base, (base.node,))
    if s.quantized:
        base.storage = tape.new(terms.projection, s.tokens, module.outputs, base.itemsize)
    return _start_adapter(tape, s, module, x, base)


def finish(tape: Tape, s: Shapes, module: Linear, started: Started) -> Value:
    """The rest: the adapter's product, scaled and added."""
    base = started.base
    if module.name not in s.adapted:
        return base
    out, inner = base.itemsize, _inner(s)
    scaled = tape.new(terms.adapter_output, s.tokens, module.outputs, inner)
    scaled = tape.new(terms.adapter_output, s.tokens, module.outputs, inner)
    summed = max(out, inner)
    if _narrows_first(s, out):
        scaled = tape.new(terms.adapter_output, s.tokens, module.outputs, out)
        summed = out
    total = tape.new(terms.adapter_output, s.tokens, module.outputs, summed)
    del scaled
    base.storage = total
    if summed != out:
        del total
        base.storage = tape.new(terms.projection, s.tokens, module.outputs, out)

    def rule(node: Node) -> Gradients:
        return gradients_before(tape, s, module, node.take(), out)

    return Value(base.storage, out, tape.record(rule, *started.nodes, views=False))


def gradients_before(tape: Tape, s: Shapes, module: Linear, gradient: Storage, itemsize: int) -> Gradients:
    """The gradient of a module's output → those of what `start` returned: the adapter's product, the module's own.

    Backward of `result + product * scaling`, with the conversions around it.

    Args:
        itemsize: of the output.
    """
    if module.name not in s.adapted:
        return (gradient,)
    inner = _inner(s)
    new = partial(tape.new, terms.adapter_output, s.tokens, module.outputs)
    own = product = gradient
    if inner > itemsize:
        product = new(inner)
        if not _narrows_first(s, itemsize):
            del gradient
            own = new(itemsize)
    elif inner < itemsize:
        product = new(inner)
    scaled = new(inner)
    del product
    return (scaled, own)


def _inner(s: Shapes) -> int:
    """Itemsize of the adapter's products."""
    return 2 if s.autocast else 4


def _narrows_first(s: Shapes, itemsize: int) -> bool:
    """PEFT's 4-bit layer converts the adapter's output before it adds it; the plain layer converts the sum."""
    return s.quantized and _inner(s) > itemsize


def convert(tape: Tape, x: Value, tokens: int, width: int, itemsize: int) -> Value:
    """`x.to(dtype)`, of which backward converts the gradient back; a module's input in the dtype it computes in."""
    if x.itemsize == itemsize:
        return x

    def rule(_: Node) -> Gradients:
        return (tape.new(terms.projection, tokens, width, before),)

    before = x.itemsize
    return Value(tape.new(terms.cast_input, tokens, width, itemsize), itemsize, tape.record(rule, x.node))


def _trained(tape: Tape, s: Shapes, module: Linear, x: Value, *, allocates: bool) -> Value:
    """torch.nn.Linear whose weight is trained; under autocast over 16-bit copies of input and weight."""
    if s.autocast:
        x = convert(tape, x, s.tokens, module.inputs, 2)
    itemsize = x.itemsize
    keep = partial(tape.keep_gradient, s, module.weights, s.storage)
    leaf = tape.step_leaf(s, module.weights, s.storage)
    copies = s.autocast and s.storage == 4
    cast = tape.cast_weight(terms.cast_weight, module.weights, keep, leaf) if copies else None
    needed = x.node is not None

    def rule(_: Node) -> Gradients:
        of_weight = tape.new(terms.gradient, module.weights, 2) if copies else keep()
        if module.bias:
            tape.keep_gradient(s, module.outputs, s.storage)
        back = tape.new(terms.projection, s.tokens, module.inputs, itemsize) if needed else None
        return (back, of_weight)

    weight = cast.node if cast is not None else leaf
    keeps = (x.storage, cast.storage) if cast is not None and needed else (x.storage,)
    node = tape.record(rule, x.node, weight, keeps=keeps, views=True, trains=True)
    return _output(tape, s, module, x, itemsize, node, allocates=allocates)


def _output(
    tape: Tape, s: Shapes, module: Linear, x: Value, itemsize: int, node: Node | None, *, allocates: bool
) -> Value:
    """A module's output; where nothing more runs, its input stands for it and is released with it."""
    storage = tape.new(terms.projection, s.tokens, module.outputs, itemsize) if allocates else x.storage
    return Value(storage, itemsize, node)


def _frozen(tape: Tape, s: Shapes, module: Linear, x: Value, *, allocates: bool) -> Value:
    """torch.nn.Linear whose weight is frozen; autocast's 16-bit copies of it are not cached."""
    if s.autocast:
        x = convert(tape, x, s.tokens, module.inputs, 2)
    itemsize = x.itemsize
    copies = s.autocast and s.storage == 4
    cast = tape.cast_weight(terms.cast_weight, module.weights, None) if copies else None

    def rule(_: Node) -> Gradients:
        return (tape.new(terms.projection, s.tokens, module.inputs, itemsize),)

    node = tape.record(rule, x.node, keeps=(cast.storage,) if cast is not None else (), views=True)
    return _output(tape, s, module, x, itemsize, node, allocates=allocates)


def _quantized(tape: Tape, s: Shapes, module: Linear, x: Value) -> Value:
    """bitsandbytes' Linear4bit: the input in the compute dtype, the weight expanded, the output converted back.

    For few tokens a fused kernel reads the 4-bit weight as it is.
    """
    itemsize = x.itemsize
    converts = itemsize != s.storage
    cast = tape.new(terms.cast_input, s.tokens, module.inputs, s.storage) if converts else None
    expands = module.name not in s.fused_4bit
    scales = [tape.new(terms.dequantized_scales, module.weights) for _ in range(2)] if expands and s.double else []
    expanded = tape.new(terms.dequantized_weight, module.weights, s.storage) if expands else None
    out = tape.new(terms.projection, s.tokens, module.outputs, s.storage)
    del scales, expanded
    if converts:
        out = tape.new(terms.projection, s.tokens, module.outputs, itemsize)
    del cast

    def rule(node: Node) -> Gradients:
        return (quantized_gradient(tape, s, module, node.take(), itemsize),)

    return Value(out, itemsize, tape.record(rule, x.node))


def quantized_gradient(tape: Tape, s: Shapes, module: Linear, gradient: Storage, itemsize: int) -> Storage:
    """The gradient of a 4-bit module's output → that of its input, which has `itemsize` too."""
    if itemsize != s.storage:
        gradient = tape.new(terms.projection, s.tokens, module.outputs, s.storage)
    scales = tape.new(terms.dequantized_scales, module.weights) if s.double else None
    expanded = tape.new(terms.dequantized_weight, module.weights, s.storage)
    del scales
    back = tape.new(terms.projection, s.tokens, module.inputs, s.storage)
    del expanded
    if itemsize != s.storage:
        del gradient
        back = tape.new(terms.projection, s.tokens, module.inputs, itemsize)
    return back


def _start_adapter(tape: Tape, s: Shapes, module: Linear, x: Value, base: Value) -> Started:
    """LoRA's path beside a frozen module, up to the second product: convert, drop out, first product."""
    if not (s.quantized and s.autocast):
        x = convert_adapter_input(tape, s, x, module.inputs)
    dropped = _drop_out(tape, s, x, module.inputs) if s.dropout else x
    held = x.storage
    if s.autocast:
        dropped = convert(tape, dropped, s.tokens, module.inputs, 2)
    first = _product(tape, s, dropped, module.inputs, module.inputs * s.rank)
    inner = Value(tape.new(terms.adapter_inner, s.tokens, s.rank, _inner(s)), _inner(s), first)
    del dropped
    second = _product(tape, s, inner, s.rank, module.outputs * s.rank)
    return Started(base, (second, base.node), held)


def convert_adapter_input(tape: Tape, s: Shapes, x: Value, width: int) -> Value:
    """The input in the adapter's fp32, whatever autocast does then."""
    if x.itemsize == 4:
        return x

    def rule(_: Node) -> Gradients:
        return (tape.new(terms.adapter_input, s.tokens, width, 2),)

    return Value(tape.new(terms.adapter_input, s.tokens, width, 4), 4, tape.record(rule, x.node))


def _drop_out(tape: Tape, s: Shapes, x: Value, width: int) -> Value:
    """CUDA's fused dropout keeps one byte an element; without gradients it makes the mask all the same."""
    itemsize = x.itemsize

    def rule(_: Node) -> Gradients:
        return (tape.new(terms.adapter_input, s.tokens, width, itemsize),)

    out = tape.new(terms.adapter_input, s.tokens, width, itemsize)
    mask = tape.new(terms.adapter_dropout_mask, s.tokens, width)
    return Value(out, itemsize, tape.record(rule, x.node, keeps=(mask,)))


def _product(tape: Tape, s: Shapes, x: Value, width: int, elements: int) -> Node | None:
    """The product with one of the adapter's matrices: keeps its input, and autocast's copy of the matrix."""
    inner, needed = _inner(s), x.node is not None
    keep = partial(tape.keep_gradient, s, elements, 4)
    cast = tape.cast_weight(terms.cast_adapter_weight, elements, keep) if s.autocast else None
    cast_node = cast.node if cast is not None else None

    def rule(_: Node) -> Gradients:
        narrow = tape.new(terms.gradient, elements, 2) if cast_node is not None else keep()
        back = tape.new(terms.adapter_input, s.tokens, width, inner) if needed else None
        return (back, narrow)

    keeps = (x.storage, cast.storage) if cast is not None and needed else (x.storage,)
    return tape.record(rule, x.node, cast_node, keeps=keeps, views=True, trains=True)
