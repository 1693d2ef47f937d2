"""The report in a browser: what it draws, what it asks for, and whether everybody can use it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from advisor.advise import Advice, advise
from advisor.errors import EnvironmentLacksError
from advisor.hardware import what_if
from advisor.profiles import ModelSource, load_gpu, load_model
from advisor.report.html import render_report
from advisor.report.language import speaking
from advisor.report.timeline import render_timeline
from advisor.traced import TracedPlan
from advisor.units import GIB, gib

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# The trace that these and the other tests of the report share is made by one worker, which has the one browser.
pytestmark = pytest.mark.xdist_group("html")

PHONE = {"width": 360, "height": 740}
DESK = {"width": 1200, "height": 900}

NO_TORCH = EnvironmentLacksError("A trace needs torch, not installed here.", hint="pip install torch")
EVIL = "<script>pwned=1</script><img src=https://example.com/x onerror=pwned=1>"

SHIFTS = """
() => {
  window.shifts = [];
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) window.shifts.push(entry.value);
  }).observe({ type: "layout-shift", buffered: true });
}
"""


@dataclass(slots=True)
class Opened:
    """A page, and everything that it said or asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """What was not let out, and by what."""


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; where there is none, these tests are skipped, but in CI there has to be one."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("There is no chromium: apt-get install chromium.")
        pytest.skip("there is no chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """`opened(text, viewport=PHONE, color_scheme="dark")` opens a page from disk."""
    contexts = []

    def open_page(text: str, **options: Any) -> Opened:
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(**{"viewport": DESK, **options})
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        context.on("request", lambda request: found.asked.append(request.url))
        context.on("requestfailed", lambda request: found.refused.append(f"{request.failure} {request.url}"))
        found.page.goto(path.as_uri())
        return found

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def text(small_advice: Advice, small_step: TracedPlan) -> str:
    return render_report(small_advice, small_step)


@pytest.fixture(scope="module")
def pages(text: str, small_advice: Advice, small_step: TracedPlan) -> dict[str, str]:
    """Every kind of page there is."""
    mini = load_model("phi-3-mini")
    long = "a-model-with-a-name-that-nobody-would-want-to-read-aloud-or-to-break"
    with speaking("ja"):
        in_japanese = {
            "a step in Japanese": render_report(small_advice, small_step),
            "three methods in Japanese": render_report(advise(mini, what_if(load_gpu("t4"))), NO_TORCH),
        }
    named = replace(
        small_advice,
        model=replace(small_advice.model, label=long),
        gpu=replace(small_advice.gpu, name="NVIDIA_" + "X" * 60),
        next_command=f"phi3-advise --model /a/{'very_' * 20}long/path/config.json --save-plan plan.toml",
        warnings=("W" * 90,),
    )
    return {
        "a step": text,
        "no step": render_report(small_advice, NO_TORCH),
        "nothing fits": render_report(advise(mini, what_if(vram_bytes=2 * GIB)), NO_TORCH),
        "three methods": render_report(advise(mini, what_if(load_gpu("a100-80gb"))), NO_TORCH),
        "long names": render_report(named, small_step),
        **in_japanese,
    }


def check_quiet(found: Opened) -> None:
    assert found.said == []
    assert [url for url in found.asked if not url.startswith("file://")] == []
    assert len(found.asked) == 1


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_drawn_without_an_error_or_a_request(
    opened: Open, pages: dict[str, str], scheme: str, javascript: bool
) -> None:
    for name, text in pages.items():
        found = opened(text, color_scheme=scheme, java_script_enabled=javascript)
        assert found.page.locator("h1").is_visible(), name
        assert found.page.locator(".bar g rect").count() >= 9, name
        check_quiet(found)
        if name.startswith("a step"):
            check_chart(found.page, javascript)


def check_chart(page: Page, javascript: bool) -> None:
    assert page.locator("#plot path.reserved").is_visible()
    heights = page.locator("#plot path").evaluate_all("all => all.map(path => path.getBoundingClientRect().height)")
    assert len(heights) >= 5
    assert max(heights) > 50
    assert page.locator("#tensors li").count() >= 3
    assert page.locator("#tensors li").first.is_visible()
    assert page.locator(".scripted").first.is_visible() == javascript


ROWS = {
    **{name: f"memory.components.{name}" for name in ("weights", "quantization", "adapters", "gradients")},
    **{name: f"memory.components.{name}" for name in ("optimizer", "activations", "logits", "workspace")},
    "peak allocated": "memory.allocated_bytes",
    "peak reserved": "memory.reserved_bytes",
    "context": "memory.context_bytes",
    "margin": "margin_bytes",
    "needed": "needed_bytes",
    "peak at": "memory.at",
}


def looked_up(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value[name]
    return value


def test_the_numbers_are_those_of_the_json(browser: Browser, tmp_path: Path, small_source: ModelSource) -> None:
    """One command writes both; the step's numbers are those of the trace, by its own command."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_source.config))
    target, plan = tmp_path / "report.html", tmp_path / "plan.toml"
    advisor = [sys.executable, "-m", "advisor"]
    words = ["--model", str(config), "--gpu", "t4", "--free", "9GiB", "--html", str(target), "--save-plan", str(plan)]
    done = subprocess.run([*advisor, *words, "--json"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert f"{target} is written" in done.stderr
    page = browser.new_page()
    page.goto(target.as_uri())

    rows = {row[0]: row[1:] for row in page.evaluate(READ_TABLE, "table.memory")}
    assert len(rows) == len(ROWS) + 3
    for label, path in ROWS.items():
        for method, (shown, exact) in zip(answer["methods"], rows[label], strict=True):
            expected = looked_up(method, path)
            if isinstance(expected, str):
                assert shown == expected
                continue
            assert int(exact) == expected, (label, method["method"])
            assert shown in {gib(expected).removesuffix(" GiB"), "–" if expected == 0 else "< 0.01"}
    gpu = answer["gpu"]
    for label, expected in (("other processes", gpu["others_bytes"]), ("usable", gpu["total_bytes"])):
        assert {int(exact) for _, exact in rows[label]} == {expected}

    bars = page.locator(".method").all()
    for bar, method in zip(bars, answer["methods"], strict=True):
        said = bar.text_content() or ""
        assert gib(method["needed_bytes"]) in said
        assert ("recommended" in said) == (method["method"] == answer["recommended"])
        spans = bar.locator("g rect").evaluate_all(WIDTHS)
        scale = sum(spans) / method["needed_bytes"]
        weights = method["memory"]["components"]["weights"] or method["memory"]["components"]["quantization"]
        assert spans[0] == pytest.approx(weights * scale, abs=0.01)  # percent, of three decimals
    assert answer["reason"].lower() in (page.locator(".answer").text_content() or "").lower()
    for warning in answer["warnings"]:
        assert warning in (page.locator(".warnings").text_content() or "")
    assert page.locator("#command-1").text_content() == answer["next_command"]
    assert page.locator("#plan-text").text_content() == plan.read_text().rstrip("\n")

    traced = json.loads(
        subprocess.run([*advisor, "trace", "--plan", plan, "--json"], capture_output=True, text=True, check=True).stdout
    )
    peaks = [int(value) for value in page.locator(".moments data").evaluate_all("all => all.map(one => one.value)")]
    assert max(peaks) == traced["memory"]["allocated_bytes"]
    assert gib(traced["memory"]["reserved_bytes"]) in (page.locator("#step + p").text_content() or "")
    page.close()


WIDTHS = "rects => rects.map(rect => rect.width.baseVal.valueInSpecifiedUnits)"
READ_TABLE = """
(table) => [...document.querySelectorAll(`${table} tbody tr`)].map((row) => [
  row.querySelector("th").textContent.trim(),
  ...[...row.querySelectorAll("td")].map((cell) => [cell.textContent.trim(), cell.querySelector("data")?.value]),
])
"""

FOCUSED = """
() => {
  const here = document.activeElement;
  const inside = here.matches(".moment") ? here.querySelector("rect") : here;
  const shown = here.matches("[type=radio]") ? here.parentElement : inside;
  const style = getComputedStyle(shown);
  return {
    name: here.id || here.dataset.copy || here.getAttribute("aria-label") || here.tagName,
    visible: here.matches(":focus-visible") && (style.outlineStyle !== "none" || style.strokeWidth === "3px"),
    moment: document.getElementById("moment").textContent,
    box: shown.getBoundingClientRect().toJSON(),
    height: innerHeight,
  };
}
"""


def test_the_keyboard_reaches_everything_and_shows_where_it_is(opened: Open, text: str) -> None:
    page = opened(text).page
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        stops.append(page.evaluate(FOCUSED))
    assert all(stop["visible"] for stop in stops), [stop["name"] for stop in stops if not stop["visible"]]
    assert all(stop["box"]["bottom"] > 0 and stop["box"]["top"] < stop["height"] for stop in stops)
    names = [stop["name"] for stop in stops]
    assert {"theme-auto", "command-1", "command-2", "slider", "to-peak", "plan-text"} <= set(names)
    operable = page.locator("button, input:not([type=radio]), [tabindex], a[href], summary").count()
    assert len(names) == len(set(names)) == operable + 1, "the radio buttons are one stop"
    moments = {stop["name"]: stop["moment"] for stop in stops if ": highest " in stop["name"]}
    assert len(moments) == page.locator(".moments tbody tr").count()
    for name, shown in moments.items():
        allocated = name.partition(": highest ")[2].partition(" allocated")[0]
        assert f": {allocated} allocated" in shown
        assert shown.startswith(name.split(",")[0].split(":")[0].split(" (")[0].replace("layer backward", "backward"))


def test_arrows_move_through_the_step_and_change_the_theme(opened: Open, text: str) -> None:
    page = opened(text).page
    page.focus("#slider")
    page.keyboard.press("Home")
    first = page.locator("#moment").text_content() or ""
    assert first.startswith("forward")
    assert page.locator("#slider").get_attribute("aria-valuetext") == first
    page.keyboard.press("End")
    assert (page.locator("#moment").text_content() or "").startswith("optimizer step")
    page.click("#to-peak")
    peak = page.locator("#moment").text_content()
    assert peak != first
    page.focus("#theme-auto")
    page.keyboard.press("ArrowRight")
    assert page.locator("#theme-light").is_checked()


def test_the_pointer_shows_the_largest_tensors_of_where_it_is(opened: Open, text: str) -> None:
    page = opened(text).page
    page.locator("#plot").scroll_into_view_if_needed()
    shown = set()
    for moment in page.locator(".moment").all():
        box = moment.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        heading = page.locator("#moment").text_content() or ""
        label = moment.get_attribute("aria-label") or ""
        assert heading.split(" (")[0].split(":")[0].split(" of layer")[0] in label
        shown.add((heading, page.locator("#tensors").inner_text()))
    assert len(shown) == page.locator(".moment").count()


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_no_page_scrolls_sideways(opened: Open, pages: dict[str, str], width: int) -> None:
    for name, text in pages.items():
        page = opened(text, viewport={"width": width, "height": 740}).page
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        beyond = page.evaluate(BEYOND, width)
        assert beyond == [], name


@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_timeline_does_not_scroll_sideways_at_the_narrowest(
    opened: Open, small_step: TracedPlan, language: str
) -> None:
    with speaking(language):
        text = render_timeline(small_step.trace, title="small")
    widest = re.sub(r"(<td[^>]*>)([\d.,]+ [KMG]?i?B)?</td>", r"\g<1>192.1 MiB</td>", text)
    page = opened(widest, viewport={"width": 320, "height": 740}, java_script_enabled=False).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


BEYOND = """
(width) => [...document.querySelectorAll("body *:not(script, style, svg.bar *)")]
  .filter((node) => node.getClientRects().length && node.getBoundingClientRect().right > width + 1)
  .map((node) => node.outerHTML.slice(0, 80))
"""


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_ever_moves(opened: Open, text: str, viewport: dict[str, int]) -> None:
    """Neither while the page loads, nor while the pointer, the keyboard, the buttons and the themes are used."""
    page = opened(text, viewport=viewport).page
    page.evaluate(SHIFTS)
    page.locator("#plot").scroll_into_view_if_needed()
    box = page.locator("#plot").bounding_box()
    assert box is not None
    before = page.evaluate("document.documentElement.scrollHeight")
    for step in range(0, 101, 4):
        page.mouse.move(box["x"] + box["width"] * step / 100, box["y"] + 100)
    page.wait_for_timeout(600)  # what moves after that is not excused by the input before it
    page.click("[data-copy=plan-text]")
    page.locator("label:has(#theme-dark)").click()
    page.locator("label:has(#theme-light)").click()
    page.wait_for_timeout(2200)  # "Copied" turns back
    assert page.evaluate("document.documentElement.scrollHeight") == before
    assert sum(page.evaluate("window.shifts")) == 0


GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_the_theme_follows_the_system_until_somebody_chooses(opened: Open, text: str, javascript: bool) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        page = opened(text, color_scheme=scheme, java_script_enabled=javascript).page
        grounds[scheme] = page.evaluate(GROUND)
        for chosen in ("dark", "light"):
            page.locator(f"label:has(#theme-{chosen})").click()
            grounds[scheme, chosen] = page.evaluate(GROUND)
    assert grounds["light"] == grounds["light", "light"] == grounds["dark", "light"] == "rgb(255, 255, 255)"
    assert grounds["dark"] == grounds["light", "dark"] == grounds["dark", "dark"] == "rgb(20, 23, 27)"


@pytest.mark.parametrize("allowed", [True, False])
def test_plan_and_command_are_copied(opened: Open, text: str, allowed: bool) -> None:
    """By the clipboard's interface, or, where that is refused, the old way."""
    page = opened(text).page
    page.evaluate(KEEP_COPIES if allowed else REFUSE_COPIES)
    for name in ("plan-text", "command-1"):
        page.click(f"[data-copy={name}]")
        expected = page.locator(f"#{name}").text_content()
        page.wait_for_function("window.copied !== undefined")
        assert page.evaluate("window.copied") == expected
        assert page.locator("#said").text_content() == "Copied"
        page.evaluate("window.copied = undefined")


KEEP_COPIES = """
() => Object.defineProperty(navigator, "clipboard", { value: { writeText: async (text) => { window.copied = text; } } })
"""
REFUSE_COPIES = """
() => {
  Object.defineProperty(navigator, "clipboard", { value: { writeText: async () => { throw new Error("refused"); } } });
  document.addEventListener("copy", () => { window.copied = String(getSelection()); });
}
"""


def test_a_name_is_text_whatever_is_in_it(opened: Open, small_advice: Advice, small_step: TracedPlan) -> None:
    advice = replace(
        small_advice,
        model=replace(small_advice.model, label=EVIL),
        gpu=replace(small_advice.gpu, name=EVIL),
        warnings=(EVIL,),
        next_command=f"phi3-advise --model '/models/{EVIL}/config.json'",
    )
    found = opened(render_report(advice, replace(small_step, warnings=(EVIL,))))
    assert found.page.evaluate("window.pwned") is None
    assert found.page.locator("img").count() == 0
    assert EVIL in (found.page.locator("h1").text_content() or "")
    check_quiet(found)


def test_the_policy_stops_what_is_not_the_page_s_own(opened: Open, text: str) -> None:
    """Were a name ever to become markup, it would neither run nor load."""
    evil = "<script>pwned=1</script><img src='https://example.com/x' onerror='pwned=1'><p style='color:red'>"
    found = opened(text.replace("<main>", f"<main>{evil}", 1))
    assert found.page.evaluate("window.pwned") is None
    assert found.refused == ["csp https://example.com/x"]
    assert len(found.said) >= 3


def test_the_page_says_what_language_it_is_in_and_heads_its_sections(
    opened: Open, text: str, small_advice: Advice, small_step: TracedPlan
) -> None:
    page = opened(text).page
    assert page.locator("html").get_attribute("lang") == "en"
    with speaking("ja"):
        japanese = opened(render_report(small_advice, small_step)).page
    assert japanese.locator("html").get_attribute("lang") == "ja"
    assert "推薦：" in (japanese.locator("h2").first.text_content() or "")
    japanese.click("[data-copy=plan-text]")
    japanese.wait_for_function("document.getElementById('said').textContent")
    assert (japanese.locator("#said").text_content() or "").startswith(("コピーしました", "選択しました。"))
    assert page.locator("h1").count() == 1
    for section in page.locator("main > section").all():
        assert section.get_attribute("aria-labelledby") or section.get_attribute("aria-label")
    assert page.evaluate(UNNAMED) == []


UNNAMED = """
() => [...document.querySelectorAll("svg:not([aria-hidden], svg svg), button, input")]
  .filter((node) => !(node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim()))
  .map((node) => node.outerHTML.slice(0, 80))
"""
