"""A base model's folder: its own, or the hub's local copy; its weights' files and the few others that go with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from advisor.errors import EnvironmentLacksError, InputError, UnsupportedError
from advisor.profiles import read_json
from advisor.training.tensor_files import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
"""What is fetched of a model on the hub: nothing that runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A model's folder, as far as its headers tell."""

    folder: str
    config: Mapping[str, Any]
    files: Mapping[str, tuple[StoredTensor, ...]]
    """File name → its tensors in the order of their bytes."""

    sharded: bool
    """Whether an index says which file has which tensor."""


def find_base(name: str, revision: str | None = None) -> BaseModel:
    """The model of a folder, or of a hub id: from the local cache, or fetched.

    Raises:
        InputError: no such folder, or no whole safetensors in it.
        UnsupportedError: its weights are quantised.
        EnvironmentLacksError: it is on the hub, and the hub cannot be reached.
    """
    if os.path.isdir(name):
        return read_base(name)
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"The base model {name} is not there.", why="The adapter was trained over it.", hint=_SAY_WHERE
        ) from error
    return _from_hub(name, revision)


_SAY_WHERE = "Say where it is now: --base with its folder or hub id."


def _from_hub(name: str, revision: str | None) -> BaseModel:
    from huggingface_hub import snapshot_download

    try:
        return read_base(snapshot_download(name, revision=revision, allow_patterns=_WANTED, local_files_only=True))
    except UnsupportedError:
        raise
    except (InputError, OSError, ValueError):
        pass  # not in the cache, or not all of it
    from advisor.profiles import require_hub_name

    try:
        require_hub_name()
        folder = snapshot_download(name, revision=revision, allow_patterns=_WANTED)
    except Exception as error:  # the hub client raises some twenty kinds; each means: no model
        raise EnvironmentLacksError(
            f"The base model {name} could not be had.",
            why=f"It is not whole in the local cache, and the hub said: {type(error).__name__}: {str(error)[:200]}",
            hint=f"Check the network (`hf auth login` for a gated model). {_SAY_WHERE}",
        ) from error
    return read_base(folder)


def read_base(folder: str) -> BaseModel:
    """The model in a folder.

    Raises:
        InputError: no config.json, or no whole safetensors.
        UnsupportedError: its weights are quantised.
    """
    config = read_json(os.path.join(folder, CONFIG))
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"The weights in {folder} are quantised.",
            why="Adding to a rounded weight would round what was trained as well.",
            hint="Merge into the model's 16-bit original: --base with its folder or hub id.",
        )
    index = os.path.join(folder, INDEX)
    sharded = os.path.isfile(index)
    names = _indexed(index) if sharded else (SINGLE,)
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise InputError(
            f"{folder} lacks {missing[0]}" + (f" and {len(missing) - 1} more files." if missing[1:] else "."),
            why="Only safetensors are read: a pickle could run code.",
            hint="Fetch the model again, or convert it: model.save_pretrained(DIR) writes safetensors.",
        )
    files = {name: read_header(os.path.join(folder, name)) for name in names}
    return BaseModel(folder=folder, config=config, files=files, sharded=sharded)


def _indexed(index: str) -> tuple[str, ...]:
    """The file names in an index; each is beside it."""
    found = read_json(index).get("weight_map")
    names = sorted(set(found.values())) if isinstance(found, dict) and found else []
    if not names or not all(isinstance(name, str) and os.path.basename(name) == name for name in names):
        raise InputError(f"{index} does not name the model's files.", hint="Fetch the model again.")
    return tuple(names)


__all__ = ["CONFIG", "INDEX", "BaseModel", "find_base", "read_base"]
