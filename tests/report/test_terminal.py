"""The screens: what a person can read from them, at which width, with which characters."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from advisor.advise import Advice, Request, advise
from advisor.errors import AdvisorError, InputError, first_line
from advisor.fit import Fit, check_fit
from advisor.hardware import Gpu, GpuProcess, what_if
from advisor.memory.estimate import estimate, simulate
from advisor.memory.trace import Trace
from advisor.plan import LoraSettings, Plan
from advisor.profiles import ModelSource, default_plan, load_gpu, load_model, load_recipe, model_names
from advisor.recipes import examine_recipe
from advisor.report.terminal import (
    render_advice,
    render_error,
    render_estimate,
    render_explain,
    render_models,
    render_recipe,
    render_survey,
    render_trace,
)
from advisor.report.terminal.bars import memory_bar
from advisor.report.terminal.console import _LOOKALIKES
from advisor.survey import survey
from advisor.traced import Survival, TracedPlan
from advisor.units import GIB, MIB, count, gib, short_count, size

MINI = load_model("phi-3-mini")


def screen(render: Callable[..., None], *values: Any, width: int = 80) -> str:
    """What a renderer prints on a console without colour."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)
    render(*values, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def words(text: str) -> str:
    """Text as it reads, however its lines are broken."""
    return " ".join(text.split())


def gpu(name: str) -> Gpu:
    return what_if(load_gpu(name))


def advice_for(name: str, model: str = "phi-3-mini", **request: Any) -> Advice:
    return advise(load_model(model), gpu(name), Request(**request))


@pytest.fixture(scope="module")
def t4() -> Advice:
    return advice_for("t4")


def column_of(line: str, word: str) -> int:
    """Which of the three method columns of an 80-column screen a word is in."""
    return (line.index(word) - 13) // 23


def run_screens(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "PYTHONIOENCODING", "PYTHONUTF8"}
    }
    program = f"from advisor.report.terminal import *\n{code}"
    return subprocess.run([sys.executable, "-c", program], env={**inherited, **environment}, capture_output=True)


T4_SCREEN = """
from advisor.advise import advise
from advisor.hardware import what_if
from advisor.profiles import load_gpu, load_model
render_advice(advise(load_model("phi-3-mini"), what_if(load_gpu("t4"))), make_console())
"""

EVERY_OTHER_SCREEN = """
from advisor.errors import InputError
from advisor.fit import check_fit
from advisor.hardware import what_if
from advisor.memory.estimate import estimate, simulate
from advisor.profiles import *
from advisor.profiles import default_plan
from advisor.recipes import examine_recipe
from advisor.advise import Request
from advisor.survey import survey
model, gpu, console = load_model("phi-3-mini"), what_if(load_gpu("t4")), make_console()
plan = default_plan("qlora", model="phi-3-mini", dtype="float16")
memory = estimate(plan, model.architecture, gpu)
render_estimate(plan, model, gpu, memory, check_fit(memory.reserved_bytes, gpu), console)
render_explain(simulate(plan, model.architecture, gpu), memory, console)
render_recipe(examine_recipe(load_recipe("cookbook-full"), gpu), console)
render_survey(survey(model)[:5], model, Request(), console)
render_models([load_model(name) for name in model_names()], console)
render_error(InputError("“Müll” → 東京 \\udc80 is no name.", why="…", hint="×"), console)
"""


def test_the_recommended_column_is_marked_in_words(t4: Advice) -> None:
    lines = screen(render_advice, t4).splitlines()
    marked = next(line for line in lines if "━━ recommended" in line)
    headings = lines[lines.index(marked) - 1]
    assert t4.recommended == "lora"
    assert column_of(marked, "━━ recommended") == column_of(headings, " LoRA") + 1 == 1
    assert "Recommended: LoRA." in screen(render_advice, t4)


