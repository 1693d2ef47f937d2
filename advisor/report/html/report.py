"""The page as a whole."""

from __future__ import annotations

import base64
import hashlib
import os
from typing import TYPE_CHECKING

from advisor import __version__
from advisor.advise import METHOD_LABELS, Advice
from advisor.errors import AdvisorError
from advisor.profiles import plan_to_toml
from advisor.report.html.claims import PATTERNS, amount_with_unit
from advisor.report.html.methods import comparison_rows, memory_table, method_bars, method_heads
from advisor.report.html.step import (
    LABEL_ROOM,
    PLOT_BOTTOM,
    Step,
    draw_plot,
    draw_scale,
    moment_rows,
    point_words,
    read_step,
    step_data,
    tensor_items,
)
from advisor.report.output import create_file
from advisor.report.page import embedded, fill, read_part, shown_text
from advisor.report.words import (
    basis_of,
    capital,
    closed_form_words,
    compute_facts,
    ended,
    memory_facts,
    origin_of,
    replayed_words,
    request_facts,
    sentence,
)
from advisor.units import short_count

if TYPE_CHECKING:
    from advisor.traced import TracedPlan


def write_report(advice: Advice, path: str | os.PathLike[str], step: TracedPlan | AdvisorError) -> None:
    """Write the page of an advice; a file that is there is never overwritten.

    Args:
        advice: what is shown.
        path: the HTML file.
        step: the recommended plan by trace, or why there is none.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    create_file(path, render_report(advice, step).encode())


def render_report(advice: Advice, step: TracedPlan | AdvisorError) -> str:
    """The page of an advice, with one step of its plan by trace, or why there is none."""
    if isinstance(step, AdvisorError):
        chart, data = _absence(step), "null"
    else:
        drawn = read_step(step)
        chart, data = _chart(advice, step, drawn), embedded(step_data(drawn))
    style = read_part("colours.css") + read_part("report.css")
    script = read_part("report.js")
    values = {
        "title": shown_text(f"{advice.model.label} on {advice.gpu.name}"),
        "policy": _policy(style, script),
        "style": style,
        "script": script,
        "gpu": _facts(origin_of(advice.gpu), *memory_facts(advice.gpu), *compute_facts(advice.gpu)),
        "asked": _facts(
            f"{short_count(advice.model.architecture.parameters)} parameters", *request_facts(advice.request)
        ),
        "recommendation": _recommendation(advice),
        "commands": _commands(advice),
        "warnings": _warnings(advice),
        "patterns": _patterns(),
        "bars": method_bars(advice),
        "heads": method_heads(advice),
        "memory": memory_table(advice),
        "comparison": comparison_rows(advice),
        "step-title": _step_title(advice),
        "step": chart,
        "plan-title": "The plan" if advice.recommended else "The plan that misses least",
        "plan": _lines(plan_to_toml(advice.choice.plan)),
        "basis": shown_text(basis_of(advice)),
        "version": shown_text(__version__),
        "data": data,
    }
    return fill(read_part("report.html"), values)


def _policy(style: str, script: str) -> str:
    """No request at all, and of styles and scripts only the page's own."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(*facts: str) -> str:
    return " · ".join(f"<span>{shown_text(fact)}</span>" for fact in facts)


def _recommendation(advice: Advice) -> str:
    if advice.recommended is None:
        said = ['<h2 class="bad">Nothing fits</h2>', "<dl>"]
        said += [
            f"<dt>{capital(METHOD_LABELS[part.method])}</dt><dd>{shown_text(sentence(part.reason))}</dd>"
            for part in advice.methods
        ]
        said.append("</dl>")
    else:
        said = [
            f'<h2 class="good">Recommended: {METHOD_LABELS[advice.recommended]}</h2>',
            f"<p>{shown_text(sentence(advice.reason))}</p>",
            f"<p>It {shown_text(ended(advice.choice.reason))}</p>",
        ]
    if advice.unlock:
        label = "To go further" if advice.recommended else "To make it fit"
        said.append(f"<p><strong>{label}:</strong> {shown_text(ended(advice.unlock))}</p>")
    return "\n".join(said)


