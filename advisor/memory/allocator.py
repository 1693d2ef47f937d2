"""PyTorch's CUDA caching allocator, replayed: from requests to reserved memory.

Rules, from c10/cuda/CUDACachingAllocator.cpp (round_size, get_allocation_size, get_free_block, should_split,
try_merge_blocks, release_cached_blocks, ExpandableSegment):

- A request is rounded up to 512 bytes. At most 1 MiB comes from 2 MiB segments, less than 10 MiB from 20 MiB
  segments, more gets a segment of its own, rounded up to 2 MiB.
- It takes the smallest free block that holds it, the lowest address among equals. What is left becomes a
  block if it has at least 512 bytes (small pool) or more than 1 MiB (large pool).
- Freed neighbours merge. When the GPU is full, segments that are wholly free are released, and the request is
  tried once more before it fails.
- With expandable_segments each pool is one segment that grows at its end by pages of 2 MiB (small) or 20 MiB
  (large) and is split down to 512 bytes; the block at its end is taken last.
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

_FAR_APART = 2**44
"""Between segments, so that none can be taken for another's neighbour."""

Request = tuple[int, int, bool]
"""A key, a size in bytes, and whether it is freed."""

EMPTY_CACHE: Request = (0, 0, True)
"""torch.cuda.empty_cache()."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the allocator held."""

    allocated_bytes: int
    """Peak of the blocks in use, as torch.cuda.max_memory_allocated counts them."""

    reserved_bytes: int
    """Peak of the segments, as torch.cuda.max_memory_reserved counts them."""

    released_bytes: int
    """Cached memory given back because the GPU was full."""

    failed_request_bytes: int | None
    """The request that no release could satisfy: out of memory."""


@dataclass(slots=True, eq=False)
class _Segment:
    """Memory that CUDA gave out in one piece, or an expandable one's mapped part."""

    small: bool
    expandable: bool = False
    last: Block | None = None


@dataclass(slots=True, eq=False)
class Block:
    """A part of a segment, in use or free."""

    segment: _Segment
    address: int
    size: int
    free: bool = False
    before: Block | None = None
    after: Block | None = None


def _order(block: Block) -> tuple[int, int]:
    return block.size, block.address


@dataclass(slots=True)
class _Pool:
    """Free blocks, smallest first, then lowest address."""

    blocks: list[Block] = field(default_factory=list)

    def add(self, block: Block) -> None:
        insort(self.blocks, block, key=_order)

    def remove(self, block: Block) -> None:
        del self.blocks[bisect_left(self.blocks, _order(block), key=_order)]

    def take(self, size: int) -> Block | None:
        """The best fit; an expandable segment's end counts as large as it could grow."""
        index = bisect_left(self.blocks, (size, -1), key=_order)
        if index == len(self.blocks):
            return None
        block = self.blocks[index]
        at_end = block.segment.expandable and block.segment.last is block and block.before is not None
        if at_end and index + 1 < len(self.blocks):
            index += 1
        return self.blocks.pop(index)


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
        self.released_bytes = 0
        self._total = total_bytes
        self._expandable = expandable
        self._pools = {True: _Pool(), False: _Pool()}
        self._growing: dict[bool, _Segment] = {}
        self._next_address = 0

    def allocate(self, size_bytes: int) -> Block | None:
        """A block for the request, or None when the GPU is full."""
        size = rounded(size_bytes)
        small = size <= SMALL_REQUEST
        block = self._pools[small].take(size) or self._extend(size, small)
        if block is None and self.release_cached():
            block = self._extend(size, small)
        if block is None:
            return None
        self._split(block, size)
        block.free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Give a block back; it merges with free neighbours and stays reserved."""
        self.allocated_bytes -= block.size
        pool = self._pools[block.segment.small]
        for other in (block.before, block.after):
            if other is not None and other.free:
                pool.remove(other)
                _absorb(block, other)
        block.free = True
        pool.add(block)

    def release_cached(self) -> bool:
        """Give whole free segments back, as torch.cuda.empty_cache does; whether there were any."""
        before = self.reserved_bytes
        for pool in self._pools.values():
            for block in list(pool.blocks):
                if block.segment.expandable:
                    self._unmap(block, pool)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size
        self.released_bytes += before - self.reserved_bytes
        return self.reserved_bytes < before

    def _extend(self, size: int, small: bool) -> Block | None:
        return self._grow(size, small) if self._expandable else self._reserve(segment_bytes(size), small)

    def _reserve(self, size: int, small: bool) -> Block | None:
        """A new segment that is one block."""
        return self._append(_Segment(small), size)

    def _grow(self, size: int, small: bool) -> Block | None:
        """Map pages at the end of the pool's one segment."""
        segment = self._growing.setdefault(small, _Segment(small, expandable=True))
        last = segment.last
        page = SMALL_SEGMENT if small else MEDIUM_SEGMENT
        if last is None or not last.free:
            return self._append(segment, _round_up(size, page))
        added = _round_up(size - last.size, page)
        if not self._take_from_gpu(added):
            return None
        self._pools[small].remove(last)
        last.size += added
        return last

    def _append(self, segment: _Segment, size: int) -> Block | None:
        """A block of new memory at the end of a segment."""
        if not self._take_from_gpu(size):
            return None
        last = segment.last
        if last is None:
            self._next_address += _FAR_APART
            block = Block(segment, self._next_address, size)
        else:
            block = Block(segment, last.address + last.size, size, before=last)
            last.after = block
        segment.last = block
        return block

    def _take_from_gpu(self, size: int) -> bool:
        if self._total is not None and self.reserved_bytes + size > self._total:
            return False
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _unmap(self, block: Block, pool: _Pool) -> None:
        """Give back the pages at the end of an expandable segment.

        Pages in its middle can be unmapped too; they would be mapped again where they were.
        """
        segment = block.segment
        if segment.last is not block:
            return
        page = SMALL_SEGMENT if segment.small else MEDIUM_SEGMENT
        kept = -block.address % page if block.before is not None else 0
        given_back = block.size - kept
        if given_back <= 0:
            return
        pool.remove(block)
        self.reserved_bytes -= given_back
        if kept:
            block.size = kept
            pool.add(block)
            return
        segment.last = block.before
        if block.before is not None:
            block.before.after = None

    def _split(self, block: Block, size: int) -> None:
        remaining = block.size - size
        small = block.segment.small
        fine = small or block.segment.expandable
        if not (remaining >= MINIMUM_BLOCK if fine else remaining > SMALL_REQUEST):
            return
        rest = Block(block.segment, block.address + size, remaining, True, block, block.after)
        if block.after is not None:
            block.after.before = rest
        else:
            block.segment.last = rest
        block.after = rest
        block.size = size
        self._pools[small].add(rest)


def _absorb(block: Block, other: Block) -> None:
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
        else:
            block.segment.last = block
    block.size += other.size


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def rounded(size_bytes: int) -> int:
    """What a request of this many bytes takes."""
    return max(MINIMUM_BLOCK, _round_up(size_bytes, MINIMUM_BLOCK))


def segment_bytes(size: int) -> int:
    """The segment that a request of `size` (already rounded) makes."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < LARGE_REQUEST:
        return MEDIUM_SEGMENT
    return _round_up(size, SEGMENT_UNIT)


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
