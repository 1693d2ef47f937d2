"""What a person is shown: every answer as one screen, at 80 columns and wider, in colour and without."""

from __future__ import annotations

from advisor.report.terminal.advice import render_advice
from advisor.report.terminal.console import make_console
from advisor.report.terminal.error import render_error
from advisor.report.terminal.estimate import render_estimate
from advisor.report.terminal.explain import render_explain
from advisor.report.terminal.lists import render_models, render_survey
from advisor.report.terminal.merge import render_merge_needs, render_merged
from advisor.report.terminal.recipe import render_recipe
from advisor.report.terminal.trace import render_trace

__all__ = [
    "make_console",
    "render_advice",
    "render_error",
    "render_estimate",
    "render_explain",
    "render_merge_needs",
    "render_merged",
    "render_models",
    "render_recipe",
    "render_survey",
    "render_trace",
]
