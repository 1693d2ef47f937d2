"""The three methods: their memory as bars against the card's, the same as a table, and what else sets them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from advisor.advise import METHOD_LABELS
from advisor.report.html.claims import Claim, amount, claims_of, look, said_exactly, swatch
from advisor.report.language import listed, localise_label
from advisor.report.page import label, said, shown_text
from advisor.report.words import EASE, METHOD_NAMES, QUALITY, SHIPPED, TRAINED, capital, settings, speed_words
from advisor.units import gib, short_count, size

if TYPE_CHECKING:
    from advisor.advise import Advice, MethodAdvice
    from advisor.fit import Fit

_LONGEST_BAR = 3.0
"""Times the card's memory; a longer bar is cut, or the card would be too short to read beside it."""

_BAR_TOP, _BAR_HEIGHT, _BAR_ROOM = 6, 30, 42


def method_bars(advice: Advice) -> str:
    """A bar for each method on one scale, the card's memory drawn into each."""
    total = advice.gpu.total_bytes
    longest = max(total, *(part.fit.needed_bytes for part in advice.methods))
    scale = min(1.01 * longest, _LONGEST_BAR * total)
    bars = "\n".join(_bar(part, scale, recommended=part.method == advice.recommended) for part in advice.methods)
    return f"{bars}\n{_scale(advice, scale)}"


def _bar(part: MethodAdvice, scale: float, *, recommended: bool) -> str:
    fit, name = part.fit, shown_text(capital(localise_label(METHOD_LABELS[part.method])))
    claims = [claim for claim in claims_of(part) if claim.size_bytes > 0]
    usable = f"{gib(fit.total_bytes)} usable"
    parts = listed([*map(_claim_words, claims), localise_label(usable)])
    needed = said_exactly(f"{gib(fit.needed_bytes)} needed of {gib(fit.total_bytes)}", fit.needed_bytes)
    limit = _percent(fit.total_bytes, scale)
    chosen = f'<span class="chosen">{label("recommended")}</span>' if recommended else ""
    return f"""<div class="method">
<h3>{name} {chosen}</h3>
<p class="claim">{_verdict(fit)} <span class="quiet">{needed}</span></p>
<svg class="bar" height="{_BAR_ROOM}" role="img" aria-label="{name}: {shown_text(parts)}">
<rect class="card" {_span(0, fit.total_bytes, scale)}/>
{_segments(claims, scale)}
<rect class="limit" x="{limit}" width="2" height="{_BAR_ROOM}"/>
{_cut(fit, scale)}</svg>
</div>"""


def _claim_words(claim: Claim) -> str:
    return f"{localise_label(claim.name)} {gib(claim.size_bytes)}"


def _segments(claims: Iterable[Claim], scale: float) -> str:
    drawn, start = [], 0
    for claim in claims:
        title = f"<title>{shown_text(_claim_words(claim))}</title>"
        drawn.append(f"<g><rect {look(claim)} {_span(start, claim.size_bytes, scale)}/>{title}</g>")
        start += claim.size_bytes
    return "\n".join(drawn)


def _span(start_bytes: int, size_bytes: int, scale: float) -> str:
    x, width = _percent(start_bytes, scale), _percent(size_bytes, scale)
    return f'x="{x}" width="{width}" y="{_BAR_TOP}" height="{_BAR_HEIGHT}"'


def _percent(size_bytes: int, scale: float) -> str:
    return f"{min(100.0, 100 * size_bytes / scale):.3f}%"


def _cut(fit: Fit, scale: float) -> str:
    """The mark of a bar that goes on beyond the scale."""
    if fit.needed_bytes <= scale:
        return ""
    middle = _BAR_TOP + _BAR_HEIGHT // 2
    return (
        f'<svg x="100%" y="{middle}" overflow="visible"><title>{label("goes on")}</title>'
        '<path class="cut" d="M0,0 L-12,-15 H-22 L-10,0 L-22,15 H-12 Z"/></svg>\n'
    )


