"""Optimizer in backward: each parameter is stepped as its gradient arrives, and the gradient is freed at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SteppedInBackward(torch.optim.Optimizer):
    """An optimizer whose work is done while gradients are computed; its own `step` has nothing left to do.

    One inner optimizer holds every state. A hook on each parameter, run once its gradient is complete, shows that
    optimizer the one parameter, so at most one gradient stands. Groups and states are the inner optimizer's own: a
    scheduler drives them, and a state dict is that of a run without hooks. Gradients cannot be clipped, added up
    over micro-batches or unscaled, since none outlives its hook.
    Source: torch.Tensor.register_post_accumulate_grad_hook; "How to save memory by fusing the optimizer step into
    the backward pass", pytorch.org/tutorials. Like accelerate's AcceleratedOptimizer, this wraps and does not
    initialise the base class.

    Args:
        inner: over the parameters that are to be stepped; each gets a hook.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._inner = inner
        self.handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(index))
            for index, group in enumerate(inner.param_groups)
            for parameter in group["params"]
        ]

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def step(parameter: torch.Tensor) -> None:
            groups = self._inner.param_groups
            self._inner.param_groups = [{**groups[index], "params": [parameter]}]
            try:
                self._inner.step()
            finally:
                self._inner.param_groups = groups
            parameter.grad = None

        return step

    def remove(self) -> None:
        """Take the hooks away: gradients stay, and nothing steps."""
        for handle in self.handles:
            handle.remove()

    @property
    def state(self) -> Any:
        """By parameter."""
        return self._inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self._inner.state = state

    @property
    def param_groups(self) -> Any:
        """Those that a scheduler changes."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self._inner.param_groups = groups

    @property
    def defaults(self) -> Any:
        """Of the inner optimizer."""
        return self._inner.defaults

    @defaults.setter
    def defaults(self, defaults: Any) -> None:
        self._inner.defaults = defaults

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: every parameter was stepped in backward."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left but gradients that a backward outside training made."""
        self._inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """That of the inner optimizer."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the inner optimizer."""
        self._inner.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"SteppedInBackward({self._inner!r})"
