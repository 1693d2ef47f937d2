"""docs/step.svg: the memory of one optimizer step, from a trace, drawn as the HTML report draws it.

python tests/docs/figure.py > docs/step.svg
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.report.html.step import Step

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs" / "step.svg"

PLAN = """\
model = "phi-3-mini-4k"
method = "lora"
micro_batch = 8
gradient_accumulation = 1
seq_len = 512
padding = "longest"
gradient_checkpointing = false
attention = "flash_attention_2"
loss = "standard"
optimizer = "adamw_torch"
lora = { rank = 16, alpha = 16, dropout = 0.05, target_modules = ["o_proj", "down_proj"] }
"""

_SCALE, _PLOT, _SIDE = 62, 770, 48
_LEGEND = 446

_RULES = """
svg { font: 12px system-ui, sans-serif; }
.page { fill: var(--page); } text { fill: var(--text); } .quiet { fill: var(--quiet); }
.band { fill: var(--band); } .grid { stroke: var(--line); } .tick { stroke: var(--edge); }
.reserved { fill: none; stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 5 3; }
.halo { paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; }
.limit { fill: var(--limit); } .limit-text { fill: var(--limit); }
.peak { fill: var(--page); stroke: var(--text); stroke-width: 2; } .moment rect { fill: transparent; }
"""


def draw_figure() -> str:
    """The cookbook's LoRA notebook with one micro-batch a step, on an A100 with 40 GB."""
    from advisor.cli.common import read_plan
    from advisor.profiles import find_model
    from advisor.report.html.step import read_step
    from advisor.report.language import speaking
    from advisor.traced import trace_plan

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        path.write_text(PLAN, encoding="utf-8")
        plan, gpu = read_plan(str(path), "a100-40gb")
    step = read_step(trace_plan(plan, find_model(plan.model), gpu))
    with speaking("en"):
        return _drawn(step)


def _drawn(step: Step) -> str:
    from advisor.report.html.step import draw_plot, draw_scale

    width = _SCALE + _PLOT + _SIDE
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 490" role="img">',
            "<title>Memory during one step of LoRA without gradient checkpointing</title>",
            f"<style>{_colours()}{_RULES}</style>",
            f'<rect class="page" width="{width}" height="490" rx="6"/>',
            f'<svg x="0" width="{_SCALE - 8}" height="440" overflow="visible">',
            draw_scale(step),
            "</svg>",
            f'<svg x="{_SCALE}" width="{_PLOT}" height="440" overflow="visible">',
            draw_plot(step),
            "</svg>",
            *_legend([any(point.components[number] for point in step.points) for number in range(8)]),
            "</svg>\n",
        )
    )


def _colours() -> str:
    """The report's colours, for image viewers that know no light-dark()."""
    from advisor.report.page import read_part

    pairs = re.findall(r"(--\w+): light-dark\((#\w+), (#\w+)\)", read_part("colours.css"))
    light = " ".join(f"{name}: {colour};" for name, colour, _ in pairs)
    dark = " ".join(f"{name}: {colour};" for name, _, colour in pairs)
    classes = " ".join(f".c{number} {{ fill: var(--c{number}); }}" for number in range(8))
    return f"\n:root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{classes}"


def _legend(present: list[bool]) -> list[str]:
    from advisor.report.history import COMPONENTS

    parts = []
    shown = [number for number in range(8) if present[number]]
    for place, number in enumerate([*shown, -1]):
        x, y = _SCALE + place % 5 * 150, _LEGEND + place // 5 * 22
        if number < 0:
            parts.append(f'<path class="reserved" d="M{x},{y + 6}h24"/><text x="{x + 30}" y="{y + 11}">reserved</text>')
            continue
        parts.append(f'<rect class="c{number}" x="{x}" y="{y}" width="12" height="12"/>')
        parts.append(f'<text x="{x + 18}" y="{y + 11}">{COMPONENTS[number]}</text>')
    return parts


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.stdout.write(draw_figure())
