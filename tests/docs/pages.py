"""What the pages claim, run again: their commands, the output they show, and every number in their text.

A page is Markdown with a few conventions, all of them invisible where it is read:

- Commands are in fenced blocks, each on a line of its own, with or without `$ `. They run from top to bottom in one
  folder a page, which starts with what `Folder` puts there. Lines under a `$ ` command are its output; a line `…`
  stands for any number of lines. `$ echo $?` shows the exit code of the command before, which otherwise has to be 0.
- What needs a GPU, a network or hours runs with the options of `SUBSTITUTIONS` added; its output is not shown.
- `<!-- not run: REASON -->` above a block: its phi3-advise commands are only parsed, by the program's own parser.
- A command in the text, `phi3-advise …` between backquotes, runs after the blocks; one with an ellipsis, or a command's
  name without what it has to be given, is a name.
- ```toml with `# NAME.toml` as first line writes that file; a python block runs in the folder.
- `<!-- numbers` … `NAME = phi3-advise … --json` … `-->` names answers, and `<!-- NAME: memory.total_bytes -->11.24
  GiB<!-- -->` is a number from one. A part of a path is a key, an index, or the `method`, `gpu` or `name` of a list's
  item; ` / ` divides one by another, and ` + ` adds; `| count`, `| short`, `| gib`, `| seconds`, `| yesno`, `| maru` or
  `| text` chooses how it is written (in a table, the bar is escaped).
- `<!-- cited: SOURCE -->8 GB<!-- -->` is somebody else's number. No other number with a unit may stand in the text.
- `<!-- generated: NAME -->` … `<!-- -->` is written by the function of that name in `generated.py`.

`python tests/docs/renew.py` writes everything anew; the tests compare.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advisor import units

ROOT = Path(__file__).parents[2]
DATA = ROOT / "profiles" / "datasets" / "phi3-advise-qa.jsonl"
ELSEWHERE = ("accuracy.md", "measurements.md")
"""What the benchmarks write, and how they are run; their own tests hold them."""

SUBSTITUTIONS: tuple[tuple[str, str], ...] = (
    (r"(?=.*--launch)", "--device cpu --model small-phi3 --method lora --max-steps 1 --no-probe"),
    (r"(?=.*--probe)", "--device cpu --model small-phi3 --method lora"),
    (r"probe --plan", "--plan small.toml --device cpu --steps 2"),
    (r"train --plan", "--plan small.toml --device cpu --max-steps 1"),
    (r"doctor", "--device cpu"),
    (r"$", "--gpu t4"),
)
"""Where the words after `phi3-advise` match, these are added, so that no GPU, no download and no hour is needed: the
small model trains on the CPU for a step, and the GPU of no machine is asked about. Of an option that is given twice
the last one counts."""

ENVIRONMENT = {"COLUMNS": "80", "LC_ALL": "C.UTF-8", "HF_HUB_OFFLINE": "1"}

SMALL_PLAN = """\
model = "small-phi3"
method = "lora"
micro_batch = 2
gradient_accumulation = 1
seq_len = 128
padding = "longest"
"""

_FENCE = re.compile(r"```(\w*)")
_MARK = re.compile(r"<!-- ([\w-]+): (.*?) -->(.*?)<!-- -->", re.DOTALL)
_DEFINITION = re.compile(r"^([\w-]+) = phi3-advise (.*)$", re.MULTILINE)
_NUMBERS = re.compile(r"<!-- numbers\n(.*?)-->", re.DOTALL)
_GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- -->)", re.DOTALL)
_UNIT = (
    r"(?:[KMG]i?B\b|bytes?\b|バイト|TFLOP|tokens?/s|tokens a second|s a step|seconds?\b|minutes?\b|%"
    r"|トークン/秒|秒|分|ギガ)"
)
_CLAIM = re.compile(rf"\d[\d,.]*(?:\s|-)?{_UNIT}|\d,\d{{3}}")


def pages() -> list[Path]:
    """Every page that makes claims."""
    found = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")]
    return [ROOT / "README.md", *sorted(page for page in found if page.name not in ELSEWHERE)]


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command printed, how it ended, and the files that it wrote."""

    said: str
    code: int
    written: dict[str, bytes]


Kept = dict[tuple[Any, ...], Ran]
"""What was run, by its words and the files that it read: pages have many commands in common."""


