"""The answer as one HTML page: it carries everything it shows, asks the network for nothing, and opens from disk."""

from __future__ import annotations

from advisor.report.html.report import render_report, write_report

__all__ = ["render_report", "write_report"]
