"""NVIDIA GPUs, asked of the driver through NVML: no torch, no CUDA context, milliseconds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from advisor.hardware.gpu import Detection, Gpu, GpuProcess
from advisor.hardware.host import ram
from advisor.hardware.query import ask, attempt, first_line, text
from advisor.profiles import GpuProfile, match_gpu
from advisor.units import MIB

FIRST_WITH_BFLOAT16 = (8, 0)
"""Ampere. Below it torch emulates bfloat16, and `torch.cuda.is_bf16_supported()` says True all the same."""

# nvml.h, nvmlReturn_t
_NOT_SUPPORTED = 3
_DRIVER_NOT_LOADED = 9
_LIBRARY_NOT_FOUND = 12
_LIBRARY_MISMATCH = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    total_bytes: int
    driver_bytes: int
    free_bytes: int | None
    unified: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    gpu: Gpu
    card_uuid: str | None
    """Of the card that a slice is part of; a whole card's own."""


def read_nvml_gpus() -> Detection | None:
    """Every NVIDIA GPU that CUDA would offer; None where there is no driver, or a driver without a GPU."""
    # Imported by name: nvidia-ml-py carries no annotations.
    nvml, error = attempt(import_module, "pynvml")
    if nvml is None:
        return None
    _, error = attempt(lambda: nvml.nvmlInit())
    if error is not None:
        absent = getattr(error, "value", None) in (_LIBRARY_NOT_FOUND, _DRIVER_NOT_LOADED)
        return None if absent else Detection(warnings=(_broken_driver(nvml, error),))
    detection, error = attempt(_read_cards, nvml)
    ask(nvml, "nvmlShutdown")
    return detection if error is None else Detection(warnings=(_broken_driver(nvml, error),))


def _said(nvml: Any, error: Exception) -> str:
    """NVML's own words, as nvidia-smi prints them; nvidia-ml-py has others for some codes."""
    words = text(ask(nvml, "nvmlErrorString", getattr(error, "value", None)))
    return words.rstrip(".") if words else first_line(error)


def _broken_driver(nvml: Any, error: Exception) -> str:
    if getattr(error, "value", None) == _LIBRARY_MISMATCH:
        remedy = "The driver was updated while the old one was loaded: restart the machine."
    else:
        remedy = (
            "Run nvidia-smi: until it lists the GPU, nothing can train on it. Restart, or install the driver again."
        )
    return f"The NVIDIA driver does not work. NVML says: {_said(nvml, error)}. {remedy}"


def _read_cards(nvml: Any) -> Detection | None:
    driver = text(ask(nvml, "nvmlSystemGetDriverVersion"))
    count = nvml.nvmlDeviceGetCount()
    found: list[_Found] = []
    warnings: list[str] = []
    for index in range(count):
        devices, error = attempt(_read_devices, nvml, index, driver)
        if error is not None:
            warnings.append(
                f"GPU {index} does not answer: {_said(nvml, error)}. Run nvidia-smi; a restart may bring it back."
            )
        elif not devices:
            warnings.append(
                f"GPU {index} is in MIG mode and has no slice. Create one with nvidia-smi mig, or turn MIG off."
            )
        found += devices or []
    gpus, hidden = _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Detection(gpus=gpus, warnings=(*warnings, *hidden)) if count else None


def _read_devices(nvml: Any, index: int, driver: str | None) -> list[_Found]:
    """What CUDA offers of one card: the card, or its slices where it is in MIG mode."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = text(ask(nvml, "nvmlDeviceGetName", handle)) or "NVIDIA GPU"
    in_mig_mode, _ = ask(nvml, "nvmlDeviceGetMigMode", handle) or (0, 0)
    if in_mig_mode:
        # The card itself is not offered, and whoever was given one slice may not be told the card's memory.
        memory = attempt(_card_memory, nvml, handle, name)[0] or _Memory(total_bytes=0, driver_bytes=0, free_bytes=None)
        card = _read_card(nvml, handle, index, name, driver, memory)
        return [_Found(gpu=gpu, card_uuid=card.uuid) for gpu in _read_slices(nvml, handle, card)]
    card = _read_card(nvml, handle, index, name, driver, _card_memory(nvml, handle, name))
    return [_Found(gpu=card, card_uuid=card.uuid)]


def _visible(found: Sequence[_Found], visible: str | None) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, and sentences about the rest.

    An entry is an index, or the first characters of the UUID of a card (all its slices) or of a slice. The first entry
    that names nothing ends the list: CUDA programming guide, "CUDA environment variables".
    """
    if visible is None:
        return tuple(one.gpu for one in found), ()
    entries = [entry.strip() for entry in visible.split(",")]
    kept: list[int] = []
    for entry in entries:
        named = [place for place, one in enumerate(found) if _is_named(entry, one)]
        if not named:
            break
        kept += [place for place in named if place not in kept]
    gpus = tuple(found[place].gpu for place in kept)
    rest = [f"GPU {one.gpu.index} ({one.gpu.name})" for place, one in enumerate(found) if place not in kept]
    if not rest:
        return gpus, ()
    sentences = [f"CUDA_VISIBLE_DEVICES={visible[:80] or '(empty)'} hides {', '.join(rest)}."]
    mixed = len({one.gpu.name for one in found}) > 1
    if mixed and any(entry.isdecimal() for entry in entries) and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        sentences.append(
            "CUDA may count unlike cards in another order than nvidia-smi: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, so that both mean the same card."
        )
    return gpus, tuple(sentences)