@dataclass(slots=True)
class Folder:
    """Where a page's commands run: a small model and a few rows of data are there."""

    path: Path
    small_model: Path
    kept: Kept = field(default_factory=dict)
    code: int = 0
    """Exit code of the last command."""

    def __post_init__(self) -> None:
        (self.path / "small-phi3").symlink_to(self.small_model)
        rows = DATA.read_text(encoding="utf-8").splitlines(keepends=True)
        (self.path / "train.jsonl").write_text("".join(rows[:24]), encoding="utf-8")
        (self.path / "small.toml").write_text(SMALL_PLAN, encoding="utf-8")

    def run(self, command: str) -> str:
        """What a command prints, on either stream."""
        words = shlex.split(command, comments=True)
        if words == ["echo", "$?"]:
            return f"{self.code}\n"
        if words[0] == "phi3-advise":
            words = self._substituted(words)
        elif words[0] not in {"cat", "ls"}:
            raise ValueError(f"no way to run {command!r}: mark it <!-- not run: REASON -->")
        if words[0] in {"cat", "ls"}:
            return self._execute(words)[0]
        read = tuple((self.path / word).read_bytes() for word in words if word.endswith(".toml") and self._is(word))
        key = (*words, *read)
        if key in self.kept:
            for name, content in self.kept[key].written.items():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                (self.path / name).write_bytes(content)
        else:
            before = self._files()
            said, code = self._execute(words)
            new = [name for name, changed in self._files().items() if before.get(name) != changed]
            self.kept[key] = Ran(said, code, {name: (self.path / name).read_bytes() for name in new})
        self.code = self.kept[key].code
        return self.kept[key].said

    def python(self, code: str) -> None:
        """Runs a block of Python."""
        said, self.code = self._execute([sys.executable, "-c", code])
        assert self.code == 0, said

    def _is(self, name: str) -> bool:
        return (self.path / name).is_file()

    def _files(self) -> dict[str, int]:
        found = (path for path in self.path.rglob("*") if path.is_file())
        return {str(path.relative_to(self.path)): path.stat().st_mtime_ns for path in found}

    def _substituted(self, words: list[str]) -> list[str]:
        given = " ".join(words[1:])
        added = next((added for pattern, added in SUBSTITUTIONS if re.match(pattern, given)), "")
        return [*words, *added.split()]

    def _execute(self, words: list[str]) -> tuple[str, int]:
        program = [sys.executable, "-m", "advisor"] if words[0] == "phi3-advise" else [words[0]]
        hidden = {"PHI3_ADVISE_LANG", "NO_COLOR", "FORCE_COLOR", "LANG", "LC_ALL", "LC_MESSAGES", "LANGUAGE"}
        inherited = {name: value for name, value in os.environ.items() if name not in hidden}
        done = subprocess.run(
            [*program, *words[1:]],
            cwd=self.path,
            env={
                **inherited,
                "PYTHONPATH": str(ROOT),
                **ENVIRONMENT,
                "PHI3_ADVISE_STATE": str(self.path.parent / "state"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        return done.stdout, done.returncode


def renewed(text: str, folder: Folder) -> str:
    """A page with its outputs and numbers as they are now.

    Raises:
        AssertionError: a command does not end as the page says.
    """
    blocks = _renewed_blocks(text.splitlines(), folder)
    for words in commands_in_text(text):
        if not is_a_name(words):
            said = folder.run(shlex.join(["phi3-advise", *words]))
            assert folder.code == 0, f"{words} ended with {folder.code}:\n{said}"
    return _renewed_numbers("\n".join(blocks) + "\n", folder)


def parsed_commands(text: str) -> Iterator[list[str]]:
    """The arguments of every phi3-advise command in a block of a page, run or not."""
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside and re.match(r"\s*(\$ )?phi3-advise\b", line):
            yield shlex.split(line.strip().removeprefix("$ "), comments=True)[1:]


def commands_in_text(text: str) -> list[list[str]]:
    """The arguments of every phi3-advise command that stands between backquotes in a page's text."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))
    return [shlex.split(code)[1:] for code in found if re.match(r"phi3-advise [^…]+$", code)]


def unchecked_numbers(text: str) -> list[str]:
    """Numbers with a unit in the text of a page that come from no run and cite no source."""
    text = _NUMBERS.sub("", text)
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = _GENERATED.sub("", text)
    text = _MARK.sub("", text)
    text = re.sub(r"\b[AH]\d00[ -]\d+ GB", "", text)  # a card's name
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", "", text, flags=re.DOTALL)
    return [" ".join(text[max(0, at.start() - 40) : at.end() + 20].split()) for at in _CLAIM.finditer(text)]


def is_a_name(words: list[str]) -> bool:
    """Whether a command is only named: it would have to be given something."""
    import click

    from advisor.cli import cli

    command = cli.get_command(click.Context(cli), words[0]) if len(words) == 1 else None
    return command is not None and any(param.required for param in command.params)


def _renewed_blocks(lines: list[str], folder: Folder) -> list[str]:
    out: list[str] = []
    rest = iter(lines)
    not_run = False
    for line in rest:
        out.append(line)
        fence = _FENCE.fullmatch(line.strip())
        if line.startswith("<!-- not run: "):
            not_run = True
        if fence is None or not line.lstrip().startswith("```"):
            continue
        block = []
        for inner in rest:
            if inner.strip() == "```":
                break
            block.append(inner)
        out += block if not_run else _renewed_block(fence[1], block, folder)
        out.append(line[: len(line) - len(line.lstrip())] + "```")
        not_run = False
    return out


def _renewed_block(language: str, block: list[str], folder: Folder) -> list[str]:
    if language == "toml":
        named = re.fullmatch(r"# ([\w-]+\.toml)", block[0])
        if named:
            (folder.path / named[1]).write_text("\n".join(block) + "\n", encoding="utf-8")
        return block
    if language == "python":
        folder.python("\n".join(block))
        return block
    if language not in {"", "console"}:
        return block
    out: list[str] = []
    at = 0
    while at < len(block):
        line = block[at]
        at += 1
        out.append(line)
        command = line.strip().removeprefix("$ ")
        if not re.match(r"\$ |phi3-advise\b", line.strip()):
            continue
        shown = []
        while at < len(block) and not re.match(r"\$ |phi3-advise\b", block[at].strip()):
            shown.append(block[at])
            at += 1
        said = [part.rstrip() for part in folder.run(command).splitlines()]
        following = block[at].strip() if at < len(block) else ""
        if command != "echo $?" and following != "$ echo $?":
            assert folder.code == 0, f"{command} ended with {folder.code}:\n" + "\n".join(said)
        is_output = line.strip().startswith("$ ") and any(part.strip() for part in shown)
        out += _renewed_output(shown, said) if is_output else shown
    return out


def _renewed_output(shown: list[str], said: list[str]) -> list[str]:
    """The lines that are shown of an output, as they are now: between `…`, as many as before, found by their first."""
    stretches: list[list[str]] = [[]]
    for line in shown:
        if line.strip() == "…":
            stretches.append([])
        else:
            stretches[-1].append(line)
    if len(stretches) == 1:
        return said
    out: list[str] = []
    start = 0
    for number, stretch in enumerate(stretches):
        if number:
            out.append("…")
        if not stretch:
            continue
        length = len(stretch)
        first = start if number == 0 else _where(stretch[0], said, start)
        if number == len(stretches) - 1:
            first = max(first, start)
            length = len(said) - first
        out += said[first : first + length]
        start = first + length
    return out


def _where(line: str, said: list[str], start: int) -> int:
    """Where a line is, or the one most like it once digits do not count."""
    rest = [_digitless(other) for other in said[start:]]
    wanted = _digitless(line)
    if wanted in rest:
        return start + rest.index(wanted)
    near = difflib.get_close_matches(wanted, rest, n=1, cutoff=0.0)
    assert near, f"the output has no line like {line!r}"
    return start + rest.index(near[0])


def _digitless(line: str) -> str:
    return re.sub(r"[\d.,]+", "#", line)


def _renewed_numbers(text: str, folder: Folder) -> str:
    from generated import GENERATED

    commands = {name: command for found in _NUMBERS.findall(text) for name, command in _DEFINITION.findall(found)}

    def number(found: re.Match[str]) -> str:
        name, path, _ = found.groups()
        if name == "cited":
            return found[0]
        assert name in commands, f"{name} names no command: {found[0]}"
        said = folder.run(f"phi3-advise {commands[name]}")
        assert said.startswith("{"), said
        return f"<!-- {name}: {path} -->{_written(json.loads(said), path)}<!-- -->"

    text = _GENERATED.sub(lambda found: f"{found[1]}{GENERATED[found[2]]()}{found[4]}", text)
    kept = _GENERATED.split(text)
    for index in range(0, len(kept), 5):
        kept[index] = _MARK.sub(number, kept[index])
    return "".join(part for index, part in enumerate(kept) if index % 5 != 2)


def _written(answer: Any, path: str) -> str:
    where, _, form = (part.strip() for part in path.replace("\\|", "|").partition("|"))
    if re.search(r" [/+] ", where):
        above, _, below = where.partition(" / ")
        whole = _looked_up(answer, below) if below else 1
        return _form(sum(_looked_up(answer, part) for part in above.split(" + ")) / whole, form or "count")
    value = _looked_up(answer, where)
    return _form(value, form or _usual_form(where, where.rpartition(".")[2], value))


def _looked_up(answer: Any, path: str) -> Any:
    for key in path.split("."):
        answer = _part(answer, key)
    return answer


def _part(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return value[key]
    if key.isdigit():
        return value[int(key)]
    return next(item for item in value if key in {item.get(name) for name in ("method", "gpu", "name")})


def _usual_form(where: str, key: str, value: Any) -> str:
    if key.endswith("_bytes") or re.search(r"\b(components|moments)\.", where):
        return "size"
    if isinstance(value, bool):
        return "yesno"
    if key.endswith("_seconds"):
        return "duration"
    return "count" if isinstance(value, int | float) else "text"


def _form(value: Any, form: str) -> str:
    return {
        "size": lambda: units.size(value),
        "gib": lambda: units.gib(value),
        "count": lambda: units.count(round(value)),
        "short": lambda: units.short_count(value),
        "duration": lambda: units.duration(value),
        "seconds": lambda: units.duration(value).removesuffix(" s"),
        "yesno": lambda: "yes" if value else "no",
        "maru": lambda: "○" if value else "×",
        "text": lambda: str(value),
    }[form]()


def new_folder(parent: Path, kept: Kept) -> Folder:
    """A fresh folder for a page; the small model is made once a parent."""
    from small_model import make_small_model

    model = parent / "small-phi3"
    if not model.exists():
        make_small_model(model)
    page = parent / f"page-{len(list(parent.iterdir()))}"
    shutil.rmtree(page, ignore_errors=True)
    page.mkdir()
    return Folder(page, model, kept)
