"""One training step as a sequence of allocations and releases: what is resident, forward, loss, backward, optimizer.

The step is one in steady state: optimizer states exist, and gradients of earlier micro-batches if there are any.
"""

from __future__ import annotations

from advisor.architecture import Architecture
from advisor.memory import terms
from advisor.memory.attention import attention_itemsize, choose_kernel, needs_mask
from advisor.memory.layer import Shapes, decoder_layer, keep_gradient, norm
from advisor.memory.ledger import Ledger
from advisor.memory.lora import adapted_names
from advisor.plan import ITEMSIZE, Plan
from advisor.profiles import Backend

EIGHT_BIT_SMALLEST = 4096
"""Tensors below this keep fp32 states (bitsandbytes/optim/optimizer.py, min_8bit_size)."""

PAGED_SMALLEST = 100_000
"""Tensors below this are not paged (bitsandbytes/optim/optimizer.py, get_state_buffer)."""

_WORKSPACE_BYTES = 8_519_680
_HOPPER_WORKSPACE_BYTES = 33_554_432


def layer_shapes(plan: Plan, arch: Architecture, *, capability: tuple[int, int] | None, backend: Backend) -> Shapes:
    """The plain numbers that a plan's layers are computed from."""
    kernel, _ = choose_kernel(plan, arch, capability=capability, backend=backend)
    masked = needs_mask(plan, arch)
    grouped = arch.heads != arch.kv_heads
    padded = plan.padding == "longest" and plan.micro_batch > 1
    return Shapes(
        batch=plan.micro_batch,
        seq=plan.seq_len,
        hidden=arch.hidden_size,
        intermediate=arch.intermediate_size,
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        layers=arch.layers,
        vocabulary=arch.vocab_size,
        linears=arch.linears,
        fused=arch.family.fused,
        qk_norm=arch.family.qk_norm,
        norm_in_fp32=arch.family.norm_in_fp32,
        kernel=kernel,
        repeat_kv=grouped and (kernel in ("eager", "math") or (kernel == "efficient" and masked)),
        mask_rows=(plan.micro_batch if padded else 1) if masked else 0,
        trained=plan.method == "full",
        quantized=plan.quantization is not None,
        double=plan.quantization is not None and plan.quantization.double,
        autocast=plan.autocast != "none",
        storage=ITEMSIZE[plan.dtype],
        stream=attention_itemsize(plan),
        rank=plan.lora.rank if plan.lora else 0,
        adapted=adapted_names(plan, arch),
        dropout=plan.lora is not None and plan.lora.dropout > 0,
        gradients_kept=plan.gradient_accumulation > 1,
    )


def hold_resident(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, *, hopper: bool) -> None:
    """What stays for the whole run: weights, adapters, optimizer states, workspaces."""
    outside = s.stream if plan.upcast_frozen else s.storage
    ledger.new(terms.weight, arch.vocab_size * arch.hidden_size, outside)
    if not arch.tied:
        ledger.new(terms.weight, arch.vocab_size * arch.hidden_size, outside)
    ledger.new(terms.weight, arch.hidden_size, outside, count=1 + arch.layers * len(arch.family.layer_norms))
    if arch.family.qk_norm:
        ledger.new(terms.weight, arch.head_dim, outside, count=2 * arch.layers)
    if arch.vision_parameters:
        ledger.new(terms.weight, arch.vision_parameters, s.storage)
    for module in arch.linears:
        _hold_linear(ledger, plan, s, module.weights, arch.layers)
        if module.bias:
            ledger.new(terms.weight, module.outputs, outside, count=arch.layers)
    if plan.quantization is not None:
        ledger.new(terms.codebook, 16)
        if plan.quantization.double:
            ledger.new(terms.codebook, 256)
    for elements, count in adapter_tensors(plan, arch):
        ledger.new(terms.adapter_weight, elements, count=count)
    _hold_optimizer(ledger, plan, arch, s)
    ledger.new(terms.matmul_workspace, 2, _HOPPER_WORKSPACE_BYTES if hopper else _WORKSPACE_BYTES)


