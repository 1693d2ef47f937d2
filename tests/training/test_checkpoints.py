"""Checkpoints are complete or absent, and the last good one outlives whatever goes wrong with the next."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from advisor.training.checkpoints import (
    MANIFEST,
    complete_checkpoints,
    go_back_to_sound,
    last_checkpoint,
    last_sound_checkpoint,
    rotate,
    write_checkpoint,
    write_json,
)


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "inner").mkdir()
    (folder / "inner" / "state").write_bytes(b"s" * 10)


def steps(folder: Path) -> list[int]:
    return [one.step for one in complete_checkpoints(folder)]


def test_a_checkpoint_has_its_files_its_step_and_its_facts(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, 7, fill, facts={"rows": 3})
    assert last_checkpoint(tmp_path) == written
    assert (written.path.name, written.step, written.facts) == ("checkpoint-7", 7, {"rows": 3})
    assert (written.path / "inner" / "state").read_bytes() == b"s" * 10
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_they_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step, fill)
    assert steps(tmp_path) == [9, 20, 100]


@pytest.mark.parametrize("damage", ["no manifest", "short file", "missing file", "renamed", "nonsense"])
def test_what_is_incomplete_is_not_there(damage: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, fill)
    broken = write_checkpoint(tmp_path, 2, fill).path
    if damage == "no manifest":
        (broken / MANIFEST).unlink()
    elif damage == "short file":
        (broken / "weights").write_bytes(b"w" * 999)
    elif damage == "missing file":
        (broken / "inner" / "state").unlink()
    elif damage == "renamed":
        broken.rename(tmp_path / "checkpoint-3")
    else:
        (broken / MANIFEST).write_text("[]")
    assert steps(tmp_path) == [1]
    # Its place can be taken.
    write_checkpoint(tmp_path, 2, fill)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", ["weights", "inner/state"])
def test_what_was_changed_without_another_length_is_not_gone_on_from(name: str, tmp_path: Path) -> None:
    written = [write_checkpoint(tmp_path, step, fill) for step in (1, 2, 3)]
    for one in written[1:]:
        damaged = one.path / name
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert last_sound_checkpoint(tmp_path) == written[0]
    assert steps(tmp_path) == [1, 2, 3]
    assert go_back_to_sound(tmp_path) == written[0]
    assert steps(tmp_path) == [1]
    write_checkpoint(tmp_path, 2, fill)
    sound = last_sound_checkpoint(tmp_path)
    assert sound is not None
    assert sound.step == 2


def test_where_nothing_is_sound_everything_begins_again(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, 1, fill).path / "weights").write_bytes(b"v" * 1000)
    assert go_back_to_sound(tmp_path) is None
    assert steps(tmp_path) == []


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, 1, fill)
    manifest = json.loads((written.path / MANIFEST).read_text())
    del manifest["checksums"]
    (written.path / MANIFEST).write_text(json.dumps(manifest))
    assert last_sound_checkpoint(tmp_path) == written


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_last_good_one(error: BaseException, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, fill)

    def fail(folder: Path) -> None:
        fill(folder)
        raise error

    with pytest.raises(type(error)):
        write_checkpoint(tmp_path, 2, fail)
    assert steps(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_failure_while_flushing_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, 1, fill)

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "the disk says no")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="says no"):
        write_checkpoint(tmp_path, 2, fill)
    assert steps(tmp_path) == [1]


def test_rotation_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step, fill)
    (tmp_path / "checkpoint-4" / "weights").unlink()
    (tmp_path / ".unfinished").mkdir()
    rotate(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    rotate(tmp_path, 0)
    assert steps(tmp_path) == [3]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step, fill)

    def cut_short(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    assert steps(tmp_path) == [2]


def test_a_step_that_has_a_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, fill)

    def fail(_: Path) -> None:
        raise AssertionError

    assert write_checkpoint(tmp_path, 5, fail).step == 5


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_small_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"outcome": "finished"})
    before = path.read_text()

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        write_json(path, {"outcome": "failed"})
    assert path.read_text() == before
    assert [found.name for found in tmp_path.iterdir()] == ["result.json"]
