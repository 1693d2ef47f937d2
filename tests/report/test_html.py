"""The report as text: what it says, what it never says, and where it is written. In a browser: test_html_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from advisor import traced as traced_module
from advisor.advise import Advice, advise
from advisor.cli import cli
from advisor.cli import html as html_command
from advisor.errors import AdvisorError, EnvironmentLacksError, InputError
from advisor.hardware import what_if
from advisor.memory.trace import Allocation, Event
from advisor.plan import plan_to_fields
from advisor.profiles import ModelSource, load_model
from advisor.report.history import COMPONENTS
from advisor.report.html import render_report, write_report
from advisor.report.output import create_file
from advisor.traced import TracedPlan
from advisor.units import GIB, size

# The trace that these and the browser's tests share is made by one worker.
pytestmark = pytest.mark.xdist_group("html")

EVIL = "</script><script>pwned=1</script><img src=x onerror=pwned=1>\x1b{{data}}"
NO_TORCH = EnvironmentLacksError("A trace needs torch, not installed here.", why="it runs", hint="pip install torch")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments], standalone_mode=False)


def text_of(page: str) -> str:
    """What a reader reads, without scripts and styles."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture(scope="module")
def page(small_advice: Advice, small_step: TracedPlan) -> str:
    return render_report(small_advice, small_step)


def test_it_says_the_recommendation_its_reason_and_every_warning(small_advice: Advice, page: str) -> None:
    said = text_of(page)
    assert "Recommended: full fine-tuning" in said
    for text in (*small_advice.warnings, small_advice.next_command, small_advice.proof_command):
        assert text in said


def test_it_asks_for_nothing_and_runs_nothing_but_its_own(page: str) -> None:
    assert not re.findall(r"https?://|//[a-z]", page.replace("// ", ""))
    assert not re.findall(r"<(?:link|img|iframe|object|embed|form|base)\b|@import|\s(?:src|href|style|on\w+)=", page)
    assert re.findall(r"url\(([^)]*)\)", page)
    assert {target[:1] for target in re.findall(r"url\(([^)]*)\)", page)} == {"#"}
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; ")
    for kind, pattern in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        (own,) = re.findall(pattern, page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_plan_can_be_copied_out_and_read_back(small_advice: Advice, page: str) -> None:
    (plan,) = re.findall(r'<pre id="plan-text">(.*?)</pre>', page, flags=re.DOTALL)
    fields = {name: value for name, value in plan_to_fields(small_advice.choice.plan).items() if value is not None}
    assert tomllib.loads(unescape(plan)) == json.loads(json.dumps(fields), object_hook=_without_none)


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {name: inner for name, inner in value.items() if inner is not None}


def test_the_step_peaks_where_the_trace_does(small_step: TracedPlan, page: str) -> None:
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page, flags=re.DOTALL)[0])
    assert data["sizes"][data["peak"]].startswith(f"{size(small_step.trace.step_bytes)} allocated")
    assert {moment.partition(" (")[0] for moment in data["moments"]} >= {"forward", "loss", "loss backward"}
    assert not {"loading", "evaluation", "saving"} & set(data["moments"])
    assert len(data["edges"]) == len(data["sizes"]) + 1 == len(data["largest"]) + 1 == len(data["moment"]) + 1
    assert data["edges"] == sorted(data["edges"])
    assert (data["edges"][0], data["edges"][-1]) == (0, 100)


def test_the_areas_of_a_column_end_where_the_next_begins(page: str) -> None:
    paths = dict(re.findall(r'<path class="c(\d)" d="M([^L]*)L', page))
    assert set(paths) <= {str(index) for index in range(len(COMPONENTS))}
    tops = [float(match) for match in re.findall(r"V([\d.]+)", paths["5"])]
    assert min(tops) >= 0


