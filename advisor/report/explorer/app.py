"""The explorer as a textual app: keys change the plan, and the bars follow."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Static
from textual.worker import Worker, get_current_worker

from advisor.errors import AdvisorError, PlanError
from advisor.explore import KNOBS, Knob, View, recommend_settings, turn
from advisor.plan import Plan
from advisor.profiles import save_plan_file
from advisor.report.explorer import dialogs, panels
from advisor.report.explorer.dialogs import LaunchDialog, SaveDialog
from advisor.report.language import localise
from advisor.report.words import ended

_OTHER_ROWS = 11
"""Rows of the screen that are not bars: heading, verdict, claims, a blank, what is said, the keys."""

_KEYS = {knob.key: knob for knob in KNOBS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the explorer is left with when a plan shall be trained."""

    plan_file: str
    data: str


class Explorer(App[Launch | None]):
    """One plan, its memory, and the keys that change it.

    Args:
        view: what is shown first.
    """

    ENABLE_COMMAND_PALETTE = False
    TITLE = "phi3-advise explore"
    CSS = f"""
    Screen {{ background: ansi_default; color: ansi_default; }}
    #all {{ background: ansi_default; scrollbar-size-vertical: 1; }}
    Static {{ background: ansi_default; color: ansi_default; height: auto; }}
    #heading, #verdict, #claims, #said {{ height: 2; }}
    #knobs {{ height: {len(KNOBS)}; }}
    #claims, #heading, #knobs, #bars {{ text-wrap: nowrap; text-overflow: ellipsis; }}
    #body {{ height: auto; margin-top: 1; }}
    #bars {{ width: 1fr; }}
    .narrow #body {{ layout: vertical; }}
    {dialogs.CSS}
    """

    def __init__(self, view: View) -> None:
        super().__init__(ansi_color=True)
        self.view = view
        self.traced: dict[str, Any] | None = None
        self._selected = 0
        self._trace: Worker[None] | None = None
        self._saved: tuple[Plan, str] | None = None
        self._drawn: dict[str, Text] = {}
        self._beside = panels.knobs_width()
        """Columns of the settings."""
        self._save_dialog, self._launch_dialog = SaveDialog(self._write), LaunchDialog(self._write)

    def compose(self) -> ComposeResult:
        """The parts of the screen, from the top."""
        with VerticalScroll(id="all", can_focus=False):
            yield Static(id="heading")
            yield Static(id="verdict")
            yield Static(id="claims")
            with Horizontal(id="body"):
                yield Static(id="knobs")
                yield Static(id="bars")
            yield Static(id="said")
            yield Static(panels.help_line(), id="help")

    async def on_mount(self) -> None:
        """Draws the first view, and makes the dialogs: that would take half of what a key may."""
        self._draw()
        for dialog in (self._save_dialog, self._launch_dialog):
            self.install_screen(dialog, type(dialog).__name__)
            with self.batch_update():
                await self.push_screen(dialog)
                await self.pop_screen()
        gc.collect()
        gc.freeze()  # or a key now and then waits 25 ms for a look through everything that was imported

    def on_unmount(self) -> None:
        """Gives back to the collector what it passed over meanwhile."""
        gc.unfreeze()

    def on_resize(self, event: events.Resize) -> None:
        """Draws for the new width."""
        narrow = event.size.width < 2 * self._beside - 8
        self.screen.set_class(narrow, "narrow")
        self.query_one("#knobs").styles.width = "100%" if narrow else self._beside
        self._draw(event.size.width, event.size.height)

    def on_click(self, event: events.Click) -> None:
        """A setting that is clicked on takes its next value."""
        if event.widget is not None and event.widget.id == "knobs" and 0 <= event.y < len(KNOBS):
            self._selected = event.y
            self._turn(KNOBS[event.y], 1)

    async def on_key(self, event: events.Key) -> None:
        """Every key but those of the dialogs."""
        if len(self.screen_stack) > 1:
            return
        does = self._keys().get(event.key)
        knob = _KEYS.get(event.key.lower())
        if does is not None:
            does()
        elif knob is not None and event.is_printable:
            self._selected = KNOBS.index(knob)
            self._turn(knob, 1 if event.key.islower() else -1)
        else:
            return
        event.stop()

    def _keys(self) -> dict[str, Callable[[], None]]:
        return {
            "up": lambda: self._select(-1),
            "down": lambda: self._select(1),
            "left": lambda: self._turn(KNOBS[self._selected], -1),
            "right": lambda: self._turn(KNOBS[self._selected], 1),
            "w": self._recommend,
            "t": self._start_trace,
            "s": self._save,
            "l": self._launch,
            "q": lambda: self.exit(None),
            "escape": self._cancel_trace,
        }

    def _select(self, by: int) -> None:
        self._selected = (self._selected + by) % len(KNOBS)
        self._draw()

    def _turn(self, knob: Knob, by: int) -> None:
        self._show(lambda: turn(self.view, knob, by))

    def _recommend(self) -> None:
        self._show(lambda: recommend_settings(self.view), said="The fastest settings of this method that fit.")

    def _show(self, change: Callable[[], View], said: str = "") -> None:
        """What a change comes to; where it is refused, why, and everything stays."""
        try:
            self.view = change()
        except PlanError as error:
            self.say(" ".join(map(ended, _parts(error))), "yellow")
        else:
            self._cancel_trace()
            self.traced = None
            self.say(said)
        self._draw()

    def _draw(self, width: int | None = None, height: int | None = None) -> None:
        """Puts the view into the parts, whose places stay: laying out anew takes longer than all the rest."""
        width, height = width or self.size.width, height or self.size.height
        rows = max(len(KNOBS), height - _OTHER_ROWS)
        beside = width if self.screen.has_class("narrow") else width - self._beside
        self.query_one("#bars").styles.height = rows
        self._put("heading", panels.heading(self.view))
        self._put("verdict", panels.verdict(self.view))
        self._put("claims", panels.claims(self.view, width - 1))
        self._put("knobs", panels.knobs(self.view, self._selected, self._beside))
        self._put("bars", panels.bars(self.view, self.traced, beside - 1, rows))

    def _put(self, name: str, text: Text) -> None:
        """Draws a part again, where it is not what it was."""
        if self._drawn.get(name) != text:
            self._drawn[name] = text
            self.query_one(f"#{name}", Static).update(text, layout=False)

    def say(self, text: str, style: str = "") -> None:
        """Two lines under the settings, in the language of the screens."""
        self._put("said", Text(localise(text), style=style))

    def _start_trace(self) -> None:
        if self._trace is None:
            self._trace = self._run_trace(self.view)

    @work(exclusive=True)
    async def _run_trace(self, view: View) -> None:
        """Traces in a process of its own, so that keys are answered meanwhile."""
        from advisor.profiles import find_model
        from advisor.trace_process import trace_apart

        self.say("Tracing: starting (Esc gives up)")
        try:
            answer = await trace_apart(
                view.plan,
                find_model(view.plan.model),
                view.gpu,
                lambda what: self.say(f"Tracing: {what} (Esc gives up)"),
            )
        except AdvisorError as error:
            self.say(" ".join(_parts(error)), "yellow")
        else:
            self.traced = answer
            self.say("Traced: the installed code run on tensors without storage; nothing was measured.")
            self._draw()
        finally:
            if self._trace is get_current_worker():  # another may have been started since this one was given up
                self._trace = None

    def _cancel_trace(self) -> None:
        if self._trace is not None:
            self._trace.cancel()
            self._trace = None
            self.say("The trace was given up.")

    def _save(self) -> None:
        self._save_dialog.begin()
        self.push_screen(self._save_dialog, self._after_save)

    def _write(self, path: str) -> None:
        """Writes the plan to a new file.

        Raises:
            InputError: the file exists, or cannot be written.
        """
        save_plan_file(self.view.plan, path)
        self._saved = (self.view.plan, path)

    def _after_save(self, path: str | None) -> None:
        if path is not None:
            self.say(f"Saved {path}.", "green")

    def _launch(self) -> None:
        saved = self._saved[1] if self._saved and self._saved[0] == self.view.plan else None
        self._launch_dialog.begin(saved)
        self.push_screen(self._launch_dialog, self._after_launch)

    def _after_launch(self, asked: tuple[str, str] | None) -> None:
        if asked is not None:
            self.exit(Launch(plan_file=asked[0], data=asked[1]))


def _parts(error: AdvisorError) -> list[str]:
    return [part for part in (error.what, error.why, error.hint) if part]
