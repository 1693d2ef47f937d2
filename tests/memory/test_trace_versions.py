"""What is said about libraries that nobody tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from advisor.memory.trace import versions
from advisor.memory.trace.versions import TESTED, version_warnings

ROOT = Path(__file__).parents[2]


def test_the_tested_range_is_that_of_the_package() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in dependencies)  # type: ignore[union-attr]
    pins = dict(re.findall(r"(?m)^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text()))
    assert dict(TESTED) == {name: (oldest[name], pins[name]) for name in TESTED}


@pytest.mark.parametrize(
    ("installed", "warned"),
    [("2.10.1", True), ("2.11.0+cu128", False), ("2.13.2", False), ("2.14.0a0", True), ("3.0", True)],
)
def test_a_version_outside_the_range_is_named(installed: str, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed if name == "torch" else TESTED[name][1])
    found = version_warnings()
    assert len(found) == warned
    assert all(installed in sentence and "2.11 to 2.13.0" in sentence for sentence in found)


def test_asking_imports_no_torch() -> None:
    ask = "from advisor.memory.trace.versions import version_warnings; version_warnings()"
    subprocess.run([sys.executable, "-c", f"{ask}; import sys; assert 'torch' not in sys.modules"], check=True)
