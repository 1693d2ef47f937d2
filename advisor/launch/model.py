"""Where a model's weights are, whether they can be had, and how much of them has to be downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from advisor.errors import EnvironmentLacksError, InputError, first_line
from advisor.profiles import ModelSource, read_json

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What from_pretrained may read of a repository; weights only as safetensors."""

_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
_TOKENIZER = "tokenizer.json"
_LFS_POINTER = b"version https://git-lfs"
"""Source: github.com/git-lfs/git-lfs, docs/spec.md (The Pointer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model that can be loaded."""

    path: str
    """A folder or a hub id, as from_pretrained takes it."""

    weight_bytes: int | None
    """All its weight files together; None where nobody says."""

    largest_file_bytes: int | None
    download_bytes: int
    """How much of it is not here yet."""

    cache: str | None = None
    """The folder that a download goes to; None for a local model."""


def locate_model(source: ModelSource) -> str:
    """The folder or hub id that a model's weights come from.

    Raises:
        InputError: the model cannot be launched, or is only a description.
    """
    if not source.launchable:
        raise InputError(f"{source.label} cannot be trained from here.", why=source.launch_note)
    if source.hub_id is not None:
        return source.hub_id
    folder = source.name.removesuffix("config.json") if source.name.endswith("config.json") else source.name
    if os.path.isdir(folder or "."):
        return os.path.abspath(folder or ".")
    if source.name.endswith(".json") or os.path.exists(source.name):
        raise InputError(
            f"{source.name} describes a model, but its weights are not beside it.",
            hint="Give the folder that holds config.json, the safetensors and the tokenizer, or a hub id.",
        )
    return source.name


def find_files(path: str) -> ModelFiles:
    """Whether the weights and the tokenizer are here or can be downloaded; nothing is downloaded.

    Raises:
        InputError: a folder without safetensors or tokenizer, or a repository without them.
        EnvironmentLacksError: no network, no such repository, or no access to it.
    """
    return _find_local(path) if os.path.isdir(path) else _find_on_hub(path)


def download(files: ModelFiles) -> None:
    """Fetches what is missing of a hub model into the cache, showing how far it is.

    Raises:
        EnvironmentLacksError: the download failed; what came stays, and the next attempt goes on from there.
    """
    if not files.download_bytes:
        return
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(files.path, allow_patterns=list(FILES))
    except Exception as error:  # the hub client raises some twenty kinds; each means: not complete
        raise EnvironmentLacksError(
            f"The download of {files.path} was not completed.",
            why=_first_line(error),
            hint="Run it again: it goes on where it stopped.",
        ) from error


def _find_local(folder: str) -> ModelFiles:
    names = os.listdir(folder)
    weights = _weight_files(names, lambda: read_json(os.path.join(folder, _INDEX)))
    missing = [name for name in weights if name not in names]
    if not weights or missing:
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        raise InputError(
            f"{folder} has no {', '.join(missing) if missing else 'safetensors'}.",
            why="Its weights are pickles, which can run code when they are read." if pickled else "",
            hint="Save the model with save_pretrained(..., safe_serialization=True), or fetch the missing files.",
        )
    if _TOKENIZER not in names:
        raise InputError(
            f"{folder} has no {_TOKENIZER}.", hint="Put the model's tokenizer beside it: tokenizer.save_pretrained(...)"
        )
    for name in weights:
        _refuse_broken(os.path.join(folder, name))
    sizes = [os.path.getsize(os.path.join(folder, name)) for name in weights]
    return ModelFiles(path=folder, weight_bytes=sum(sizes), largest_file_bytes=max(sizes), download_bytes=0)


def _refuse_broken(path: str) -> None:
    """A file of weights that is cut off, or only the pointer that Git LFS leaves where it did not fetch.

    Raises:
        InputError: it is.
    """
    from advisor.training.tensor_files import read_header

    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(
                f"{path} is not the weights, but Git LFS's pointer to them.",
                hint="Fetch them in that folder: `git lfs pull`",
            )
    read_header(path)


def _find_on_hub(hub_id: str) -> ModelFiles:
    from huggingface_hub import constants

    cached = _cached_sizes(hub_id)
    if cached is not None:
        return ModelFiles(
            path=hub_id,
            weight_bytes=sum(cached),
            largest_file_bytes=max(cached),
            download_bytes=0,
            cache=constants.HF_HUB_CACHE,
        )
    sizes = _published_sizes(hub_id)
    weights = [size for name, size in sizes.items() if name.endswith(".safetensors")]
    if not weights or _TOKENIZER not in sizes:
        lacks = "safetensors" if not weights else _TOKENIZER
        raise InputError(f"{hub_id} has no {lacks} on the hub.", hint="Choose a repository that has them.")
    missing = sum(size for name, size in sizes.items() if not _is_cached(hub_id, name))
    return ModelFiles(
        path=hub_id,
        weight_bytes=sum(weights),
        largest_file_bytes=max(weights),
        download_bytes=missing,
        cache=constants.HF_HUB_CACHE,
    )


def _cached_sizes(hub_id: str) -> list[int] | None:
    """Sizes of the weight files where everything that loading needs is in the cache; else None."""
    config, tokenizer = _cached_file(hub_id, "config.json"), _cached_file(hub_id, _TOKENIZER)
    if config is None or tokenizer is None:
        return None
    index = _cached_file(hub_id, _INDEX)
    names = _weight_files([_INDEX] if index else [_ONE_FILE], lambda: read_json(index or ""))
    paths = [_cached_file(hub_id, name) for name in names]
    whole = [path for path in paths if path is not None]
    return [os.path.getsize(path) for path in whole] if whole and len(whole) == len(paths) else None


def _published_sizes(hub_id: str) -> dict[str, int]:
    """The repository's files that loading may read, with their sizes."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    from advisor.profiles import require_hub_name

    try:
        require_hub_name()
        info = HfApi().model_info(hub_id, files_metadata=True, timeout=30)
    except Exception as error:  # some twenty kinds; each means that it cannot be had
        raise EnvironmentLacksError(
            f"The weights of {hub_id} are neither here nor to be reached.",
            why=_first_line(error),
            hint="Check the name and the network (`hf auth login` for a gated model), or give a folder that has them.",
        ) from error
    top = [file for file in info.siblings or () if "/" not in file.rfilename]
    return {
        file.rfilename: file.size or 0 for file in top if any(fnmatch(file.rfilename, pattern) for pattern in FILES)
    }


def _weight_files(names: Sequence[str], read_index: Callable[[], Mapping[str, object]]) -> list[str]:
    """The files that hold the weights: those of the index where there is one."""
    if _INDEX in names:
        shards = read_index().get("weight_map")
        if isinstance(shards, Mapping):
            return sorted({str(shard) for shard in shards.values()})
    if _ONE_FILE in names:
        return [_ONE_FILE]
    return sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("adapter"))


def _cached_file(hub_id: str, name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, name)
    return found if isinstance(found, str) else None


def _is_cached(hub_id: str, name: str) -> bool:
    return _cached_file(hub_id, name) is not None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


__all__ = ["ModelFiles", "download", "find_files", "locate_model"]
