"""RMSNorm, forward and backward, operation by operation.

Source: transformers models/phi3/modeling_phi3.py, Phi3RMSNorm; models/gemma/modeling_gemma.py, GemmaRMSNorm.
"""

from __future__ import annotations

from advisor.memory import terms
from advisor.memory.shapes import Shapes
from advisor.memory.tape import Gradients, Node, Rule, Storage, Tape, Value


def norm(tape: Tape, s: Shapes, x: Value, rows: int, width: int) -> Value:
    """Convert to fp32, divide by the root mean square, convert back, times the weight (Gemma: convert back last).

    Args:
        x: the input.
        rows: how many vectors are normalised.
        width: features of each.
    """
    wide, convert = _to_fp32(tape, x, rows, width)
    square = tape.new(terms.norm_temporary, rows, width, 4)
    statistics = tape.new(terms.norm_statistics, rows)
    del square
    squared = tape.record(_square_rule(tape, rows, width), convert, keeps=(wide,))
    scaled = tape.new(terms.norm_temporary, rows, width, 4)
    keeps = (wide, statistics)
    multiplied = tape.record(_scale_rule(tape, rows, width), convert, squared, keeps=keeps)
    del wide, keeps, convert, squared
    if s.norm_in_fp32:
        return _weigh_in_fp32(tape, s, scaled, multiplied, x.itemsize, rows, width)
    narrow, multiplied = _to_input(tape, scaled, multiplied, x.itemsize, rows, width)
    return _weigh(tape, s, narrow, multiplied, x.itemsize, rows, width)


def _to_fp32(tape: Tape, x: Value, rows: int, width: int) -> tuple[Storage, Node | None]:
    if x.itemsize == 4:
        return x.storage, x.node

    def rule(_: Node) -> Gradients:
        return (tape.new(terms.hidden_states, rows, width, 2),)

    return tape.new(terms.norm_input_copy, rows, width), tape.record(rule, x.node)


def _square_rule(tape: Tape, rows: int, width: int) -> Rule:
    """Of the mean of the squares: the gradient spread out, the input's power, twice that, the product."""

    def rule(_: Node) -> Gradients:
        spread = tape.new(terms.norm_temporary, rows, width, 4)
        power = tape.new(terms.norm_temporary, rows, width, 4)
        doubled = tape.new(terms.norm_temporary, rows, width, 4)
        back = tape.new(terms.norm_temporary, rows, width, 4)
        del spread, power, doubled
        return (back,)

    return rule


def _scale_rule(tape: Tape, rows: int, width: int) -> Rule:
    """Of the input times its reciprocal root mean square."""

    def rule(_: Node) -> Gradients:
        product = tape.new(terms.norm_temporary, rows, width, 4)
        back = tape.new(terms.norm_temporary, rows, width, 4)
        statistics = tape.new(terms.norm_statistics, rows)
        del product
        return (back, statistics)

    return rule


def _to_input(
    tape: Tape, scaled: Storage, multiplied: Node | None, itemsize: int, rows: int, width: int
) -> tuple[Storage, Node | None]:
    if itemsize == 4:
        return scaled, multiplied

    def rule(_: Node) -> Gradients:
        return (tape.new(terms.norm_temporary, rows, width, 4),)

    return tape.new(terms.norm_output, rows, width, 2), tape.record(rule, multiplied)


def _weigh(
    tape: Tape, s: Shapes, narrow: Storage, multiplied: Node | None, itemsize: int, rows: int, width: int
) -> Value:
    out_itemsize = max(itemsize, s.stream)
    converts = out_itemsize > itemsize
    out = tape.new(terms.norm_output, rows, width, out_itemsize)

    def rule(_: Node) -> Gradients:
        back = None
        if multiplied is not None:
            back = tape.new(terms.norm_temporary, rows, width, out_itemsize)
        if s.trained:
            product = tape.new(terms.norm_temporary, rows, width, out_itemsize)
            tape.keep_gradient(s, width, s.storage)
            del product
        if converts:
            back = tape.new(terms.norm_temporary, rows, width, itemsize)
        return (back,)

    keeps = (narrow,) if s.trained else ()
    return Value(out, out_itemsize, tape.record(rule, multiplied, keeps=keeps, trains=s.trained))


def _weigh_in_fp32(
    tape: Tape, s: Shapes, scaled: Storage, multiplied: Node | None, itemsize: int, rows: int, width: int
) -> Value:
    product = tape.new(terms.norm_temporary, rows, width, 4)

    def rule(_: Node) -> Gradients:
        back = tape.new(terms.norm_temporary, rows, width, 4)
        if s.trained:
            weighed = tape.new(terms.norm_temporary, rows, width, 4)
            tape.keep_gradient(s, width, s.storage)
            del weighed
        return (back,)

    keeps = (scaled,) if s.trained else ()
    node = tape.record(rule, multiplied, keeps=keeps, trains=s.trained)
    if itemsize == 4:
        return Value(product, 4, node)

    def convert(_: Node) -> Gradients:
        return (tape.new(terms.norm_temporary, rows, width, 4),)

    return Value(tape.new(terms.norm_output, rows, width, 2), 2, tape.record(convert, node))
