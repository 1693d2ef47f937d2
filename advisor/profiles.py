"""What is known about models, GPUs and recipes, read from TOML: files in, frozen values out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from advisor.architecture import Architecture, architecture_from_config
from advisor.errors import EnvironmentLacksError, UnknownNameError
from advisor.files import read_json as read_json
from advisor.files import read_toml as read_toml
from advisor.plan import Dtype, Method, Plan, plan_from_fields
from advisor.plan_files import plan_to_toml as plan_to_toml
from advisor.plan_files import save_plan_file as save_plan_file
from advisor.units import GIB, MIB

Backend = Literal["cuda", "rocm", "xpu", "mps", "cpu"]
Provenance = Literal["measured", "published", "assumed"]

_HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model as somebody describes it: the keys of a config.json, and nothing that was computed from them."""

    name: str
    label: str
    config: Mapping[str, Any]
    origin: str
    """What to call it in errors."""

    source: str
    hub_id: str | None = None
    launchable: bool = True
    launch_note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model: its architecture, and whether this tool can train it."""

    name: str
    label: str
    architecture: Architecture
    source: str
    hub_id: str | None = None
    launchable: bool = True
    launch_note: str = ""
    """Why it cannot be launched, where it cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProfile:
    """A kind of GPU, as its vendor and its driver describe it."""

    name: str
    product: str
    vendor: str
    backend: Backend
    architecture: str
    driver_names: tuple[str, ...]
    driver_bytes: int
    """Memory as the driver reports it."""

    usable_bytes: int
    """Memory that a process can have; the driver's figure where nobody published this one."""

    capability: tuple[int, int] | None
    """CUDA compute capability; None for other vendors."""

    multiprocessors: int | None
    """Streaming multiprocessors, as the vendor's data sheet counts them; None for other vendors."""

    bfloat16: bool
    """Whether the hardware computes in bfloat16."""

    dense_16bit_flops: float
    """Dense 16-bit operations a second, accumulating in fp32."""

    bandwidth_bytes_per_s: float
    context_bytes: int
    """What the driver takes for a process beside torch's own allocations."""

    context_provenance: Provenance
    sources: Mapping[str, str]
    """Where each group of numbers was read."""

    note: str = ""
    """What a person should know before training on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named set of plan fields, with the facts about it that are worth saying."""

    name: str
    label: str
    fields: Mapping[str, Any]
    source: str
    notes: tuple[str, ...] = ()


def profile_folder(kind: Literal["models", "gpus", "recipes", "datasets", "messages"]) -> str:
    """Where the profiles of a kind are: inside an installed package, or at the top of a checkout."""
    installed = os.path.join(_HERE, "_profiles", kind)
    return installed if os.path.isdir(installed) else os.path.join(os.path.dirname(_HERE), "profiles", kind)


@cache
def _profiles(kind: Literal["models", "gpus", "recipes"]) -> Mapping[str, dict[str, Any]]:
    folder = profile_folder(kind)
    names = sorted(entry for entry in os.listdir(folder) if entry.endswith(".toml"))
    return {name.removesuffix(".toml"): read_toml(os.path.join(folder, name)) for name in names}


def _find(kind: Literal["models", "gpus", "recipes"], name: str) -> dict[str, Any] | None:
    """The raw profile of that name or alias; reads one file where the name is the file's."""
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    path = os.path.join(profile_folder(kind), f"{wanted}.toml")
    if os.path.sep not in wanted and os.path.isfile(path):
        return read_toml(path)
    for raw in _profiles(kind).values():
        hubs = [raw.get("hub_id", ""), *raw.get("other_hub_ids", ())]
        if wanted in raw.get("aliases", ()) or name.strip().lower() in [hub.lower() for hub in hubs if hub]:
            return raw
    return None


def model_names() -> tuple[str, ...]:
    """Names of the model profiles."""
    return tuple(_profiles("models"))