def _scale(advice: Advice, scale: float) -> str:
    """What the line in each bar means."""
    total = advice.gpu.total_bytes
    before = total > scale / 2
    anchor, shift = ("end", -6) if before else ("start", 6)
    cut = any(part.fit.needed_bytes > scale for part in advice.methods)
    x = _percent(total, scale)
    beyond = f"A bar with an arrow goes on beyond {_LONGEST_BAR:g} times that."
    note = f'<p class="note">{said(beyond)}</p>' if cut else ""
    usable = f"{gib(total)} usable"
    return (
        f'<svg class="bar" height="22" aria-hidden="true"><rect class="limit" x="{x}" width="2" height="20"/>'
        f'<svg x="{x}" overflow="visible"><text class="limit-text" x="{shift}" y="15" text-anchor="{anchor}">'
        f"{label(usable)}</text></svg></svg>{note}"
    )


def _verdict(fit: Fit) -> str:
    if fit.near_edge:
        return f'<strong class="near">{label("fits, near the edge")}</strong>'
    if fit.fits:
        return f'<strong class="good">{label("fits")}</strong>'
    short = said_exactly(f"does not fit: {gib(fit.missing_bytes)} short", fit.missing_bytes)
    return f'<strong class="bad">{short}</strong>'


def memory_table(advice: Advice) -> str:
    """The bars' numbers, which are also their legend."""
    parts = advice.methods
    columns = [claims_of(part) for part in parts]
    rows = []
    for claims in zip(*columns, strict=True):
        if claims[0].name == "reserved beyond that":
            rows.append(_sum_row("peak allocated", [part.memory.allocated_bytes for part in parts]))
        if claims[0].name == "context":
            rows.append(_sum_row("peak reserved", [part.fit.reserved_bytes for part in parts]))
        if claims[0].name != "other processes" or any(claim.size_bytes for claim in claims):
            cells = [amount(claim.size_bytes) for claim in claims]
            rows.append(_row(claims[0].name, cells, before=swatch(claims[0])))
    rows.append(_sum_row("needed", [part.fit.needed_bytes for part in parts]))
    rows.append(_row("usable", [amount(part.fit.total_bytes) for part in parts]))
    if any(part.spilled_bytes for part in parts):
        rows.append(_row("in host RAM", [amount(part.spilled_bytes) for part in parts]))
    rows.append(_row("peak at", [label(part.memory.at) for part in parts], kind="words"))
    return "\n".join(rows)


def _sum_row(name: str, sizes: Iterable[int]) -> str:
    return _row(name, [amount(size_bytes) for size_bytes in sizes], kind="sum")


def _row(name: str, cells: Sequence[str], *, kind: str = "", before: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    inside = "".join(f'<td role="cell">{cell}</td>' for cell in cells)
    return f'<tr role="row"{attribute}><th scope="row" role="rowheader">{before}{label(name)}</th>{inside}</tr>'


def method_heads(advice: Advice) -> str:
    """The columns' heads."""
    return "".join(
        f'<th scope="col" role="columnheader">{shown_text(capital(localise_label(METHOD_NAMES[part.method])))}</th>'
        for part in advice.methods
    )


def comparison_rows(advice: Advice) -> str:
    """What sets the methods apart, beside memory."""
    rows: dict[str, Callable[[MethodAdvice], str]] = {
        "trained": lambda part: TRAINED[part.method],
        "parameters": lambda part: short_count(part.memory.parameters.trainable),
        "settings": lambda part: "\n".join(settings(part.plan)),
        "speed (estimate)": speed_words,
        "quality": lambda part: QUALITY[part.method],
        "ease": lambda part: EASE[part.method],
        "you ship": lambda part: f"{size(part.saved_bytes)} {SHIPPED[part.method]}",
    }
    if any(part.tier != "estimate" for part in advice.methods):
        rows["memory by"] = lambda part: part.tier
    return "\n".join(_row(name, [_lines(say(part)) for part in advice.methods]) for name, say in rows.items())


def _lines(text: str) -> str:
    return "<br>".join(label(line).replace("_", "_<wbr>") for line in text.splitlines())
