"""A run's adapter added into its base model, on the CPU, a piece of a tensor at a time.

W + scaling × B A, computed in fp32 and rounded once, as PEFT's merge_and_unload does it; a QLoRA adapter is added to
the 16-bit model, not to its 4-bit form. What is in RAM at one time does not depend on the size of the model.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from typing import TYPE_CHECKING, Any

from advisor.errors import EnvironmentLacksError, InputError, RunFailedError, UnsupportedError
from advisor.hardware import peak_ram_bytes
from advisor.training.adapter_files import AdaptedModule, read_adapter
from advisor.training.base_files import CONFIG, INDEX, BaseModel, find_base
from advisor.training.checkpoints import CHECKPOINTS
from advisor.training.tensor_files import FLOATING, StoredTensor, TensorWriter, read_elements, stored_as
from advisor.units import MIB, gib, size

if TYPE_CHECKING:
    import torch

    from advisor.plan import Dtype

BLOCK_ELEMENTS = 2 * MIB
"""Elements of a weight that are worked on at one time; a row that is longer is taken whole."""

_RUNTIME_BYTES = 96 * MIB
"""What torch's matrix product takes for itself when it first runs: thread pools, packed operands (measured: 20 to
60 MiB on two cores)."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
_GENERATION = "generation_config.json"
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A merge that can start: everything was found and fits together."""

    run: str
    out: str
    base: BaseModel
    base_name: str
    """The hub id or folder of the base model, as it was given."""

    modules: Mapping[str, AdaptedModule]
    """The base model's tensor → what is added to it."""

    dtype: Dtype | None
    """What the floating tensors are converted to; None leaves each as it is."""

    ram_bytes: int
    """The most that this process will hold, what it holds already included."""

    disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A merge that is done."""

    merge: Merge
    files: tuple[str, ...]
    seconds: float
    peak_ram_bytes: int | None
    """The most that this process has held; None where the system does not say."""


def prepare_merge(run: str, out: str | None = None, *, base: str | None = None, dtype: Dtype | None = None) -> Merge:
    """Finds and checks everything that a merge needs, and says how much RAM and disk it takes. Writes nothing.

    Args:
        run: the run folder, or a checkpoint in it.
        out: the folder to make; if None, `merged` in the run folder.
        base: the base model's folder or hub id, where it is no longer where the adapter says.
        dtype: converts the merged model's floating tensors; None leaves each as the base model has it.

    Raises:
        InputError: no adapter, nothing to merge, a base model that is missing or has other shapes, `out` is taken.
        UnsupportedError: an adapter that is more than low-rank matrices, or a quantised base model.
        EnvironmentLacksError: too little RAM or disk, or the hub cannot be reached.
    """
    adapter = read_adapter(run)
    out = _default_out(run) if out is None else out
    _check_out(out)
    base_name = base or adapter.base_model
    model = find_base(base_name, adapter.revision if base is None else None)
    modules = {module.weight: module for module in adapter.modules}
    _check_shapes(modules, model)
    merge = Merge(
        run=run,
        out=out,
        base=model,
        base_name=base_name,
        modules=modules,
        dtype=dtype,
        ram_bytes=_held_bytes() + _working_bytes(modules, model),
        disk_bytes=sum(_bytes_after(tensor, dtype) for tensors in model.files.values() for tensor in tensors),
    )
    _check_room(merge)
    return merge


def merge_adapter(merge: Merge, *, progress: Callable[[int, int], None] | None = None) -> Merged:
    """Writes the merged model's folder: complete, or not at all.

    Args:
        merge: from `prepare_merge`.
        progress: told how many bytes are written, of how many.

    Raises:
        RunFailedError: the adapter or the result has values that are not finite; the disk is full.
    """
    started = time.monotonic()
    done = 0
    with _aside(merge.out) as folder:
        for name, tensors in merge.base.files.items():
            for written in _write_file(os.path.join(folder, name), tensors, merge):
                done += written
                if progress is not None:
                    progress(done, merge.disk_bytes)
        _write_companions(folder, merge)
        files = tuple(sorted(os.listdir(folder)))
    return Merged(merge=merge, files=files, seconds=time.monotonic() - started, peak_ram_bytes=peak_ram_bytes())


def _default_out(run: str) -> str:
    """`merged` in the run folder; for a checkpoint, whose folder goes when newer ones come, a name beside that."""
    folder, name = os.path.split(os.path.abspath(run))
    if os.path.basename(folder) != CHECKPOINTS:
        return os.path.join(run, "merged")
    return os.path.join(os.path.dirname(folder), f"merged-{name}")


def _check_out(out: str) -> None:
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise InputError(f"{out} exists already.", hint="Name another folder with --out, or move that one away.")


def _check_shapes(modules: Mapping[str, AdaptedModule], base: BaseModel) -> None:
    """Every adapted module is a floating matrix of the base model, of the same shape."""
    weights = {tensor.name: tensor for tensors in base.files.values() for tensor in tensors}
    for name, module in modules.items():
        weight = weights.get(name)
        if weight is None and module.name == _HEAD and base.config.get("tie_word_embeddings", True):
            raise UnsupportedError(
                f"The adapter changes {_HEAD}, which this model shares with its embedding.",
                why="Added to the shared weight, what was trained for the one would change the other as well.",
                hint="Load it as an adapter, unmerged: PeftModel.from_pretrained(...)",
            )
        if weight is None:
            raise InputError(
                f"The adapter changes {module.name}, which the model in {base.folder} does not have.",
                why="It was trained over another model.",
                hint="Say which: --base with its folder or hub id.",
            )
        if weight.shape != module.shape or weight.dtype not in FLOATING:
            raise InputError(
                f"The adapter does not suit {module.name} of the model in {base.folder}.",
                why=f"It is made for {module.shape}, and the weight is {weight.shape} in {weight.dtype}.",
                hint="Say which model it was trained over: --base with its folder or hub id.",
            )


def _held_bytes() -> int:
    """What this process holds once torch is there."""
    import psutil
    import torch  # noqa: F401 - its libraries are part of the answer

    held: int = psutil.Process().memory_info().rss
    return held


def _working_bytes(modules: Mapping[str, AdaptedModule], base: BaseModel) -> int:
    """The most that merging holds at one time.

    A block = its values as read, its update in fp32, the result, and the test of whether that is finite: at most
    8 + 4 + 8 + 12 bytes an element; beside it one module's two matrices, as read and in fp32: 8 + 4 bytes an element.
    """
    widest = max((tensor.shape[-1] for file in base.files.values() for tensor in file if tensor.shape), default=0)
    matrices = max(module.a.elements + module.b.elements for module in modules.values())
    return 32 * max(BLOCK_ELEMENTS, widest) + 12 * matrices + _RUNTIME_BYTES


def _bytes_after(tensor: StoredTensor, dtype: Dtype | None) -> int:
    from advisor.plan import ITEMSIZE

    return tensor.size_bytes if dtype is None or tensor.dtype not in FLOATING else tensor.elements * ITEMSIZE[dtype]


def _check_room(merge: Merge) -> None:
    """RAM beyond what the process has already, and the disk under `out`."""
    from advisor.hardware import host

    machine = host(merge.out)
    wanted = merge.ram_bytes - _held_bytes()
    if machine.ram_available_bytes is not None and machine.ram_available_bytes < wanted:
        raise EnvironmentLacksError(
            f"Merging needs {size(wanted)} more RAM, and {size(machine.ram_available_bytes)} is free.",
            hint="Close something that uses RAM.",
        )
    if machine.disk_free_bytes is not None and machine.disk_free_bytes < merge.disk_bytes:
        raise EnvironmentLacksError(
            f"The merged model takes {gib(merge.disk_bytes)} of disk, and {gib(machine.disk_free_bytes)} is free.",
            hint="Name a folder on another disk with --out.",
        )


@contextmanager
def _aside(out: str) -> Iterator[str]:
    """A folder beside `out` that takes its name when all is well, and is removed otherwise.

    What a killed process left is removed by the next one.
    """
    import psutil

    parent, name = os.path.split(os.path.abspath(out))
    prefix, suffix = f".{name}.", ".unfinished"
    folder = os.path.join(parent, f"{prefix}{os.getpid()}{suffix}")
    try:
        os.makedirs(parent, exist_ok=True)
        for entry in os.listdir(parent):
            writer = entry.removeprefix(prefix).removesuffix(suffix)
            if entry == f"{prefix}{writer}{suffix}" and writer.isdigit() and not psutil.pid_exists(int(writer)):
                shutil.rmtree(os.path.join(parent, entry))
        os.mkdir(folder)
        try:
            yield folder
            if os.path.isdir(out):
                os.rmdir(out)  # empty: `_check_out` saw to that
            os.rename(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise RunFailedError(
            f"The merged model could not be written to {out}.",
            why=f"{error.strerror or error}. Nothing half-written is left.",
            hint="Name a folder with room with --out.",
        ) from error


def _write_file(path: str, tensors: tuple[StoredTensor, ...], merge: Merge) -> Iterator[int]:
    """One file of the merged model, its tensors in the base model's order; yields the bytes of each block."""
    outlines = [
        (tensor.name, _format_after(tensor, merge.dtype), tensor.shape, _bytes_after(tensor, merge.dtype))
        for tensor in tensors
    ]
    with TensorWriter(path, outlines) as writer:
        for tensor in tensors:
            with open(tensor.path, "rb") as source:
                module = merge.modules.get(tensor.name)
                if module is None and _format_after(tensor, merge.dtype) == tensor.dtype:
                    yield from _copy(source, tensor, writer)
                else:
                    yield from _write_blocks(source, tensor, module, merge.dtype, writer)


