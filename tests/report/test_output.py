"""A report's file is whole or what it was before."""

from __future__ import annotations

from pathlib import Path

import pytest

from advisor.errors import InputError
from advisor.report.output import replace_file


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_bytes(b"old")
    replace_file(target, b"new")
    assert target.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    target.write_bytes(b"old")
    whole = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> int:
        whole(path, content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match="cannot be written"):
        replace_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        replace_file(tmp_path / "missing" / "page.html", b"new")
    assert error.value.why
    assert error.value.hint


def test_a_link_still_points_where_it_did(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    link = tmp_path / "link.html"
    target.write_bytes(b"old")
    link.symlink_to(target)
    replace_file(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
