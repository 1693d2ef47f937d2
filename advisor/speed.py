"""How long a step takes: operations and bytes against the GPU's rates. An estimate, and labelled as one.

A micro-step has a part per token (matrix products, attention) and a fixed part (kernel launches, reading the weights,
dequantising 4-bit weights); an optimizer step reads and writes every trained parameter's states once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from advisor.architecture import Architecture
from advisor.hardware import Gpu
from advisor.memory.lora import adapted_names
from advisor.plan import ITEMSIZE, Method, Plan

MATMUL_EFFICIENCY = 0.5
"""Share of the dense 16-bit rate that training reaches.

Derived from two published A100 runs of a 3.2 B model at 4,096 tokens: 57 % for full fine-tuning without checkpointing;
34 % of 4 × parameters × tokens for LoRA with it, which is 51 % of the 6 × that the hardware then computes.
"""

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the memory bandwidth that large copies reach; assumed."""

LAUNCH_SECONDS = 5e-6
"""From one kernel's start to the next where the GPU waits for Python; assumed."""

HOST_BYTES_PER_S = 12e9
"""Between host RAM and GPU: PCIe 3.0 × 16 as copies reach it; assumed."""

EIGHT_BIT_SLOWDOWN = 1.05
"""8-bit AdamW against fused AdamW on the whole run: −5 %, published for Llama-3.2-3B on one A100."""

CHUNKED_LOSS_SPEEDUP = 1.02
"""Chunked cross-entropy against the standard loss: +2 %, from the same measurements."""

_KERNELS_A_LAYER: Mapping[Method, tuple[int, int]] = {"full": (42, 65), "lora": (74, 97), "qlora": (82, 105)}
"""Kernels of one layer, forward and backward: operations that are no views, counted in transformers' Phi-3 (torch 2.13,
transformers 5.23, PEFT 0.21, four adapted modules); QLoRA adds two dequantisation kernels a module."""

