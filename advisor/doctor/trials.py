"""Three small computations on a device, each compared with what has to come out; one JSON object a line.

Run in a process apart: `python -m advisor.doctor.trials [device]`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from advisor.doctor.check import Check, Verdict
from advisor.hardware.query import ask, attempt

MATMUL_SECONDS = 1.0
SLOW_SHARE = 0.2
"""Of the profile's rate. A busy or throttled card falls below; a healthy one reaches well above half."""

_SIZE = {"cpu": 512}
_LARGE = 4096
_BITSANDBYTES = "Install the bitsandbytes that fits this torch: pip install -U bitsandbytes."


def main(arguments: list[str]) -> None:
    """Tries each computation and says how it went."""
    device = torch.device(arguments[0] if arguments else default_device())
    _tell(cuda_of_torch())
    for name, trial in _TRIALS.items():
        try:
            check = trial(device)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is what is asked about
            check = Check(
                name=f"{name} on {device}",
                verdict="bad",
                found=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
                remedy=_REMEDIES[name],
            )
        _tell(check)


def _tell(check: Check) -> None:
    sys.stdout.write(json.dumps(asdict(check)) + "\n")
    sys.stdout.flush()


def cuda_of_torch() -> Check:
    """The CUDA that torch was built with, and the newest that the driver runs."""
    if torch.version.hip is not None:
        return Check(name="ROCm", verdict="good", found=torch.version.hip)
    built = torch.version.cuda
    if built is None:
        return Check(name="CUDA", verdict="absent", found="none: this torch is built without it")
    newest = driver_cuda()
    if newest is None:
        return Check(name="CUDA", verdict="good", found=f"torch is built with {built}")
    found = f"torch is built with {built}, the driver runs up to {newest[0]}.{newest[1]}"
    # Minor versions of one major run on each other's drivers (NVIDIA, CUDA Compatibility).
    if int(built.partition(".")[0]) > newest[0]:
        return Check(name="CUDA", verdict="bad", found=found, remedy="Update the driver, or install an older torch.")
    return Check(name="CUDA", verdict="good", found=found)


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver runs; None where NVML does not say."""
    nvml = attempt(import_module, "pynvml")[0]
    if nvml is None or attempt(nvml.nvmlInit)[1] is not None:
        return None
    version = ask(nvml, "nvmlSystemGetCudaDriverVersion")
    ask(nvml, "nvmlShutdown")
    return (version // 1000, version % 1000 // 10) if isinstance(version, int) else None


def default_device() -> str:
    """The accelerator that torch sees, else the CPU."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        return str(accelerator) if accelerator is not None else "cpu"
    return "cpu"


def compute_dtype(device: torch.device) -> torch.dtype:
    """What training computes in there: fp16 where bfloat16 is only emulated."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def try_matmul(device: torch.device) -> Check:
    """16-bit products for a second: right, and at what rate."""
    dtype, size = compute_dtype(device), _SIZE.get(device.type, _LARGE)
    left = torch.randn(size, size, device=device, dtype=dtype) / size**0.5
    right = torch.randn(size, size, device=device, dtype=dtype)
    product = left @ right
    rows = slice(0, 16)
    wanted = left[rows].float() @ right.float()
    error = (product[rows].float() - wanted).abs().max().item()
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MATMUL_SECONDS:
        for _ in range(4):
            left @ right
        _wait(device)
        done += 4
    rate = 2 * size**3 * done / elapsed
    found = f"{_spelled(dtype)}, {rate / 1e12:,.2f} TFLOP/s"
    peak = _peak_rate(device)
    if error > 0.1:
        return _said("matmul", device, "bad", f"{found}; off by {error:.2g}", "It computes wrongly: do not train.")
    if peak and rate < SLOW_SHARE * peak:
        found += f", {rate / peak:.0%} of the card's {peak / 1e12:,.0f}"
        return _said("matmul", device, "doubtful", found, "Someone else uses the card, or it is throttled: nvidia-smi.")
    return _said("matmul", device, "good", found, _cpu_build(device))


def try_4bit_matmul(device: torch.device) -> Check:
    """bitsandbytes' NF4 product against the product with its own dequantised weight."""
    if find_spec("bitsandbytes") is None:
        return _said("4-bit matmul", device, "absent", "not tried: bitsandbytes is not installed")
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    dtype = compute_dtype(device)
    linear: Any = Linear4bit(256, 512, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    states = torch.randn(64, 256, device=device, dtype=dtype)
    product = linear(states)
    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)
    wanted = states.float() @ weight.float().t()
    error = ((product.float() - wanted).abs().max() / wanted.abs().max()).item()
    found = f"bitsandbytes {bitsandbytes.__version__}, off by {error:.1%}"
    if error > 0.05:
        return _said("4-bit matmul", device, "bad", found, _BITSANDBYTES)
    return _said("4-bit matmul", device, "good", found)


def try_attention(device: torch.device) -> Check:
    """Causal attention, forward and backward, as SDPA picks it, against the formula."""
    dtype = compute_dtype(device)
    query, key, value = (torch.randn(1, 4, 256, 96, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    chosen = _backend(query, key, value)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    output.sum().backward()
    scores = query.float() @ key.float().transpose(-1, -2) / 96**0.5
    scores = scores.masked_fill(torch.ones(256, 256, device=device).triu(1).bool(), float("-inf"))
    error = (output.float() - scores.softmax(-1) @ value.float()).abs().max().item()
    found = f"{chosen}, off by {error:.2g}"
    if error > 0.1:
        return _said("attention", device, "bad", found, _REMEDIES["attention"])
    if device.type == "cuda" and chosen == "math":
        return _said("attention", device, "doubtful", found, "Only the slow kernel runs: it holds all scores at once.")
    return _said("attention", device, "good", found)


def _backend(*tensors: torch.Tensor) -> str:
    """Which kernel SDPA takes, by torch's own name."""
    choose: Any = torch._fused_sdp_choice
    choice = choose(*tensors, is_causal=True)
    names = {backend.value: name for name, backend in SDPBackend.__members__.items()}
    return names.get(choice, "math").removesuffix("_ATTENTION").lower()


def _peak_rate(device: torch.device) -> float | None:
    """The profile's dense 16-bit rate of this GPU."""
    if device.type != "cuda":
        return None
    from advisor.profiles import match_gpu

    profile = match_gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)
    return profile.dense_16bit_flops if profile else None


def _cpu_build(device: torch.device) -> str:
    """Why the CPU computes although a GPU may be there."""
    if device.type != "cpu":
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return "This torch is a CPU build; with a GPU here, install one that has CUDA (pytorch.org)."
    return ""


def _said(name: str, device: torch.device, verdict: Verdict, found: str, remedy: str = "") -> Check:
    return Check(name=f"{name} on {device}", verdict=verdict, found=found, remedy=remedy)


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


_TRIALS: dict[str, Callable[[torch.device], Check]] = {
    "matmul": try_matmul,
    "4-bit matmul": try_4bit_matmul,
    "attention": try_attention,
}
_REMEDIES = {
    "matmul": "torch cannot compute there: its CUDA build may be newer than the driver. Update the driver.",
    "4-bit matmul": _BITSANDBYTES,
    "attention": 'Update torch, or write attention = "eager" in the plan.',
}

if __name__ == "__main__":
    main(sys.argv[1:])
