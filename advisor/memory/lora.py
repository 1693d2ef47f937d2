"""Which modules carry an adapter: PEFT's matching of target names, told by an architecture alone."""

from __future__ import annotations

from advisor.architecture import Architecture
from advisor.errors import PlanError
from advisor.plan import Plan


def adapted_names(plan: Plan, arch: Architecture) -> frozenset[str]:
    """Names of the linear modules that the plan's targets match.

    Raises:
        PlanError: no target matches anything.
    """
    matched, _ = match_targets(plan, arch)
    return matched


def match_targets(plan: Plan, arch: Architecture) -> tuple[frozenset[str], tuple[str, ...]]:
    """The module names that match, and the targets that match nothing.

    A target matches the modules whose path is it or ends with it after a dot (peft/tuners/tuners_utils.py,
    check_target_module_exists). "all-linear" is every linear module but the output head.

    Raises:
        PlanError: no target matches anything; the message lists the names that exist.
    """
    if plan.lora is None:
        return frozenset(), ()
    names = frozenset(linear.name for linear in arch.linears)
    targets = plan.lora.target_modules
    if targets == "all-linear":
        return names, ()
    wanted = (targets,) if isinstance(targets, str) else targets
    matched = {
        linear.name
        for linear in arch.linears
        for target in wanted
        if linear.path == target or linear.path.endswith(f".{target}") or linear.name == target
    }
    unmatched = tuple(
        target for target in wanted if not any(name == target or target.endswith(f".{name}") for name in matched)
    )
    if not matched:
        raise PlanError(
            "lora.target_modules",
            f"no module is called {' or '.join(wanted)[:120]}",
            why=f"{arch.model_type} has {', '.join(sorted(names))}"
            + (": queries, keys and values are one module, so are gate and up." if arch.family.fused else "."),
            hint='Name some of these, or write "all-linear".',
        )
    return frozenset(matched), unmatched
