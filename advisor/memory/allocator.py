"""PyTorch's CUDA caching allocator, replayed: from requests to reserved memory.

Rules, from c10/cuda/CUDACachingAllocator.cpp (round_size, get_allocation_size, get_free_block, should_split,
try_merge_blocks, release_cached_blocks; find_expandable_block, map_block, unmap_block, ExpandableSegment):

- A request is rounded up to 512 bytes. At most 1 MiB comes from 2 MiB segments, less than 10 MiB from 20 MiB
  segments, more gets a segment of its own, rounded up to 2 MiB.
- It takes the smallest free block that holds it, the lowest address among equals. What is left becomes a
  block if it has at least 512 bytes (small pool) or more than 1 MiB (large pool).
- Freed neighbours merge. When the GPU is full, segments that are wholly free are released, and the request is
  tried once more before it fails.
- With expandable_segments each pool is one range of addresses, mapped by pages of 2 MiB (small) or 20 MiB (large)
  and split down to 512 bytes. A request that no free block holds takes the lowest addresses that are free or
  unmapped and maps what is missing; a free block next to unmapped addresses counts as large as it could grow.
  When the GPU is full, every page that lies wholly inside a free block is unmapped.
"""

from __future__ import annotations

from bisect import bisect_left, insort
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

_ADDRESSES = 2**43 // MEDIUM_SEGMENT * MEDIUM_SEGMENT
"""Of an expandable segment: without end. torch reserves 1.125 times the GPU's memory, and one more segment after."""


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
    """Memory that CUDA gave out in one piece, or the addresses of an expandable one."""

    small: bool
    start: int
    expandable: bool = False

    @property
    def page(self) -> int:
        """What an expandable segment maps and unmaps."""
        return SMALL_SEGMENT if self.small else MEDIUM_SEGMENT


@dataclass(slots=True, eq=False)
class Block:
    """A part of a segment: in use, free, or (in an expandable one) addresses without memory behind them."""

    segment: _Segment
    address: int
    size: int
    free: bool = False
    before: Block | None = None
    after: Block | None = None
    mapped: bool = True

    @property
    def expandable_size(self) -> int:
        """The size that it can grow to."""
        after = self.after
        return self.size + (after.size if after is not None and not after.mapped else 0)


def _order(block: Block) -> tuple[int, int]:
    return block.size, block.address


def _address(block: Block) -> int:
    return block.address


@dataclass(slots=True)
class _Pool:
    """Free blocks, smallest first, then lowest address; and unmapped ones, lowest address first."""

    blocks: list[Block] = field(default_factory=list)
    unmapped: list[Block] = field(default_factory=list)

    def add(self, block: Block) -> None:
        if block.mapped:
            insort(self.blocks, block, key=_order)
        else:
            insort(self.unmapped, block, key=_address)

    def remove(self, block: Block) -> None:
        if block.mapped:
            del self.blocks[bisect_left(self.blocks, _order(block), key=_order)]
        else:
            self.unmapped.remove(block)

    def take(self, size: int) -> Block | None:
        """The best fit; blocks that can grow count as large as they can."""
        index = bisect_left(self.blocks, (size, -1), key=_order)
        if index == len(self.blocks):
            return None
        while index + 1 < len(self.blocks) and self.blocks[index].segment.expandable:
            if self.blocks[index + 1].expandable_size >= self.blocks[index].expandable_size:
                break
            index += 1
        return self.blocks.pop(index)

    def absorb_neighbours(self, block: Block) -> None:
        """Merge a block, which is in no list yet, with neighbours that are free, and mapped or not as it is."""
        for other in (block.before, block.after):
            if other is not None and other.free and other.mapped == block.mapped:
                self.remove(other)
                _absorb(block, other)

    def room_for(self, size: int) -> Block | None:
        """Where the lowest addresses begin that are free or unmapped, at least one of them unmapped, for so much."""
        for hole in self.unmapped:
            first = hole.before if hole.before is not None and hole.before.free else hole
            found, block = first.size, first.after
            while found < size and block is not None and block.free:
                found += block.size
                block = block.after
            if found >= size:
                return first
        return None


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
        self._next_address = 0

    @property
    def total_bytes(self) -> int | None:
        """What segments may add up to; None is no limit."""
        return self._total

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
        pool.absorb_neighbours(block)
        block.free = True
        pool.add(block)

    def release_cached(self) -> bool:
        """Give whole free segments or pages back, as torch.cuda.empty_cache does; whether there were any."""
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
        if not self._take_from_gpu(size):
            return None
        return self._new_segment(small, size)

    def _new_segment(self, small: bool, size: int, *, expandable: bool = False) -> Block:
        self._next_address += _FAR_APART
        segment = _Segment(small, self._next_address, expandable)
        return Block(segment, segment.start, size, free=expandable, mapped=not expandable)

    def _grow(self, size: int, small: bool) -> Block | None:
        """Map pages of the pool's addresses until they hold the request."""
        pool = self._pools[small]
        block = pool.room_for(size)
        if block is None:
            block = self._new_segment(small, _ADDRESSES, expandable=True)
            pool.add(block)
        if not block.mapped and not self._map(block, min(block.size, size), pool):
            return None
        while block.size < size:
            following = block.after
            assert following is not None
            if not self._map(following, min(size - block.size, following.size), pool):
                return None
            block = following
        pool.remove(block)
        return block

    def _map(self, block: Block, size: int, pool: _Pool) -> bool:
        """Put memory behind the beginning of an unmapped block: it becomes a free one, and merges with free ones."""
        mapped = _round_up(size, block.segment.page)
        if not self._take_from_gpu(mapped):
            return False
        pool.remove(block)
        if mapped < block.size:
            pool.add(_cut(block, mapped))
        block.mapped = True
        pool.absorb_neighbours(block)
        pool.add(block)
        return True

    def _take_from_gpu(self, size: int) -> bool:
        if self._total is not None and self.reserved_bytes + size > self._total:
            return False
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _unmap(self, block: Block, pool: _Pool) -> None:
        """Give back the pages that lie wholly inside a free block of an expandable segment."""
        start, page = block.segment.start, block.segment.page
        first = start + _round_up(block.address - start, page)
        end = start + (block.address + block.size - start) // page * page
        if first >= end:
            return
        pool.remove(block)
        self.reserved_bytes -= end - first
        if end < block.address + block.size:
            pool.add(_cut(block, end - block.address))
        if block.address < first:
            inner = _cut(block, first - block.address)
            pool.add(block)
            block = inner
        block.mapped = False
        pool.absorb_neighbours(block)
        pool.add(block)

    def _split(self, block: Block, size: int) -> None:
        remaining = block.size - size
        fine = block.segment.small or block.segment.expandable
        if remaining >= MINIMUM_BLOCK if fine else remaining > SMALL_REQUEST:
            block.free = True
            self._pools[block.segment.small].add(_cut(block, size))


def _cut(block: Block, size: int) -> Block:
    """Shorten a block; what it loses is a block of its own after it, free and mapped as it is."""
    rest = Block(block.segment, block.address + size, block.size - size, block.free, block, block.after, block.mapped)
    if block.after is not None:
        block.after.before = rest
    block.after = rest
    block.size = size
    return rest


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
