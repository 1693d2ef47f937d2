"""How a question is spelled as a command."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote
from typing import Any

from advisor.hardware import Gpu
from advisor.request import DEFAULT_MODEL, Request
from advisor.units import exact_size


def spell_command(model: str, gpu: Gpu, options: Mapping[str, Any]) -> str:
    """The command that asks about the same model and GPU with these options."""
    words = {"--model": model} if model != DEFAULT_MODEL else {}
    spelled = {name: quote(str(value)) for name, value in {**words, **gpu_options(gpu), **options}.items()}
    return " ".join(["phi3-advise", *(f"{name} {value}" for name, value in spelled.items())])


def request_options(request: Request) -> dict[str, Any]:
    """What was asked that is not asked by itself."""
    usual = _spelled(Request())
    return {name: value for name, value in _spelled(request).items() if value != usual[name]}


def _spelled(request: Request) -> dict[str, Any]:
    targets = request.target_modules
    return {
        "--seq-len": request.seq_len,
        "--effective-batch": request.effective_batch,
        "--lora-rank": request.lora_rank,
        "--target-modules": targets if isinstance(targets, str) else ",".join(targets),
        "--prefer": request.prefer,
        "--method": request.method,
    }


def gpu_options(gpu: Gpu) -> dict[str, str]:
    """What names a GPU that is described, or is not the first of this machine."""
    if gpu.detected:
        device = "cpu" if gpu.backend == "cpu" else str(gpu.index or "")
        return {"--device": device} if device else {}
    options = {"--gpu": gpu.profile.name} if gpu.profile else {}
    if gpu.profile is None or gpu.total_bytes != gpu.profile.usable_bytes:
        options["--vram"] = exact_size(gpu.total_bytes)
    if gpu.free_bytes is not None:
        options["--free"] = exact_size(gpu.free_bytes)
    return options


__all__ = ["gpu_options", "request_options", "spell_command"]
