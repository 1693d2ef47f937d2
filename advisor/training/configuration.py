"""The keys of a config.json → a transformers configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.errors import InputError, UnsupportedError


def build_config(architecture: Mapping[str, Any]) -> Any:
    """The keys of a config.json → a transformers configuration.

    Raises:
        InputError: no model_type, one that transformers does not know, or values it refuses.
        UnsupportedError: an architecture that is not a decoder-only causal language model.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = {key: value for key, value in architecture.items() if key != "model_type"}
    kind = architecture.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(
            f"The installed transformers has no model_type {str(kind)[:60]!r}.",
            hint="Check model_type in the config.json, or install a newer transformers.",
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(f"{kind} is not a decoder-only causal language model.")
    for key in ("auto_map", "quantization_config", "torch_dtype", "dtype", "architectures"):
        values.pop(key, None)
    try:
        return CONFIG_MAPPING[kind](**_with_token_ids_inside(values, CONFIG_MAPPING[kind]))
    except Exception as error:
        raise InputError(f"transformers refuses this {kind} configuration: {str(error)[:300]}") from error


def _with_token_ids_inside(values: Mapping[str, Any], configuration: type[Any]) -> dict[str, Any]:
    """Leave padding out when the architecture's own default lies outside a smaller vocabulary."""
    values = dict(values)
    vocabulary, padding = values.get("vocab_size"), getattr(configuration, "pad_token_id", None)
    if "pad_token_id" not in values and isinstance(vocabulary, int):
        values["pad_token_id"] = padding if isinstance(padding, int) and padding < vocabulary else None
    return values
