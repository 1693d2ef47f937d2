"""Bytes to words and back."""

from __future__ import annotations

import pytest

from advisor.errors import InputError, shown
from advisor.units import (
    GIB,
    LARGEST_SIZE_BYTES,
    MIB,
    count,
    duration,
    exact_size,
    gib,
    parse_count,
    parse_size,
    short_count,
    size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("12", 12 * GIB),
        ("12GiB", 12 * GIB),
        ("12 gib", 12 * GIB),
        (" 12G ", 12 * GIB),
        ("12288MiB", 12 * GIB),
        ("12GB", 12 * 10**9),
        ("0.5TiB", 512 * GIB),
        ("14.56GiB", int(14.56 * GIB)),
        (".5", GIB // 2),
        ("1B", 1),
        ("512B", 512),
        ("1024KiB", MIB),
        ("1024TiB", LARGEST_SIZE_BYTES),
    ],
)
def test_a_size_is_read_in_the_unit_it_names(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


BAD_SIZES = ["", " ", "0", "0GiB", "-1", "-1GiB", "nan", "inf", "1e3", "12 GiB GiB", "GiB", "twelve", "1PiB", "1025TiB"]
BAD_SIZES += ["9" * 39, "9" * 5000, "1.2.3", "12\x00", "١٢", "12ſ"]


@pytest.mark.parametrize("text", BAD_SIZES)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert "12GiB" in caught.value.hint
    assert caught.value.why
    assert len(caught.value.what) < 200


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12M", 12_000_000),
        ("1.5B", 1_500_000_000),
        ("120k", 120_000),
        ("250000", 250_000),
        ("250_000", 250_000),
        ("250,000", 250_000),
        ("2T", 2 * 10**12),
        ("1", 1),
    ],
)
def test_a_count_is_read_with_its_scale(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "0", "-5", "12GiB", "nan", "M", "2000T", "9" * 5000, "0.5"])
def test_what_is_no_count_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_count(text)
    assert "12M" in caught.value.hint


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (10_637_877_248, "9.91 GiB"),
        (GIB, "1.00 GiB"),
        (34 * MIB, "34.0 MiB"),
        (1536, "1.5 KiB"),
        (512, "512 B"),
        (0, "0 B"),
        (-34 * MIB, "-34.0 MiB"),
    ],
)
def test_a_size_is_said_in_the_unit_that_fits(size_bytes: int, words: str) -> None:
    assert size(size_bytes) == words


def test_gib_is_gib_however_small_or_large() -> None:
    assert gib(34 * MIB) == "0.03 GiB"
    assert gib(2048 * GIB) == "2,048.00 GiB"


@pytest.mark.parametrize(
    ("number", "words"), [(3_821_079_552, "3.82 B"), (25_165_824, "25.2 M"), (8_192, "8.19 k"), (16, "16"), (0, "0")]
)
def test_a_short_count_has_three_digits(number: int, words: str) -> None:
    assert short_count(number) == words


def test_a_count_has_all_its_digits() -> None:
    assert count(3_821_079_552) == "3,821,079,552"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.25, "0.25 s"),
        (42.4, "42 s"),
        (600, "10 min"),
        (7500, "2 h 5 min"),
        (2 * 86400, "2.0 days"),
        (86400 * 10.5, "10.5 days"),
    ],
)
def test_a_duration_is_said_as_people_say_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_value_of_any_size_can_be_shown() -> None:
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    assert shown("x" * 100) == "'" + "x" * 56 + "..."
    assert shown(16) == "16"
    assert "int" in shown(10**5000)
    assert "list" in shown(nested)


@pytest.mark.parametrize(("size_bytes", "text"), [(4 * GIB, "4GiB"), (1536 * MIB, "1536MiB"), (1000, "1000B")])
def test_an_exact_size_reads_back_as_the_same_number(size_bytes: int, text: str) -> None:
    assert exact_size(size_bytes) == text
    assert parse_size(text) == size_bytes
