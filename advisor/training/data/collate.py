"""Rows → one micro-batch, never larger than what the plan's memory was computed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advisor.errors import InputError
from advisor.training.data.lengths import bucket_length
from advisor.training.data.tokens import MASKED

if TYPE_CHECKING:
    from advisor.plan import Plan


def keeps_masks_below(plan: Plan, config: Any, device: torch.device) -> int:
    """Tokens below which a batch without a mask would run the math kernel, where one with a mask does not; else 0.

    transformers drops a mask that masks nothing, and then lets SDPA share grouped key-value heads instead of repeating
    them: only flash attention can, and it needs compute capability 8.0 and 16 bits; the math kernel holds all scores.
    With a mask the heads are repeated and the memory-efficient kernel runs. From a sliding window on there always is
    a mask.
    Source: transformers integrations/sdpa_attention.py (use_gqa_in_sdpa), masking_utils.py (_ignore_causal_mask_sdpa).
    """
    if device.type != "cuda" or torch.version.hip is not None or plan.attention != "sdpa":
        return 0
    text = config.get_text_config()
    grouped = getattr(text, "num_key_value_heads", None) not in (None, text.num_attention_heads)
    in_fp32 = plan.autocast == "none" and (plan.upcast_frozen or plan.dtype == "float32")
    has_flash = torch.cuda.get_device_capability(device) >= (8, 0) and not in_fp32
    if not grouped or has_flash:
        return 0
    return getattr(text, "sliding_window", None) or plan.seq_len + 1


class Collator:
    """Pads on the right, to one of few lengths, at most the plan's.

    A causal model's tokens never see what follows them, so padding on the right needs no mask: there is one only where
    the plan's worst case has one (`padding = "longest"`).

    Packed rows carry positions that restart with each sample. From those transformers builds the block mask of sdpa
    and eager, for every row of a batch; its flash attention looks at positions only in a batch of one, so there the
    rows are laid end to end. Padding after the last sample counts as a sample of its own.
    Source: transformers masking_utils.py (find_packed_sequence_indices), modeling_flash_attention_utils.py
    (_is_packed_sequence).

    Args:
        plan: the plan that is trained.
        pad_token_id: what rows are filled up with.
        keeps_masks_below: a batch of fewer tokens a row has a mask even if it happens to need none, where the plan's
            memory was computed with one; see the function of that name.
    """

    def __init__(self, plan: Plan, pad_token_id: int, *, keeps_masks_below: int = 0) -> None:
        self._plan = plan
        self._pad = pad_token_id
        self._keeps_masks_below = keeps_masks_below

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch; all tensors are int64 of shape (rows, tokens), but a kept mask: bool, (rows, 1, tokens, tokens).

        Raises:
            InputError: nothing in the batch carries loss, or a row is longer than the plan's.
        """
        plan = self._plan
        longest = max(len(row["input_ids"]) for row in rows)
        if longest > plan.seq_len:
            raise InputError(f"A row has {longest:,} tokens, and the plan's seq_len is {plan.seq_len:,}.")
        width = bucket_length(longest, plan.seq_len)
        labels = self._filled(rows, "labels", width, MASKED)
        if bool((labels[:, 1:] == MASKED).all()):
            raise InputError(
                "All labels of a batch are masked, so nothing would be learned from it.",
                hint="Look at which parts of the rows carry loss.",
            )
        batch = {"input_ids": self._filled(rows, "input_ids", width, self._pad), "labels": labels}
        if plan.packing:
            batch["position_ids"] = self._positions(rows, width)
            if plan.attention == "flash_attention_2":
                return {name: tensor.view(1, -1) for name, tensor in batch.items()}
            unmasked = bool((batch["position_ids"] == torch.arange(width)).all())
        elif plan.padding == "longest" and plan.micro_batch > 1:
            batch["attention_mask"] = self._mask(rows, width)
            unmasked = bool(batch["attention_mask"].all())
        else:
            return batch
        if unmasked and width < self._keeps_masks_below:
            batch["attention_mask"] = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(rows), 1, 1, 1)
        return batch

    def _filled(self, rows: Sequence[Mapping[str, Any]], column: str, width: int, filler: int) -> torch.Tensor:
        filled = np.full((len(rows), width), filler, dtype=np.int64)
        for row, values in enumerate(rows):
            filled[row, : len(values[column])] = values[column]
        return torch.from_numpy(filled)

    def _positions(self, rows: Sequence[Mapping[str, Any]], width: int) -> torch.Tensor:
        """The rows' own, and positions from 0 for the padding."""
        positions = np.empty((len(rows), width), dtype=np.int64)
        for row, values in enumerate(rows):
            own = len(values["position_ids"])
            positions[row, :own] = values["position_ids"]
            positions[row, own:] = np.arange(width - own)
        return torch.from_numpy(positions)

    def _mask(self, rows: Sequence[Mapping[str, Any]], width: int) -> torch.Tensor:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return (torch.arange(width)[None, :] < lengths[:, None]).to(torch.int64)
