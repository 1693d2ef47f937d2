"""Cases worked by hand from the rules in c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

from advisor.memory.allocator import EMPTY_CACHE, CachingAllocator, Request, replay
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
