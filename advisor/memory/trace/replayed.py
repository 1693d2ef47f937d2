"""A trace's events, one by one, through the caching allocator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.memory.allocator import Block, CachingAllocator
    from advisor.memory.trace import Event


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
        if loading and event.moment != "loading":
            loading = False
            if empties_cache:
                allocator.release_cached()
        key = id(event.allocation)
        if event.freed:
            block = blocks.pop(key)
            allocator.free(block)
            yield event, block
            continue
        made = allocator.allocate(event.allocation.nbytes)
        yield event, made
        if made is None:
            return
        blocks[key] = made
