"""One training step as a sequence of allocations and releases: what is resident, forward, loss, backward, optimizer.

The step is one in steady state: optimizer states exist, and gradients of earlier micro-batches if there are any.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from advisor.architecture import Architecture
from advisor.memory import terms
from advisor.memory.head import Head, Held, run_head
from advisor.memory.layer import decoder_layer, first_gradients, recomputed_layer
from advisor.memory.ledger import Ledger
from advisor.memory.resident import (
    adapter_tensors,
    hold_resident,
    paged_bytes,
    state_bytes,
    trained_elements,
    trained_itemsize,
    trained_tensors,
)
from advisor.memory.shapes import Shapes, layer_shapes
from advisor.memory.tape import Tape, Value, waiting
from advisor.plan import Plan

EMBEDDING_ROWS = 3072
"""Up to so many tokens the embedding's gradient takes no temporaries (aten/src/ATen/native/cuda/Embedding.cu)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer's events on a ledger of its own, to be repeated where the layer runs."""

    ledger: Ledger
    input: int
    """Handle of the layer's input, which the forward does not make but releases, if nothing else keeps it."""

    output: int | None
    """Handle of the output; None for a checkpointed layer, whose forward is not among the events."""

    forward: int
    """Where the forward's events end."""

    saved: frozenset[int]
    """What is kept for backward."""

    outlives: frozenset[int]
    """What is kept until the step ends."""

    gradient: int
    """Handle of the output's gradient."""

    backward: tuple[int, int, int]
    """Where the MLP's backward begins, the attention's begins, and that ends."""

    returned: int | None
    """Handle of the input's gradient; None if it has none."""


@lru_cache(maxsize=128)
def run_layer(s: Shapes, *, checkpointed: bool, requires_grad: bool, whole_segments: bool = False) -> Layer:
    """Forward and backward of one layer; of a checkpointed one only the backward, with its recomputation.

    The search asks for the same layer under every loss and optimizer, so the answer is remembered.

    Args:
        requires_grad: gradients flow through the layer's input.
        whole_segments: as the step's ledger has it.
    """
    ledger = Ledger(whole_segments=whole_segments)
    tape = Tape(ledger)
    bottom = waiting() if requires_grad else None
    values = [Value(tape.new(terms.hidden_states, s.tokens, s.hidden, s.stream), s.stream, bottom)]
    start = values[0].storage.handle
    output, forward, saved = None, 1, frozenset[int]()
    if not checkpointed:
        out = decoder_layer(tape, s, values[0])
        values.clear()
        output, top, forward = out.storage.handle, out.node, ledger.position
        tape.casts.clear()
        saved = frozenset(ledger.handles_after(ledger.position) - {output} - set(tape.outlives))
        del out
    gradient = tape.new(terms.hidden_states, s.tokens, s.hidden, s.stream)
    handle, begins = gradient.handle, ledger.position
    if checkpointed:
        ends_gradients = first_gradients(tape, s, gradient)
        middle, ends = recomputed_layer(tape, s, values[0])
        tape.casts.clear()
        targets = ((middle, gradient), *zip(ends, ends_gradients, strict=True))
        del ends_gradients
    else:
        targets = ((top, gradient),)
    del gradient
    for target, arrived in targets:
        if target is not None and arrived is not None:
            target.receive(arrived, is_view=False, ledger=ledger)
    del targets, arrived
    tape.backward(down_to=tape.middle)
    half = ledger.position
    tape.backward()
    values.clear()
    returned = bottom.take().keep() if bottom is not None else None
    return Layer(
        ledger=ledger,
        input=start,
        output=output,
        forward=forward,
        saved=saved,
        outlives=frozenset(tape.outlives),
        gradient=handle,
        backward=(begins, half, ledger.position),
        returned=returned,
    )


def run_step(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, *, workspace_bytes: int) -> None:
    """The whole step, from what is resident to the optimizer."""
    ledger.at("loading")
    hold_resident(ledger, plan, arch, s, workspace_bytes=workspace_bytes)
    if s.gradients_kept:
        for elements, count in trained_tensors(plan, arch):
            ledger.new(terms.gradient, elements, trained_itemsize(plan), count=count)
    ledger.at("forward")
    tables, mask = _hold_inputs(ledger, plan, arch, s)
    run = _Checkpointed if plan.gradient_checkpointing else _Kept
    layers = run(ledger, plan, arch, s)
    held = layers.forward()
    if not plan.gradient_checkpointing:
        held.decoder += mask
        mask = []
    head = run_head(ledger, plan, arch, s, held)
    gradient = layers.backward(head.hidden.keep())
    ledger.free(*tables, *mask)
    _embedding_backward(ledger, arch, s, gradient, head)
    _optimizer_step(ledger, plan, arch)


