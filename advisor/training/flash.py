"""flash-attn 2 in a model that was built without its package, which only running needs."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from advisor.errors import PlanError

_NAME = "flash_attention_2"


def use_flash_attention(model: Any) -> None:
    """Switch a model that was built with eager attention to flash-attn 2.

    Most architectures look the name up in each forward. Some chose a class by it when they were built; those classes
    have the same weights, their module imports what they call only where the package is, and flash-attn since 2.1
    aligns causal masks at the bottom right.
    Source: transformers modeling_utils.py (_flash_attn_can_dispatch), models/falcon/modeling_falcon.py
    (FALCON_ATTENTION_CLASSES, FalconFlashAttention2).

    Raises:
        PlanError: transformers refuses flash-attn 2 for this architecture.
    """
    if not model._supports_flash_attn:
        raise PlanError(
            "attention", f"{model.config.model_type} cannot use {_NAME}", hint='Write attention = "eager" or "sdpa".'
        )
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    for module in model.modules():
        namespace = vars(sys.modules[type(module).__module__])
        for name, classes in namespace.items():
            if name.endswith("_ATTENTION_CLASSES") and classes.get("eager") is type(module):
                # Without a name it takes what building with flash-attn 2 has loaded.
                named = partial(_flash_attention_forward, attn_implementation=_NAME)
                namespace[_flash_attention_forward.__name__] = named
                module.__class__ = classes[_NAME]
                module._flash_attn_uses_top_left_mask = False
                break
    model.config._attn_implementation = _NAME
