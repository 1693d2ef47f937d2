"""PyTorch's CUDA caching allocator, replayed: from requests to reserved memory.

Rules (c10/cuda/CUDACachingAllocator.cpp): requests are rounded up to 512 bytes; those of at most 1 MiB come
from 2 MiB segments, those below 10 MiB from 20 MiB segments, larger ones get a segment of their own rounded
up to 2 MiB. A request takes the smallest free block that holds it; what is left becomes a block if it has at
least 512 bytes (small pool) or more than 1 MiB (large pool). Freed neighbours merge. When the GPU is full,
cached segments are released and the request is tried again before it fails.
With expandable_segments each pool is one segment that grows by 2 MiB (small) or 20 MiB (large) pages.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from advisor.units import MIB

MINIMUM_BLOCK = 512
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
MEDIUM_SEGMENT = 20 * MIB
LARGE_REQUEST = 10 * MIB
SEGMENT_UNIT = 2 * MIB

Request = tuple[int, int, bool]
"""A key, a size in bytes, and whether it is freed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the allocator held."""

    allocated_bytes: int
    """Peak of the blocks in use, as torch.cuda.max_memory_allocated counts them."""

    reserved_bytes: int
    """Peak of the segments, as torch.cuda.max_memory_reserved counts them."""

    released_segments: int
    """Cached segments given back because the GPU was full."""

    failed_request_bytes: int | None
    """The request that no release could satisfy: out of memory."""


@dataclass(slots=True, eq=False)
class _Segment:
    size: int
    small: bool
    expandable: bool = False


@dataclass(slots=True, eq=False)
class _Block:
    segment: _Segment
    address: int
    size: int
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


@dataclass(slots=True)
class _Pool:
    """Free blocks, smallest first."""

    blocks: list[tuple[int, int, _Block]] = field(default_factory=list)

    def add(self, block: _Block) -> None:
        insort(self.blocks, (block.size, block.address, block), key=lambda entry: entry[:2])

    def remove(self, block: _Block) -> None:
        del self.blocks[bisect_left(self.blocks, (block.size, block.address), key=lambda entry: entry[:2])]

    def take(self, size: int) -> _Block | None:
        index = bisect_left(self.blocks, (size, -1), key=lambda entry: entry[:2])
        return self.blocks.pop(index)[2] if index < len(self.blocks) else None


class CachingAllocator:
    """The allocator of one stream of one GPU.

    Args:
        total_bytes: what segments may add up to; None is no limit.
        expandable: whether expandable_segments is on.
    """

    def __init__(self, *, total_bytes: int | None = None, expandable: bool = False) -> None:
        self.reserved_bytes = 0
        self.allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.released_segments = 0
        self._total = total_bytes
        self._expandable = expandable
        self._pools = {True: _Pool(), False: _Pool()}
        self._growing: dict[bool, _Block] = {}
        self._next_address = 0

    def allocate(self, size_bytes: int) -> _Block | None:
        """A block for the request, or None when the GPU is full."""
        size = max(MINIMUM_BLOCK, -(-size_bytes // MINIMUM_BLOCK) * MINIMUM_BLOCK)
        small = size <= SMALL_REQUEST
        block = self._pools[small].take(size)
        if block is None:
            block = self._grow(size, small) if self._expandable else self._reserve(size, small)
        if block is None:
            return None
        self._split(block, size)
        block.free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: _Block) -> None:
        """Give a block back; it merges with free neighbours and stays reserved."""
        self.allocated_bytes -= block.size
        pool = self._pools[block.segment.small]
        for other in (block.before, block.after):
            if other is not None and other.free:
                pool.remove(other)
                _absorb(block, other)
        block.free = True
        pool.add(block)

    def _split(self, block: _Block, size: int) -> None:
        remaining = block.size - size
        small = block.segment.small
        splits = remaining >= MINIMUM_BLOCK if small or block.segment.expandable else remaining > SMALL_REQUEST
        if not splits:
            return
        rest = _Block(block.segment, block.address + size, remaining, True, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.after = rest
        block.size = size
        self._pools[small].add(rest)

    def _reserve(self, size: int, small: bool) -> _Block | None:
        """A new segment, after releasing cached ones if the GPU is full."""
        wanted = segment_bytes(size)
        if not self._has_room(wanted) and not self._release(wanted):
            return None
        return self._new_segment(wanted, small, expandable=False)

    def _new_segment(self, size: int, small: bool, *, expandable: bool) -> _Block:
        block = _Block(_Segment(size, small, expandable), self._next_address, size)
        self._next_address += size + 2**40
        self._add_reserved(size)
        return block

    def _add_reserved(self, size: int) -> None:
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _has_room(self, size: int) -> bool:
        return self._total is None or self.reserved_bytes + size <= self._total

    def _release(self, size: int) -> bool:
        """Free whole cached segments: first one that is large enough, then all. True if there is room."""
        whole = [
            entry[2]
            for pool in self._pools.values()
            for entry in pool.blocks
            if entry[2].before is None and entry[2].after is None and not entry[2].segment.expandable
        ]
        for block in whole:
            self._pools[block.segment.small].remove(block)
            self.reserved_bytes -= block.size
            self.released_segments += 1
        return self._has_room(size)

    def _grow(self, size: int, small: bool) -> _Block | None:
        """Map pages at the end of the pool's one segment."""
        page = SMALL_SEGMENT if small else MEDIUM_SEGMENT
        last = self._growing.get(small)
        while last is not None and last.after is not None:
            last = last.after
        tail = last.size if last is not None and last.free else 0
        added = -(-(size - tail) // page) * page
        if not self._has_room(added):
            return None
        if last is None:
            block = self._new_segment(added, small, expandable=True)
            self._growing[small] = block
            return block
        self._add_reserved(added)
        if last.free:
            self._pools[small].remove(last)
            last.size += added
            return last
        block = _Block(last.segment, last.address + last.size, added, False, last, None)
        last.after = block
        self._growing[small] = block
        return block


def _absorb(block: _Block, other: _Block) -> None:
    """Merge a neighbour into a block that is being freed."""
    if other is block.before:
        block.address = other.address
        block.before = other.before
        if other.before is not None:
            other.before.after = block
    else:
        block.after = other.after
        if other.after is not None:
            other.after.before = block
    block.size += other.size


def segment_bytes(size: int) -> int:
    """The segment that a request of `size` (already rounded) makes."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < LARGE_REQUEST:
        return MEDIUM_SEGMENT
    return -(-size // SEGMENT_UNIT) * SEGMENT_UNIT


def replay(requests: Iterable[Request], *, total_bytes: int | None = None, expandable: bool = False) -> Replay:
    """Run requests through the allocator until the end or until the GPU is full."""
    allocator = CachingAllocator(total_bytes=total_bytes, expandable=expandable)
    blocks: dict[int, _Block] = {}
    failed = None
    for key, size, freed in requests:
        if freed:
            block = blocks.pop(key, None)
            if block is not None:
                allocator.free(block)
            continue
        block = allocator.allocate(size)
        if block is None:
            failed = size
            break
        blocks[key] = block
    return Replay(
        allocated_bytes=allocator.peak_allocated_bytes,
        reserved_bytes=allocator.peak_reserved_bytes,
        released_segments=allocator.released_segments,
        failed_request_bytes=failed,
    )