def _commands(advice: Advice) -> str:
    commands = [advice.next_command, *([advice.proof_command] if advice.proof_command else [])]
    return "\n".join(
        _copyable(f"command-{number}", _unbroken(command), f"command {number}")
        for number, command in enumerate(commands, 1)
    )


def _unbroken(command: str) -> str:
    """No word is broken at a hyphen."""
    return " ".join(f"<span>{shown_text(word)}</span>" for word in command.split(" "))


def _copyable(name: str, text: str, label: str) -> str:
    return (
        f'<div class="copyable"><pre id="{name}">{text}</pre>'
        f'<button type="button" class="scripted" data-copy="{name}" aria-label="Copy {label}">Copy</button></div>'
    )


def _warnings(advice: Advice) -> str:
    if not advice.warnings:
        return ""
    items = "".join(f"<li>{shown_text(warning)}</li>" for warning in advice.warnings)
    return f'<section aria-labelledby="warnings"><h2 id="warnings">Good to know</h2><ul class="warnings">{items}</ul></section>'  # noqa: E501


def _patterns() -> str:
    """What is no component is hatched."""
    drawn = {
        "beyond": '<path d="M-1,1 l2,-2 M0,8 l8,-8 M7,9 l2,-2"/>',
        "context": '<rect class="solid" width="8" height="8"/>',
        "others": '<path d="M-1,1 l2,-2 M0,8 l8,-8 M7,9 l2,-2 M-1,7 l2,2 M0,0 l8,8 M7,-1 l2,2"/>',
        "margin": '<circle cx="2" cy="2" r="1.2"/><circle cx="6" cy="6" r="1.2"/>',
    }
    return "".join(
        f'<pattern id="{name}" width="8" height="8" patternUnits="userSpaceOnUse"><rect class="page" width="8" height="8"/>{drawn[name]}</pattern>'  # noqa: E501
        for name in PATTERNS.values()
    )


def _step_title(advice: Advice) -> str:
    return f"Memory over one step of {METHOD_LABELS[advice.choice.method]}"


def _absence(error: AdvisorError) -> str:
    """Why there is no chart."""
    why = f"<p>{shown_text(sentence(error.why))}</p>" if error.why else ""
    hint = f"<p><strong>To see it:</strong> {shown_text(error.hint)}</p>" if error.hint else ""
    return f'<div class="card-like"><p><strong>{shown_text(error.what)}</strong></p>{why}{hint}</div>'


def _chart(advice: Advice, traced: TracedPlan, step: Step) -> str:
    values = {
        "said": _traced_words(advice, traced),
        "height": str(PLOT_BOTTOM + LABEL_ROOM),
        "plot": draw_plot(step),
        "scale": draw_scale(step),
        "last": str(len(step.points) - 1),
        "peak": str(step.points.index(step.peak)),
        "moment": shown_text(point_words(step, step.peak)),
        "tensors": tensor_items(step.peak.largest),
        "rows": moment_rows(step),
    }
    return fill(read_part("step.html"), values)


def _traced_words(advice: Advice, step: TracedPlan) -> str:
    memory = step.memory
    allocated, reserved = amount_with_unit(memory.allocated_bytes), amount_with_unit(memory.reserved_bytes)
    peak = f"Its peak is {allocated} allocated, at {shown_text(memory.at)}, and {reserved} reserved."
    closed_form = f"The closed form says {shown_text(closed_form_words(step))}."
    said = [f"Traced: the installed code run on tensors without storage. {peak} {closed_form}"]
    if step.survival is not None:
        room = amount_with_unit(step.survival.room_bytes)
        said.append(f"Replayed in the {room} that are left for tensors: {shown_text(replayed_words(step.survival))}")
    if step.fit is not None and advice.choice.fits and not step.fit.fits:
        said.append("By the trace this plan does not fit: ask again with --trace, which takes a smaller one.")
    said += [shown_text(warning) for warning in step.warnings if warning not in advice.warnings]
    return "\n".join(f"<p>{text}</p>" for text in said)


def _lines(text: str) -> str:
    return "\n".join(map(shown_text, text.splitlines()))