BASIS = (
    f"{MATMUL_EFFICIENCY:.0%} of the GPU's dense 16-bit rate (two published A100 runs) and "
    f"{BANDWIDTH_EFFICIENCY:.0%} of its bandwidth (assumed)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The estimated speed of a plan."""

    step_seconds: float
    """One optimizer step: all its micro-batches and the update."""

    tokens_per_second: float
    """Tokens of the longest batch. In packed or unpadded rows every one is trained on; where rows are padded, what is
    padding is computed too and trains nothing."""

    parts: Mapping[str, float]
    """Seconds of an optimizer step by what they go to."""

    basis: str
    """The efficiency that is assumed, and where it comes from; or which probe measured it."""

    measured: bool = False
    """Whether a probe timed it; else it is an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a GPU does in a second."""

    operations: float
    """Dense 16-bit operations that training reaches."""

    bytes: float
    """Bytes that large copies reach."""


NOMINAL = Rates(operations=100e12 * MATMUL_EFFICIENCY, bytes=1e12 * BANDWIDTH_EFFICIENCY)
"""A GPU of no kind, to put plans in order where the real one's rates are unknown; never shown."""


def known_rates(gpu: Gpu) -> Rates | None:
    """The rates that training reaches on a GPU; None without a profile."""
    if gpu.profile is None:
        return None
    return Rates(
        operations=gpu.profile.dense_16bit_flops * MATMUL_EFFICIENCY,
        bytes=gpu.profile.bandwidth_bytes_per_s * BANDWIDTH_EFFICIENCY,
    )


def estimate_speed(plan: Plan, arch: Architecture, gpu: Gpu, *, spilled_bytes: int = 0) -> Speed | None:
    """Step time and tokens a second; None where the GPU's rates are not known or products are in fp32.

    Args:
        plan: the plan.
        arch: its model.
        gpu: the GPU; without a profile its rates are unknown.
        spilled_bytes: paged optimizer states that live in host RAM, read and written once a step.
    """
    rates = known_rates(gpu)
    if rates is None or (plan.dtype == "float32" and plan.autocast == "none"):
        return None
    parts = step_parts(plan, arch, rates, spilled_bytes)
    seconds = sum(parts.values())
    tokens = plan.effective_batch * plan.seq_len
    return Speed(step_seconds=seconds, tokens_per_second=tokens / seconds, parts=parts, basis=BASIS)


def relative_seconds(plan: Plan, arch: Architecture, gpu: Gpu, *, spilled_bytes: int = 0) -> float:
    """Step time for comparing plans of one method on one GPU, known or not."""
    return sum(step_parts(plan, arch, known_rates(gpu) or NOMINAL, spilled_bytes).values())


def step_parts(plan: Plan, arch: Architecture, rates: Rates, spilled_bytes: int) -> dict[str, float]:
    """Seconds of an optimizer step by what they go to.

    Stepping in backward moves the same bytes at another time, and costs nothing (so published for Llama-3.2-3B on one
    A100). Packed rows are taken to attend over their whole length, which is what a block mask computes and the most
    that variable-length kernels do.
    """
    micro_steps = plan.gradient_accumulation
    parts = {
        "matrix products": micro_steps * product_operations(plan, arch) / rates.operations,
        "attention": micro_steps * attention_operations(plan, arch) / rates.operations,
        "dequantisation": micro_steps * dequantized_bytes(plan, arch) / rates.bytes,
        "kernel launches": micro_steps * launches(plan, arch) * LAUNCH_SECONDS,
        "optimizer": optimizer_bytes(plan, arch) / rates.bytes,
        "host transfers": 2 * spilled_bytes / HOST_BYTES_PER_S,
    }
    seconds = sum(parts.values())
    parts["chunked loss"] = seconds * (1 / CHUNKED_LOSS_SPEEDUP - 1) if plan.loss == "chunked" else 0.0
    parts["8-bit states"] = seconds * (EIGHT_BIT_SLOWDOWN - 1) if "8bit" in plan.optimizer else 0.0
    return parts


def passes(plan: Plan) -> tuple[int, int]:
    """How often a micro-step multiplies by each layer's weights, and by the head's.

    Forward 1; backward 1 for the input's gradient and, where the weight is trained, 1 for its own; checkpointing
    repeats the layers' forward.
    """
    trained = 1 if plan.method == "full" else 0
    return 2 + trained + (1 if plan.gradient_checkpointing else 0), 2 + trained


def product_operations(plan: Plan, arch: Architecture) -> float:
    """Operations of a micro-step's matrix products: 2 × tokens × weights a pass."""
    layers, head = passes(plan)
    matrices = arch.layers * sum(linear.weights for linear in arch.linears)
    adapters = arch.layers * adapter_elements_a_layer(plan, arch)
    head_weights = arch.vocab_size * arch.hidden_size
    return 2.0 * plan.tokens * (layers * matrices + (layers + 1) * adapters + head * head_weights)


def adapter_elements_a_layer(plan: Plan, arch: Architecture) -> int:
    """Elements of one layer's adapters."""
    if plan.lora is None:
        return 0
    names = adapted_names(plan, arch)
    return sum(plan.lora.rank * (m.inputs + m.outputs) for m in arch.linears if m.name in names)


def attention_operations(plan: Plan, arch: Architecture) -> float:
    """Operations of a micro-step's attention: 2 products of seq² scores, half of them masked; backward 2.5 ×."""
    forward = 2.0 * 2.0 * plan.tokens * plan.seq_len * arch.query_size * arch.layers / 2
    return forward * (3.5 + (1 if plan.gradient_checkpointing else 0))


def dequantized_bytes(plan: Plan, arch: Architecture) -> float:
    """Bytes that a micro-step moves to expand 4-bit weights: read packed, write and read expanded, every pass."""
    if plan.quantization is None:
        return 0.0
    elements = arch.layers * sum(linear.weights for linear in arch.linears)
    return passes(plan)[0] * elements * (0.5 + 2 * ITEMSIZE[plan.dtype])


def launches(plan: Plan, arch: Architecture) -> int:
    """Kernels of a micro-step."""
    forward, backward = _KERNELS_A_LAYER[plan.method]
    return arch.layers * (forward * (2 if plan.gradient_checkpointing else 1) + backward)


def optimizer_bytes(plan: Plan, arch: Architecture) -> float:
    """Bytes of an update: gradient read, parameter and both states read and written."""
    if plan.method == "full":
        trained, itemsize = arch.parameters, ITEMSIZE[plan.dtype]
    else:
        trained, itemsize = arch.layers * adapter_elements_a_layer(plan, arch), 4
    state = 1 if "8bit" in plan.optimizer else itemsize
    return float(trained) * (3 * itemsize + 4 * state)
