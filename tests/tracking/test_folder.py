"""The run folder and who holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from pipeline.tracking.folder import one_writer, set_aside


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    torn = [tmp_path / "checkpoints/state_000000000512.safetensors.4711.tmp", tmp_path / "validation.csv.4711.tmp"]
    kept = tmp_path / "validation.csv"
    torn[0].parent.mkdir()
    for path in [*torn, kept]:
        path.touch()
    with one_writer(tmp_path):
        assert [path.exists() for path in [*torn, kept]] == [False, False, True]


def test_what_another_writer_publishes_below_is_left_to_him(tmp_path: Path) -> None:
    his = tmp_path / "runs/job-1/checkpoints/state.4711.tmp"
    his.parent.mkdir(parents=True)
    his.touch()
    (tmp_path / "runs/job-1/lock").touch()
    with one_writer(tmp_path):
        assert his.exists()


def test_another_lock_that_is_not_had_within_is_not_taken_for_this_one(tmp_path: Path) -> None:
    with FileLock(tmp_path / "other"), pytest.raises(Timeout), one_writer(tmp_path / "run"):
        FileLock(tmp_path / "other").acquire(timeout=0)


def test_what_is_set_aside_never_meets_what_was(tmp_path: Path) -> None:
    for number in ("1", "2", "3"):
        (tmp_path / "train.log").write_text(number)
        set_aside(tmp_path)
    (tmp_path / "earlier-1/train.log").unlink()
    (tmp_path / "earlier-1").rmdir()
    (tmp_path / "train.log").write_text("4")
    set_aside(tmp_path)
    assert {p.parent.name: p.read_text() for p in tmp_path.glob("*/train.log")} == {
        "earlier-2": "2", "earlier-3": "3", "earlier-4": "4",
    }  # fmt: skip