def _format_after(tensor: StoredTensor, dtype: Dtype | None) -> str:
    return tensor.dtype if dtype is None or tensor.dtype not in FLOATING else stored_as(dtype)


def _copy(source: BufferedReader, tensor: StoredTensor, writer: TensorWriter) -> Iterator[int]:
    """A tensor that nothing changes, byte for byte."""
    source.seek(tensor.start)
    left = tensor.size_bytes
    while left:
        raw = source.read(min(left, BLOCK_ELEMENTS))
        if not raw:
            raise InputError(f"{tensor.path} ends in the middle of {tensor.name}.", hint="Fetch the model again.")
        writer.write_bytes(raw)
        left -= len(raw)
        yield len(raw)


def _write_blocks(
    source: BufferedReader,
    tensor: StoredTensor,
    module: AdaptedModule | None,
    dtype: Dtype | None,
    writer: TensorWriter,
) -> Iterator[int]:
    """A tensor with its update, or in another format, some whole rows at a time."""
    import torch

    update = None if module is None else _Update(module)
    target: torch.dtype = getattr(torch, FLOATING[_format_after(tensor, dtype)])
    width = tensor.shape[-1] if tensor.shape else 1
    rows = tensor.elements // width if width else 0
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        block = read_elements(source, tensor, first * width, count * width).view(count, width)
        if update is not None:
            block = update.rows(first, count).add_(block)
        result = block.to(target)
        if not torch.isfinite(result).all():
            raise _explain_infinite(tensor.name, block, dtype)
        writer.write(result)
        yield result.numel() * result.element_size()


