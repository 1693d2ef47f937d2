"""Memory that exists only inside kernels, and which attention kernel runs."""

from advisor.memory.kernels.call import NOTHING, Call, Inside, Rule
from advisor.memory.kernels.choice import AttentionBackend, AttentionCall, Choice, choose_attention
from advisor.memory.kernels.hardware import Cpu, Gpu, Hardware, hardware_of
from advisor.memory.kernels.rules import cublas_operations, cublas_workspace_bytes, last_output_first, rules

__all__ = [
    "NOTHING",
    "AttentionBackend",
    "AttentionCall",
    "Call",
    "Choice",
    "Cpu",
    "Gpu",
    "Hardware",
    "Inside",
    "Rule",
    "choose_attention",
    "cublas_operations",
    "cublas_workspace_bytes",
    "hardware_of",
    "last_output_first",
    "rules",
]
