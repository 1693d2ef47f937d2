"""What a merge needs, before it starts, and what it made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from advisor.report.terminal.text import print_paragraph
from advisor.report.words import clean
from advisor.units import duration, gib, size

if TYPE_CHECKING:
    from advisor.training.merge import Merge, Merged


def render_merge_needs(merge: Merge, console: Console) -> None:
    """One paragraph: what goes into what, and what that takes."""
    kept = "the base model's format" if merge.dtype is None else merge.dtype
    print_paragraph(
        console,
        f"Merging {len(merge.modules)} adapted modules of {clean(merge.run)} into {clean(merge.base_name)}, in {kept}. "
        f"Needs {gib(merge.ram_bytes)} of RAM and {size(merge.disk_bytes)} of disk.",
    )


def render_merged(merged: Merged, console: Console) -> None:
    """Where it is, and how to load it."""
    out = clean(merged.merge.out)
    peak = merged.peak_ram_bytes
    held = "" if peak is None else f", with {gib(peak)} of RAM at the most"
    print_paragraph(console, f"Merged in {duration(merged.seconds)}{held}: {out}")
    print_paragraph(console, f'AutoModelForCausalLM.from_pretrained("{out}", dtype="auto") loads it.')
