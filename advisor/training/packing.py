"""Rows of several samples: attention stays inside each.

transformers sees in `position_ids` that positions restart. For sdpa and eager attention it then makes a block mask,
batch × 1 × tokens × tokens, which rules SDPA's flash kernel out (masking_utils.py, find_packed_sequence_indices). For
flash-attn 2 it calls the variable-length kernel, but only where the batch is a single row, so the collator lays rows
end to end; and it looks at the positions, waits for the GPU and copies queries, keys and values again in every layer
(modeling_flash_attention_utils.py, _is_packed_sequence and _prepare_from_posids). So the borders of all samples are
computed here, once a forward, and given to it.

flash-attn 2, where it is installed and the GPU has it, is therefore the variable-length path; everywhere else the block
mask is. torch's own variable-length function (torch.nn.attention.varlen, 2.10 on) runs on CUDA alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def separate_samples(decoder: torch.nn.Module) -> None:
    """Give flash attention the borders of the samples in each batch whose positions restart.

    Args:
        decoder: the causal LM without its output head; PEFT and the chunked loss call it as a module.
    """
    decoder.register_forward_pre_hook(_add_borders, with_kwargs=True)


def _add_borders(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("past_key_values") is not None:  # no packed rows, or tokens that follow a cache
        return args, kwargs
    borders, longest = sample_borders(positions)
    return args, {
        **kwargs,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def sample_borders(positions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where samples begin in all rows end to end, and where the last one ends; and the longest one's length.

    Args:
        positions: (batch, tokens); a sample begins at every zero.
    """
    flat = positions.reshape(-1)
    starts = (flat == 0).nonzero().view(-1)
    borders = functional.pad(starts, (0, 1), value=flat.numel()).to(torch.int32)
    return borders, int(borders.diff().max().item())
