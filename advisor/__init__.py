"""Which of full fine-tuning, LoRA and QLoRA fits a GPU, at what settings, and how long it takes.

A public name is loaded when it is first used, so `import advisor` by itself loads nothing else.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advisor.advise import Advice, advise
    from advisor.errors import AdvisorError
    from advisor.hardware import detect
    from advisor.memory.estimate import estimate
    from advisor.plan import Plan
    from advisor.profiles import load_gpu, load_model, load_plan

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "AdvisorError",
    "Plan",
    "advise",
    "detect",
    "estimate",
    "load_gpu",
    "load_model",
    "load_plan",
]

_HOMES = {
    "Advice": "advisor.advise",
    "AdvisorError": "advisor.errors",
    "Plan": "advisor.plan",
    "advise": "advisor.advise",
    "detect": "advisor.hardware",
    "estimate": "advisor.memory.estimate",
    "load_gpu": "advisor.profiles",
    "load_model": "advisor.profiles",
    "load_plan": "advisor.profiles",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `advisor.advise` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