def test_the_comparison_holds_this_users_numbers(t4: Advice) -> None:
    shown = screen(render_advice, t4)
    for part in t4.methods:
        assert f"{gib(part.fit.needed_bytes).removesuffix(' GiB')} / {gib(part.fit.total_bytes)}" in shown
        assert gib(part.fit.reserved_bytes) in shown
        assert f"{short_count(part.memory.parameters.trainable)} parameters" in shown
        assert size(part.saved_bytes) in shown
        assert part.plan.optimizer in shown
        assert f"{part.plan.micro_batch} × {part.plan.gradient_accumulation} sequences" in shown
    assert f"no: {gib(t4.of('full').fit.missing_bytes)} short" in shown
    for said in ("best", "nearly the same", "may lose a little", "hard: needs resources", "very easy"):
        assert said in shown


def test_the_comparison_is_one_screen(t4: Advice) -> None:
    assert len(screen(render_advice, t4).splitlines()) <= 45


def test_speed_is_called_an_estimate_and_its_basis_is_told(t4: Advice) -> None:
    shown = screen(render_advice, t4)
    speed = t4.of("lora").speed
    assert speed is not None
    assert f"{speed.tokens_per_second:,.0f} tokens/s" in shown
    assert "(estimate)" in shown
    assert speed.basis in words(shown)
    assert "Nothing was measured" in words(shown)


def test_a_method_that_does_not_fit_has_no_speed(t4: Advice) -> None:
    full = t4.of("full")
    assert full.speed is not None
    assert f"{full.speed.tokens_per_second:,.0f} tokens/s" not in screen(render_advice, t4)


def test_the_time_for_the_run_is_shown_where_tokens_are_given() -> None:
    assert "for the run" in screen(render_advice, advice_for("t4", tokens=12_000_000))
    assert "for the run" not in screen(render_advice, advice_for("t4"))


def test_an_unknown_speed_is_said_to_be_unknown() -> None:
    described = advise(MINI, what_if(None, vram_bytes=24 * GIB))
    assert "not known" in screen(render_advice, described)
    assert "tokens/s" not in screen(render_advice, described)


def test_reason_unlock_warnings_and_gpu_are_told(t4: Advice) -> None:
    shown = words(screen(render_advice, t4))
    assert t4.reason[1:] in shown
    assert t4.choice.reason in shown
    assert t4.unlock in shown
    for warning in t4.warnings:
        assert warning in shown
    assert "NVIDIA T4 (what if) · 14.56 GiB usable" in shown
    assert "compute capability 7.5 · no bfloat16 · context 0.14 GiB (published)" in shown


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_next_command_is_alone_on_its_line_and_whole(t4: Advice, width: int) -> None:
    long = replace(t4, next_command="phi3-advise --model /data/" + "models/" * 20 + "config.json --save-plan plan.toml")
    for advice in (t4, long):
        assert f"  {advice.next_command}" in screen(render_advice, advice, width=width).splitlines()


def test_where_nothing_fits_each_method_says_what_is_missing() -> None:
    advice = advise(MINI, what_if(None, vram_bytes=2 * GIB))
    shown = screen(render_advice, advice)
    assert advice.recommended is None
    assert "Nothing fits" in shown.splitlines()
    assert "recommended" not in shown.lower()
    for part in advice.methods:
        assert f"no: {gib(part.fit.missing_bytes)} short" in shown
        assert f"by {gib(part.fit.missing_bytes)} at {part.memory.at}" in words(shown)


def test_what_others_hold_is_shown_with_who_holds_it() -> None:
    processes = (
        GpuProcess(pid=4312, name="/usr/bin/python3", used_bytes=8 * GIB),
        GpuProcess(pid=99, name="evil\x1b[2J", used_bytes=300 * MIB),
        GpuProcess(pid=7),
        GpuProcess(pid=8),
    )
    busy = replace(gpu("rtx-4090"), detected=True, index=1, driver="570.86", free_bytes=14 * GIB, processes=processes)
    shown = words(screen(render_advice, advise(MINI, busy)))
    assert "detected as GPU 1, driver 570.86" in shown
    assert "14.00 GiB free" in shown
    assert f"{gib(busy.others_bytes)} held by others: /usr/bin/python3 (4312) 8.00 GiB" in shown
    assert "process (7), 1 more" in shown
    assert "\x1b" not in shown