class _Layers:
    """The decoder layers of a step: the last and the first event by event, those between them all at once."""

    def __init__(self, ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes) -> None:
        self.ledger, self.plan, self.arch, self.s = ledger, plan, arch, s
        self.embedding_needs = s.trained or plan.gradient_checkpointing

    def run_backward(self, layer: Layer, name: str, now: dict[int, int]) -> int | None:
        """Repeats a layer's backward and returns the handle of the gradient of its input."""
        begins, half, ends = layer.backward
        self.ledger.replay(layer.ledger, begins, half, f"backward of the {name} layer: MLP", now)
        self.ledger.replay(layer.ledger, half, ends, f"backward of the {name} layer: attention", now)
        return None if layer.returned is None else now[layer.returned]

    def embed(self) -> int:
        """The embedding's output."""
        s = self.s
        made = self.ledger.new(terms.hidden_states, s.tokens, s.hidden, s.stream)
        if s.norm_in_fp32:
            self.ledger.free(made)
            made = self.ledger.new(terms.hidden_states, s.tokens, s.hidden, s.stream)
        return made

    def hold_outputs(self) -> list[int]:
        """The outputs of the micro-batch before, of this step or the last, which its caller holds until these come.

        The logits; and, through the graph behind the loss, a leaf with its gradient: the embedding's output, which
        adapters under checkpointing make require one (transformers enable_input_require_grads).
        """
        s, plan = self.s, self.plan
        held: list[int] = []
        if not plan.hold_outputs:
            return held
        if plan.loss == "standard":
            held.append(self.ledger.new(terms.logits, s.tokens, s.vocabulary, 4 if s.autocast else s.stream))
        if plan.lora is not None and plan.gradient_checkpointing:
            held.append(self.ledger.new(terms.hidden_states, s.tokens, s.hidden, s.stream, count=2))
        return held

    def hold_gradients(self, layers: int) -> None:
        """Gradients of the layers between the last and the first."""
        s, new = self.s, self.ledger.new
        if s.gradients_kept or s.in_backward or layers < 1:
            return
        if not s.trained:
            for elements, _ in adapter_tensors(self.plan, self.arch):
                new(terms.gradient, elements, 4, count=layers)
            return
        for module in s.linears:
            new(terms.gradient, module.weights, s.storage, count=layers)
            if module.bias:
                new(terms.gradient, module.outputs, s.storage, count=layers)
        new(terms.gradient, s.hidden, s.storage, count=layers * len(self.arch.family.layer_norms))


class _Checkpointed(_Layers):
    """Every layer keeps its input alone and runs again in backward."""

    def forward(self) -> Held:
        """One hidden state a layer, and autocast's copies of the weights."""
        s, ledger = self.s, self.ledger
        previous = self.hold_outputs()
        self.first = self.embed()
        self.between, self.last = [], self.first
        sizes = (s.tokens, s.hidden, s.stream)
        if s.layers > 1:
            self.last = ledger.new(terms.hidden_states, *sizes)
        if s.layers > 2:
            self.between.append(ledger.new(terms.hidden_states, *sizes, count=s.layers - 2))
        return Held(forward=self._casts(), outputs=previous)

    def _casts(self) -> list[int]:
        """Autocast's 16-bit copies of fp32 weights that require gradients: cached until the forward has ended."""
        s, new = self.s, self.ledger.new
        if not s.autocast:
            return []
        if not s.trained:
            tensors = adapter_tensors(self.plan, self.arch)
            return [new(terms.cast_adapter_weight, elements, count=count) for elements, count in tensors]
        if s.storage == 2:
            return []
        before = s.layers - 1
        casts = [new(terms.cast_weight, module.weights, count=before) for module in s.linears] if before else []
        return casts + self._run_last()

    def _run_last(self) -> list[int]:
        """The last layer's forward, which keeps nothing but its copies of weights."""
        s = self.s
        tape = Tape(self.ledger, records=False)
        # Its input is there already, as what checkpointing keeps.
        decoder_layer(tape, s, Value(tape.new(terms.hidden_states, 0, 0, 0), s.stream, None))
        return [cast.keep() for cast in tape.casts]

    def backward(self, gradient: int) -> int | None:
        """From the gradient of the last layer's output to that of the embedding's."""
        s, ledger = self.s, self.ledger
        layer = run_layer(s, checkpointed=True, requires_grad=True, whole_segments=ledger.whole_segments)
        returned = self.run_backward(layer, "last", {layer.input: self.last, layer.gradient: gradient})
        if s.layers > 1:
            assert returned is not None
            ledger.free(*self.between)
            self.hold_gradients(s.layers - 2)
            returned = self.run_backward(layer, "first", {layer.input: self.first, layer.gradient: returned})
        return returned


