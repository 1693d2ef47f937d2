"""What the HTML pages have in common: templates, colours, and text that cannot become markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from advisor.report.language import localise, localise_label
from advisor.report.words import clean

_PLACEHOLDER = re.compile(r"""\{\{(?:([a-z-]+)|"([^"{}]+)")\}\}""")


def read_part(name: str) -> str:
    """A file of `advisor/report/parts`."""
    return resources.files("advisor.report").joinpath("parts", name).read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Each {{name}} by its value, each {{"text"}} by itself in the page's language.

    In one pass: a value's own braces stay what they are.
    """

    def put(match: re.Match[str]) -> str:
        return values[match[1]] if match[1] else label(" ".join(match[2].split()))

    return _PLACEHOLDER.sub(put, template)


def policy(style: str, script: str) -> str:
    """A page's content security policy: no request at all, and of styles and scripts only the page's own."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shown_text(text: str) -> str:
    """Text as it stands in a page: escaped, without control characters."""
    return escape(clean(text))


def said(text: str) -> str:
    """Sentences in the page's language."""
    return shown_text(localise(text))


def label(text: str) -> str:
    """The same of a heading or a cell, whose words are all this program's own."""
    return shown_text(localise_label(text))


def breakable(name: str) -> str:
    """The same with places to break the line after each dot."""
    return shown_text(name).replace(".", ".<wbr>")
