"""The explorer in Japanese, and its dialogs when they are opened a second time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from report.left_over import JAPANESE, left_in_english
from rich.cells import cell_len
from textual.widgets import Input, Static

from advisor.cli.explore import first_view
from advisor.explore import KNOBS
from advisor.report.explorer import panels
from advisor.report.explorer.app import Explorer
from advisor.report.language import speaking

PARTS = ("heading", "verdict", "claims", "knobs", "bars", "said", "help")


def shown(app: Explorer) -> list[str]:
    return "\n".join(str(app.screen.query_one(f"#{name}", Static).render()) for name in PARTS).splitlines()


def test_the_screen_is_in_japanese_and_in_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def drive() -> None:
        app = Explorer(first_view(None, "t4", None))
        async with app.run_test(size=(80, 30)) as pilot:
            await pilot.pause()
            for keys in ((), ("f", "f"), ("r",), ("w",), ("g",)):
                await pilot.press(*keys)
                await pilot.pause()
                lines = shown(app)
                names = {app.view.gpu.name, app.view.model.label}
                assert [line for line in lines if left_in_english(line) and not any(n in line for n in names)] == []
                knobs = app.screen.query_one("#knobs", Static)
                assert {cell_len(line) for line in str(knobs.render()).splitlines()} == {panels.knobs_width() - 1}
                bars = str(app.screen.query_one("#bars", Static).render()).splitlines()
                assert max(map(cell_len, bars)) <= 80 - panels.knobs_width()
            assert JAPANESE.search("".join(lines))

    with speaking("ja"):
        asyncio.run(drive())


def test_every_setting_has_a_japanese_name_and_room_for_its_value() -> None:
    with speaking("ja"):
        lines = str(
            panels.knobs(first_view("phi-3-medium-4k", "a100-40gb", None), 0, panels.knobs_width())
        ).splitlines()
    assert len(lines) == len(KNOBS)
    assert all(JAPANESE.search(line) or "GPU" in line for line in lines)
    assert any(line.rstrip().endswith("phi-3-medium-4k") for line in lines)


@pytest.mark.parametrize("key", ["s", "l"])
def test_a_dialog_that_is_opened_again_offers_what_is_free_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    app = Explorer(first_view(None, "t4", None))

    async def drive() -> None:
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            await pilot.press(key)
            await pilot.pause()
            app.screen.query_one("#path", Input).value = "no/such/folder/plan.toml"
            await pilot.press("enter")
            await pilot.pause()
            assert "cannot be written" in str(app.screen.query_one(".problem", Static).render())
            await pilot.press("escape")
            (tmp_path / "plan.toml").touch()
            await pilot.press(key)
            await pilot.pause()
            assert app.screen.query_one("#path", Input).value == "plan-2.toml"
            assert str(app.screen.query_one(".problem", Static).render()) == ""

    asyncio.run(drive())
