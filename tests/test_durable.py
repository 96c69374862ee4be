"""A full disk, by a limit that the kernel itself keeps: it takes a part of the bytes and refuses the rest."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import durable
from tests.conftest import ROOT

LIMIT = 10_000
FULL = f"""
import resource, sys
from pathlib import Path
from pipeline import durable
from pipeline.tracking.spool import Spool
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
"""
PUBLISH = """
try:
    durable.publish(Path(sys.argv[1]), bytes(50_000))
except OSError as error:
    print(durable.is_full(error))
"""
SPOOL = """
spool, said = Spool(Path(sys.argv[1]), "r"), 0
try:
    while True:
        spool.metrics({"k": float(said)}, said)
        said += 1
except OSError as error:
    print(durable.is_full(error), said)
"""
needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes")


def under_the_limit(code: str, path: Path) -> list[str]:
    command = [sys.executable, "-c", FULL + code, str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def test_what_is_published_is_there_and_nothing_else(tmp_path: Path) -> None:
    for data in (b"one", b"another"):
        durable.publish(tmp_path / "new/file.bin", data)
        assert (tmp_path / "new/file.bin").read_bytes() == data
    assert len(list(tmp_path.rglob("*.*"))) == 1


@needs_limits
def test_without_room_the_old_file_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    assert under_the_limit(PUBLISH, path) == ["True"]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@needs_limits
def test_without_room_a_spool_holds_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "spool-r.jsonl"
    full, said = under_the_limit(SPOOL, path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert full == "True"
    assert len(lines) == int(said) > 50
    assert all(line.endswith(b"}\n") for line in lines)
    assert LIMIT - 200 < path.stat().st_size < LIMIT


def test_another_error_is_not_taken_for_a_full_disk() -> None:
    assert not durable.is_full(PermissionError(errno.EACCES, "no"))
