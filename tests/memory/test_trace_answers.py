"""What a traced program hears about values that are not there, against what it finds on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from real_execution import highest, profiled

from advisor.memory.kernels import Cpu
from advisor.memory.trace.tracker import Tracker


def take_and_put(device: str) -> None:
    rows, mask = torch.ones(64, 32, 48, device=device), torch.ones(64, 32, dtype=torch.bool, device=device)
    rows[mask] = rows[mask] * 2.0


def fill(device: str) -> None:
    rows, mask = torch.ones(64, 32, 48, device=device), torch.ones(64, 32, dtype=torch.bool, device=device)
    rows[mask] = 0.0


@pytest.mark.parametrize("program", [take_and_put, fill])
def test_a_mask_takes_as_much_as_it_can(program: Callable[[str], None]) -> None:
    tracker = Tracker(Cpu())
    with tracker:
        program("meta")
    traced = highest(-e.allocation.nbytes if e.freed else e.allocation.nbytes for e in tracker.events)
    assert traced == pytest.approx(profiled(lambda: program("cpu")), rel=0.001)


def test_a_masked_selection_is_as_large_as_its_operands_spread_out() -> None:
    with Tracker(Cpu()):
        rows, mask = torch.ones(64, 1, 48, device="meta"), torch.ones(64, 32, 1, dtype=torch.bool, device="meta")
        assert torch.masked_select(rows, mask).shape == (64 * 32 * 48,)
