"""The chunked loss: the output head and the cross-entropy a few tokens at a time.

With all logits at once a step holds them in 16 bits, in fp32, their log-softmax and its gradient:
14 bytes × tokens × vocabulary. Here each chunk is checkpointed, so only one chunk of them lives at a time.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from advisor.errors import PlanError

if TYPE_CHECKING:
    import torch
    from torch import nn

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once."""

_IGNORED_LABEL = -100
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale")


def chunk_loss(causal_lm: Any) -> None:
    """Replace the forward of a causal LM by one that computes its loss in chunks and returns no logits.

    Raises:
        PlanError: the architecture transforms its logits before the loss.
    """
    transforms = [name for name in _LOGIT_TRANSFORMS if getattr(causal_lm.config, name, None)]
    if transforms:
        raise PlanError(
            "loss",
            f"a chunked loss would leave out this model's {transforms[0]}",
            hint='Use loss = "standard".',
        )

    def forward(self: Any, labels: torch.Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        given = {name: value for name, value in inputs.items() if value is not None}
        hidden = self.base_model(**given).last_hidden_state
        loss = chunked_cross_entropy(hidden, self.get_output_embeddings(), labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    causal_lm.forward = MethodType(forward, causal_lm)


def chunked_cross_entropy(
    hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, label_count: torch.Tensor | None
) -> torch.Tensor:
    """Mean cross-entropy of the next token; `hidden` is (batch, tokens, size), `labels` (batch, tokens).

    Divides by `label_count`, or by the labels that are not masked.
    """
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    def of_chunk(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(states).float()
        return functional.cross_entropy(logits, targets, ignore_index=_IGNORED_LABEL, reduction="sum")

    targets = functional.pad(labels, (0, 1), value=_IGNORED_LABEL)[..., 1:].reshape(-1)
    states = hidden.reshape(-1, hidden.size(-1))
    total = states.new_zeros((), dtype=torch.float32)
    for chunk, chunk_targets in zip(states.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        total = total + checkpoint(of_chunk, chunk, chunk_targets, use_reentrant=False)
    count = label_count if label_count is not None else (targets != _IGNORED_LABEL).sum()
    return total / count
