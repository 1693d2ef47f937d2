"""A report's file is whole and new, or it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from advisor.errors import InputError
from advisor.report.output import check_creatable, create_file


def test_a_file_that_is_there_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_bytes(b"old")
    for write in (lambda: create_file(target, b"new"), lambda: check_creatable(target)):
        with pytest.raises(InputError, match="exists already"):
            write()
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_is_none_is_said(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    for write in (lambda path: create_file(path, b"new"), check_creatable):
        with pytest.raises(InputError, match="cannot be written") as error:
            write(tmp_path / folder / "page.html")
        assert error.value.why
        assert error.value.hint


def test_a_link_to_nowhere_is_somebody_s(tmp_path: Path) -> None:
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "page.html")
    with pytest.raises(InputError, match="exists already"):
        create_file(link, b"new")
    assert not (tmp_path / "page.html").exists()
