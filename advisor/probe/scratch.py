"""What a matrix product on the CPU takes and gives back before it ends: the processor's, not the plan's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
"""oneDNN's scratch inside them depends on the processor's instructions and cores; some take none."""


def find_scratch(changes: Sequence[tuple[int, int]], products: Sequence[tuple[int, int]]) -> set[int]:
    """Which changes are scratch: taken and given back inside one product.

    Args:
        changes: the time and the bytes of each, in order of time; below zero is a release.
        products: when each product began and ended, in order of time.
    """
    starts = [start for start, _ in products]
    inside: dict[int, list[int]] = {}
    for index, (time, _) in enumerate(changes):
        product = bisect_right(starts, time) - 1
        if product >= 0 and time <= products[product][1]:
            inside.setdefault(product, []).append(index)
    scratch: set[int] = set()
    for indices in inside.values():
        for index in indices:
            freed = changes[index][1]
            taken = [i for i in indices if i < index and changes[i][1] == -freed and i not in scratch]
            if freed < 0 and taken:
                scratch |= {taken[-1], index}
    return scratch
