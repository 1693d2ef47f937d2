"""The page is parsed as a browser would, and its data are held against the trace."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.left_over import left_in_english

from advisor import units
from advisor.errors import InputError
from advisor.memory.trace import Allocation, Event, Trace
from advisor.report.language import speaking
from advisor.report.timeline import COMPONENTS, write_timeline
from advisor.units import MIB


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "input", "wbr"}:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif "tbody" in self._open:
            self.rows[-1][-1] += data
        elif inside != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.scripts[0])
        return loaded


def written(trace: Trace, folder: Path, **options: Any) -> str:
    write_timeline(trace, folder / "page.html", **{"title": "small", **options})
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(small_trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(small_trace, tmp_path_factory.mktemp("timeline"))


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_data_add_up_to_the_peak(small_trace: Trace, page: Page) -> None:
    data = page.data
    peak = data["peak"]
    totals = [sum(column) for column in zip(*data["allocated"], strict=True)]
    assert totals[peak] == max(totals) == small_trace.allocated_bytes
    at_peak = {name: column[peak] for name, column in zip(data["components"], data["allocated"], strict=True)}
    assert {name: size for name, size in at_peak.items() if size} == dict(small_trace.components)


def test_the_reserved_line_peaks_at_what_is_reserved(small_trace: Trace, page: Page) -> None:
    assert max(page.data["reserved"]) == small_trace.reserved_bytes
    assert page.data["failed"] is None


def test_every_event_belongs_to_a_moment_and_a_step(small_trace: Trace, page: Page) -> None:
    spans = page.data["spans"]
    assert sum(span["events"] for span in spans) == len(small_trace.events)
    assert sum(span["points"] for span in spans) == len(page.data["event"])
    assert [span["moment"] for span in spans if span["step"] == 0] == ["loading"]
    for step in (1, 2):
        moments = [span["moment"] for span in spans if span["step"] == step]
        assert moments[:3] == ["forward", "loss", "loss backward"]
        layers = [moment for moment in moments if moment.startswith("backward of layer")]
        assert layers == [f"backward of layer {layer}" for layer in (2, 1, 0)]
        assert moments[-1] == ("evaluation" if step == 2 else "optimizer step")


def test_each_point_is_the_highest_of_its_events(small_trace: Trace, page: Page) -> None:
    data = page.data
    totals = [sum(column) for column in zip(*data["allocated"], strict=True)]
    by_moment: dict[str, int] = {}
    start = 0
    for span in data["spans"]:
        highest = max(totals[start : start + span["points"]])
        by_moment[span["moment"]] = max(by_moment.get(span["moment"], 0), highest)
        start += span["points"]
    assert by_moment == dict(small_trace.moments)


def test_the_largest_tensors_of_the_loss_are_logits(page: Page) -> None:
    data = page.data
    shown = [data["tensors"][index] for index in data["largest"][data["peak"]]]
    assert [row[0] * row[1] for row in shown] == sorted((row[0] * row[1] for row in shown), reverse=True)
    # cuBLAS's workspaces are larger than this model's logits.
    rows = [row for row in shown if data["components"][row[2]] != "workspace"]
    number, size, component, described, _, operation = rows[0]
    assert data["components"][component] == "logits"
    assert described.endswith("× 4096")
    assert number * size >= 4 * MIB
    assert operation.startswith("aten.")


def test_the_table_lists_everything_alive_at_the_peak(small_trace: Trace, page: Page) -> None:
    rows = [row for row in page.rows if len(row) == 9 and row[0]]
    assert sum(int(row[1]) for row in rows) <= len(small_trace.largest)
    largest = small_trace.largest[0]
    shape = " × ".join(map(str, largest.shape))
    assert any(row[2:5] == [units.size(largest.nbytes), shape, largest.dtype] for row in rows)
    layers = [row for row in rows if ".layers.*." in row[6] and row[5] == "weights"]
    assert {row[1] for row in layers} == {"3"}


def test_tables_have_scoped_headers(page: Page) -> None:
    headers = [attributes for tag, attributes in page.elements if tag == "th"]
    assert headers
    assert all(attributes.get("scope") in {"col", "row"} for attributes in headers)
    assert ("html", {"lang": "en"}) in page.elements


def test_nothing_outside_the_page_is_asked_for(text: str, page: Page) -> None:
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not [tag for tag, attributes in page.elements if {"src", "href", "action"} & attributes.keys()]
    assert not [tag for tag, _ in page.elements if tag in {"link", "img", "iframe"}]
    assert "url(" not in text
    assert "@import" not in text
    policies = [attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'; ")
    assert "unsafe" not in str(policies[0])
    for kind, pattern in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        (own,) = re.findall(pattern, text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in str(policies[0])


def test_the_page_is_in_the_language_that_was_asked_for(small_trace: Trace, tmp_path: Path) -> None:
    with speaking("ja"):
        page = Page(written(small_trace, tmp_path))
    assert ("html", {"lang": "ja"}) in page.elements
    assert "割り当て" in page.text
    assert page.data["words"]["step"] == "ステップ {0}"
    assert {span["moment"] for span in page.data["spans"]} >= {"順伝播", "層 2 の逆伝播", "オプティマイザの更新"}
    cells = [cell for row in page.rows for cell in row if not re.search(r"\w\.\w", cell)]
    assert [said for said in (page.text, *cells) if left_in_english(said)] == []
    assert not {"tensors", "backward", "thread", "peak"} & set(re.findall(r"\w+", " ".join((page.text, *cells))))


def test_a_page_that_is_there_is_not_overwritten(small_trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        written(small_trace, tmp_path)
    assert (tmp_path / "page.html").read_text() == "mine"


def test_names_cannot_become_markup(small_trace: Trace, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x>{{data}}"
    allocation = Allocation(16 * MIB, (16 * MIB,), evil, evil, evil, "forward", "activations")
    events = (*small_trace.events, Event(allocation, False, "forward"))
    trace = replace(small_trace, events=events, largest=(allocation, *small_trace.largest), at=evil)
    page = Page(written(trace, tmp_path, title=evil))
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert page.text.count(evil) >= 2
    assert any(evil in str(tensor) for tensor in page.data["tensors"])


def test_a_gpu_that_is_too_small_is_shown_to_be(small_trace: Trace, tmp_path: Path) -> None:
    limit = small_trace.allocated_bytes - 4 * MIB
    page = Page(written(small_trace, tmp_path, gpu_total_bytes=limit))
    data = page.data
    assert data["gpu_total"] == limit
    assert data["failed"]["bytes"] > 0
    drawn = [size for size in data["reserved"] if size is not None]
    assert max(drawn) <= limit
    assert len(drawn) < len(data["reserved"])
    assert "Out of memory" in page.text


def test_components_are_all_that_a_trace_knows(small_trace: Trace) -> None:
    assert set(small_trace.components) <= set(COMPONENTS)
    assert len(set(COMPONENTS)) == 8


def test_the_page_of_a_large_trace_stays_small(small_trace: Trace, tmp_path: Path) -> None:
    """As many events as Phi-3-medium's, in as many moments."""
    events: list[Event] = []
    for index in range(30_000):
        moment = f"backward of layer {index // 500}"
        allocation = Allocation(512 * index + 512, (index, 128), "float32", f"layers.{index}", "op", moment, "logits")
        events += [Event(allocation, False, moment), Event(allocation, True, moment)]
    text = written(replace(small_trace, events=tuple(events)), tmp_path)
    assert len(text) < 10**6
    assert len(Page(text).data["event"]) <= 4000