@pytest.mark.parametrize("place", ["model", "gpu", "warning", "tensor", "error"])
def test_no_name_becomes_markup(small_advice: Advice, small_step: TracedPlan, place: str) -> None:
    advice, step = small_advice, small_step
    outcome: TracedPlan | AdvisorError = step
    if place == "model":
        advice = replace(
            advice, model=replace(advice.model, label=EVIL, name=EVIL), next_command=f"phi3-advise --model '{EVIL}'"
        )
    elif place == "gpu":
        advice = replace(advice, gpu=replace(advice.gpu, name=EVIL))
    elif place == "warning":
        advice = replace(advice, warnings=(EVIL,), reason=EVIL, unlock=EVIL)
    elif place == "tensor":
        event = next(event for event in reversed(step.trace.events) if event.moment == "forward")
        at = step.trace.events.index(event)
        made = Allocation(16 * GIB, (1,), EVIL, EVIL, EVIL, "forward", "activations")
        events = (*step.trace.events[:at], Event(made, False, "forward"), *step.trace.events[at:])
        outcome = replace(step, trace=replace(step.trace, events=events, at=EVIL), warnings=(EVIL,))
    else:
        outcome = EnvironmentLacksError(EVIL, why=EVIL, hint=EVIL)
    page = render_report(advice, outcome)
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "\x1b" not in page
    assert "pwned" in page


def test_without_a_trace_the_page_says_why(small_advice: Advice) -> None:
    page = render_report(small_advice, NO_TORCH)
    said = text_of(page)
    assert "A trace needs torch, not installed here." in said
    assert "pip install torch" in said
    assert 'id="plot"' not in page
    assert '<script type="application/json" id="data">null</script>' in page


def test_where_nothing_fits_each_method_s_reason_is_said() -> None:
    advice = advise(load_model("phi-3-mini"), what_if(vram_bytes=2 * GIB))
    assert advice.recommended is None
    said = text_of(render_report(advice, NO_TORCH))
    assert "Nothing fits" in said
    assert said.count("Out of memory by") == 3
    assert "The plan that misses least" in said
    assert "recommended" not in said.replace("Recommended", "")


def test_a_trace_that_does_not_fit_is_not_kept_quiet(small_advice: Advice, small_step: TracedPlan) -> None:
    assert small_step.fit is not None
    too_much = replace(small_step, fit=replace(small_step.fit, reserved_bytes=3 * GIB))
    assert "By the trace this plan does not fit" in text_of(render_report(small_advice, too_much))


def test_the_page_of_a_large_trace_stays_under_a_megabyte(small_advice: Advice, small_step: TracedPlan) -> None:
    """As many events as Phi-3-medium's, in as many moments, no two tensors alike."""
    events: list[Event] = []
    for index in range(60_000):
        moment = f"backward of layer {index // 1500}" if index else "forward"
        allocation = Allocation(512 * index + 512, (index, 128), "float32", f"layers.{index}", "op", moment, "logits")
        events += [Event(allocation, False, moment), Event(allocation, True, moment)]
    step = replace(small_step, trace=replace(small_step.trace, events=tuple(events)))
    assert len(render_report(small_advice, step).encode()) < 10**6


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_module, "find_spec", lambda _: None)


