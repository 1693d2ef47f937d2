"""What the HTML pages have in common: templates, colours, and text that cannot become markup."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from advisor.report.words import clean

_PLACEHOLDER = re.compile(r"\{\{([a-z-]+)\}\}")


def read_part(name: str) -> str:
    """A file of `advisor/report/parts`."""
    return resources.files("advisor.report").joinpath("parts", name).read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Each {{name}} by its value, in one pass: a value's own braces stay what they are."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shown_text(text: str) -> str:
    """Text as it stands in a page: escaped, without control characters."""
    return escape(clean(text))


def breakable(name: str) -> str:
    """The same with places to break the line after each dot."""
    return shown_text(name).replace(".", ".<wbr>")