def _is_named(entry: str, one: _Found) -> bool:
    if entry.isdecimal():
        return str(one.gpu.index) == (entry.lstrip("0") or "0")
    uuids = [uuid.lower() for uuid in (one.gpu.uuid, one.card_uuid) if uuid]
    return entry.lower().startswith(("gpu-", "mig-")) and any(uuid.startswith(entry.lower()) for uuid in uuids)


def _read_card(nvml: Any, handle: Any, index: int, name: str, driver: str | None, memory: _Memory) -> Gpu:
    profile = match_gpu(name, None if memory.unified else memory.driver_bytes)
    capability = ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle) or (profile.capability if profile else None)
    display = _has_display(nvml, handle)
    notes = [*memory.notes]
    if display:
        notes.append("A display is attached: what it needs can grow during a run.")
    if capability is None:
        notes.append("Its compute capability is unknown.")
    return Gpu(
        index=index,
        uuid=text(ask(nvml, "nvmlDeviceGetUUID", handle)),
        name=name,
        backend="cuda",
        driver=driver,
        capability=capability,
        bfloat16=capability >= FIRST_WITH_BFLOAT16 if capability else None,
        total_bytes=memory.total_bytes,
        driver_bytes=memory.driver_bytes,
        free_bytes=memory.free_bytes,
        processes=_processes(nvml, handle),
        display_attached=display,
        unified=memory.unified,
        detected=True,
        notes=tuple(notes),
    ).with_profile(profile)


def _memory_info(nvml: Any, handle: Any) -> tuple[Any, int | None]:
    """NVML's figures, and what the driver keeps for itself: version 2 says, version 1 counts it as used."""
    info = ask(nvml, "nvmlDeviceGetMemoryInfo", handle, getattr(nvml, "nvmlMemory_v2", None))
    if info is None:
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
    return info, getattr(info, "reserved", None)


def _card_memory(nvml: Any, handle: Any, name: str) -> _Memory:
    """The card's memory; raises NVML's error where nothing tells it."""
    answer, error = attempt(_memory_info, nvml, handle)
    # GB10 and Jetson have no memory of their own: not supported, or (nvtop has seen it) a total of zero.
    without_figures = answer[0].total == 0 if answer else getattr(error, "value", None) == _NOT_SUPPORTED
    shared = _host_memory() if without_figures else None
    if shared is not None:
        return shared
    if answer is None or without_figures:
        return _profile_memory(nvml, name, error or ValueError("a total of zero"))
    info, reserved_bytes = answer
    if reserved_bytes is None:
        return _memory_without_reserve(info, name)
    total_bytes = info.total - reserved_bytes
    return _Memory(total_bytes=total_bytes, driver_bytes=info.total, free_bytes=min(info.free, total_bytes))


def _host_memory() -> _Memory | None:
    total_bytes, available_bytes = ram()
    if total_bytes is None:
        return None
    return _Memory(
        total_bytes=total_bytes,
        driver_bytes=total_bytes,
        free_bytes=available_bytes,
        unified=True,
        notes=("NVML reports no memory figures. Its memory is shared with the host, so host RAM is what counts.",),
    )


def _profile_memory(nvml: Any, name: str, error: Exception) -> _Memory:
    profile = match_gpu(name, None)
    if profile is None:
        raise error
    note = f"The driver does not tell its memory ({_said(nvml, error)}): that of any {profile.product} is assumed."
    return _Memory(
        total_bytes=profile.usable_bytes,
        driver_bytes=profile.driver_bytes,
        free_bytes=None,
        notes=(note,),
    )


