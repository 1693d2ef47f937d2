"""Writes the pages' outputs, numbers, tables and figure anew: python tests/docs/renew.py [PAGE …]."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]


def main() -> None:
    from figure import FIGURE, draw_figure
    from pages import new_folder, pages, renewed

    named = [Path(name).resolve() for name in sys.argv[1:]]
    kept: dict[Any, Any] = {}
    if not named or FIGURE in named:
        FIGURE.write_text(draw_figure(), encoding="utf-8")
    with tempfile.TemporaryDirectory() as parent:
        for page in pages():
            if named and page not in named:
                continue
            before = page.read_text(encoding="utf-8")
            after = renewed(before, new_folder(Path(parent), kept))
            page.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{page.name}: {'changed' if after != before else 'current'}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
