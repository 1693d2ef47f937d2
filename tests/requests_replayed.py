"""Requests, written down by hand, through the caching allocator."""

from __future__ import annotations

from collections.abc import Iterable

from advisor.memory.allocator import Block, CachingAllocator, Replay

Request = tuple[int, int, bool]
"""A key, a size in bytes, and whether it is freed."""

EMPTY_CACHE: Request = (0, 0, True)
"""torch.cuda.empty_cache()."""


def replay(requests: Iterable[Request], *, total_bytes: int | None = None, expandable: bool = False) -> Replay:
    """Run requests through the allocator until the end or until the GPU is full."""
    allocator = CachingAllocator(total_bytes=total_bytes, expandable=expandable)
    blocks: dict[int, Block] = {}
    failed = None
    for request in requests:
        key, size, freed = request
        if request is EMPTY_CACHE:
            allocator.release_cached()
            continue
        if freed:
            allocator.free(blocks.pop(key))
            continue
        block = allocator.allocate(size)
        if block is None:
            failed = size
            break
        blocks[key] = block
    return Replay(
        allocated_bytes=allocator.peak_allocated_bytes,
        reserved_bytes=allocator.peak_reserved_bytes,
        released_bytes=allocator.released_bytes,
        failed_request_bytes=failed,
    )
