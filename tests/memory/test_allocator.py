"""Cases worked by hand from the rules in c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from requests_replayed import EMPTY_CACHE, Request, replay

from advisor.memory.allocator import Block, CachingAllocator
from advisor.units import KIB, MIB


def made(*sizes: int) -> list[Request]:
    return [(index, size, False) for index, size in enumerate(sizes, 1)]


def test_a_byte_takes_512_and_reserves_2_mib() -> None:
    result = replay(made(1))
    assert (result.allocated_bytes, result.reserved_bytes) == (512, 2 * MIB)


def test_one_mib_is_still_small_and_one_block_more_is_not() -> None:
    assert replay(made(MIB)).reserved_bytes == 2 * MIB
    assert replay(made(MIB + 1)).reserved_bytes == 20 * MIB


def test_from_10_mib_on_a_request_has_its_own_segment_of_2_mib_units() -> None:
    assert replay(made(10 * MIB - 512)).reserved_bytes == 20 * MIB
    assert replay(made(10 * MIB)).reserved_bytes == 10 * MIB
    assert replay(made(11 * MIB)).reserved_bytes == 12 * MIB


def test_small_and_large_requests_never_share_a_segment() -> None:
    assert replay(made(512, 2 * MIB)).reserved_bytes == 22 * MIB


def test_a_large_block_with_a_mib_to_spare_is_handed_out_and_counted_whole() -> None:
    # 11 MiB in a 12 MiB segment leaves 1 MiB, which is not more than 1 MiB.
    assert replay(made(11 * MIB)).allocated_bytes == 12 * MIB
    assert replay(made(11 * MIB - 512)).allocated_bytes == 11 * MIB - 512


def test_the_smallest_hole_that_fits_is_used() -> None:
    requests = [*made(30 * MIB, 20 * MIB), (1, 0, True), (2, 0, True), (3, 18 * MIB, False), (4, 30 * MIB, False)]
    assert replay(requests).reserved_bytes == 50 * MIB


def test_freed_neighbours_merge() -> None:
    # Three blocks of one 20 MiB segment; the first two freed make room for 12 MiB.
    requests = [*made(6 * MIB, 6 * MIB, 6 * MIB), (1, 0, True), (2, 0, True), (4, 12 * MIB, False)]
    assert replay(requests).reserved_bytes == 20 * MIB


def test_holes_that_are_not_neighbours_do_not_merge() -> None:
    requests = [*made(6 * MIB, 6 * MIB, 6 * MIB), (1, 0, True), (3, 0, True), (4, 12 * MIB, False)]
    assert replay(requests).reserved_bytes == 32 * MIB


def test_a_full_gpu_gives_cached_segments_back_before_it_fails() -> None:
    requests = [*made(30 * MIB), (1, 0, True), (2, 40 * MIB, False)]
    result = replay(requests, total_bytes=50 * MIB)
    assert result.failed_request_bytes is None
    assert result.released_bytes == 30 * MIB
    assert result.reserved_bytes == 40 * MIB


def test_a_request_that_no_release_satisfies_is_out_of_memory() -> None:
    result = replay(made(30 * MIB, 30 * MIB), total_bytes=50 * MIB)
    assert result.failed_request_bytes == 30 * MIB
    assert result.reserved_bytes == 30 * MIB


def test_a_segment_in_partial_use_cannot_be_given_back() -> None:
    requests = [*made(6 * MIB, 6 * MIB), (1, 0, True), (3, 40 * MIB, False)]
    assert replay(requests, total_bytes=50 * MIB).failed_request_bytes == 40 * MIB


def test_empty_cache_makes_the_next_request_reserve_again() -> None:
    requests = [*made(30 * MIB), (1, 0, True), EMPTY_CACHE, (2, 10 * MIB, False)]
    allocator_peak = replay(requests)
    assert allocator_peak.reserved_bytes == 30 * MIB
    assert allocator_peak.released_bytes == 30 * MIB


def test_expandable_segments_grow_by_pages_and_join_holes() -> None:
    # Two blocks of 30 MiB fill three pages of 20 MiB; freed, they are one hole of 60.
    requests = [*made(30 * MIB, 30 * MIB), (1, 0, True), (2, 0, True), (3, 60 * MIB, False)]
    assert replay(requests, expandable=True).reserved_bytes == 60 * MIB
    assert replay(requests).reserved_bytes == 120 * MIB


def test_expandable_segments_split_down_to_512_bytes() -> None:
    assert replay(made(11 * MIB), expandable=True).allocated_bytes == 11 * MIB


def test_an_expandable_end_grows_by_what_is_missing() -> None:
    requests = [*made(30 * MIB), (1, 0, True), (2, 50 * MIB, False)]
    assert replay(requests, expandable=True).reserved_bytes == 60 * MIB


def test_an_expandable_segment_gives_its_end_back_when_the_gpu_is_full() -> None:
    requests = [*made(512 * KIB, 40 * MIB), (2, 0, True), (3, 2 * MIB, False), (3, 0, True), EMPTY_CACHE]
    allocator = CachingAllocator(expandable=True)
    small = allocator.allocate(512 * KIB)
    large = allocator.allocate(40 * MIB)
    assert small is not None
    assert large is not None
    allocator.free(large)
    allocator.release_cached()
    assert allocator.reserved_bytes == 2 * MIB
    assert replay(requests, expandable=True).reserved_bytes == 42 * MIB


def expandable_blocks(*sizes_mib: int, total_mib: int | None = None) -> tuple[CachingAllocator, list[Block]]:
    """An allocator with blocks of so many MiB, one after the other."""
    allocator = CachingAllocator(expandable=True, total_bytes=None if total_mib is None else total_mib * MIB)
    blocks = [allocator.allocate(size * MIB) for size in sizes_mib]
    assert all(block is not None for block in blocks)
    return allocator, [block for block in blocks if block is not None]


def offset_mib(block: Block | None) -> float:
    """Where a block begins in its segment."""
    assert block is not None
    return (block.address - block.segment.start) / MIB


def test_a_full_gpu_unmaps_whole_pages_in_the_middle() -> None:
    # 30 MiB in [0, 30) maps two pages, the next in [30, 60) one more, the third in [60, 90) two more: 100 MiB.
    # Without the second, [30, 60) is free. 40 MiB more need 30 MiB above the 10 free ones at the end, two pages:
    # 140 MiB. The one page wholly inside [30, 60) is [40, 60): unmapped, 80 MiB stay, and 120 are enough.
    requests = [*made(30 * MIB, 30 * MIB, 30 * MIB), (2, 0, True), (4, 40 * MIB, False)]
    result = replay(requests, total_bytes=120 * MIB, expandable=True)
    assert result.failed_request_bytes is None
    assert result.released_bytes == 20 * MIB
    assert result.reserved_bytes == 120 * MIB
    # A page less, and it fails with what it had reserved.
    failed = replay(requests, total_bytes=119 * MIB, expandable=True)
    assert failed.failed_request_bytes == 40 * MIB
    assert failed.reserved_bytes == 100 * MIB


def test_a_hole_is_mapped_again_before_the_end_grows() -> None:
    # As above, [40, 60) is unmapped. 25 MiB fit into the free [30, 40) and 15 MiB of the hole: its one page.
    allocator, (_, second, _) = expandable_blocks(30, 30, 30)
    allocator.free(second)
    allocator.release_cached()
    assert allocator.reserved_bytes == 80 * MIB
    assert offset_mib(allocator.allocate(25 * MIB)) == 30
    assert allocator.reserved_bytes == 100 * MIB


def test_a_hole_too_small_for_the_request_stays_unmapped() -> None:
    # [30, 60) offers 30 MiB of addresses; 31 go to the end, after the 10 free ones: [90, 121) needs two pages more.
    allocator, (_, second, _) = expandable_blocks(30, 30, 30)
    allocator.free(second)
    allocator.release_cached()
    assert offset_mib(allocator.allocate(31 * MIB)) == 90
    assert allocator.reserved_bytes == (80 + 40) * MIB


def test_what_is_left_of_a_page_stays_on_both_sides_of_a_hole() -> None:
    # [0, 5), [5, 75), [75, 80): four pages. Of the freed middle the pages [20, 40) and [40, 60) are whole.
    allocator, (_, middle, _) = expandable_blocks(5, 70, 5)
    assert allocator.reserved_bytes == 80 * MIB
    allocator.free(middle)
    allocator.release_cached()
    assert allocator.reserved_bytes == 40 * MIB
    # Two free blocks of 15 MiB: the one beside the hole counts as 55, so the other is the better fit.
    assert offset_mib(allocator.allocate(15 * MIB)) == 60
    # 16 MiB take [5, 20) and one MiB of the hole, for which a page is mapped.
    assert offset_mib(allocator.allocate(16 * MIB)) == 5
    assert allocator.reserved_bytes == 60 * MIB


def test_small_requests_unmap_pages_of_2_mib() -> None:
    # Five times 1 MiB in three pages; [1, 4) is free, and [2, 4) is the page wholly inside it.
    allocator, blocks = expandable_blocks(1, 1, 1, 1, 1)
    assert allocator.reserved_bytes == 6 * MIB
    for block in blocks[1:4]:
        allocator.free(block)
    allocator.release_cached()
    assert allocator.reserved_bytes == 4 * MIB


def test_a_wholly_free_expandable_segment_is_given_back_whole() -> None:
    allocator, (block,) = expandable_blocks(30)
    allocator.free(block)
    allocator.release_cached()
    assert allocator.reserved_bytes == 0
    assert offset_mib(allocator.allocate(50 * MIB)) == 0
    assert allocator.reserved_bytes == 60 * MIB


def test_both_pools_share_the_card() -> None:
    # 2 MiB for the small request leave 39 of 41: one page of 20 MiB, not the two that 30 MiB need.
    result = replay(made(512, 30 * MIB), total_bytes=41 * MIB, expandable=True)
    assert result.failed_request_bytes == 30 * MIB
    assert result.reserved_bytes == 2 * MIB
    assert replay(made(512, 30 * MIB), total_bytes=42 * MIB, expandable=True).reserved_bytes == 42 * MIB


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_full_card_is_never_reserved_beyond_its_size(seed: int, *, expandable: bool) -> None:
    rng = random.Random(seed)
    total = rng.randrange(60, 200) * MIB
    allocator = CachingAllocator(total_bytes=total, expandable=expandable)
    alive: list[Block] = []
    refused = 0
    for _ in range(600):
        if alive and rng.random() < 0.45:
            allocator.free(alive.pop(rng.randrange(len(alive))))
            continue
        block = allocator.allocate(int(2 ** rng.uniform(8, 26)))
        if block is None:
            refused += 1
            continue
        alive.append(block)
        assert allocator.allocated_bytes == sum(b.size for b in alive) <= allocator.reserved_bytes <= total
        alive.sort(key=lambda b: b.address)
        assert all(a.address + a.size <= b.address for a, b in pairwise(alive))
    assert refused
    assert allocator.peak_reserved_bytes <= total
    for block in alive:
        allocator.free(block)
    allocator.release_cached()
    assert allocator.reserved_bytes == allocator.allocated_bytes == 0
