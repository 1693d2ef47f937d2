"""A plan as another tool's configuration: what it can be told is written, what it cannot is said."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Literal, get_args

from advisor.export.draft import Draft, Export, Setting, Told, field_names
from advisor.plan import Plan

if TYPE_CHECKING:
    from advisor.architecture import Architecture
    from advisor.fit import Fit
    from advisor.hardware import Gpu

Tool = Literal["trl", "axolotl", "llama-factory", "accelerate"]

TOOLS: tuple[Tool, ...] = get_args(Tool)


def export_plan(plan: Plan, tool: Tool, *, file: str | None = None) -> Export:
    """A plan as a tool's configuration.

    Args:
        plan: what is to be trained.
        tool: what shall train it.
        file: the configuration's name in the command that runs it; None takes the tool's usual one.

    Raises:
        InputError: the tool cannot do anything of the kind; the reason says what.
        UnknownNameError: a model that no profile has.
    """
    module = import_module(f"advisor.export.{tool.replace('-', '_')}")
    draft = Draft(plan)
    module.describe(plan, draft)
    name = file or f"{tool}.yaml"
    return draft.finish(tool, module.CHECKED_AGAINST, tuple(line.format(file=name) for line in module.COMMANDS))


def fit_as_run(export: Export, arch: Architecture, gpu: Gpu) -> Fit | None:
    """Whether what the tool really runs fits; None where that is no plan, or the closed form does not know it."""
    from advisor.errors import InputError
    from advisor.fit import check_fit
    from advisor.memory.estimate import estimate

    if export.as_run is None or not gpu.total_bytes:
        return None
    try:
        return check_fit(estimate(export.as_run, arch, gpu).reserved_bytes, gpu)
    except InputError:
        return None


def smaller_that_fits(plan: Plan, tool: Tool, arch: Architecture, gpu: Gpu) -> Plan | None:
    """The plan at the largest smaller micro-batch at which what the tool runs fits; the effective batch stays."""
    for size in range(plan.micro_batch - 1, 0, -1):
        if plan.effective_batch % size:
            continue
        smaller = replace(plan, micro_batch=size, gradient_accumulation=plan.effective_batch // size)
        fit = fit_as_run(export_plan(smaller, tool), arch, gpu)
        if fit is not None and fit.fits:
            return smaller
    return None


__all__ = [
    "TOOLS",
    "Export",
    "Setting",
    "Told",
    "Tool",
    "export_plan",
    "field_names",
    "fit_as_run",
    "smaller_that_fits",
]
