"""A trace's events, one by one, through the caching allocator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from advisor.memory.trace.result import LOADING, WARM_UP
from advisor.units import GIB

if TYPE_CHECKING:
    from advisor.memory.allocator import Block, CachingAllocator
    from advisor.memory.trace import Allocation, Event

_LEFT_BY_WARM_UP = int(1.2 * GIB)
"""Of the GPU. Source: transformers modeling_utils.py (caching_allocator_warmup)."""


def walk(
    events: Iterable[Event], allocator: CachingAllocator, *, empties_cache: bool
) -> Iterator[tuple[Event, Block | None]]:
    """Each event with its block, once the allocator has taken it; None, and the end, when the GPU is full.

    Args:
        events: of a trace, from its start.
        allocator: a fresh one.
        empties_cache: whether torch.cuda.empty_cache() is called between loading and training.
    """
    blocks: dict[int, Block] = {}
    loading = True
    for event in events:
        if loading and event.moment != LOADING:
            loading = False
            if empties_cache:
                allocator.release_cached()
        key = id(event.allocation)
        if event.freed:
            block = blocks.pop(key)
            allocator.free(block)
            yield event, block
            continue
        made = allocator.allocate(_requested_bytes(event.allocation, allocator.total_bytes))
        yield event, made
        if made is None:
            return
        blocks[key] = made


def _requested_bytes(allocation: Allocation, total_bytes: int | None) -> int:
    """What is asked for; a warm-up leaves some of the GPU."""
    if allocation.operation != WARM_UP or total_bytes is None:
        return allocation.nbytes
    return max(0, min(allocation.nbytes, total_bytes - _LEFT_BY_WARM_UP))
