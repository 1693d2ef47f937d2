"""Everything that one decoder layer's memory depends on, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.architecture import Architecture, Linear
from advisor.memory.attention import Kernel, attention_itemsize, choose_kernel, mask_rows
from advisor.memory.lora import adapted_names
from advisor.plan import ITEMSIZE, Plan
from advisor.profiles import Backend


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

    mask_rows: int
    """Rows of sequences in the attention mask; 0: there is none."""

    caches: bool
    """Keys and values are copied into a cache: a hand-written loop that holds its outputs and left use_cache on."""

    holds_cache: bool
    """The cache is among the outputs; those of the chunked loss are the loss alone."""

    trained: bool
    """Every weight is trained (full fine-tuning)."""

    quantized: bool
    double: bool
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

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim


def layer_shapes(plan: Plan, arch: Architecture, *, capability: tuple[int, int] | None, backend: Backend) -> Shapes:
    """The plain numbers that a plan's layers are computed from."""
    kernel, _ = choose_kernel(plan, arch, capability=capability, backend=backend)
    rows = mask_rows(plan, arch)
    grouped = arch.heads != arch.kv_heads
    return Shapes(
        batch=plan.micro_batch,
        seq=plan.seq_len,
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
        repeat_kv=grouped and (plan.attention == "eager" or (plan.attention == "sdpa" and rows > 0)),
        mask_rows=rows,
        caches=plan.hold_outputs and not plan.gradient_checkpointing,
        holds_cache=plan.hold_outputs and plan.loss == "standard",
        trained=plan.method == "full",
        quantized=plan.quantization is not None,
        double=plan.quantization is not None and plan.quantization.double,
        autocast=plan.autocast != "none",
        half="float16" in (plan.dtype, plan.autocast),
        storage=ITEMSIZE[plan.dtype],
        stream=attention_itemsize(plan),
        rank=plan.lora.rank if plan.lora else 0,
        adapted=adapted_names(plan, arch),
        dropout=plan.lora is not None and plan.lora.dropout > 0,
        gradients_kept=plan.gradient_accumulation > 1,
    )
