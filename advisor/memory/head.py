"""Final norm, output head and loss, forward and backward.

Source: transformers models/phi3/modeling_phi3.py, Phi3ForCausalLM; loss/loss_utils.py, ForCausalLMLoss;
accelerate utils/operations.py, convert_outputs_to_fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from advisor.architecture import Architecture
from advisor.chunks import chunk_rows
from advisor.memory import terms
from advisor.memory.ledger import Ledger
from advisor.memory.linear import convert
from advisor.memory.norm import norm
from advisor.memory.shapes import Shapes
from advisor.memory.tape import Gradients, Node, Storage, Tape, Value, waiting
from advisor.plan import Plan


@dataclass(slots=True)
class Held:
    """Handles of what is released at one of the forward's ends."""

    decoder: list[int] = field(default_factory=list)
    """When the last layer's output is normed."""

    forward: list[int] = field(default_factory=list)
    """When the loss is there: autocast's copies of weights."""

    outputs: list[int] = field(default_factory=list)
    """When the model has returned: what an earlier micro-batch's outputs held."""


class Head:
    """The gradients that the output head leaves behind."""

    __slots__ = ("hidden", "tied", "tied_is_view")

    def __init__(self, hidden: Storage, tied: Storage | None, tied_is_view: bool) -> None:
        self.hidden = hidden
        """Of the last layer's output."""

        self.tied = tied
        """Of a matrix that is the embedding too, which waits for the embedding's own gradient."""

        self.tied_is_view = tied_is_view
        """A view is not added to in place."""


def run_head(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, held: Held) -> Head:
    """From the last layer's output to the gradient of it."""
    ledger.at("logits")
    tape = Tape(ledger)
    bottom = waiting()
    tied: list[Storage] = []
    run = _chunked_loss if plan.loss == "chunked" else _standard_loss
    run(tape, plan, arch, s, _normed(tape, s, bottom, held.decoder), held, tied)
    ledger.at("head backward")
    tape.backward()
    is_view = plan.loss == "standard" and not (s.autocast and s.storage == 4)
    return Head(bottom.take(), tied[0] if tied else None, is_view)


def _normed(tape: Tape, s: Shapes, bottom: Node, held: list[int]) -> Value:
    last = Value(tape.new(terms.hidden_states, s.tokens, s.hidden, s.stream), s.stream, bottom)
    normed = norm(tape, s, last, s.tokens, s.hidden)
    tape.ledger.free(*held)
    return normed


def _head_storage(plan: Plan, s: Shapes) -> int:
    """Itemsize of the head's weights: never 4-bit, fp32 after kbit preparation."""
    return s.stream if plan.upcast_frozen else s.storage


def _standard_loss(
    tape: Tape, plan: Plan, arch: Architecture, s: Shapes, normed: Value, held: Held, tied: list[Storage]
) -> None:
    """All logits at once: their fp32 copy, its log-softmax, and the gradients of the same sizes."""
    ledger = tape.ledger
    itemsize = 2 if s.autocast else normed.itemsize
    wide = partial(tape.new, terms.logits, s.tokens, s.vocabulary, 4)
    logits, node = _logits(tape, plan, arch, s, normed, tied)
    ledger.at("loss")
    copy = wide() if itemsize == 2 else None
    log_softmax = wide()
    del copy, normed
    tape.casts.clear()
    ledger.free(*held.forward)
    if s.autocast:
        logits = wide()
    if plan.hold_outputs:
        logits.keep()
    del logits
    ledger.free(*held.outputs)
    ledger.at("loss backward")
    of_log = wide()
    gradient = wide()
    del of_log, log_softmax
    if itemsize == 2:
        gradient = tape.new(terms.logits, s.tokens, s.vocabulary, 2)
    if node is not None:
        node.receive(gradient, is_view=False, ledger=ledger)


