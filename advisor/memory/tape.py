"""Autograd without tensors: which operation keeps what for backward, and what its backward allocates.

A model's forward is written down as in the library that runs it, on values that have a size and no content. What
Python would release when a name is rebound or a function returns is released here the same way, because a `Storage`
lives as long as something refers to it; and `Tape.backward` runs the operations in the order, and adds gradients up
by the rules, of torch/csrc/autograd/engine.cpp and input_buffer.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

from advisor.memory import terms
from advisor.memory.ledger import Ledger, Term
from advisor.memory.shapes import Shapes


class Storage:
    """Memory that is released when nothing refers to it any more."""

    __slots__ = ("_ledger", "handle")

    def __init__(self, ledger: Ledger, handle: int) -> None:
        self._ledger: Ledger | None = ledger
        self.handle = handle

    def __del__(self) -> None:
        if self._ledger is not None:
            self._ledger.free(self.handle)

    def keep(self) -> int:
        """Never to be released by itself; returns the handle."""
        self._ledger = None
        return self.handle

    def release(self) -> None:
        """Released now, whoever still refers to it."""
        if self._ledger is not None:
            self._ledger.free(self.keep())


class Value:
    """A tensor in forward: its storage, itemsize, and the operation that made it if gradients flow through it."""

    __slots__ = ("itemsize", "node", "storage")

    def __init__(self, storage: Storage, itemsize: int, node: Node | None) -> None:
        self.storage = storage
        self.itemsize = itemsize
        self.node = node


class Node:
    """An operation that waits for the gradient of its output.

    Its rule allocates and returns one gradient for each input; then the output's gradient and what the operation keeps
    for backward are released. A rule that stands for several operations takes the gradient and releases it earlier.
    """

    __slots__ = ("_gradient", "inputs", "is_view", "keeps", "rule", "views")

    def __init__(
        self, rule: Rule, inputs: tuple[Node | None, ...], keeps: tuple[Storage, ...], views: bool | None
    ) -> None:
        self.rule = rule
        self.inputs = inputs
        self.keeps = keeps
        self.views = views
        self.is_view = False
        self._gradient: Storage | None = None

    @property
    def waits(self) -> bool:
        """No gradient has arrived."""
        return self._gradient is None

    def done(self) -> None:
        """Releases the gradient and what was kept."""
        self._gradient, self.keeps, self.rule = None, (), _spent

    def take(self) -> Storage:
        """The gradient, which from now on lives as long as its taker holds it."""
        gradient = self._gradient
        assert gradient is not None
        self._gradient = None
        return gradient

    def receive(self, gradient: Storage, *, is_view: bool, ledger: Ledger) -> None:
        """Adds a gradient to those that have arrived.

        In place, unless the older one is a view of something: then the sum is a tensor of its own.
        Source: torch/csrc/autograd/input_buffer.cpp, accumulate and can_accumulate_inplace.
        """
        old = self._gradient
        if old is None:
            self._gradient, self.is_view = gradient, is_view
        elif self.is_view:
            self._gradient, self.is_view = Storage(ledger, ledger.like(old.handle)), False


Gradients = tuple[Storage | None, ...]
Rule = Callable[[Node], Gradients]


def _spent(_: Node) -> Gradients:
    raise AssertionError("an operation runs backward once")


def waiting() -> Node:
    """Where gradients leave a tape: the operation before its first."""
    return Node(_spent, (), (), False)


class Tape:
    """The operations of a forward in the order in which they ran.

    Args:
        ledger: where allocations are written.
        records: whether anything is kept for backward.
    """

    __slots__ = ("casts", "ledger", "middle", "nodes", "outlives", "records")

    def __init__(self, ledger: Ledger, *, records: bool = True) -> None:
        self.ledger = ledger
        self.records = records
        self.nodes: list[Node] = []
        self.casts: list[Storage] = []
        """Autocast's cache: 16-bit copies of fp32 weights, until the forward ends."""

        self.outlives: list[int] = []
        """Handles of what is alive after backward too."""

        self.middle = 0
        """How many operations belong to the first half of a layer."""

    def new(self, term: Term, *sizes: int) -> Storage:
        """Allocates."""
        return Storage(self.ledger, self.ledger.new(term, *sizes))

    def record(
        self,
        rule: Rule,
        *inputs: Node | None,
        keeps: tuple[Storage, ...] = (),
        views: bool | None = False,
        trains: bool = False,
    ) -> Node | None:
        """Notes an operation, if gradients flow through any of its inputs.

        Args:
            rule: its backward.
            inputs: the operations that made its inputs.
            keeps: what it saves for backward.
            views: whether the gradients that it returns are views; None if they are what it was given.
            trains: one of its inputs is a weight that is trained, so that it has a backward in any case.
        """
        if not (self.records and (trains or any(inputs))):
            return None
        node = Node(rule, inputs, keeps, views)
        self.nodes.append(node)
        return node

    def cast_weight(
        self, term: Term, elements: int, trained: Callable[[], Storage | None] | None, step: Node | None = None
    ) -> Value:
        """Autocast's 16-bit copy of an fp32 weight; one that is trained stays until the forward ends.

        Args:
            term: what it is.
            elements: of the weight.
            trained: makes the weight's gradient; None if it is frozen.
            step: what happens when that gradient comes.

        Source: aten/src/ATen/autocast_mode.cpp, cached_cast.
        """
        storage = self.new(term, elements)
        if trained is None:
            return Value(storage, 2, None)
        self.casts.append(storage)
        return Value(storage, 2, CastLeaf(trained, step))

    def keep_gradient(self, s: Shapes, elements: int, itemsize: int) -> Storage | None:
        """The gradient of a weight: kept; or returned, to be released where nobody keeps it.

        Nobody does where it is added to an earlier micro-batch's, or where backward steps the weight.
        """
        if s.gradients_kept or s.in_backward:
            return self.new(terms.gradient, elements, itemsize)
        self.ledger.new(terms.gradient, elements, itemsize)
        return None

    def step_leaf(self, s: Shapes, elements: int, itemsize: int) -> Node | None:
        """Autograd's end at a weight that backward steps; None where nothing is allocated for that."""
        return StepLeaf(elements, itemsize) if s.foreach else None

    def backward(self, *, down_to: int = 0) -> None:
        """Runs every operation that a gradient has reached, the last first, until `down_to` of them are left."""
        nodes = self.nodes
        while len(nodes) > down_to:
            node = nodes.pop()
            if not node.waits:
                self._pass_on(node, node.rule(node))

    def _pass_on(self, node: Node, gradients: Gradients) -> None:
        is_view = node.is_view if node.views is None else node.views
        node.done()
        for target, gradient in zip(node.inputs, gradients, strict=True):
            if target is not None and gradient is not None:
                target.receive(gradient, is_view=is_view, ledger=self.ledger)


