"""bitsandbytes' AdamW, whose states come back from a checkpoint the way they were: paged, shared, one at a time."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW

_MOMENTS = ("state1", "state2")
_CODEBOOKS = {"qmap1": "dynamic", "qmap2": "udynamic"}


class PagedAdamW(AdamW):
    """AdamW in 32 or 8 bits, paged or not.

    bitsandbytes' own `load_state_dict` copies everything on the host, then moves every state to the device: paged
    ones are no longer paged, and each parameter has codebooks of its own.
    Source: bitsandbytes 0.50 optim/optimizer.py (Optimizer8bit.load_state_dict, get_state_buffer).
    """

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:  # noqa: ARG002
        """Take the states over, each to where a first step would have made it.

        Raises:
            ValueError: the groups are not those of this optimizer.
        """
        saved_groups = state_dict["param_groups"]
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("The saved optimizer has other parameters.")
        numbers = chain.from_iterable(group["params"] for group in saved_groups)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = self._placed(parameter, state_dict["state"][number])
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})

    def _placed(self, parameter: torch.Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        """One parameter's state where it belongs."""
        values = {name: value for name, value in saved.items() if name != self._FSDP_WRAPPED_QUANT_STATE_KEY}
        values.update(saved.get(self._FSDP_WRAPPED_QUANT_STATE_KEY, {}))
        placed: dict[str, Any] = {}
        for name, value in values.items():
            if name in _MOMENTS:
                placed[name] = self.get_state_buffer(parameter, dtype=value.dtype)  # type: ignore[no-untyped-call]
                placed[name].copy_(value)
            elif name in _CODEBOOKS:
                kind = _CODEBOOKS[name]
                self.name2qmap[kind] = self.name2qmap[kind].to(parameter.device)
                placed[name] = self.name2qmap[kind]
            else:
                placed[name] = value.to(parameter.device) if isinstance(value, torch.Tensor) else value
        return placed
