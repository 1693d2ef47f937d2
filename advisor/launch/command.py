"""What is started: accelerate's configuration, the command line, and the environment of the training process."""

from __future__ import annotations

import json
import os
import shlex
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass

from advisor.hardware import Gpu
from advisor.plan import Plan
from advisor.training.job import Job

CONFIG_FILE = "accelerate.yaml"
JOB_FILE = "job.json"
MODULE = "advisor.training.run"

_MIXED_PRECISION = {"none": "no", "bfloat16": "bf16", "float16": "fp16"}
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
_TYPED = (*_VISIBLE.values(), "PYTHONSAFEPATH", "PYTHONPATH", "OMP_NUM_THREADS")
_TORCH_DEVICES = {"rocm": "cuda"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line and what its environment has beside this process's own."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def text(self) -> str:
        """As it is typed: the device that it sees, the packages that it finds and its threads are part of it.

        The rest of the environment the training process sets for itself, or does as well without.
        """
        shown = {
            name: value for name, value in self.environment.items() if name in _TYPED and os.environ.get(name) != value
        }
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in shown.items()), shlex.join(self.words)])


def torch_device(gpu: Gpu) -> str:
    """What torch calls the device in the training process, which sees only that one."""
    return _TORCH_DEVICES.get(gpu.backend, gpu.backend)


def training_command(job: Job, gpu: Gpu) -> Command:
    """The `accelerate launch` of a job whose folder holds its files."""
    words = (
        *_accelerate(),
        "launch",
        "--config_file",
        os.path.join(job.out, CONFIG_FILE),
        "-m",
        MODULE,
        os.path.join(job.out, JOB_FILE),
    )
    return Command(words=words, environment=training_environment(gpu))


def accelerate_config(plan: Plan, gpu: Gpu) -> str:
    """accelerate's configuration file: one process on one device, in the plan's mixed precision."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "NO",
        "downcast_bf16": "no",
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": _MIXED_PRECISION[plan.autocast],
        "num_machines": 1,
        "num_processes": 1,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": gpu.backend == "cpu",
    }
    # JSON's strings, numbers and booleans are YAML's too.
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())


def _accelerate() -> tuple[str, ...]:
    """accelerate's own command beside this Python; the module where there is none."""
    script = os.path.join(sysconfig.get_path("scripts"), "accelerate")
    if os.access(script, os.X_OK) and os.path.isfile(script):
        return (script,)
    return sys.executable, "-m", "accelerate.commands.accelerate_cli"


def training_environment(gpu: Gpu) -> dict[str, str]:
    """What the training process has beside this one's variables; a dry run has the same."""
    added = {
        # Reserved memory is predicted for expandable segments.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # A data folder or a file of the user's in the current folder must not stand in for a library of the same name.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": _python_path(),
        **_visible_device(gpu),
    }
    if gpu.backend != "cuda" or sys.platform == "win32":
        del added["PYTORCH_ALLOC_CONF"]
    if gpu.backend == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(_cores())
    return {name: value for name, value in added.items() if value}


def _visible_device(gpu: Gpu) -> dict[str, str]:
    """The training sees the one device that was judged: by its UUID, which no order of counting changes."""
    name = _VISIBLE.get(gpu.backend)
    if name is None or not gpu.detected or gpu.index is None:
        return {}
    already = [entry.strip() for entry in os.environ.get(name, "").split(",") if entry.strip()]
    if gpu.uuid:
        return {name: gpu.uuid}
    # torch counted within what is visible, so the number means an entry of that list.
    return {name: already[gpu.index] if gpu.index < len(already) else str(gpu.index)}


def _python_path() -> str:
    """Where this package is, for a checkout that nobody installed."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    installed = {os.path.realpath(path) for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))}
    already = os.environ.get("PYTHONPATH", "")
    if os.path.realpath(here) in installed or here in already.split(os.pathsep):
        return already
    return os.pathsep.join(filter(None, (here, already)))


def _cores() -> int:
    """Processor cores that this process may use; hardware threads of one core do not add up."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


__all__ = [
    "CONFIG_FILE",
    "JOB_FILE",
    "Command",
    "accelerate_config",
    "torch_device",
    "training_command",
    "training_environment",
]
