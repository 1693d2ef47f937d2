"""A look at the device from a process of its own: does torch see it, does bitsandbytes compute on it.

`python -m advisor.launch.device_check DEVICE` prints one JSON object. torch takes seconds to import
and a CUDA context some hundred MiB, so neither is done in the process that supervises the training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

TIMEOUT_SECONDS = 180
_MODULE = "advisor.launch.device_check"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCheck:
    """What the device answered; None where it was not asked or all is well."""

    torch_error: str | None = None
    bitsandbytes_error: str | None = None
    cuda: str | None = None
    """The CUDA version that torch was built for."""

    device_name: str | None = None


def check_device(device: str, environment: Mapping[str, str]) -> DeviceCheck:
    """Asks the device in a process of its own.

    Args:
        device: what torch calls it.
        environment: what the training's process will have beside this one's.
    """
    try:
        done = subprocess.run(
            (sys.executable, "-m", _MODULE, device),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return DeviceCheck(torch_error=f"no answer within {TIMEOUT_SECONDS} s")
    for line in reversed(done.stdout.splitlines()):
        try:
            return DeviceCheck(**json.loads(line))
        except (ValueError, TypeError):
            continue
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return DeviceCheck(torch_error=said[-1][:300] if said else f"the check ended with code {done.returncode}")


def main(device: str) -> DeviceCheck:
    """Runs in the process of its own."""
    try:
        import torch

        cuda = torch.version.cuda
        probe = torch.ones(64, 64, device=device, dtype=torch.float16)
        float((probe @ probe).sum())
        name = torch.cuda.get_device_name(device) if probe.is_cuda else None
    except Exception as error:  # noqa: BLE001 - whatever it is, the device cannot be used
        return DeviceCheck(torch_error=_said(error))
    found = DeviceCheck(cuda=cuda, device_name=name)
    try:
        _quantize(device)
        _step(device)
    except Exception as error:  # noqa: BLE001 - likewise for bitsandbytes
        return DeviceCheck(cuda=cuda, device_name=name, bitsandbytes_error=_said(error))
    return found


def _quantize(device: str) -> None:
    """A 4-bit product, forward and backward."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float16, quant_type="nf4").to(device)
    inputs = torch.ones(2, 64, device=device, dtype=torch.float16, requires_grad=True)
    layer(inputs).float().sum().backward()


def _step(device: str) -> None:
    """One step of an 8-bit optimizer, large enough for its 8-bit states."""
    import torch
    from bitsandbytes.optim.adamw import AdamW8bit

    weight = torch.nn.Parameter(torch.ones(128, 64, device=device))
    weight.grad = torch.ones_like(weight)
    AdamW8bit([weight]).step()


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"


if __name__ == "__main__":
    from dataclasses import asdict

    sys.stdout.write(json.dumps(asdict(main(sys.argv[1]))) + "\n")


__all__ = ["DeviceCheck", "check_device"]