def _memory_without_reserve(info: Any, name: str) -> _Memory:
    """From version 1's figures: what a process can have is the profile's, where there is one."""
    profile = match_gpu(name, info.total)
    total_bytes = min(info.total, profile.usable_bytes) if profile else info.total
    note = "This driver does not tell what it keeps for itself: some hundreds of MiB less may be there."
    return _Memory(
        total_bytes=total_bytes,
        driver_bytes=info.total,
        free_bytes=min(info.free, total_bytes),
        notes=() if total_bytes < info.total else (note,),
    )


def _has_display(nvml: Any, handle: Any) -> bool | None:
    """Whether a monitor is plugged in or a display server uses the card; None where neither is known."""
    answers = [ask(nvml, f"nvmlDeviceGetDisplay{what}", handle) for what in ("Mode", "Active")]
    return None if answers == [None, None] else any(answers)


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    """Compute and graphics processes, the largest first; one that is both is listed once."""
    held: dict[int, int | None] = {}
    for kind in ("Compute", "Graphics"):
        listed = ask(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3", handle)
        if listed is None:
            listed = ask(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v2", handle)
        for process in listed or ():
            amounts = [amount for amount in (held.get(process.pid), process.usedGpuMemory) if amount is not None]
            held[process.pid] = max(amounts, default=None)
    largest_first = sorted(held.items(), key=lambda item: (-(item[1] or 0), item[0]))
    return tuple(GpuProcess(pid=pid, name=_process_name(nvml, pid), used_bytes=used) for pid, used in largest_first)


def _process_name(nvml: Any, pid: int) -> str | None:
    """The program's file name and no more: a command line may hold secrets."""
    command = text(ask(nvml, "nvmlSystemGetProcessName", pid))
    if command is None:
        psutil, _ = attempt(import_module, "psutil")
        command = text(attempt(lambda: psutil.Process(pid).name())[0]) if psutil else None
    return re.split(r"[/\\]", command.split(" -")[0])[-1] or None if command else None


def _read_slices(nvml: Any, handle: Any, card: Gpu) -> Iterator[Gpu]:
    """The slices of a card in MIG mode: CUDA offers them, and not the card."""
    slots = ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    for slot in range(slots):
        part = ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, slot)
        attributes = ask(nvml, "nvmlDeviceGetAttributes", part) if part is not None else None
        memory = _slice_memory(nvml, part, attributes) if part is not None else None
        if memory is None:
            continue
        name = text(ask(nvml, "nvmlDeviceGetName", part)) or card.name
        label = name.partition(" MIG ")[2] or f"in slot {slot}"
        gpu = replace(
            card,
            uuid=text(ask(nvml, "nvmlDeviceGetUUID", part)),
            name=name,
            total_bytes=memory.total_bytes,
            driver_bytes=memory.driver_bytes,
            free_bytes=memory.free_bytes,
            processes=_processes(nvml, part),
            mig=True,
            unified=False,
            notes=(f"It is MIG slice {label} of GPU {card.index} ({card.name}).", *memory.notes),
        )
        share = attributes.computeInstanceSliceCount / slots if attributes else None
        yield gpu.with_profile(_slice_profile(card, memory, share))


def _slice_memory(nvml: Any, part: Any, attributes: Any) -> _Memory | None:
    answer, _ = attempt(_memory_info, nvml, part)
    if answer is not None and answer[0].total:
        info, reserved_bytes = answer
        total_bytes = info.total - (reserved_bytes or 0)
        return _Memory(total_bytes=total_bytes, driver_bytes=info.total, free_bytes=min(info.free, total_bytes))
    if attributes is None:
        return None
    size_bytes = int(attributes.memorySizeMB) * MIB
    note = "The driver does not tell how much of it is free."
    return _Memory(total_bytes=size_bytes, driver_bytes=size_bytes, free_bytes=None, notes=(note,))


def _slice_profile(card: Gpu, memory: _Memory, compute_share: float | None) -> GpuProfile | None:
    """The card's profile with the slice's share of its rates.

    Compute goes by slices (1g is one of seven on an A100), bandwidth by memory.
    Source: NVIDIA MIG user guide, "Supported MIG profiles".
    """
    profile = card.profile
    if profile is None or compute_share is None:
        return None
    return replace(
        profile,
        driver_bytes=memory.driver_bytes,
        usable_bytes=memory.total_bytes,
        dense_16bit_flops=profile.dense_16bit_flops * min(1.0, compute_share),
        bandwidth_bytes_per_s=profile.bandwidth_bytes_per_s * min(1.0, memory.driver_bytes / card.driver_bytes),
        context_provenance="assumed",
        sources={**profile.sources, "slice": "the card's rates, by the slice's share of compute slices and memory"},
    )