@pytest.mark.usefixtures("no_torch")
def test_without_torch_the_command_writes_the_page_all_the_same(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    result = run("--gpu", "t4", "--html", str(target), "--json")
    assert result.return_value == 0
    assert json.loads(result.stdout)["recommended"] == "lora"
    assert "shows no step: A trace needs torch" in result.stderr
    assert "A trace needs torch" in text_of(target.read_text())


@pytest.mark.usefixtures("no_torch")
def test_where_there_is_no_gpu_the_page_says_whose_answer_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advisor.cli.common.detect_gpu", lambda _: None)
    target = tmp_path / "report.html"
    assert run("--html", str(target)).return_value == 0
    assert "No GPU was found: this is the answer for a T4" in text_of(target.read_text())


@pytest.mark.usefixtures("no_torch")
def test_the_commands_follow_what_was_saved(tmp_path: Path) -> None:
    target, plan = tmp_path / "report.html", tmp_path / "my plan.toml"
    assert run("--gpu", "t4", "--html", str(target), "--save-plan", str(plan)).return_value == 0
    assert f"phi3-advise trace --plan '{plan}'" in text_of(target.read_text())


@pytest.mark.parametrize("exists", [True, False])
def test_a_file_that_is_there_is_never_overwritten(tmp_path: Path, exists: bool) -> None:
    """A link to nowhere counts: what it names is not ours to make."""
    target = tmp_path / "report.html"
    if exists:
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    result = run("--gpu", "t4", "--html", str(target))
    assert isinstance(result.exception, InputError)
    assert "exists already" in result.exception.what
    assert target.is_symlink() or target.read_text() == "mine"


@pytest.mark.parametrize("words", [["--html", "{}/missing/report.html"], ["--html", "{}"]])
def test_a_path_that_cannot_be_written_is_refused_before_any_trace(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_command, "trace_plan", None)
    result = run("--gpu", "t4", *(word.format(tmp_path) for word in words))
    assert isinstance(result.exception, InputError)


def test_page_and_plan_take_a_file_each(tmp_path: Path) -> None:
    target = str(tmp_path / "one")
    result = run("--gpu", "t4", "--html", target, "--save-plan", target)
    assert isinstance(result.exception, InputError)
    assert "both name" in result.exception.what


def test_a_recipe_has_no_page(tmp_path: Path) -> None:
    result = run("--recipe", "cookbook-full", "--gpu", "t4", "--html", str(tmp_path / "report.html"))
    assert isinstance(result.exception, InputError)
    assert "--html" in result.exception.what


def test_a_plan_that_was_traced_is_not_traced_again(
    tmp_path: Path, small_advice: Advice, small_source: ModelSource, small_step: TracedPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(html_command, "trace_plan", None)
    target = tmp_path / "report.html"
    html_command.write_page(small_advice, small_source, str(target), small_step)
    assert target.read_text() == render_report(small_advice, small_step)


def test_half_a_page_is_not_left(tmp_path: Path, small_advice: Advice, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    with pytest.raises(InputError, match="cannot be written"):
        write_report(small_advice, tmp_path / "missing" / "report.html", NO_TORCH)
    monkeypatch.setattr("builtins.open", _full_disk)
    with pytest.raises(InputError, match="cannot be written"):
        create_file(target, b"page")
    assert not target.exists()


class _FullDisk:
    def __init__(self, path: Path) -> None:
        path.touch()

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, _: bytes) -> int:
        raise OSError(28, "No space left on device")


def _full_disk(path: Path, _: str) -> _FullDisk:
    return _FullDisk(path)


WEIGHTS_OF_LUMINANCE = (0.2126, 0.7152, 0.0722)
CONES = ((0.41222, 0.53633, 0.05145), (0.21190, 0.68070, 0.10740), (0.08830, 0.28172, 0.62998))
OF_CONES = ((0.21045, 0.79362, -0.00407), (1.97800, -2.42859, 0.45059), (0.02590, 0.78277, -0.80868))
# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
VISIONS: Mapping[str, tuple[tuple[float, ...], ...]] = MappingProxyType({
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
})  # fmt: skip


def colours(theme: int) -> dict[str, tuple[float, ...]]:
    """The colours of a theme in linear RGB."""
    css = (Path(traced_module.__file__).parent / "report" / "parts" / "colours.css").read_text()
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", css)
    return {name: _linear(pair[theme]) for name, *pair in pairs}


def _linear(colour: str) -> tuple[float, ...]:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return tuple(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)


def _times(matrix: tuple[tuple[float, ...], ...], vector: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted(_times((WEIGHTS_OF_LUMINANCE,), colour)[0] for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def _oklab(colour: tuple[float, ...]) -> tuple[float, ...]:
    """Björn Ottosson's OKLab."""
    clipped = tuple(min(1.0, max(0.0, part)) for part in colour)
    return _times(OF_CONES, tuple(cone ** (1 / 3) for cone in _times(CONES, clipped)))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_have_the_contrast_that_wcag_asks_for(theme: int) -> None:
    """4.5 for text, 3 for what is not text (WCAG 2.2, AA: 1.4.3 and 1.4.11), on the page and on its bands."""
    known = colours(theme)
    for ground in (known["page"], known["band"]):
        for name in ("text", "quiet", "accent", "limit", "good", "near"):
            assert contrast(known[name], ground) >= 4.5, name
        for name in ("edge", *(f"c{index}" for index in range(8))):
            assert contrast(known[name], ground) >= 3, name


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_components_stay_apart_for_every_colour_vision(theme: int, vision: str) -> None:
    """Distances in OKLab; 0.02 is about what can be told apart side by side."""
    known = colours(theme)
    seen = [_oklab(_times(VISIONS[vision], known[f"c{index}"])) for index in range(8)]
    for one in range(8):
        for other in range(one):
            distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
            assert distance >= (0.15 if one == other + 1 else 0.08) - 0.001, (one, other)
