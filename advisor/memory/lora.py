"""Which modules carry an adapter: PEFT's matching of target names, told by an architecture alone.

Source: peft/tuners/tuners_utils.py, check_target_module_exists and _maybe_include_all_linear_layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from advisor.architecture import Architecture, Linear
from advisor.errors import PlanError
from advisor.plan import Plan

_FIELD = "lora.target_modules"
_OUTSIDE = ("lm_head", "model.embed_tokens")
"""Modules that PEFT would adapt and this project does not: the output head and the embedding."""

_CONTAINERS = ("model.layers", "model.norm", "model.rotary_emb", "model")
_FUSED_PARTS = ("mlp.activation_fn", "resid_attn_dropout", "resid_mlp_dropout")
_SEPARATE_PARTS = ("mlp.act_fn",)
"""What has a name inside a layer and no parameters (transformers models/phi3 and models/llama)."""


def adapted_names(plan: Plan, arch: Architecture) -> frozenset[str]:
    """Names of the linear modules that the plan's targets match.

    Raises:
        PlanError: as `match_targets`.
    """
    matched, _ = match_targets(plan, arch)
    return matched


def match_targets(plan: Plan, arch: Architecture) -> tuple[frozenset[str], tuple[str, ...]]:
    """The module names that match, and the targets that match nothing.

    A list's target matches the modules whose path is it or ends with it after a dot. A string is a regular expression
    for the whole path, such as `model.layers.0.self_attn.qkv_proj`; "all-linear" is every linear module but the head.

    Raises:
        PlanError: no target matches anything (the message lists the names that exist), an expression is not valid, or
            what matches is the head, the embedding, no linear module, or in some layers only.
    """
    if plan.lora is None:
        return frozenset(), ()
    targets = plan.lora.target_modules
    linears = {linear.path for linear in arch.linears}
    named = tuple(path for path in arch.layer_modules if path not in linears)
    others = ("self_attn", "mlp", *named, *(_FUSED_PARTS if arch.family.fused else _SEPARATE_PARTS))
    return _match(targets, arch.linears, others, arch.layers, arch.model_type)


@lru_cache(maxsize=256)
def _match(
    targets: str | tuple[str, ...],
    linears: tuple[Linear, ...],
    others: tuple[str, ...],
    layers: int,
    model_type: str,
) -> tuple[frozenset[str], tuple[str, ...]]:
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return frozenset(linear.name for linear in linears), ()
        found = {targets: _matched_by(_expression(targets), linears, others, layers)}
    else:
        found = {target: _matched_by(_suffix(target), linears, others, layers) for target in targets}
    matched = frozenset(name for names in found.values() for name in names)
    unmatched = tuple(target for target, names in found.items() if not names)
    if not matched:
        names = targets if isinstance(targets, str) else " or ".join(targets)
        raise PlanError(
            _FIELD,
            f"no module is called {names[:120]}",
            why=f"{model_type} has {', '.join(sorted(linear.name for linear in linears))}"
            + (
                ": queries, keys and values are one module, so are gate and up."
                if any(linear.name == "qkv_proj" for linear in linears)
                else "."
            ),
            hint='Name some of these, or write "all-linear".'
            + (" A plain string is a regular expression for the whole path." if isinstance(targets, str) else ""),
        )
    return matched, unmatched


def _expression(target: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(target)
    except (re.error, RecursionError, OverflowError) as error:
        raise PlanError(
            _FIELD,
            f"{target[:60]!r} is not a regular expression",
            why=f"PEFT takes a plain string as one: {str(error)[:100]}.",
            hint='Write a list of names, such as ["qkv_proj", "o_proj"], or "all-linear".',
        ) from error
    return lambda path: pattern.fullmatch(path) is not None


def _suffix(target: str) -> Callable[[str], bool]:
    return lambda path: path == target or path.endswith(f".{target}")


def _matched_by(
    matches: Callable[[str], bool], linears: tuple[Linear, ...], others: tuple[str, ...], layers: int
) -> frozenset[str]:
    """Names of the modules that match, in every layer.

    Raises:
        PlanError: something else matches, or a module in some layers only.
    """
    for path in _OUTSIDE:
        if matches(path):
            _refuse(path, "adapters on the output head or the embedding are not modelled", "Leave it out of the list.")
    parts = ("model.layers.0", *(f"model.layers.0.{part}" for part in others))
    for path in (*_CONTAINERS, *parts):
        if matches(path):
            _refuse(path, "it is not a linear module, and PEFT refuses it", "Name linear modules only.")
    names = set()
    for linear in linears:
        count = sum(matches(f"model.layers.{layer}.{linear.path}") for layer in range(layers))
        if 0 < count < layers:
            _refuse(
                linear.path,
                f"it matches in {count} of {layers} layers, and the closed form takes every layer to be alike",
                "Trace it instead (phi3-advise trace --plan FILE), or match every layer.",
            )
        if count:
            names.add(linear.name)
    return frozenset(names)


def _refuse(path: str, why: str, hint: str) -> None:
    raise PlanError(_FIELD, f"matches {path}", why=why[0].upper() + why[1:] + ".", hint=hint)


__all__ = ["adapted_names", "match_targets"]