class _Kept(_Layers):
    """Every layer keeps what its backward needs."""

    def forward(self) -> Held:
        """All layers' forward; the decoder holds the embedding until it ends, whether or not a layer keeps it."""
        s, ledger = self.s, self.ledger
        previous = self.hold_outputs()
        first = self.embed()
        whole = ledger.whole_segments
        self.layer = run_layer(s, checkpointed=False, requires_grad=True, whole_segments=whole)
        self.first_layer = self.layer
        if not self.embedding_needs:
            self.first_layer = run_layer(s, checkpointed=False, requires_grad=False, whole_segments=whole)
        if previous and s.holds_cache:
            previous += ledger.repeat(self.layer.ledger, self.layer.outlives, s.layers)
        kept = self.first_layer.input in self.first_layer.saved
        stands_for = first if kept else ledger.new(terms.hidden_states, 0, 0, 0)
        self.now_first = {self.first_layer.input: stands_for}
        if s.layers == 1:
            self.layer = self.first_layer
        out = self._run_forward(self.first_layer, self.now_first)
        cached = [self.now_first[handle] for handle in self.first_layer.outlives]
        self.between = []
        if s.layers > 1:
            if s.layers > 2:
                self.between = ledger.repeat(self.layer.ledger, self.layer.saved, s.layers - 2)
                cached += ledger.repeat(self.layer.ledger, self.layer.outlives, s.layers - 2)
            self.now_last = {self.layer.input: out}
            out = self._run_forward(self.layer, self.now_last)
            cached += [self.now_last[handle] for handle in self.layer.outlives]
        ledger.free(out)
        if s.holds_cache:
            cached.clear()
        return Held(decoder=cached if kept else [first, *cached], outputs=previous)

    def _run_forward(self, layer: Layer, now: dict[int, int]) -> int:
        assert layer.output is not None
        self.ledger.replay(layer.ledger, 1, layer.forward, "forward", now)
        return now[layer.output]

    def backward(self, gradient: int) -> int | None:
        """From the gradient of the last layer's output to that of the embedding's, if it has one."""
        s, ledger = self.s, self.ledger
        returned: int | None = gradient
        if s.layers > 1:
            self.now_last[self.layer.gradient] = gradient
            returned = self.run_backward(self.layer, "last", self.now_last)
            ledger.free(*self.between)
            self.hold_gradients(s.layers - 2)
        assert returned is not None
        self.now_first[self.first_layer.gradient] = returned
        return self.run_backward(self.first_layer, "first", self.now_first)


def _hold_inputs(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes) -> tuple[list[int], list[int]]:
    """Token ids, which whoever runs the step has until it ends; rotary tables, which layers keep; and the mask.

    Layers keep the mask too where they are checkpointed. What they keep is there until the first has run backward.
    """
    ledger.new(terms.token_ids, s.tokens, 3)
    tables = [ledger.new(terms.rotary_table, s.position_rows * s.seq, arch.rotary_dim, s.stream)]
    if not s.mask_rows:
        return tables, []
    itemsize = 1 if plan.attention == "sdpa" else s.stream
    return tables, [ledger.new(terms.attention_mask, s.mask_rows, s.seq, itemsize)]


def _embedding_backward(ledger: Ledger, arch: Architecture, s: Shapes, gradient: int | None, head: Head) -> None:
    """Full fine-tuning gathers a dense gradient of the embedding; a tied one is added to the head's.

    Above 3,072 tokens the kernel sorts the ids (six lists of 8 bytes a token) and sums rows in fp32.
    Source: aten/src/ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu.
    """
    ledger.at("embedding backward")
    if not s.trained:
        if gradient is not None:
            ledger.free(gradient)
        return
    assert gradient is not None
    if s.norm_in_fp32:
        scaled = ledger.new(terms.hidden_states, s.tokens, s.hidden, s.stream)
        ledger.free(gradient)
        gradient = scaled
    elements = arch.vocab_size * arch.hidden_size
    inside = []
    if s.tokens > EMBEDDING_ROWS:
        inside.append(ledger.new(terms.token_ids, s.tokens, 6))
    made = ledger.new(terms.gradient, elements, s.storage)
    if s.tokens > EMBEDDING_ROWS:
        inside.append(ledger.new(terms.embedding_rows, s.tokens, s.hidden))
    ledger.free(*inside, gradient)
    if head.tied is not None:
        if head.tied_is_view:
            total = ledger.new(terms.gradient, elements, s.storage)
            ledger.free(made, head.tied.keep())
            made = total
        else:
            ledger.free(made)
            made = head.tied.keep()
    if s.foreach:
        ledger.free(ledger.new(terms.foreach_temporary, elements, s.storage))
    if s.gradients_kept or s.in_backward:
        ledger.free(made)


def _optimizer_step(ledger: Ledger, plan: Plan, arch: Architecture) -> None:
    """Gradients, states and, for the foreach step, one temporary for all parameters at once.

    Where backward has stepped every parameter, nothing is left to do.
    """
    ledger.at("optimizer step")
    if plan.optimizer == "adamw_torch" and not plan.optimizer_in_backward:
        for elements, count in trained_tensors(plan, arch):
            ledger.new(terms.foreach_temporary, elements, trained_itemsize(plan), count=count)


__all__ = [
    "adapter_tensors",
    "layer_shapes",
    "paged_bytes",
    "run_layer",
    "run_step",
    "state_bytes",
    "trained_elements",
    "trained_itemsize",
    "trained_tensors",
]
