"""The explorer, driven by its keys without a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from textual.pilot import Pilot
from textual.widgets import Input, Static

from advisor.advise import Request, advise
from advisor.cli import cli
from advisor.cli.explore import first_view, launch
from advisor.cli.train import command as train
from advisor.errors import EnvironmentLacksError
from advisor.explore import KNOBS, View, offers, show
from advisor.fit import explain_fit
from advisor.hardware import what_if
from advisor.profiles import load_gpu, load_model
from advisor.report.explorer.app import Explorer, Launch

Drive = Callable[[Explorer, Pilot[Launch | None]], Coroutine[Any, Any, None]]


@pytest.fixture
def view() -> View:
    return first_view(None, "t4", None)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def driven(view: View, drive: Drive, size: tuple[int, int] = (80, 24)) -> Explorer:
    """The app after it was driven."""
    app = Explorer(view)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await drive(app, pilot)

    asyncio.run(run())
    return app


def after(view: View, *keys: str) -> Explorer:
    async def press(_: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press(*keys)
        await pilot.pause()

    return driven(view, press)


def text_of(app: Explorer, name: str) -> str:
    return str(app.screen.query_one(f"#{name}", Static).render())


def test_it_starts_with_the_recommendation(view: View) -> None:
    advice = advise(load_model("phi-3-mini-4k"), what_if(load_gpu("t4")), Request())
    assert after(view).view.plan == advice.choice.plan


def test_it_says_whether_it_fits_in_the_words_of_the_main_screen(view: View) -> None:
    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        for keys in ((), ("f", "f"), ("g",)):
            await pilot.press(*keys)
            await pilot.pause()
            said = explain_fit(app.view.fit, app.view.memory.at)
            assert said[1:] in text_of(app, "verdict")
            assert ("Fits. " in text_of(app, "verdict")) == app.view.fit.fits

    driven(view, drive)


CHANGED = {
    "model": lambda view: view.model.name,
    "gpu": lambda view: view.gpu.name,
    "rank": lambda view: view.plan.lora.rank,
}


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_every_setting_has_a_key_and_its_capital_goes_back(view: View, knob: Any) -> None:
    if knob.name == "optimizer_in_backward":
        view = first_view(None, "h200", None)
        view = show(view.model, view.gpu, replace(view.plan, micro_batch=1, gradient_accumulation=1))
        assert view.plan.method == "full"
    if knob.name == "attention":
        view = first_view(None, "rtx-4090", None)
    read = CHANGED.get(knob.name, lambda view: getattr(view.plan, knob.name))

    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        before, bars = read(app.view), text_of(app, "claims") + text_of(app, "bars")
        await pilot.press(knob.key)
        await pilot.pause()
        assert read(app.view) != before
        # The next model is the same one for longer texts, packed rows have a mask as padded ones do, and stepping in
        # backward moves no peak that is before backward.
        if knob.name not in ("model", "packing", "optimizer_in_backward"):
            assert text_of(app, "claims") + text_of(app, "bars") != bars
        await pilot.press(knob.key.upper())
        await pilot.pause()
        assert read(app.view) == before
        assert app.view.memory == view.memory

    driven(view, drive)


def test_arrows_choose_and_change(view: View) -> None:
    app = after(view, "down", "down", "down", "right")
    assert app.view.plan.seq_len == 3072
    app = after(view, "down", "down", "down", "left", "up", "up", "up", "up", "right", "left")
    assert app.view.plan.seq_len == 1536


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_every_value_of_every_setting_is_shown_or_refused_with_a_reason(view: View, knob: Any) -> None:
    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        for _ in range(len(offers(view, knob)) + 1):
            before = app.view
            await pilot.press(knob.key)
            await pilot.pause()
            assert app.view is not before or text_of(app, "said").strip()

    driven(view, drive)


def test_a_refused_combination_says_why_and_changes_nothing(view: View) -> None:
    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press("e")
        await pilot.pause()
        assert app.view.plan.attention == "sdpa"
        assert "flash_attention_2 does not run on NVIDIA T4" in text_of(app, "said")

    driven(view, drive)


def test_full_fine_tuning_has_no_rank_and_says_so(view: View) -> None:
    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press("f", "f", "r")
        await pilot.pause()
        assert app.view.plan.method == "full"
        assert "no adapters" in text_of(app, "said")

    driven(view, drive)


def test_a_gpu_without_bfloat16_changes_the_number_formats_and_back(view: View) -> None:
    assert view.plan.autocast == "float16"
    moved = after(view, "g").view
    assert moved.gpu.bfloat16
    assert moved.plan.autocast == "bfloat16"
    assert after(moved, "G").view.plan == view.plan


def test_best_fit_takes_the_settings_that_the_advice_takes(view: View) -> None:
    app = after(view, "f", "w")
    advice = advise(load_model("phi-3-mini-4k"), what_if(load_gpu("t4")), Request())
    assert app.view.plan == advice.of("qlora").plan


@pytest.mark.parametrize("keys", [(), ("f",), ("f", "f"), ("n", "n", "b", "c"), ("g", "r", "o"), ("m", "x", "p")])
def test_the_saved_plan_estimates_to_what_was_shown(view: View, keys: tuple[str, ...], folder: Path) -> None:
    app = after(view, *keys, "s", "enter")
    result = CliRunner().invoke(cli, ["estimate", "--plan", str(folder / "plan.toml"), "--json"])
    memory = json.loads(result.stdout)["memory"]
    shown = app.view.memory
    assert memory["allocated_bytes"] == shown.allocated_bytes
    assert memory["reserved_bytes"] == shown.reserved_bytes
    assert memory["components"] == dict(shown.components)
    assert memory["moments"] == dict(shown.moments)


def test_saving_never_overwrites_but_asks_for_another_name(view: View, folder: Path) -> None:
    (folder / "plan.toml").write_text("mine", encoding="utf-8")

    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press("s")
        await pilot.pause()
        path = app.screen.query_one("#path", Input)
        assert path.value == "plan-2.toml"
        path.value = "plan.toml"
        await pilot.press("enter")
        await pilot.pause()
        assert "exists already" in str(app.screen.query_one(".problem", Static).render())
        path.value = "other.toml"
        await pilot.press("enter")
        await pilot.pause()
        assert "Saved other.toml" in text_of(app, "said")

    driven(view, drive)
    assert (folder / "plan.toml").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["other.toml", "plan.toml"]


@pytest.mark.parametrize("path", ["", "no/such/folder/plan.toml", "[bold]/plan.toml"])
def test_a_name_that_cannot_be_written_is_asked_for_again(view: View, path: str, folder: Path) -> None:
    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press("s")
        await pilot.pause()
        app.screen.query_one("#path", Input).value = path
        await pilot.press("enter")
        await pilot.pause()
        assert path in str(app.screen.query_one(".problem", Static).render())
        await pilot.press("escape")
        await pilot.pause()
        assert len(app.screen_stack) == 1

    driven(view, drive)
    assert list(folder.iterdir()) == []


def test_letters_in_a_dialog_are_text(view: View) -> None:
    app = after(view, "s", "m", "b", "q", "escape")
    assert app.view.plan == view.plan


def test_launching_saves_and_leaves_with_the_plan_and_the_data(view: View, folder: Path) -> None:
    async def drive(_: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press("l", *"my.jsonl".replace(".", "_"), "enter")
        await pilot.pause()

    assert driven(view, drive).return_value == Launch(plan_file="plan.toml", data="my_jsonl")
    assert (folder / "plan.toml").exists()


def test_launching_a_plan_that_was_saved_takes_its_file(view: View, folder: Path) -> None:
    assert after(view, "s", "enter", "l", "enter").return_value == Launch(plan_file="plan.toml", data="")
    assert [path.name for path in folder.iterdir()] == ["plan.toml"]


def test_launching_a_plan_that_was_changed_since_saves_it_again(view: View) -> None:
    assert after(view, "s", "enter", "c", "l", "enter").return_value == Launch(plan_file="plan-2.toml", data="")


@pytest.mark.parametrize("data", ["", "my data.jsonl"])
def test_what_is_launched_is_a_command_that_train_understands(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("advisor.cli.main", started.append)
    launch(Launch(plan_file="plan.toml", data=data))
    program, *words = shlex.split(capsys.readouterr().out)
    assert program == "phi3-advise"
    assert started == ([words] if data else [])
    parsed = train.make_context(words[0], words[1:])
    assert (parsed.params["path"], parsed.params["data"]) == ("plan.toml", data or "train.jsonl")


def test_q_leaves_with_nothing(view: View) -> None:
    assert after(view, "q").return_value is None


async def until(pilot: Pilot[Launch | None], reached: Callable[[], bool]) -> None:
    for _ in range(3000):
        if reached():
            return
        await pilot.pause(0.1)
    raise AssertionError("it never came")


def test_t_traces_while_keys_are_answered_and_shows_what_it_said(view: View) -> None:
    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press("t")
        await until(pilot, lambda: "Tracing: starting" not in text_of(app, "said"))
        assert "Tracing: " in text_of(app, "said")
        await pilot.press("down")
        await until(pilot, lambda: app.traced is not None)
        await pilot.pause()
        assert app.traced is not None
        assert app.traced["tier"] == "trace"
        assert "traced: reserved" in text_of(app, "bars")
        await pilot.press("c")
        await pilot.pause()
        assert "traced" not in text_of(app, "bars")

    driven(view, drive)


@pytest.mark.parametrize("key", ["escape", "b", "q"])
def test_a_trace_that_is_given_up_leaves_no_process(view: View, key: str) -> None:
    def tracing() -> list[psutil.Process]:
        return [
            child for child in psutil.Process().children(recursive=True) if "advisor.trace_process" in child.cmdline()
        ]

    async def drive(_: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press("t")
        await until(pilot, lambda: bool(tracing()))
        await pilot.press(key)
        await until(pilot, lambda: not tracing())

    app = driven(view, drive)
    assert app.traced is None


def test_a_trace_that_fails_says_so(view: View) -> None:
    model = replace(view.model, name="phi-3-mini-4k")
    plan = replace(view.plan, lora=replace(view.plan.lora, target_modules="no_such_module"))

    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        app.view = replace(app.view, model=model, plan=plan)
        await pilot.press("t")
        await until(pilot, lambda: "no_such_module" in text_of(app, "said"))
        assert app.traced is None

    driven(view, drive)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (60, 20), (40, 10), (200, 60)])
def test_every_size_shows_the_verdict_and_80_by_24_shows_all(view: View, size: tuple[int, int]) -> None:
    async def drive(app: Explorer, _: Pilot[Launch | None]) -> None:
        assert app.query_one("#verdict").region.y < size[1]
        if size >= (80, 24):
            assert app.query_one("#help").region.bottom <= size[1]
        for name in ("heading", "claims", "knobs", "bars"):
            lines = text_of(app, name).splitlines()
            if size[0] >= 80:
                assert max(map(len, lines)) <= app.query_one(f"#{name}").region.width

    driven(view, drive, size)


def test_resizing_draws_the_bars_anew(view: View) -> None:
    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        before = len(text_of(app, "claims").splitlines()[0])
        await pilot.resize_terminal(120, 40)
        await pilot.pause()
        assert len(text_of(app, "claims").splitlines()[0]) == before + 40
        assert "Highest in each moment" in text_of(app, "bars")

    driven(view, drive)


def test_a_setting_can_be_clicked(view: View) -> None:
    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.click("#knobs", offset=(3, [knob.name for knob in KNOBS].index("gradient_checkpointing")))
        await pilot.pause()
        assert app.view.plan.gradient_checkpointing != view.plan.gradient_checkpointing

    driven(view, drive)


def test_without_colour_it_still_says_everything(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def drive(app: Explorer, pilot: Pilot[Launch | None]) -> None:
        await pilot.press("f", "f")
        await pilot.pause()
        assert app.no_color
        assert "Does not fit" in text_of(app, "verdict")

    driven(view, drive)


def test_a_gpu_that_only_its_memory_describes_stays_on_the_list() -> None:
    view = first_view(None, None, "12GiB")
    app = after(view, "g", "G")
    assert app.view.gpu == view.gpu
    assert app.view.plan.gpu is None


def test_without_textual_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advisor.cli.explore.find_spec", lambda _: None)
    result = CliRunner().invoke(cli, ["explore", "--gpu", "t4"])
    assert isinstance(result.exception, EnvironmentLacksError)
    assert result.exception.hint == "pip install textual"


def test_without_a_terminal_it_says_so() -> None:
    result = CliRunner().invoke(cli, ["explore", "--gpu", "t4"])
    assert isinstance(result.exception, EnvironmentLacksError)
    assert "terminal" in result.exception.what


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal_it_draws_and_leaves_it_as_it_was() -> None:
    import pty

    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "advisor", "explore", "--gpu", "t4"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    drawn = b""
    while b"step in backward" not in drawn:
        drawn += os.read(leader, 65536)
    os.write(leader, b"q")
    while True:
        try:
            read = os.read(leader, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not read:
            break
        drawn += read
    assert process.wait(timeout=60) == 0
    os.close(leader)
    assert drawn.rindex(b"\x1b[?1049l") > drawn.rindex(b"\x1b[?1049h")
