"""torch's compiler, left out until somebody compiles.

A trace compiles nothing, yet importing the compiler would take a fifth of a trace's time: torch and transformers
decorate functions that it has to pass over, and the first call of one of those imports all of it.

Source: torch/_compile.py (_disable_dynamo), torch/_dynamo/decorators.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import _compile

_NAME = "torch._dynamo"


class _PostponedCompiler(ModuleType):
    """Takes the marks that functions are given for the compiler; whoever asks for anything else gets the compiler."""

    def __init__(self) -> None:
        super().__init__(_NAME)
        spec = find_spec(_NAME)
        assert spec is not None
        self.__spec__, self.__file__, self.__package__ = spec, spec.origin, _NAME
        self._places = list(spec.submodule_search_locations or [])
        self._passed_over: list[Callable[..., Any]] = []
        self._kept_whole: list[Callable[..., Any]] = []

    def lend_submodules(self) -> None:
        """Let one be imported without the package: transformers needs a small one for its masks."""
        self.__path__ = self._places

    def keep_submodules(self) -> None:
        """Import the package before any: torch's own parts import each other in that order only."""
        vars(self).pop("__path__", None)

    def disable(
        self, fn: Callable[..., Any] | None = None, recursive: bool = True, *, wrapping: bool = True, **_: Any
    ) -> Callable[..., Any]:
        """A function that the compiler passes over: torch's own wrapper, which asks here at its first call.

        That call is without `wrapping`, and its answer is kept with the function until the compiler is there.
        """
        if fn is None or wrapping:
            wrapped: Callable[..., Any] = _compile._disable_dynamo(fn, recursive)
            return wrapped
        self._passed_over.append(fn)
        return fn

    def assume_constant_result(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The mark that the compiler looks for."""
        fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
        return fn

    def allow_in_graph(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The compiler is told once it is there."""
        self._kept_whole.append(fn)
        return fn

    def graph_break(self) -> None:
        """Optimizers call it; nothing is being compiled."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # what Python asks of any module
            raise AttributeError(name)
        if name == "config" and "__path__" in vars(self):  # checkpointing asks
            return import_module(f"{_NAME}.config")
        self._import()
        return getattr(self, name)

    def _import(self) -> None:
        """Become the compiler, and tell it what was promised in its place."""
        passed_over, kept_whole, spec = self._passed_over, self._kept_whole, self.__spec__
        assert isinstance(spec, ModuleSpec)
        assert isinstance(spec.loader, Loader)
        self.__path__ = self._places
        del self._passed_over, self._kept_whole, self._places
        self.__class__ = ModuleType  # type: ignore[assignment]
        for fn in passed_over:  # at its next call it asks again
            vars(fn).pop("__dynamo_disable", None)
        spec.loader.exec_module(self)
        for fn in kept_whole:
            self.allow_in_graph(fn)


@contextmanager
def compiler_postponed() -> Iterator[None]:
    """Inside, the compiler is imported only by what compiles; afterwards by whatever touches it.

    Without effect where it is imported already.
    """
    if _NAME not in sys.modules:
        sys.modules[_NAME] = torch._dynamo = _PostponedCompiler()
    module = sys.modules[_NAME]
    if not isinstance(module, _PostponedCompiler):
        yield
        return
    module.lend_submodules()
    try:
        yield
    finally:
        if isinstance(module, _PostponedCompiler):  # nothing asked for the compiler
            module.keep_submodules()
