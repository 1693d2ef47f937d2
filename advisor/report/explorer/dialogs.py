"""The explorer's two questions: where to save a plan, and what to train it on."""

from __future__ import annotations

import os
from collections.abc import Callable

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import Key
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from advisor.errors import InputError
from advisor.report.language import localise, localise_label
from advisor.request import PLAN_FILE

CSS = """
    SaveDialog, LaunchDialog { align: center middle; }
    #dialog { width: 70; max-width: 100%; height: auto; border: solid ansi_default; padding: 0 1; }
    #dialog, #dialog Static { background: ansi_default; color: ansi_default; }
    #dialog Input { background: ansi_default; color: ansi_default; border: none; height: 1; margin-bottom: 1; }
    #dialog .problem { color: ansi_yellow; height: 3; }
"""
"""For the app's own sheet: a screen's would be read when it is first opened."""


def free_name() -> str:
    """`plan.toml`, or the first `plan-2.toml`, `plan-3.toml` … that does not exist."""
    stem, extension = os.path.splitext(PLAN_FILE)
    number, name = 1, PLAN_FILE
    while os.path.lexists(name):
        number += 1
        name = f"{stem}-{number}{extension}"
    return name


def _offer(path: Input) -> None:
    path.value = free_name()
    path.cursor_position = len(path.value)


class SaveDialog(ModalScreen[str | None]):
    """Asks for a file's name until one can be written; answers it, or None.

    Args:
        write: writes the plan to a new file; raises `InputError` where that cannot be.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def compose(self) -> ComposeResult:
        """The question, the name, what was wrong with it."""
        with Vertical(id="dialog"):
            yield Static(localise_label("Save the plan as (Enter saves, Esc leaves it):"))
            yield Input(id="path")
            yield Static(classes="problem")

    def begin(self) -> None:
        """Offers a name that is free now."""
        _offer(self.query_one("#path", Input))
        self.query_one(".problem", Static).update("")

    def on_key(self, event: Key) -> None:
        """Escape leaves."""
        if event.key == "escape":
            event.stop()
            self.dismiss(None)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Tries the name."""
        path = os.path.expanduser(event.value.strip())
        try:
            if not path:
                raise InputError("The file has no name.", hint="Type one.")
            self._write(path)
        except InputError as error:
            self.query_one(".problem", Static).update(_problem(error))
        else:
            self.dismiss(path)


class LaunchDialog(ModalScreen[tuple[str, str] | None]):
    """Asks where to save the plan, unless it is saved already, and for the data; answers both, or None.

    Args:
        write: writes the plan to a new file; raises `InputError` where that cannot be.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._saved: str | None = None
        self._write = write

    def compose(self) -> ComposeResult:
        """The questions, and what was wrong with the answers."""
        with Vertical(id="dialog"):
            yield Static(id="where", markup=False)
            yield Input(id="path")
            yield Static(localise_label("Train on this file, folder or hub id (empty: only print the command):"))
            yield Input(placeholder="train.jsonl", id="data")
            yield Static(localise("Enter leaves the explorer, Esc goes back to it."))
            yield Static(classes="problem")

    def begin(self, saved: str | None) -> None:
        """Asks for the data first: the name of the plan's file is there already.

        Args:
            saved: the file that the plan was saved to as it is; None where it was not.
        """
        self._saved = saved
        where = localise_label("Save the plan as:") if saved is None else localise(f"The plan is in {saved}.")
        self.query_one("#where", Static).update(where)
        path = self.query_one("#path", Input)
        path.display = saved is None
        _offer(path)
        self.query_one(".problem", Static).update("")
        self.query_one("#data", Input).focus()

    def on_key(self, event: Key) -> None:
        """Escape goes back."""
        if event.key == "escape":
            event.stop()
            self.dismiss(None)

    def on_input_submitted(self) -> None:
        """Saves where that is still to be done, and leaves."""
        path = self._saved or os.path.expanduser(self.query_one("#path", Input).value.strip())
        try:
            if not path:
                raise InputError("The file has no name.", hint="Type one.")
            if self._saved is None:
                self._write(path)
        except InputError as error:
            self.query_one(".problem", Static).update(_problem(error))
        else:
            self.dismiss((path, self.query_one("#data", Input).value.strip()))


def _problem(error: InputError) -> str:
    """Brackets in a path are no markup."""
    said = localise(" ".join(part for part in (error.what, error.why, error.hint) if part))
    return said.replace("[", r"\[")
