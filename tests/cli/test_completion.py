"""Completion in real shells: the lines that the README gives are read, and what the shell then offers is looked at."""

from __future__ import annotations

import os
import select
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advisor.cli import _SUBCOMMANDS
from advisor.profiles import gpu_names, model_names, recipe_names

README = Path(__file__).resolve().parents[2] / "README.md"

CASES = {
    "phi3-advise ex": {"explore", "export"},
    "phi3-advise --gpu rtx-40": {name for name in gpu_names() if name.startswith("rtx-40")},
    "phi3-advise --model phi-3-me": {"phi-3-medium-4k", "phi-3-medium-128k"},
    "phi3-advise --recipe cook": {name for name in recipe_names() if name.startswith("cook")},
    "phi3-advise estimate --ex": {"--explain"},
    "phi3-advise export --to l": {"llama-factory"},
    "phi3-advise export --gpu a100": {"a100-40gb", "a100-80gb"},
}
every_case = pytest.mark.parametrize("line", CASES)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of its own, and a phi3-advise on the path."""
    script = tmp_path / "bin" / "phi3-advise"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m advisor "$@"\n', encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    for name in ("plan.toml", "other.toml"):
        (tmp_path / name).touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("_PHI3")}
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "HOME": str(tmp_path), "TERM": "dumb", "PS1": "$ ", "COLUMNS": "200"}


def readme_line(shell: str) -> str:
    """The line that the README gives for a shell."""
    (line,) = [line for line in README.read_text(encoding="utf-8").splitlines() if f"{shell}_source phi3" in line]
    return line.partition("#")[0].strip()


def need(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{shell} is not installed, and .ci/run should have installed it")
        pytest.skip(f"{shell} is not installed (apt-get install {shell})")
    return found


def pressed_tab(command: list[str], setup: list[str], line: str, environment: dict[str, str], folder: Path) -> str:
    """What an interactive shell writes when a line is typed and the tabulator is pressed twice."""
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment, cwd=folder, start_new_session=True
    )
    os.close(follower)
    try:
        for words in (*setup, "echo rea''dy"):
            os.write(leader, words.encode() + b"\n")
        _read_until(leader, "ready")
        os.write(leader, line.encode() + b"\t\t")
        return _read_while_it_writes(leader)
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def _read_until(leader: int, word: str) -> None:
    seen = ""
    while word not in seen:
        assert select.select([leader], [], [], 120)[0], f"the shell stays silent after {seen!r}"
        seen += os.read(leader, 65536).decode(errors="replace")


def _read_while_it_writes(leader: int) -> str:
    """Until five seconds pass in which nothing comes; the first of it may take longer."""
    seen, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        quiet = 5 if seen.strip() else 60
        if not select.select([leader], [], [], quiet)[0]:
            break
        seen += os.read(leader, 65536).decode(errors="replace")
    return seen


def offered_by_bash(line: str, environment: dict[str, str], folder: Path) -> set[str]:
    """What bash's completion function answers, called as bash calls it."""
    words = line.split(" ")
    script = (
        f"{readme_line('bash')}\n"
        f"COMP_WORDS=({' '.join(words)}) COMP_CWORD={len(words) - 1}\n"
        f"$(complete -p phi3-advise | sed 's/.*-F \\([^ ]*\\).*/\\1/') phi3-advise\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        [need("bash"), "--norc", "--noprofile", "-c", script],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@every_case
def test_bash_offers_the_names(line: str, environment: dict[str, str], tmp_path: Path) -> None:
    assert offered_by_bash(line, environment, tmp_path) == CASES[line]


@every_case
def test_fish_offers_the_names(line: str, environment: dict[str, str], tmp_path: Path) -> None:
    script = f"{readme_line('fish')}; complete -C '{line}'"
    done = subprocess.run(
        [need("fish"), "--no-config", "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {row.split("\t")[0] for row in done.stdout.splitlines()} == CASES[line]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_tabulator_shows_the_names(shell: str, environment: dict[str, str], tmp_path: Path) -> None:
    setup = [readme_line(shell)]
    if shell == "zsh":
        setup.insert(0, "autoload -Uz compinit && compinit -u; LISTMAX=0")
        command = [need("zsh"), "-f", "-i"]
    else:
        command = [need("bash"), "--norc", "--noprofile", "-i"]
    line = "phi3-advise --gpu rtx-40"
    shown = pressed_tab(command, setup, line, environment, tmp_path)
    assert all(name in shown for name in CASES[line]), shown


def test_every_command_and_option_is_offered(environment: dict[str, str], tmp_path: Path) -> None:
    assert offered_by_bash("phi3-advise ''", environment, tmp_path) == set(_SUBCOMMANDS)
    offered = offered_by_bash("phi3-advise --", environment, tmp_path)
    assert {"--gpu", "--model", "--vram", "--json", "--help", "--version"} <= offered
    assert offered_by_bash("phi3-advise --model ''", environment, tmp_path) == set(model_names())


def test_a_plan_is_completed_as_a_file(environment: dict[str, str], tmp_path: Path) -> None:
    command = [need("bash"), "--norc", "--noprofile", "-i"]
    shown = pressed_tab(command, [readme_line("bash")], "phi3-advise estimate --plan pl", environment, tmp_path)
    assert "plan.toml" in shown


@pytest.mark.parametrize("line", ["phi3-advise ex", "phi3-advise --gpu rtx-40", "phi3-advise trace --gpu t"])
def test_a_completion_loads_no_library_that_is_slow_to_load(line: str) -> None:
    words = line.split()
    script = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: sys.stderr.write(json.dumps(sorted(sys.modules))))\n"
        "from advisor.cli import main\nmain([])\n"
    )
    asked = {"_PHI3_ADVISE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip()
    loaded = done.stderr
    slow = ("torch", "transformers", "numpy", "rich", "textual", "tomllib", "pynvml")
    assert not [name for name in slow if f'"{name}"' in loaded]