def _hold_linear(ledger: Ledger, plan: Plan, s: Shapes, elements: int, layers: int) -> None:
    if plan.quantization is None:
        ledger.new(terms.weight, elements, s.storage, count=layers)
        return
    ledger.new(terms.packed_weight, elements, count=layers)
    if plan.quantization.double:
        ledger.new(terms.block_scales, elements, 1, count=layers)
        ledger.new(terms.nested_scales, elements, count=layers)
        ledger.new(terms.nested_offset, count=layers)
    else:
        ledger.new(terms.block_scales, elements, 4, count=layers)


def adapter_tensors(plan: Plan, arch: Architecture) -> list[tuple[int, int]]:
    """Elements and number of each kind of adapter matrix."""
    if plan.lora is None:
        return []
    names = adapted_names(plan, arch)
    widths = [width for m in arch.linears if m.name in names for width in (m.inputs, m.outputs)]
    return [(width * plan.lora.rank, arch.layers) for width in widths]


def trained_tensors(plan: Plan, arch: Architecture) -> list[tuple[int, int]]:
    """Elements and number of each kind of tensor that the optimizer steps."""
    if plan.method != "full":
        return adapter_tensors(plan, arch)
    embedding = arch.vocab_size * arch.hidden_size
    tensors = [(embedding, 1 if arch.tied else 2)]
    tensors.append((arch.hidden_size, 1 + arch.layers * len(arch.family.layer_norms)))
    if arch.family.qk_norm:
        tensors.append((arch.head_dim, 2 * arch.layers))
    for module in arch.linears:
        tensors.append((module.weights, arch.layers))
        if module.bias:
            tensors.append((module.outputs, arch.layers))
    return tensors


def trained_elements(plan: Plan, arch: Architecture) -> int:
    """How many parameters are trained."""
    return sum(elements * count for elements, count in trained_tensors(plan, arch))


def trained_itemsize(plan: Plan) -> int:
    """Itemsize of what is trained: the weights' own, fp32 for adapters."""
    return ITEMSIZE[plan.dtype] if plan.method == "full" else 4


def _hold_optimizer(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes) -> None:
    tensors = trained_tensors(plan, arch)
    if plan.optimizer in ("adamw_torch", "adamw_torch_fused"):
        for elements, count in tensors:
            ledger.new(terms.moments, elements, trained_itemsize(plan), count=count)
        if plan.optimizer == "adamw_torch_fused":
            ledger.new(terms.step_counters, sum(count for _, count in tensors))
        return
    eight_bit = "8bit" in plan.optimizer
    paged = plan.optimizer.startswith("paged")
    for elements, count in tensors:
        coded = eight_bit and elements >= EIGHT_BIT_SMALLEST
        if not (paged and elements >= PAGED_SMALLEST):
            ledger.new(terms.moments, elements, 1 if coded else 4, count=count)
        if coded:
            ledger.new(terms.moment_scales, elements, count=count)
    if eight_bit:
        ledger.new(terms.moment_codebooks)


def paged_bytes(plan: Plan, arch: Architecture) -> int:
    """Optimizer states in managed memory, which moves to host RAM when the GPU is full.

    Source: bitsandbytes/optim/optimizer.py, get_state_buffer; functional.get_paged.
    """
    if not plan.optimizer.startswith("paged"):
        return 0
    itemsize = 1 if "8bit" in plan.optimizer else 4
    paged = [(n, count) for n, count in trained_tensors(plan, arch) if n >= PAGED_SMALLEST]
    return sum(terms.moments(elements, itemsize) * count for elements, count in paged)


