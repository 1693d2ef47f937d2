"""Everything that one decoder layer's memory depends on, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.architecture import Architecture, Linear
from advisor.memory.attention import Kernel, attention_itemsize, choose_kernel, is_padded, mask_rows
from advisor.memory.lora import adapted_names
from advisor.plan import ITEMSIZE, Plan
from advisor.profiles import Backend

_LARGEST_SHARED_HEAD = 256
"""Up to this size transformers asks the kernel to share key heads (integrations/sdpa_attention.py, use_gqa_in_sdpa)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Everything that one layer's memory depends on, as plain numbers."""

    batch: int
    seq: int
    tokens: int
    """Tokens in a micro-batch."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    layers: int
    vocabulary: int
    linears: tuple[Linear, ...]
    fused: bool
    qk_norm: bool
    norm_in_fp32: bool
    kernel: Kernel
    capability: tuple[int, int] | None
    repeat_kv: bool
    """transformers repeats keys and values to all query heads before the kernel."""

    packed: bool
    """flash-attn 2 on a padded batch: the padding is cut out before the kernel and put back after it."""

    samples: int
    """Sequences that flash-attn 2's variable-length kernel is given; 0: it is not the kernel."""

    mask_rows: int
    """Rows of sequences in the attention mask; 0: there is none."""

    position_rows: int
    """Rows in the rotary tables: one for all, unless each has positions of its own."""

    caches: bool
    """Keys and values are copied into a cache: a hand-written loop that holds its outputs and left use_cache on."""

    holds_cache: bool
    """The cache is among the outputs; those of the chunked loss are the loss alone."""

    trained: bool
    """Every weight is trained (full fine-tuning)."""

    quantized: bool
    double: bool
    fused_4bit: frozenset[str]
    """Names of the 4-bit modules whose forward multiplies without expanding the weight: few tokens."""

    autocast: bool
    half: bool
    """16-bit tensors are float16, not bfloat16."""

    storage: int
    """Itemsize of the stored 16-bit (or fp32) weights, and of what 4-bit weights are expanded to."""

    stream: int
    """Itemsize of the embedding and of what is stored beside 4-bit weights: hidden states have it between layers."""

    rank: int
    adapted: frozenset[str]
    """Names of the linear modules that carry an adapter."""

    dropout: bool
    gradients_kept: bool
    """Gradients of an earlier micro-batch exist already."""

    in_backward: bool
    """Backward steps each weight as its gradient comes, and the gradient dies."""

    foreach: bool
    """That step makes a temporary of the weight's size."""

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim


def layer_shapes(
    plan: Plan,
    arch: Architecture,
    *,
    capability: tuple[int, int] | None,
    backend: Backend,
    multiprocessors: int | None = None,
) -> Shapes:
    """The plain numbers that a plan's layers are computed from.

    Args:
        plan: what is trained.
        arch: of what.
        capability: the GPU's; None where it is unknown or not CUDA.
        backend: the GPU's software stack.
        multiprocessors: how many the GPU has, by which bitsandbytes chooses its kernel; None where nobody said.
    """
    kernel, _ = choose_kernel(plan, arch, capability=capability, backend=backend)
    rows = mask_rows(plan, arch)
    grouped = arch.heads != arch.kv_heads
    end_to_end = plan.packing and plan.attention == "flash_attention_2"
    shares = rows == 0 and arch.head_dim <= _LARGEST_SHARED_HEAD
    return Shapes(
        batch=1 if end_to_end else plan.micro_batch,
        seq=plan.tokens if end_to_end else plan.seq_len,
        tokens=plan.tokens,
        hidden=arch.hidden_size,
        intermediate=arch.intermediate_size,
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        rotary_dim=arch.rotary_dim,
        layers=arch.layers,
        vocabulary=arch.vocab_size,
        linears=arch.linears,
        fused=arch.family.fused,
        qk_norm=arch.family.qk_norm,
        norm_in_fp32=arch.family.norm_in_fp32,
        kernel=kernel,
        capability=capability,
        repeat_kv=grouped and (plan.attention == "eager" or (plan.attention == "sdpa" and not shares)),
        packed=plan.attention == "flash_attention_2" and is_padded(plan),
        samples=plan.samples if end_to_end or (plan.attention == "flash_attention_2" and is_padded(plan)) else 0,
        mask_rows=rows,
        position_rows=plan.micro_batch if plan.packing and not end_to_end else 1,
        caches=plan.hold_outputs and not plan.gradient_checkpointing and not plan.packing,
        holds_cache=plan.hold_outputs and plan.loss == "standard",
        trained=plan.method == "full",
        quantized=plan.quantization is not None,
        double=plan.quantization is not None and plan.quantization.double,
        fused_4bit=_fused_4bit(plan, arch, capability, multiprocessors) if backend == "cuda" else frozenset(),
        autocast=plan.autocast != "none",
        half="float16" in (plan.dtype, plan.autocast),
        storage=ITEMSIZE[plan.dtype],
        stream=attention_itemsize(plan),
        rank=plan.lora.rank if plan.lora else 0,
        adapted=adapted_names(plan, arch),
        dropout=plan.lora is not None and plan.lora.dropout > 0,
        gradients_kept=plan.gradient_accumulation > 1,
        in_backward=plan.optimizer_in_backward,
        foreach=plan.optimizer_in_backward and plan.optimizer == "adamw_torch",
    )


def _fused_4bit(
    plan: Plan, arch: Architecture, capability: tuple[int, int] | None, multiprocessors: int | None
) -> frozenset[str]:
    """Modules whose 4-bit product is one kernel, by the rule of the installed bitsandbytes; none without it.

    Backward expands the weight whatever the tokens (bitsandbytes/autograd/_functions.py, MatMul4Bit.backward).
    Source: bitsandbytes/backends/cuda/ops.py, _gemm_4bit_use_custom_cuda.
    """
    from advisor.memory.kernels.hardware import ASSUMED_CAPABILITY, ASSUMED_MULTIPROCESSORS, Gpu
    from advisor.memory.kernels.quantized import FUSED_4BIT_LIMIT, uses_fused_4bit

    if plan.quantization is None or plan.tokens > FUSED_4BIT_LIMIT:
        return frozenset()
    gpu = Gpu(capability=capability or ASSUMED_CAPABILITY, multiprocessors=multiprocessors or ASSUMED_MULTIPROCESSORS)
    return frozenset(
        module.name
        for module in arch.linears
        if uses_fused_4bit(plan.tokens, module.outputs, module.inputs, _BLOCK, plan.dtype, gpu)
    )


_BLOCK = 64
"""Weights that share a scale (bitsandbytes.functional.quantize_4bit)."""