class CastLeaf(Node):
    """Autograd's end at an fp32 weight of which autocast made a 16-bit copy: the gradient is converted at once.

    Leaves come before everything else that is ready. Source: torch/csrc/autograd/engine.cpp, CompareNodeTaskTime.
    """

    __slots__ = ("_keep", "_step")

    def __init__(self, keep: Callable[[], Storage | None], step: Node | None) -> None:
        super().__init__(_spent, (), (), False)
        self._keep = keep
        self._step = step

    def receive(self, gradient: Storage, *, is_view: bool, ledger: Ledger) -> None:
        """Makes the fp32 gradient while the 16-bit one is alive."""
        made = self._keep()
        if self._step is not None and made is not None:
            gradient.release()
            self._step.receive(made, is_view=is_view, ledger=ledger)


class StepLeaf(Node):
    """Autograd's end at a weight that is stepped as soon as its gradient is there (optimizer in backward).

    The foreach step makes its temporary for this weight alone; the gradient dies with the hook that stepped.
    Source: torch/csrc/autograd/functions/accumulate_grad.cpp, AccumulateGrad::apply; training/in_backward.py.
    """

    __slots__ = ("_sizes",)

    def __init__(self, elements: int, itemsize: int) -> None:
        super().__init__(_spent, (), (), False)
        self._sizes = (elements, itemsize)

    def receive(self, gradient: Storage, *, is_view: bool, ledger: Ledger) -> None:  # noqa: ARG002
        """Steps while the gradient is alive."""
        ledger.free(ledger.new(terms.foreach_temporary, *self._sizes))
