"""An adapter as PEFT saved it: which modules it changes, by which matrices, scaled by how much."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advisor.errors import InputError, UnsupportedError, shown
from advisor.profiles import read_json
from advisor.training.checkpoints import CHECKPOINTS, last_checkpoint
from advisor.training.tensor_files import FLOATING, StoredTensor, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_UNDERSTOOD = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "runtime_config"),
        *("base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora"),
        *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "bias", "init_lora_weights", "ensure_weight_tying", "eva_config", "loftq_config"),
        *("megatron_core", "qalora_group_size", "velora_config"),
    }
)
"""What a LoRA's weights depend on, or do not depend on once it is trained. Anything else that is set changes the sum
that a merge has to make. Source: peft tuners/lora/config.py (LoraConfig)."""

_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base model's weights alone; PiSSA, OLoRA and CorDA take a part out of them."""

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModule:
    """One Linear module's update: scaling × B A, with A (rank, inputs) and B (outputs, rank)."""

    name: str
    a: StoredTensor
    b: StoredTensor
    scaling: float

    @property
    def weight(self) -> str:
        """The base model's tensor that it changes."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA in a folder."""

    base_model: str
    """The hub id or folder that it was trained over, as it was given."""

    revision: str | None
    modules: tuple[AdaptedModule, ...]


def read_adapter(folder: str) -> Adapter:
    """The adapter in a run folder.

    Raises:
        InputError: there is none (a full fine-tuning, an unfinished run), or its files are not whole.
        UnsupportedError: it is more than low-rank matrices beside Linear modules.
    """
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        raise _explain_absence(folder)
    config = read_json(os.path.join(folder, CONFIG))
    _refuse_other_kinds(config)
    base_model = config.get("base_model_name_or_path")
    if not isinstance(base_model, str) or not base_model:
        raise InputError(
            f"{os.path.join(folder, CONFIG)} names no base model.",
            hint="Name it: --base with its folder or hub id.",
        )
    tensors = read_header(os.path.join(folder, WEIGHTS))
    return Adapter(base_model=base_model, revision=config.get("revision"), modules=_modules(tensors, config))


def _explain_absence(folder: str) -> InputError:
    """Why a folder has no adapter, as far as its files tell."""
    if not os.path.isdir(folder):
        return InputError(f"There is no folder {folder}.", hint="Give the run folder that training wrote.")
    if os.path.isfile(os.path.join(folder, "config.json")):
        return InputError(
            f"{folder} holds a whole model: there is nothing to merge.",
            why="A full fine-tuning trains every weight and leaves no adapter.",
            hint=f'Load it as it is: AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")',
        )
    last = last_checkpoint(Path(folder, CHECKPOINTS))
    if last is not None and not (last.path / CONFIG).is_file():
        last = None
    return InputError(
        f"{folder} holds no adapter.",
        why=f"{CONFIG} is not there: the training has not finished, or this is not its folder.",
        hint=f"Merge its last checkpoint: phi3-advise merge {last.path} --out DIR"
        if last is not None
        else "Give the run folder of a LoRA or QLoRA training that ended.",
    )


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"An adapter of the kind {shown(kind)} cannot be merged here.",
            why="Only a LoRA is a sum that can be made a tensor at a time.",
            hint=_WITH_PEFT,
        )
    more = sorted(name for name, value in config.items() if value and name not in _UNDERSTOOD)
    if config.get("bias", "none") != "none":
        more.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        more.append("init_lora_weights")
    if more:
        raise UnsupportedError(
            f"This adapter has {', '.join(more)}, and cannot be merged here.",
            why="Its weights are more than low-rank matrices to add to the base model's.",
            hint=_WITH_PEFT,
        )


_WITH_PEFT = "Merge it with PEFT, with the whole model in RAM: PeftModel.from_pretrained(...).merge_and_unload()"


def _modules(tensors: tuple[StoredTensor, ...], config: Mapping[str, Any]) -> tuple[AdaptedModule, ...]:
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        match = _KEY.fullmatch(tensor.name)
        if match is None or tensor.dtype not in FLOATING or len(tensor.shape) != 2:
            raise UnsupportedError(
                f"This adapter holds {tensor.name} ({tensor.dtype}), and cannot be merged here.",
                why="It is not one of a Linear module's two low-rank matrices.",
                hint=_WITH_PEFT,
            )
        pairs.setdefault(match["module"], {})[match["matrix"]] = tensor
    if not pairs:
        raise InputError("The adapter is empty: it changes no module.", hint="Give the folder of another run.")
    return tuple(_module(name, pair, config) for name, pair in sorted(pairs.items()))


def _module(name: str, pair: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> AdaptedModule:
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or a.shape[0] != b.shape[1] or not a.shape[0]:
        shapes = f"A {a.shape if a else 'is missing'}, B {b.shape if b else 'is missing'}"
        raise InputError(f"The adapter of {name} is not whole: {shapes}.", hint="Copy the run folder again.")
    rank = a.shape[0]
    alpha = _of_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise InputError(f"The adapter's lora_alpha is {shown(alpha)}.", hint="Copy the run folder again.")
    return AdaptedModule(name=name, a=a, b=b, scaling=alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _of_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The first pattern that the module's name ends in decides. Source: peft utils/other.py (get_pattern_key)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


__all__ = ["AdaptedModule", "Adapter", "read_adapter"]
