"""How much host RAM a run takes while weights go to a GPU and come back, computed from its plan.

What transformers does with a safetensors model, read in 5.15 and 5.23 (modeling_utils.py, `_load_pretrained_model`;
core_model_loading.py, `convert_and_load_state_dict_in_model`): every weight file is mapped before the first tensor is
read, and all stay mapped until the last one is. A tensor is a view of its file's pages; a few threads, or one where
weights are quantised on the way, copy tensor after tensor to the device. A copy that changes the dtype converts the
tensor in host RAM first (torch, aten/src/ATen/native/cuda/Copy.cu, `copy_kernel_cuda`, blocking).

While a model is saved, the tensors of one file are in host RAM as well: transformers hands file after file to
safetensors, and that copies all tensors of a file from the device before it writes the first byte (safetensors 0.8,
torch.py, `_flatten_as_ptr`; transformers 5.23, modeling_utils.py, `save_pretrained`). Files are kept small for that. An
adapter is one file; the optimizer's states go one by one (torch/serialization.py, `_save`). A model trained in fp32
under autocast leaves a 16-bit copy, and that is made as a whole.

So what has to be there is the process and a few converted tensors, however large the model is. The files' pages are
resident too while there is room, and count in the process's resident size; nobody wrote to them, and the system takes
them back when it needs them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from advisor.architecture import Architecture
from advisor.hardware import Gpu
from advisor.launch.model import ModelFiles
from advisor.memory.resident import trained_elements, trained_itemsize
from advisor.plan import ITEMSIZE, Plan
from advisor.training.tensor_files import SHARD_BYTES
from advisor.units import GIB

PROCESS_BYTES = 3 * GIB
"""The training process itself, with CUDA started: Python, torch's CUDA libraries, pinned buffers; assumed. On a CPU
the whole run of a small model was resident with 1.2 GiB (torch 2.11's CUDA build, transformers 5.15)."""

MOST_THREADS = 4
"""Threads that transformers loads with, or as many as there are processors (core_model_loading.py, GLOBAL_WORKERS)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RamNeed:
    """Host RAM of a run on a GPU."""

    process_bytes: int
    staging_bytes: int
    """Tensors that are converted to the plan's dtype on their way to the device, at one time."""

    mapped_bytes: int
    """The weight files: resident while there is room, and given back where there is none."""

    spilled_bytes: int
    """Paged optimizer states, after loading."""

    saved_bytes: int
    """What is trained, on its way from the GPU into a file: as much of it as is here at one time."""

    @property
    def required_bytes(self) -> int:
        """What has to be there."""
        return self.process_bytes + max(self.staging_bytes, self.spilled_bytes + self.saved_bytes)

    @property
    def resident_bytes(self) -> int:
        """The most that the process can be seen to hold, the files' pages included."""
        return self.process_bytes + max(self.staging_bytes + self.mapped_bytes, self.spilled_bytes + self.saved_bytes)


def ram_need(
    plan: Plan,
    arch: Architecture | None,
    files: ModelFiles | None,
    gpu: Gpu,
    *,
    spilled_bytes: int = 0,
    cpu_count: int | None = None,
) -> RamNeed | None:
    """Process + the larger of: threads × the largest tensor in the plan's dtype; paged states + what is saved.

    None on the processor, whose plan's memory is host RAM already.
    """
    if gpu.backend == "cpu":
        return None
    threads = 1 if plan.quantization is not None else min(MOST_THREADS, cpu_count or MOST_THREADS)
    largest_file = (files.largest_file_bytes if files is not None else None) or 0
    largest = largest_tensor(arch) * ITEMSIZE[plan.dtype] * threads if arch is not None else largest_file
    mapped = (files.weight_bytes if files is not None else None) or 0
    if sys.platform == "win32":
        # Windows sets memory aside for whatever it maps so (transformers 5.23, modeling_utils.py, on its backends).
        largest, mapped = largest + mapped, 0
    saved = saved_at_once(plan, arch) if arch is not None else 0
    return RamNeed(
        process_bytes=PROCESS_BYTES,
        staging_bytes=largest,
        mapped_bytes=mapped,
        spilled_bytes=spilled_bytes,
        saved_bytes=saved,
    )


def saved_at_once(plan: Plan, arch: Architecture) -> int:
    """An adapter; of a model the larger of: a file, or a tensor that is larger; its copy in another dtype and a tensor.

    A copy from the GPU that changes the dtype makes the tensor on the host first, as it was.
    """
    elements, itemsize = trained_elements(plan, arch), trained_itemsize(plan)
    if plan.method != "full":
        return elements * itemsize
    largest = largest_tensor(arch) * itemsize
    file = min(elements * itemsize, max(SHARD_BYTES, largest))
    return file if plan.saved_dtype == plan.dtype else max(file, elements * ITEMSIZE[plan.saved_dtype] + largest)


def largest_tensor(arch: Architecture) -> int:
    """Elements of the largest weight; of a layer's experts together, which may be merged while they load."""
    return max(*arch.outer_modules.values(), *arch.layer_modules.values())


__all__ = ["RamNeed", "largest_tensor", "ram_need", "saved_at_once"]