def run_step(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, *, hopper: bool) -> None:
    """The whole step, from what is resident to the optimizer."""
    ledger.at("loading")
    hold_resident(ledger, plan, arch, s, hopper=hopper)
    kept = []
    if s.gradients_kept:
        for elements, count in trained_tensors(plan, arch):
            kept.append(ledger.new(terms.gradient, elements, trained_itemsize(plan), count=count))
    inputs = _hold_inputs(ledger, plan, arch, s)
    casts = _hold_casts(ledger, plan, arch, s)
    embedded = ledger.new(terms.hidden_states, s.tokens, s.hidden, s.stream)
    if plan.gradient_checkpointing:
        below = [ledger.new(terms.hidden_states, s.tokens, s.hidden, s.stream, count=s.layers - 1)]
    else:
        below = _hold_layers(ledger, s, s.layers - 1)
        if s.stream == 4:
            below.append(ledger.new(terms.hidden_states, s.tokens, s.hidden, 4, count=s.layers - 1))
        last = decoder_layer(ledger, s)
    gradient = _head(ledger, plan, arch, s, casts)
    if plan.gradient_checkpointing:
        last = decoder_layer(ledger, s)
    gradient = last(gradient)
    ledger.free(*below)
    if s.layers > 1:
        _hold_gradients(ledger, plan, arch, s, s.layers - 2)
        gradient = decoder_layer(ledger, s)(gradient)
    _embedding_backward(ledger, plan, arch, s, gradient, embedded)
    ledger.free(*inputs)
    _optimizer_step(ledger, plan, arch, s)


def _hold_inputs(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes) -> list[int]:
    """Token ids, rotary tables, the mask: alive until backward has ended."""
    ledger.at("forward")
    held = [ledger.new(terms.token_ids, s.tokens, 3)]
    held.append(ledger.new(terms.rotary_table, s.seq, arch.rotary_dim, s.stream))
    if s.mask_rows:
        itemsize = 1 if plan.attention == "sdpa" else s.stream
        held.append(ledger.new(terms.attention_mask, s.mask_rows, s.seq, itemsize))
    return held


def _hold_casts(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes) -> list[int]:
    """Autocast's 16-bit copies of fp32 weights that require gradients: cached until forward has ended."""
    if not s.autocast or not plan.gradient_checkpointing:
        return []
    if not s.trained:
        return [ledger.new(terms.cast_adapter_weight, n, count=count) for n, count in adapter_tensors(plan, arch)]
    if s.storage == 2:
        return []
    return [ledger.new(terms.cast_weight, module.weights, count=s.layers) for module in s.linears]


def _hold_layers(ledger: Ledger, s: Shapes, layers: int) -> list[int]:
    """What `layers` layers keep for backward, found by running one on a ledger of its own."""
    probe = Ledger()
    decoder_layer(probe, s)
    handles = []
    for entry in probe.alive():
        handles.append(ledger.new(entry.term, *entry.sizes, count=entry.count * layers, component=entry.component))
    return handles


def _hold_gradients(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, layers: int) -> None:
    """Gradients of the layers between the last and the first."""
    if s.gradients_kept or layers < 1:
        return
    if not s.trained:
        for elements, _ in adapter_tensors(plan, arch):
            ledger.new(terms.gradient, elements, 4, count=layers)
        return
    for module in s.linears:
        ledger.new(terms.gradient, module.parameters, s.storage, count=layers)
    ledger.new(terms.gradient, s.hidden, s.storage, count=layers * len(arch.family.layer_norms))


def _head(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, casts: list[int]) -> int:
    """Final norm, output head and loss, forward and backward; returns the gradient of the last hidden state."""
    ledger.at("final norm")
    last = ledger.new(terms.hidden_states, s.tokens, s.hidden, s.stream)
    normed, itemsize, norm_backward = norm(ledger, s, s.hidden, s.tokens, s.stream)
    if s.stream == 2:
        ledger.free(last)
        last = -1
    if plan.loss == "chunked":
        back = _chunked_loss(ledger, arch, s, normed, itemsize, casts)
    else:
        back = _standard_loss(ledger, plan, arch, s, normed, itemsize, casts)
    ledger.at("final norm backward")
    back = norm_backward(back)
    ledger.free(*([last] if last >= 0 else []))
    return back