def gpu_names() -> tuple[str, ...]:
    """Names of the GPU profiles."""
    return tuple(_profiles("gpus"))


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes."""
    return tuple(_profiles("recipes"))


def _aliases(kind: Literal["models", "gpus", "recipes"]) -> tuple[str, ...]:
    return tuple(alias for raw in _profiles(kind).values() for alias in raw.get("aliases", ()))


def load_model(name: str) -> ModelProfile:
    """The model of that profile name, config.json path (or its folder) or hub id.

    Raises:
        UnknownNameError: nothing of that name.
        InputError: a file that describes no decoder-only causal model.
        UnsupportedError: a model whose layers the closed form does not know.
        EnvironmentLacksError: a hub id whose config.json is neither cached nor reachable.
    """
    return profile_of(find_model(name))


def profile_of(model: ModelSource) -> ModelProfile:
    """A model with its architecture, as the closed form needs it.

    Raises:
        InputError: what is described is no decoder-only causal model.
        UnsupportedError: a model whose layers the closed form does not know.
    """
    return ModelProfile(
        name=model.name,
        label=model.label,
        architecture=architecture_from_config(model.config, origin=model.origin),
        source=model.source,
        hub_id=model.hub_id,
        launchable=model.launchable,
        launch_note=model.launch_note,
    )


def find_model(name: str) -> ModelSource:
    """What describes the model of that profile name, config.json path (or its folder) or hub id.

    Raises:
        UnknownNameError: nothing of that name.
        InputError: a file that is no JSON object.
        EnvironmentLacksError: a hub id whose config.json is neither cached nor reachable.
    """
    raw = _find("models", name)
    if raw is not None:
        return _source_from_profile(raw)
    folder = _is_folder(name)
    path = os.path.join(name, "config.json") if folder else name
    if folder or name.endswith(".json") or os.path.isfile(path):
        return _source_from_config(read_json(path), name=name, source=path)
    if _looks_like_hub_id(name):
        return _source_from_hub(name)
    raise UnknownNameError(
        "model",
        name,
        model_names(),
        aliases=_aliases("models"),
        hint="`phi3-advise models` lists them; the path of a config.json or a hub id works too.",
    )


def _is_folder(name: str) -> bool:
    try:
        return os.path.isdir(name)
    except ValueError:
        return False


def _looks_like_hub_id(name: str) -> bool:
    owner, slash, repository = name.partition("/")
    allowed = (owner + repository).replace("-", "").replace("_", "").replace(".", "")
    return bool(slash and owner and repository) and allowed.isalnum() and not name.startswith(".") and len(name) <= 193


def _source_from_profile(raw: Mapping[str, Any]) -> ModelSource:
    return ModelSource(
        name=raw["name"],
        label=raw["label"],
        config=raw["architecture"],
        origin=raw["name"],
        source=raw["source"],
        hub_id=raw.get("hub_id"),
        launchable=raw["launchable"],
        launch_note=raw.get("launch_note", ""),
    )


def _source_from_config(config: Mapping[str, Any], *, name: str, source: str) -> ModelSource:
    label = os.path.basename(os.path.normpath(name.removesuffix("config.json").rstrip("/") or name))
    return ModelSource(name=name, label=label[:40], config=config, origin=source, source=source)


def _source_from_hub(hub_id: str) -> ModelSource:
    """Reads no more than config.json, from the local cache or the hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        cached = try_to_load_from_cache(hub_id, "config.json")
        if not isinstance(cached, str):
            require_hub_name()
        path = cached if isinstance(cached, str) else hf_hub_download(hub_id, "config.json")
    except Exception as error:  # the hub client raises some twenty kinds; each means: no config.json
        raise EnvironmentLacksError(
            f"The config.json of {hub_id} could not be had.",
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no reason given'}",
            hint="Check the name and the network (`hf auth login` for a gated model), or give a config.json's path.",
        ) from error
    return _source_from_config(read_json(path), name=hub_id, source=f"config.json of {hub_id}")