def test_near_the_edge_is_said_in_words() -> None:
    part = advice_for("t4").of("lora")
    spare = part.fit.total_bytes - part.fit.needed_bytes
    edge = replace(part, fit=replace(part.fit, margin_bytes=part.fit.margin_bytes + spare - part.fit.total_bytes // 50))
    advice = advice_for("t4")
    methods = tuple(edge if method.method == "lora" else method for method in advice.methods)
    assert edge.fit.near_edge
    assert "yes, near the edge" in screen(render_advice, replace(advice, methods=methods))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["t4", "rtx-4090", "a100-80gb", "rtx-4060-8gb", "max-1550"])
@pytest.mark.parametrize("model", ["phi-3-mini", "phi-3-medium-4k", "phi-3-small-8k"])
def test_no_line_is_wider_than_the_terminal(name: str, model: str, width: int) -> None:
    advice = advice_for(name, model, seq_len=131_072, effective_batch=128)
    lines = screen(render_advice, advice, width=width).splitlines()
    assert max(len(line) for line in lines if line.strip() != advice.next_command) <= width


def test_a_wider_terminal_shows_more(t4: Advice) -> None:
    assert " margin" not in screen(render_advice, t4).split("█ reserved")[0]
    assert "\n margin " in screen(render_advice, t4, width=120)


def fit_of(**claims: int) -> Fit:
    given = {"reserved_bytes": 0, "context_bytes": 0, "others_bytes": 0, "margin_bytes": 0, "total_bytes": 100}
    return Fit(**{**given, **claims})


def test_a_bar_draws_the_claims_to_the_gpus_total() -> None:
    fit = fit_of(reserved_bytes=50, context_bytes=10, others_bytes=10, margin_bytes=10)
    assert memory_bar(fit, 20).plain == "█" * 10 + "▓" * 4 + "▒" * 2 + "░" * 4


@pytest.mark.parametrize("reserved", [101, 1000])
def test_a_bar_that_is_too_long_ends_in_a_marker(reserved: int) -> None:
    assert memory_bar(fit_of(reserved_bytes=reserved), 20).plain == "█" * 19 + "▶"


def test_a_bar_that_just_fits_has_no_marker() -> None:
    assert memory_bar(fit_of(reserved_bytes=100), 20).plain == "█" * 20


def test_an_estimate_shows_totals_components_and_moments() -> None:
    plan, target = default_plan("full", model="phi-3-mini"), gpu("a100-80gb")
    memory = estimate(plan, MINI.architecture, target)
    shown = screen(render_estimate, plan, MINI, target, memory, check_fit(memory.reserved_bytes, target))
    for size_bytes in (memory.allocated_bytes, memory.reserved_bytes, memory.context_bytes, memory.total_bytes):
        assert gib(size_bytes) in shown
    assert f"{count(memory.parameters.total)}, of which {count(memory.parameters.trainable)} are trained" in shown
    for name, size_bytes in [*memory.components.items(), *memory.moments.items()]:
        assert not size_bytes or any(name in line and gib(size_bytes) in line for line in shown.splitlines())
    peak = [line for line in shown.splitlines() if line.endswith("█ peak")]
    assert [line.startswith(memory.at) for line in peak] == [True]
    assert "Fits." in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_without_a_gpu_an_estimate_judges_no_fit() -> None:
    plan, target = default_plan("lora", model="phi-3-mini"), gpu("t4")
    memory = estimate(plan, MINI.architecture, target)
    shown = screen(render_estimate, plan, MINI, target, memory, None)
    assert "its." not in shown
    assert "fit." not in shown
    assert target.name not in shown


def test_an_explanation_adds_up_to_the_peak_allocated() -> None:
    plan, target = default_plan("qlora", model="phi-3-mini"), gpu("rtx-4090")
    ledger, memory = simulate(plan, MINI.architecture, target), estimate(plan, MINI.architecture, target)
    shown = screen(render_explain, ledger, memory)
    results = [
        line.split()[-2] for line in shown.splitlines() if line.startswith("    ") and line.rstrip().endswith(" B")
    ]
    assert sum(int(result.replace(",", "")) for result in results) == memory.allocated_bytes
    total = count(memory.allocated_bytes)
    assert f"Sum: {total} B of {total} B peak allocated" in words(shown)


def test_an_explanation_gives_formula_inputs_and_source_of_each_term() -> None:
    plan, target = default_plan("qlora", model="phi-3-mini"), gpu("rtx-4090")
    ledger, memory = simulate(plan, MINI.architecture, target), estimate(plan, MINI.architecture, target)
    shown = words(screen(render_explain, ledger, memory))
    for entry in ledger.alive_at_peak():
        assert f"{entry.term.name} ({entry.component})" in shown
    assert "= ⌈elements ÷ 2⌉ Source: bitsandbytes.functional.quantize_4bit." in shown
    assert "elements = 50,331,648 × 32 805,306,368 B" in shown


@pytest.mark.parametrize("name", ["a100-40gb", "t4"])
def test_a_recipe_tells_its_story(name: str) -> None:
    answer = examine_recipe(load_recipe("cookbook-full"), gpu(name))
    shown = screen(render_recipe, answer)
    for text in answer.story:
        assert text[1:] in words(shown)
    assert answer.verdict[1:] in words(shown)
    assert answer.recipe.label in shown
    assert answer.recipe.source in words(shown)
    assert "micro-batch 7 × accumulation 4" in shown
    assert gib(answer.state_bytes) in shown
    assert ("Does not fit." in shown) == (name == "t4")
    assert max(map(len, shown.splitlines())) <= 80


def test_the_survey_has_a_line_a_gpu() -> None:
    rows, request = survey(MINI), Request()
    shown = screen(render_survey, rows, MINI, request)
    lines = {line.split()[0]: line for line in shown.splitlines() if " GiB " in line}
    assert len(lines) == len(rows)
    assert lines["t4"].split()[3] == "–"
    reach = next(row for row in rows if row.gpu.name == "NVIDIA T4").reach["lora"]
    assert f"{reach.micro_batch:,} / {reach.seq_len:,}" in lines["t4"]
    assert max(map(len, shown.splitlines())) <= 80


def test_models_that_cannot_be_launched_say_why() -> None:
    profiles = [load_model(name) for name in model_names()]
    shown = screen(render_models, profiles)
    for profile in profiles:
        line = next(line for line in shown.splitlines() if line.startswith(f"{profile.name} "))
        assert short_count(profile.architecture.parameters) in line
        assert ("no (" in line) != profile.launchable
        assert profile.launch_note in words(shown)
    assert max(map(len, shown.splitlines())) <= 80


def test_an_error_says_what_why_and_what_to_do() -> None:
    error = InputError("There is no GPU.", why="None was found.", hint="Name one: --gpu t4")
    assert screen(render_error, error) == (
        "Error: There is no GPU.\nWhy: None was found.\nWhat to do: Name one: --gpu t4\n"
    )


def test_an_error_without_reason_or_hint_has_no_empty_lines_for_them() -> None:
    assert screen(render_error, AdvisorError("It failed.")) == "Error: It failed.\n"


def test_a_path_in_an_error_can_be_copied() -> None:
    path = "/data/" + "a-long-name/" * 12 + "config.json"
    shown = screen(render_error, InputError(f"{path} cannot be read.", hint=f"Look at {path} with --gpu t4."))
    assert sum(path in line for line in shown.splitlines()) == 2


def test_a_library_s_words_are_cut_between_words() -> None:
    assert first_line(OSError("\n  It is gone.\nMore.")) == "It is gone."
    assert first_line(OSError()) == "OSError"
    assert first_line(OSError("word " * 100), 22) == "word word word word …"


def test_a_long_list_is_shown_to_its_end() -> None:
    rows = [f"train.jsonl, line {number}: {'x' * 160}" for number in range(10)]
    shown = screen(render_error, InputError("Bad rows.", why="\n".join([*rows, "and 15 more", "2. The disk is full."])))
    for part in ("line 9", "and 15 more", "2. The disk is full."):
        assert part in shown
    assert screen(render_error, InputError("x", why="y\n" * 100)).splitlines()[-1].strip() == "…"


def test_an_error_stays_one_screen_and_commands_no_terminal() -> None:
    shown = screen(render_error, InputError("\x1b[2J[red]" + "x " * 50_000, why="y\x07 " * 50_000, hint=":smile: z"))
    assert len(shown.splitlines()) <= 40
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[red]" in shown
    assert "What to do: :smile: z" in shown


def test_a_pipe_gets_80_columns_and_no_colour() -> None:
    done = run_screens(T4_SCREEN, TERM="xterm-256color")
    text = done.stdout.decode()
    assert done.stderr == b""
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) == 80


