"""The chunked loss: the output head and the cross-entropy a few tokens at a time.

With all logits at once a step holds them in 16 bits, in fp32, their log-softmax and its gradient:
14 bytes × tokens × vocabulary. Here one chunk of them lives at a time: in torch's own operation where torch has
it (2.13 on), in a checkpointed loop over as many rows before.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from advisor.chunks import chunk_rows
from advisor.errors import PlanError

if TYPE_CHECKING:
    import torch

_IGNORED_LABEL = -100
_LOGIT_TRANSFORMS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *("logits_scaling", "logit_scale", "output_multiplier_scale", "lm_head_multiplier", "logits_mup_width_multiplier"),
)
_LARGEST_FP16 = 65504
_LARGEST_LOSS = 16
"""Natural logarithms a token; guessing among 200,000 tokens costs 12.2."""


def chunk_loss(causal_lm: Any) -> None:
    """Replace the forward of a causal LM by one that computes its loss in chunks and returns no logits.

    Raises:
        PlanError: the architecture's logits are more than the product of the decoder's states and one matrix.
    """
    config = causal_lm.config.get_text_config()
    left_out = [name for name in _LOGIT_TRANSFORMS if getattr(config, name, None)]
    head = causal_lm.get_output_embeddings()
    if all(child is not head for child in causal_lm.children()):
        left_out.append("transform before its output matrix")
    if left_out:
        raise PlanError(
            "loss",
            f"a chunked loss would leave out this model's {left_out[0]}",
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
    hidden: torch.Tensor, head: Any, labels: torch.Tensor, label_count: torch.Tensor | None
) -> torch.Tensor:
    """Mean cross-entropy of the next token; `hidden` is (batch, tokens, size), `labels` (batch, tokens).

    The sum over tokens is what is computed in chunks, and it is divided by `label_count`, or by the labels that are
    not masked, afterwards: torch's operation computes gradients in its forward, before the factor of a gradient
    scaler arrives, and those of a mean over thousands of tokens would vanish in float16.
    """
    from torch import nn
    from torch.nn import functional

    targets = functional.pad(labels, (0, 1), value=_IGNORED_LABEL)[..., 1:].reshape(-1)
    states = hidden.reshape(-1, hidden.size(-1))
    # A head with adapters of its own is more than a weight.
    fused = type(head) is nn.Linear and _torch_has_chunks()
    total = _fused_sum(states, head, targets) if fused else _looped_sum(states, head, targets)
    count = label_count if label_count is not None else (targets != _IGNORED_LABEL).sum()
    return total / count


def _torch_has_chunks() -> bool:
    """Whether torch is 2.13 or newer."""
    from torch import nn

    return hasattr(nn.functional, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def _fused_sum(states: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """torch's own chunked operation, in the dtype that autocast would give its product.

    Autocast does not know it: conversions are made here, and carry gradients. Its result has the dtype of the
    states; a sum that float16 could not hold is scaled by a power of two through the weights of the classes.
    Source: torch/nn/modules/linear_cross_entropy.py, linear_cross_entropy_options.py.
    """
    import torch

    weight, bias = head.weight, head.bias
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    states, weight = states.to(dtype), weight.to(dtype)
    scale = _scale_of_sum(states.size(0)) if dtype == torch.float16 else 1.0
    classes = None if scale == 1 else torch.full((weight.size(0),), scale, dtype=dtype, device=states.device)
    rows = chunk_rows(states.size(0), states.size(1), weight.size(0))
    total = torch.nn.functional.linear_cross_entropy(
        states,
        weight,
        targets,
        linear_bias=None if bias is None else bias.to(dtype),
        weight=classes,
        reduction="sum",
        ignore_index=_IGNORED_LABEL,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None),
    )
    return total.float() / scale if scale != 1 else total.float()


def _scale_of_sum(tokens: int) -> float:
    """The largest power of two, at most 1, by which the loss of so many tokens fits float16."""
    scale = 1.0
    while tokens * _LARGEST_LOSS * scale > _LARGEST_FP16:
        scale /= 2
    return scale


def _looped_sum(states: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """One checkpointed chunk after the other, in fp32."""
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    def of_chunk(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(states).float()
        return functional.cross_entropy(logits, targets, ignore_index=_IGNORED_LABEL, reduction="sum")

    rows = chunk_rows(states.size(0), states.size(1), head.out_features)
    total = states.new_zeros((), dtype=torch.float32)
    for chunk, chunk_targets in zip(states.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(of_chunk, chunk, chunk_targets, use_reentrant=False)
    return total