class _Update:
    """One module's scaling × B A, row by row of the weight."""

    def __init__(self, module: AdaptedModule) -> None:
        self._a, self._b = _read_matrix(module.a), _read_matrix(module.b)
        self._scaling = module.scaling

    def rows(self, first: int, count: int) -> torch.Tensor:
        """(count, inputs) in fp32."""
        return (self._b[first : first + count] @ self._a).mul_(self._scaling)


def _read_matrix(tensor: StoredTensor) -> torch.Tensor:
    """In fp32, as PEFT loads an adapter."""
    with open(tensor.path, "rb") as file:
        return read_elements(file, tensor, 0, tensor.elements).view(tensor.shape).float()


def _explain_infinite(name: str, block: torch.Tensor, dtype: Dtype | None) -> RunFailedError:
    import torch

    if dtype is not None and torch.isfinite(block).all():
        return RunFailedError(
            f"{name} does not fit {dtype}.",
            why=f"Its largest value is {block.abs().max().item():.4g}.",
            hint="Use --dtype bfloat16 or float32.",
        )
    return RunFailedError(
        f"{name} has values that are not finite.",
        why="The training diverged, or a file is damaged.",
        hint="Look at the losses in the run's metrics.jsonl, and merge an earlier checkpoint.",
    )


def _write_companions(folder: str, merge: Merge) -> None:
    """Configuration, index, tokenizer, generation settings and card; the run's own where it has them."""
    config: dict[str, Any] = dict(merge.base.config)
    if merge.dtype is not None:
        config["dtype"] = merge.dtype
        config.pop("torch_dtype", None)  # the older name of the same
    _write_json(os.path.join(folder, CONFIG), config)
    if merge.base.sharded:
        weight_map = {tensor.name: name for name, tensors in merge.base.files.items() for tensor in tensors}
        _write_json(
            os.path.join(folder, INDEX),
            {"metadata": {"total_size": merge.disk_bytes}, "weight_map": dict(sorted(weight_map.items()))},
        )
    trained = os.path.isfile(os.path.join(merge.run, "tokenizer_config.json"))
    _copy_files(_TOKENIZER_FILES, merge.run if trained else merge.base.folder, folder)
    own = os.path.isfile(os.path.join(merge.run, _GENERATION))
    _copy_files((_GENERATION,), merge.run if own else merge.base.folder, folder)
    from advisor.training.model_card import render_merged_card

    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(render_merged_card(merge.base_name, folder=os.path.basename(os.path.abspath(merge.out))))


def _write_json(path: str, value: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def _copy_files(names: tuple[str, ...], source: str, target: str) -> None:
    for name in names:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


__all__ = ["Merge", "Merged", "merge_adapter", "prepare_merge"]