def test_columns_sets_the_width_of_a_pipe() -> None:
    text = run_screens(T4_SCREEN, COLUMNS="120").stdout.decode()
    assert 80 < max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("columns", ["", "0", "-5", "wide", "²", "1" * 30])
def test_a_senseless_width_is_survived(columns: str) -> None:
    done = run_screens(T4_SCREEN, COLUMNS=columns)
    assert done.stderr == b""
    assert b"recommended" in done.stdout


def test_no_color_leaves_no_escape_codes_even_in_a_terminal() -> None:
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert b"\x1b[" in run_screens(T4_SCREEN, **terminal).stdout
    assert b"\x1b" not in run_screens(T4_SCREEN, **terminal, NO_COLOR="1").stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_an_encoding_that_lacks_the_characters_gets_lookalikes(encoding: str) -> None:
    for code in (T4_SCREEN, EVERY_OTHER_SCREEN):
        done = run_screens(code, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode(encoding)
    ascii_screen = run_screens(T4_SCREEN, PYTHONIOENCODING="ascii").stdout.decode("ascii")
    utf8_screen = run_screens(T4_SCREEN, PYTHONIOENCODING="utf-8").stdout.decode()
    assert "== recommended ==" in ascii_screen
    assert "####>" in ascii_screen
    assert "?" not in ascii_screen.replace("fits?", "")
    assert [len(line) for line in ascii_screen.splitlines()] == [len(line) for line in utf8_screen.splitlines()]


@pytest.fixture
def traced(small_trace: Trace) -> TracedPlan:
    """The small model's trace on a T4, beside a closed form that is 64 MiB short."""
    target = gpu("t4")
    memory = replace(
        estimate(default_plan("lora", model="phi-3-mini"), MINI.architecture, target),
        allocated_bytes=small_trace.allocated_bytes,
        reserved_bytes=small_trace.expandable.reserved_bytes,
        at=small_trace.at,
        components=dict(small_trace.components),
        moments=dict(small_trace.peaks),
    )
    return TracedPlan(
        plan=Plan(model="small", method="lora", lora=LoraSettings(rank=8), micro_batch=2, seq_len=256),
        model=ModelSource(name="small", label="small\x1b[2J", config={}, origin="small", source="a test"),
        gpu=target,
        memory=memory,
        trace=small_trace,
        fit=check_fit(memory.reserved_bytes, target),
        survival=survival(),
        closed_form=replace(memory, allocated_bytes=memory.allocated_bytes - MIB),
        unknown_to_closed_form="",
        warnings=("torch 9.9 was not tested.",),
    )


def survival(**given: Any) -> Survival:
    return Survival(
        **{"room_bytes": GIB, "released_bytes": 0, "failed_at": None, "requested_bytes": 0, "left_bytes": 0, **given}
    )


@pytest.mark.parametrize("width", [80, 120])
def test_a_trace_shows_peaks_verdict_modules_and_largest_tensors(traced: TracedPlan, width: int) -> None:
    shown = screen(render_trace, traced, width=width)
    run = traced.trace
    assert f"{gib(run.allocated_bytes)} at {run.at}" in shown
    assert f"{gib(run.expandable.reserved_bytes)} in expandable segments" in words(shown)
    assert f"{gib(run.default.reserved_bytes)} by default" in words(shown)
    assert "−1.0 MiB (−" in shown
    assert "Fits." in shown
    assert "Replayed in 1.00 GiB: every request is met." in words(shown)
    assert "! torch 9.9 was not tested." in shown
    assert "model.layers.*.mlp.gate_up_proj" in shown
    assert "base_model" not in shown
    assert "\x1b" not in shown
    tensors = shown.partition("Largest tensors")[2]
    assert "3 of 512.0 KiB · bfloat16 1024 × 256 · weights" in tensors
    assert "_log_softmax" in tensors
    assert "nothing was measured" in words(shown)
    assert [line.startswith(run.at) for line in shown.splitlines() if line.endswith("█ peak")] == [True]
    assert max(map(len, shown.splitlines())) <= width


def test_a_trace_says_what_was_released_and_where_memory_ran_out(traced: TracedPlan) -> None:
    pressed = replace(traced, survival=survival(released_bytes=300 * MIB))
    assert "after 300.0 MiB of cached segments is released" in words(screen(render_trace, pressed))
    full = survival(failed_at="loss backward", requested_bytes=250 * MIB, left_bytes=20 * MIB)
    said = words(screen(render_trace, replace(traced, survival=full)))
    assert "out of memory at loss backward: 250.0 MiB asked for, 20.0 MiB left." in said


def test_a_trace_without_a_gpu_or_a_closed_form_judges_neither(traced: TracedPlan) -> None:
    unknown = replace(traced, fit=None, survival=None, closed_form=None, unknown_to_closed_form="It is a test.")
    shown = screen(render_trace, unknown)
    assert "its." not in shown
    assert "Replayed" not in shown
    assert "closed form says      nothing: It is a test." in shown


def test_an_advice_that_was_traced_says_which_methods_were(t4: Advice) -> None:
    assert " tier " not in screen(render_advice, t4)
    methods = tuple(replace(part, tier="trace") if part.fits else part for part in t4.methods)
    shown = screen(render_advice, replace(t4, methods=methods))
    row = next(line for line in shown.splitlines() if line.startswith(" tier "))
    assert row.split() == ["tier", *(part.tier for part in methods)]
    assert "Tier: trace (" in shown
    assert "estimate for full." in words(shown)


def test_the_command_that_proves_the_plan_follows_the_one_that_writes_it(t4: Advice) -> None:
    lines = screen(render_advice, t4).splitlines()
    assert lines[lines.index(f"  {t4.next_command}") + 1] == "  phi3-advise trace --plan plan.toml"
    nothing = advise(MINI, what_if(None, vram_bytes=2 * GIB))
    assert "phi3-advise trace" not in screen(render_advice, nothing)


def test_lookalikes_take_as_much_room_and_are_ascii() -> None:
    assert all(len(one) == len(other) == 1 and other.isascii() for one, other in _LOOKALIKES.items())


def test_lone_surrogates_do_not_break_a_utf8_screen() -> None:
    done = run_screens(EVERY_OTHER_SCREEN, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr.decode()
    assert "東京" in done.stdout.decode()


def test_the_screens_load_nothing_heavy() -> None:
    code = "import sys; print(sorted({'torch', 'transformers', 'numpy', 'click'} & set(sys.modules)))"
    assert run_screens(code).stdout.strip() == b"[]"
