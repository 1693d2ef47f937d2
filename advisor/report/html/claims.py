"""What a plan claims of a GPU's memory: the components at the peak, and what comes on top of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from advisor.report.history import COMPONENTS
from advisor.report.page import said, shown_text
from advisor.units import GIB, gib

if TYPE_CHECKING:
    from advisor.advise import MethodAdvice


class Claim(NamedTuple):
    """One part of what is needed."""

    name: str
    size_bytes: int
    look: str
    """The class of its colour, or the id of its pattern."""


BEYOND = "reserved beyond that"
"""What the allocator has reserved and no tensor uses at the peak."""

_COMPONENT_LOOKS = {name: f"c{index}" for index, name in enumerate(COMPONENTS)}
PATTERNS = {BEYOND: "beyond", "context": "context", "other processes": "others", "margin": "margin"}


def claims_of(part: MethodAdvice) -> list[Claim]:
    """Everything that a method's plan needs, in the order in which it is stacked."""
    memory, fit = part.memory, part.fit
    claims = [Claim(name, memory.components[name], _COMPONENT_LOOKS[name]) for name in COMPONENTS]
    rest = {
        BEYOND: fit.reserved_bytes - memory.allocated_bytes,
        "context": fit.context_bytes,
        "other processes": fit.others_bytes,
        "margin": fit.margin_bytes,
    }
    return [*claims, *(Claim(name, size, PATTERNS[name]) for name, size in rest.items())]


def look(claim: Claim) -> str:
    """The attributes of whatever is drawn for a claim."""
    return f'class="{claim.look}"' if claim.name in COMPONENTS else f'class="{claim.look}" fill="url(#{claim.look})"'


def swatch(claim: Claim) -> str:
    """A claim's colour in a table."""
    return (
        '<svg class="swatch" width="14" height="14" aria-hidden="true">'
        f'<rect {look(claim)} width="100%" height="100%"/></svg>'
    )


def amount(size_bytes: int) -> str:
    """GiB for a column that says so; the exact bytes go with it."""
    text = gib(size_bytes).removesuffix(" GiB")
    if size_bytes == 0:
        text = "–"
    elif 0 < size_bytes < GIB / 200:
        text = "&lt; 0.01"
    return f'<data value="{size_bytes}">{text}</data>'


def said_exactly(text: str, *sizes: int) -> str:
    """Sentences in the page's language; with each of the sizes that they name in GiB go its exact bytes."""
    exact: dict[str, list[int]] = {}
    for size_bytes in sizes:
        exact.setdefault(shown_text(gib(size_bytes)), []).append(size_bytes)

    def put(found: re.Match[str]) -> str:
        left = exact[found[0]]
        return f'<data value="{left.pop(0) if len(left) > 1 else left[0]}">{found[0]}</data>'

    longest_first = sorted(map(re.escape, exact), key=len, reverse=True)
    return re.sub(rf"(?<![\d,.])(?:{'|'.join(longest_first)})", put, said(text))
