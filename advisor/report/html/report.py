"""The page as a whole."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from advisor import __version__
from advisor.advise import METHOD_LABELS, Advice
from advisor.errors import AdvisorError
from advisor.profiles import plan_to_toml
from advisor.report.html.claims import PATTERNS, said_exactly
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
from advisor.report.language import language_of, localise_label, speaking, spoken
from advisor.report.output import create_file
from advisor.report.page import embedded, fill, label, policy, read_part, said, shown_text
from advisor.report.terminal.wrapping import JOINT
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
from advisor.units import gib, short_count

if TYPE_CHECKING:
    from advisor.traced import TracedPlan


def write_report(advice: Advice, path: str | os.PathLike[str], step: TracedPlan | AdvisorError) -> None:
    """Write the page of an advice in the language that was asked for; a file that is there is never overwritten.

    Args:
        advice: what is shown.
        path: the HTML file.
        step: the recommended plan by trace, or why there is none.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    with speaking(language_of(os.environ)):  # whatever characters the terminal has
        page = render_report(advice, step)
    create_file(path, page.encode())


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
        "lang": spoken(),
        "title": shown_text(f"{advice.model.label}{JOINT}{localise_label(advice.gpu.name)}"),
        "policy": policy(style, script),
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
        "plan-title": label("The plan" if advice.recommended else "The plan that misses least"),
        "plan": _lines(plan_to_toml(advice.choice.plan)),
        "basis": said(basis_of(advice)),
        "version": shown_text(__version__),
        "data": data,
    }
    return fill(read_part("report.html"), values)


def _facts(*facts: str) -> str:
    return JOINT.join(f"<span>{label(fact)}</span>" for fact in facts)


def _recommendation(advice: Advice) -> str:
    if advice.recommended is None:
        lines = [f'<h2 class="bad">{label("Nothing fits")}</h2>', "<dl>"]
        for part in advice.methods:
            name = capital(localise_label(METHOD_LABELS[part.method]))
            lines.append(f"<dt>{shown_text(name)}</dt><dd>{said(sentence(part.reason))}</dd>")
        lines.append("</dl>")
    else:
        recommended = f"Recommended: {METHOD_LABELS[advice.recommended]}"
        lines = [
            f'<h2 class="good">{label(recommended)}</h2>',
            f"<p>{said(sentence(advice.reason))}</p>",
            f"<p>{said(f'It {ended(advice.choice.reason)}')}</p>",
        ]
    if advice.unlock:
        what = label("To go further:" if advice.recommended else "To make it fit:")
        lines.append(f"<p><strong>{what}</strong> {said(ended(advice.unlock))}</p>")
    return "\n".join(lines)


def _commands(advice: Advice) -> str:
    commands = [advice.next_command, *([advice.proof_command] if advice.proof_command else [])]
    return "\n".join(
        _copyable(f"command-{number}", _unbroken(command), f"Copy command {number}")
        for number, command in enumerate(commands, 1)
    )


def _unbroken(command: str) -> str:
    """No word is broken at a hyphen."""
    return " ".join(f"<span>{shown_text(word)}</span>" for word in command.split(" "))


def _copyable(name: str, text: str, does: str) -> str:
    button = f'<button type="button" class="scripted" data-copy="{name}" aria-label="{label(does)}">'
    return f'<div class="copyable"><pre id="{name}">{text}</pre>{button}{label("Copy")}</button></div>'


def _warnings(advice: Advice) -> str:
    if not advice.warnings:
        return ""
    items = "".join(f"<li>{said(warning)}</li>" for warning in advice.warnings)
    title = f'<h2 id="warnings">{label("Good to know")}</h2>'
    return f'<section aria-labelledby="warnings">{title}<ul class="warnings">{items}</ul></section>'


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
    return label(f"Memory over one step of {METHOD_LABELS[advice.choice.method]}")


def _absence(error: AdvisorError) -> str:
    """Why there is no chart."""
    why = f"<p>{said(sentence(error.why))}</p>" if error.why else ""
    hint = f"<p><strong>{label('To see it:')}</strong> {said(error.hint)}</p>" if error.hint else ""
    return f'<div class="card-like"><p><strong>{said(error.what)}</strong></p>{why}{hint}</div>'


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
    memory, peaks = step.memory, (step.memory.allocated_bytes, step.memory.reserved_bytes)
    allocated, reserved = map(gib, peaks)
    peak = f"Its peak is {allocated} allocated, at {memory.at}, and {reserved} reserved."
    closed_form = f"The closed form says {closed_form_words(step)}."
    lines = [said_exactly(f"Traced: the installed code run on tensors without storage. {peak} {closed_form}", *peaks)]
    if step.survival is not None:
        room = step.survival.room_bytes
        replayed = f"Replayed in the {gib(room)} that are left for tensors: {replayed_words(step.survival)}"
        lines.append(said_exactly(replayed, room))
    if step.fit is not None and advice.choice.fits and not step.fit.fits:
        lines.append(said("By the trace this plan does not fit: ask again with --trace, which takes a smaller one."))
    lines += [said(warning) for warning in step.warnings if warning not in advice.warnings]
    return "\n".join(f"<p>{text}</p>" for text in lines)


def _lines(text: str) -> str:
    return "\n".join(map(shown_text, text.splitlines()))