def require_hub_name() -> None:
    """Looks the hub's host up once, so that no network is said at once and not after five retries.

    Raises:
        OSError: its name does not resolve.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if not getproxies() and not constants.HF_HUB_OFFLINE:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)


def load_gpu(name: str) -> GpuProfile:
    """The GPU profile of that name or alias.

    Raises:
        UnknownNameError: nothing of that name.
    """
    raw = _find("gpus", name)
    if raw is None:
        raise UnknownNameError(
            "GPU",
            name,
            gpu_names(),
            aliases=_aliases("gpus"),
            hint="`phi3-advise gpus` lists them; for any other card give its memory: --vram 12GiB",
        )
    return _gpu_from_profile(raw)


@cache
def all_gpus() -> tuple[GpuProfile, ...]:
    """Every GPU profile, the smallest memory first."""
    return tuple(
        sorted(map(_gpu_from_profile, _profiles("gpus").values()), key=lambda gpu: (gpu.usable_bytes, gpu.name))
    )


def gpu_ladder() -> Iterator[GpuProfile]:
    """GPUs that can be bought or rented today, the smallest first: what is named when a larger one would do."""
    for name in read_toml(os.path.join(os.path.dirname(profile_folder("gpus")), "gpu-ladder.toml"))["gpus"]:
        yield load_gpu(name)


def match_gpu(driver_name: str, driver_bytes: int | None) -> GpuProfile | None:
    """The profile of the card that a driver names so; memory decides between cards of one name.

    None where no profile names it: unknown stays unknown.
    """
    named = [gpu for gpu in all_gpus() if driver_name in gpu.driver_names]
    if driver_bytes is None:
        return named[0] if len(named) == 1 else None
    close = [gpu for gpu in named if abs(gpu.driver_bytes - driver_bytes) <= gpu.driver_bytes // 10]
    return min(close, key=lambda gpu: abs(gpu.driver_bytes - driver_bytes), default=None)


def _gpu_from_profile(raw: Mapping[str, Any]) -> GpuProfile:
    memory, compute, context = raw["memory"], raw["compute"], raw["context"]
    driver_bytes = int(memory["driver_mib"]) * MIB
    major, _, minor = compute.get("capability", "").partition(".")
    return GpuProfile(
        name=raw["name"],
        product=raw["product"],
        vendor=raw["vendor"],
        backend=raw["backend"],
        architecture=raw["architecture"],
        driver_names=tuple(raw.get("driver_names", ())),
        driver_bytes=driver_bytes,
        usable_bytes=int(memory["usable_gib"] * GIB) if "usable_gib" in memory else driver_bytes,
        capability=(int(major), int(minor)) if major else None,
        multiprocessors=compute.get("multiprocessors"),
        bfloat16=compute["bfloat16"],
        dense_16bit_flops=compute["dense_16bit_tflops"] * 1e12,
        bandwidth_bytes_per_s=raw["bandwidth"]["gb_per_s"] * 1e9,
        context_bytes=int(context["mib"]) * MIB,
        context_provenance=context["provenance"],
        note=raw.get("note", ""),
        sources={name: raw[name]["source"] for name in ("memory", "compute", "bandwidth", "context")},
    )


def load_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UnknownNameError: nothing of that name.
    """
    raw = _find("recipes", name)
    if raw is None:
        raise UnknownNameError("recipe", name, recipe_names(), hint="Take one of these, or write a plan file.")
    return Recipe(
        name=raw["name"],
        label=raw["label"],
        fields=raw["plan"],
        source=raw["source"],
        notes=tuple(raw.get("notes", ())),
    )


def default_plan(method: Method, *, model: str, dtype: Dtype = "bfloat16") -> Plan:
    """The method's default plan for a model, in the number format that the device computes in."""
    plan = plan_from_fields({**load_recipe(method).fields, "model": model})
    if dtype == "float32":
        return replace(plan, dtype="float32", autocast="none")
    return plan if dtype == "bfloat16" else without_bfloat16(plan)


def without_bfloat16(plan: Plan) -> Plan:
    """The same plan on a GPU that has no bfloat16: fp16 under a gradient scaler.

    Trainable weights must then be fp32 ("Attempting to unscale FP16 gradients"), so full fine-tuning stores fp32.
    """
    return replace(plan, dtype="float32" if plan.method == "full" else "float16", autocast="float16")


def load_plan(path: str, *, dtype: Dtype = "bfloat16") -> Plan:
    """The plan in a TOML file; fields left out take the method's defaults.

    Args:
        path: the file. A `model` that is no profile's name but a relative path is looked up beside it first.
        dtype: what the device computes in, for a `dtype` that is left out.

    Raises:
        InputError: no file, not TOML, or a field that cannot be used.
    """
    return plan_with_defaults(read_toml(path), folder=os.path.dirname(path), dtype=dtype)


def plan_with_defaults(fields: Mapping[str, Any], *, folder: str = "", dtype: Dtype = "bfloat16") -> Plan:
    """A plan from a plan file's values over the defaults of its method."""
    method = fields.get("method")
    if method not in ("full", "lora", "qlora") or not isinstance(fields.get("model"), str):
        return plan_from_fields(fields)
    model = fields["model"]
    beside = os.path.join(folder, model)
    if folder and model and os.path.exists(beside) and _find("models", model) is None:
        model = beside
    said = {"dtype", "autocast"} & set(fields)
    base = default_plan(method, model=model, dtype="bfloat16" if said else dtype)
    return plan_from_fields({**fields, "model": model}, base)
