"""The README and docs/ say what the program does: see pages.py for how."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import pages
from figure import FIGURE

PAGES = pages.pages()
LINKED = [*PAGES, *(pages.ROOT / "docs" / name for name in pages.ELSEWHERE)]
NAMES = [str(page.relative_to(pages.ROOT)) for page in PAGES]
MEND = "if the program is right, write the pages anew: python tests/docs/renew.py"


@pytest.fixture(scope="session")
def kept() -> pages.Kept:
    return {}


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.xdist_group(f"docs of {page.name}")) for page in PAGES], ids=NAMES
)
def test_commands_run_and_say_what_the_page_says(page: Path, parent: Path, kept: pages.Kept) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.renewed(text, pages.new_folder(parent, kept)).splitlines() == text.splitlines(), MEND


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_is_one_that_the_program_parses(page: Path) -> None:
    from advisor.cli import cli

    text = page.read_text(encoding="utf-8")
    for arguments in [*pages.parsed_commands(text), *pages.commands_in_text(text)]:
        name, command, rest = "phi3-advise", cli, list(arguments)
        if arguments and not arguments[0].startswith("-"):
            name, command, rest = cli.resolve_command(click.Context(cli, info_name=name), arguments)
        command.make_context(name, rest, resilient_parsing=pages.is_a_name(arguments))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_number_with_a_unit_is_without_a_run_or_a_source(page: Path) -> None:
    assert pages.unchecked_numbers(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """From the root of the repository, where the reader of a page types."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/.-])((?:advisor|docs|profiles|tests)/[\w./-]*\w/?)(?![\w<*…])", text):
        assert (pages.ROOT / path).exists(), path


@pytest.mark.parametrize("page", LINKED, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if heading:
            assert heading in _anchors(path.read_text(encoding="utf-8")), target


def _anchors(text: str) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_figure_is_that_of_a_trace_today() -> None:
    drawn = subprocess.run(
        [sys.executable, str(pages.ROOT / "tests" / "docs" / "figure.py")],
        env={**os.environ, "PYTHONPATH": str(pages.ROOT)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    ).stdout
    assert drawn == FIGURE.read_text(encoding="utf-8"), MEND


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It takes 9.91 GiB.", 1),
        ("約 11.24 GiB です。", 1),
        ("It takes <!-- t4: memory.total_bytes -->9.91 GiB<!-- -->.", 0),
        ("Micro-batch 4, rank 16, two cards.", 0),
        ("```\nneeds 9.91 GiB\n```", 0),
        ("It speeds up by 12 %, and by 20%.", 2),
        ("Sixteen are 16 bytes a parameter; 1 個 8 バイト", 2),
    ],
)
def test_a_number_in_the_text_needs_a_run(text: str, found: int) -> None:
    assert len(pages.unchecked_numbers(text)) == found


def test_commands_in_the_text_are_found() -> None:
    text = "Run `phi3-advise models`, or `phi3-advise\ngpus --json`.\n```\nphi3-advise doctor `x`\n```\n"
    text += "`phi3-advise --x …`"
    assert pages.commands_in_text(text) == [["models"], ["gpus", "--json"]]


def test_numbers_are_divided_and_added() -> None:
    answer = {"a": 6, "b": {"c": 2}, "d": 4}
    assert pages._written(answer, "a + b.c / d") == "2"
    assert pages._written(answer, "a + d | text") == "10.0"


def test_an_output_is_renewed_between_its_ellipses() -> None:
    shown = ["head 1", "…", "peak 2.00 GiB", "…"]
    said = ["head 1", "a", "b", "peak 3.00 GiB", "tail"]
    assert pages._renewed_output(shown, said) == ["head 1", "…", "peak 3.00 GiB", "…"]
    assert pages._renewed_output(["old"], said) == said


def test_every_field_of_the_json_is_described() -> None:
    parts = json.loads((pages.ROOT / "docs" / "schema.json").read_text(encoding="utf-8"))["$defs"]
    bare = [
        f"{name}.{field}"
        for name, part in parts.items()
        for field, value in part.get("properties", {}).items()
        if not value.get("description")
    ]
    assert bare == []
