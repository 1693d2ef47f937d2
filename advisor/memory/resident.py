"""What stays for the whole run: weights, adapters, optimizer states, workspaces; and what the optimizer steps."""

from __future__ import annotations

from advisor.architecture import Architecture
from advisor.memory import terms
from advisor.memory.ledger import Ledger
from advisor.memory.lora import adapted_names
from advisor.memory.shapes import Shapes
from advisor.plan import ITEMSIZE, Plan

EIGHT_BIT_SMALLEST = 4096
"""Tensors below this keep fp32 states (bitsandbytes/optim/optimizer.py, min_8bit_size)."""

PAGED_SMALLEST = 100_000
"""Tensors below this are not paged (bitsandbytes/optim/optimizer.py, get_state_buffer)."""


def hold_resident(ledger: Ledger, plan: Plan, arch: Architecture, s: Shapes, *, workspace_bytes: int) -> None:
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
    _hold_optimizer(ledger, plan, arch)
    if workspace_bytes:
        ledger.new(terms.matmul_workspace, 2, workspace_bytes)


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


def _hold_optimizer(ledger: Ledger, plan: Plan, arch: Architecture) -> None:
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


def state_bytes(plan: Plan, arch: Architecture) -> int:
    """Weights, gradients and both running averages of what is trained, wherever they are stored."""
    itemsize = trained_itemsize(plan)
    torch_states = plan.optimizer in ("adamw_torch", "adamw_torch_fused")
    moment = 1 if "8bit" in plan.optimizer else itemsize if torch_states else 4
    return sum(count * elements * (2 * itemsize + 2 * moment) for elements, count in trained_tensors(plan, arch))