def _standard_loss(
    ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, normed: int, itemsize: int, casts: list[int]
) -> int:
    sizes = (s.tokens, arch.vocab_size)
    head_storage = s.stream if plan.upcast_frozen else s.storage
    elements = arch.vocab_size * arch.hidden_size
    out_itemsize = 2 if s.autocast else itemsize
    ledger.at("logits")
    cast = ledger.new(terms.cast_weight, elements) if s.autocast and head_storage == 4 else None
    scores = ledger.new(terms.logits, *sizes, out_itemsize)
    ledger.at("loss")
    wide = ledger.new(terms.logits, *sizes, 4) if out_itemsize == 2 else None
    log_softmax = ledger.new(terms.logits, *sizes, 4)
    if wide is not None:
        ledger.free(wide)
    if s.autocast and out_itemsize == 2:
        converted = ledger.new(terms.logits, *sizes, 4)
        ledger.free(scores)
        scores = converted
    ledger.free(*casts)
    if not plan.hold_outputs:
        ledger.free(scores)
    if not s.trained or (s.autocast and itemsize == 4):
        ledger.free(normed)
    ledger.at("loss backward")
    of_log = ledger.new(terms.logits, *sizes, 4)
    back = ledger.new(terms.logits, *sizes, 4)
    ledger.free(of_log, log_softmax)
    if out_itemsize == 2:
        narrow = ledger.new(terms.logits, *sizes, 2)
        ledger.free(back)
        back = narrow
    ledger.at("head backward")
    hidden = ledger.new(terms.projection, s.tokens, s.hidden, out_itemsize)
    if s.trained:
        if cast is not None:
            narrow = ledger.new(terms.gradient, elements, 2)
            keep_gradient(ledger, s, elements, s.storage)
            ledger.free(narrow)
        else:
            keep_gradient(ledger, s, elements, s.storage)
    ledger.free(back, *([cast] if cast is not None else []))
    if s.trained and not (s.autocast and itemsize == 4):
        ledger.free(normed)
    return hidden


def chunk_rows(tokens: int, hidden: int, vocabulary: int) -> int:
    """Rows of logits that the chunked loss makes at a time.

    Source: torch/nn/modules/linear_cross_entropy_options.py, "aspect_ratio:2", the default on CUDA.
    """
    target = -(-tokens // -(-vocabulary // hidden))
    return max(1, min((1 << (target - 1).bit_length()) // 2, tokens))


def _chunked_loss(ledger: Ledger, arch: Architecture, s: Shapes, normed: int, itemsize: int, casts: list[int]) -> int:
    ledger.at("loss")
    rows = chunk_rows(s.tokens, s.hidden, arch.vocab_size)
    back = ledger.new(terms.hidden_states, s.tokens, s.hidden, itemsize)
    if s.trained:
        keep_gradient(ledger, s, arch.vocab_size * arch.hidden_size, s.storage)
    buffers = [ledger.new(terms.logits, rows, arch.vocab_size, 4)]
    buffers.append(ledger.new(terms.logits, rows, arch.vocab_size, itemsize))
    ledger.free(*buffers, *casts, normed)
    return back


def _embedding_backward(
    ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, gradient: int, embedded: int
) -> None:
    """Full fine-tuning gathers a dense gradient of the embedding; a tied one is added to the head's."""
    ledger.at("embedding backward")
    ledger.free(embedded)
    if s.trained:
        elements = arch.vocab_size * arch.hidden_size
        if arch.tied and not s.gradients_kept:
            ledger.free(ledger.new(terms.gradient, elements, s.storage))
        else:
            keep_gradient(ledger, s, elements, s.storage)
    ledger.free(gradient)


def _optimizer_step(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes) -> None:
    """Gradients, states and, for the foreach step, one temporary for all parameters at once."""
    ledger.at("optimizer step")
    if plan.optimizer == "adamw_torch":
        for elements, count in trained_tensors(plan, arch):
            ledger.new(terms.foreach_temporary, elements, trained_itemsize(plan), count=count)


def state_bytes(plan: Plan, arch: Architecture) -> int:
    """Weights, gradients and both running averages of what is trained, wherever they are stored."""
    itemsize = trained_itemsize(plan)
    torch_states = plan.optimizer in ("adamw_torch", "adamw_torch_fused")
    moment = 1 if "8bit" in plan.optimizer else itemsize if torch_states else 4
    return sum(count * elements * (2 * itemsize + 2 * moment) for elements, count in trained_tensors(plan, arch))