def _logits(
    tape: Tape, plan: Plan, arch: Architecture, s: Shapes, normed: Value, tied: list[Storage]
) -> tuple[Storage, Node | None]:
    elements = arch.vocab_size * arch.hidden_size
    x = convert(tape, normed, s.tokens, s.hidden, 2) if s.autocast else normed
    keep = partial(_keep_head_gradient, tape, arch, s, tied)
    copies = s.autocast and _head_storage(plan, s) == 4
    leaf = None if arch.tied else tape.step_leaf(s, elements, s.storage)
    cast = tape.cast_weight(terms.cast_weight, elements, keep if s.trained else None, leaf) if copies else None
    itemsize = x.itemsize

    def rule(_: Node) -> Gradients:
        of_weight = None
        if s.trained:
            of_weight = tape.new(terms.gradient, elements, 2) if copies else keep()
        return (tape.new(terms.projection, s.tokens, s.hidden, itemsize), of_weight)

    weight = cast.node if cast is not None else leaf
    keeps = ((x.storage,) if s.trained else ()) + ((cast.storage,) if cast is not None else ())
    node = tape.record(rule, x.node, weight, keeps=keeps, views=True, trains=s.trained)
    del x, cast, keeps
    return tape.new(terms.logits, s.tokens, arch.vocab_size, itemsize), node


def _keep_head_gradient(tape: Tape, arch: Architecture, s: Shapes, tied: list[Storage]) -> Storage | None:
    elements = arch.vocab_size * arch.hidden_size
    if arch.tied:
        tied.append(tape.new(terms.gradient, elements, s.storage))
        return None
    return tape.keep_gradient(s, elements, s.storage)


def _chunked_loss(
    tape: Tape, plan: Plan, arch: Architecture, s: Shapes, normed: Value, held: Held, tied: list[Storage]
) -> None:
    """torch.nn.functional.linear_cross_entropy: a chunk of logits at a time, and all gradients already in forward.

    Autocast does not know it: hidden states and weight are converted before. Backward makes zeros for the gradients
    of the operation's other outputs, which nobody uses (torch/autograd/function.py, set_materialize_grads).
    Source: torch/nn/modules/linear_cross_entropy.py, _ChunkContext.build, on CUDA with the policy "compact".
    """
    elements = arch.vocab_size * arch.hidden_size
    x = convert(tape, normed, s.tokens, s.hidden, 2) if s.autocast else normed
    itemsize = x.itemsize
    copies = s.autocast and _head_storage(plan, s) == 4
    weight = tape.new(terms.cast_weight, elements) if copies else None
    rows = chunk_rows(s.tokens, s.hidden, s.vocabulary)
    wide = itemsize == 2 and not s.half
    inside = [tape.new(terms.logits, rows, s.vocabulary, 4 if wide else itemsize)]
    gradient = tape.new(terms.hidden_states, s.tokens, s.hidden, itemsize)
    of_weight = tape.new(terms.gradient, elements, itemsize) if s.trained else None
    if s.trained and itemsize == 2:
        inside.append(tape.new(terms.hidden_states, rows, s.hidden, 4))
    selected = tape.new(terms.hidden_states, rows, s.hidden, itemsize)
    if wide:
        inside.append(tape.new(terms.logits, rows, s.vocabulary, 2))
        del selected
        if rows < s.tokens:
            inside.append(tape.new(terms.logits, rows, s.vocabulary, 2))
    node = x.node
    del inside, x, weight, normed
    tape.casts.clear()
    tape.ledger.free(*held.forward, *held.outputs)
    tape.ledger.at("loss backward")
    zeros = [tape.new(terms.hidden_states, s.tokens, s.hidden, itemsize)]
    if of_weight is not None:
        zeros.append(tape.new(terms.gradient, elements, itemsize))
    del zeros
    if of_weight is not None:
        _receive_head_gradient(tape, arch, s, tied, of_weight, copied=copies)
    if node is not None:
        node.receive(gradient, is_view=True, ledger=tape.ledger)


def _receive_head_gradient(
    tape: Tape, arch: Architecture, s: Shapes, tied: list[Storage], gradient: Storage, *, copied: bool
) -> None:
    """The chunked loss's gradient of the head, in the weight's dtype."""
    elements = arch.vocab_size * arch.hidden_size
    if copied:
        narrow, gradient = gradient, tape.new(terms.gradient, elements, s.storage)
        narrow.release()
    if arch.tied:
        tied.append(gradient)
    elif s.in_backward:
        leaf = tape.step_leaf(s, elements, s.storage)
        if leaf is not None:
            leaf.receive(gradient, is_view=False, ledger=tape.ledger)
        gradient.release()
    elif not s.gradients_kept:
        gradient.keep()
