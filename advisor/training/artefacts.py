"""What a finished training leaves in its run folder: adapter or model, tokenizer, generation settings, model card.

Everything is written aside first. The file without which nothing loads (adapter_config.json, or the model's
config.json) is moved last, so a folder that loads is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.plan import Dtype, Plan
from advisor.training.model_card import CardFacts, render_card
from advisor.training.tensor_files import SHARD_BYTES

if TYPE_CHECKING:
    import torch

_ASIDE = ".artefacts.unfinished"
_ADAPTER_KEY = "adapter_config.json"
_MODEL_KEY = "config.json"
_WEIGHTS = ("adapter_model*.safetensors", "model*.safetensors", "model.safetensors.index.json")


def save_artefacts(model: Any, tokenizer: Any, folder: str, *, plan: Plan, card: CardFacts) -> None:
    """Writes what was trained into `folder`, complete or not at all; the model in memory stays as it is.

    An adapter stays in fp32, as it was trained. A fully fine-tuned model is saved in the dtype that it was trained
    in, with one exception: fp32 weights under 16-bit autocast are saved in autocast's dtype. Those are the very
    values that the matrix products used, a model of 16 bits is what the base was and what people load, and the fp32
    weights stay in the checkpoints. Weights that a float16 cannot hold are all saved in fp32.

    Args:
        model: what the trainer called: the causal LM, or PEFT's wrapper around it; torch.compile and distributed
            wrappers are taken off.
        tokenizer: with its chat template.
        folder: the run folder; it need not be there yet.
        plan: what was trained, and how.
        card: how it went, for the model card.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    run = Path(folder)
    aside = run / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        inner = _unwrap(model)
        if plan.method == "full":
            dtype = _save_model(inner, aside, plan)
            weights = f"A whole model in {dtype}."
        else:
            _save_adapter(inner, aside, card.base_model)
            weights = f"An adapter in float32, {_counted(inner)}; the base model is not in it."
        tokenizer.save_pretrained(aside)
        text = render_card(plan, card, folder=run.resolve().name, weights=weights)
        (aside / "README.md").write_text(text, encoding="utf-8")
        _move_into(aside, run, key=_MODEL_KEY if plan.method == "full" else _ADAPTER_KEY)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _unwrap(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def _counted(model: Any) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{trained:,} parameters"


def _save_adapter(model: Any, aside: Path, base_model: str) -> None:
    """The adapter as PEFT saves it, over the base model as it was named.

    PEFT would ask the hub whether the vocabulary was resized; nothing here resizes it.
    """
    (config,) = model.peft_config.values()
    before = config.base_model_name_or_path
    config.base_model_name_or_path = base_model
    try:
        model.save_pretrained(aside, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = before
    causal_lm = model.get_base_model()
    with _as_loaded(causal_lm):
        causal_lm.generation_config.save_pretrained(aside)


def _save_model(model: Any, aside: Path, plan: Plan) -> Dtype:
    """The whole model as transformers saves it; the dtype that it is in then."""
    dtype = plan.saved_dtype
    state = _converted(model.state_dict(), dtype) if dtype != plan.dtype else None
    if state is None:
        dtype = plan.dtype
    with _as_loaded(model):
        model.save_pretrained(aside, state_dict=state, max_shard_size=SHARD_BYTES)
    path = aside / _MODEL_KEY
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return dtype


def _converted(state: Mapping[str, torch.Tensor], name: Dtype) -> dict[str, torch.Tensor] | None:
    """The state in another dtype, on the CPU; None where a tensor of finite values would get an infinite one.

    Tensors that share their storage share it afterwards, or transformers could not tell that they are tied.
    """
    import torch

    dtype: torch.dtype = getattr(torch, name)
    made: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    converted = {}
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            converted[key] = tensor
            continue
        source = (tensor.data_ptr(), tuple(tensor.shape))
        if source not in made:
            made[source] = tensor.detach().to("cpu", dtype)
            if _is_finite(tensor) and not _is_finite(made[source]):
                return None
        converted[key] = made[source]
    return converted


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of it is, without a mask as large as it is."""
    ends = tensor.detach().aminmax() if tensor.numel() else ()
    return all(bool(end.isfinite()) for end in ends)


@contextmanager
def _as_loaded(causal_lm: Any) -> Iterator[None]:
    """The key-value cache is off while training; a model that is loaded to generate wants it."""
    config = causal_lm.config
    before = config.use_cache
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = before


def _move_into(aside: Path, run: Path, *, key: str) -> None:
    """Moves the finished files into the run folder, the key last; weights of an earlier save go."""
    readable = (aside / "README.md").stat().st_mode
    for path in aside.iterdir():
        path.chmod(readable)  # safetensors writes for the owner alone, whatever the umask says
        _flush(path)
    for stale in (_ADAPTER_KEY, _MODEL_KEY):
        (run / stale).unlink(missing_ok=True)
    for pattern in _WEIGHTS:
        for path in run.glob(pattern):
            path.unlink()
    for path in sorted(aside.iterdir(), key=lambda path: path.name == key):
        path.replace(run / path.name)
    _flush(run)


def _flush(path: Path) -> None:
    """Waits until the file, or a folder's list of files, is on the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # no handle to a folder there
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["CardFacts", "save_artefacts"]
