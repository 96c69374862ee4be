"""What a run has to tell MLflow, in a local file: first here, then sent (:mod:`pipeline.tracking.sender`).

Training never waits for the server, and what the server could not take stays here. A line sent twice does no harm:
MLflow keeps equal (key, step, time, value) once, and of everything else the last.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import durable

log = logging.getLogger(__name__)

BATCH = 200
SPOOLS = "spool-*.jsonl"


class Spool:
    """An append-only JSONL file of what a run has to tell MLflow, and the number of its bytes already sent.

    May be written from several threads. Writing raises ``OSError`` where there is no room, and leaves no half line.

    Attributes:
        path: The spool; beside it, ``<name>.sent`` holds the offset of the first line not sent yet.
        run_id: MLflow's id of the run, or the local one of a run that begins with this spool.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path, self.run_id = path, run_id
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._known = _metrics_in(path)  # a resumed training says again what it said after its last state
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def metrics(self, values: Mapping[str, float], step: int, rising: bool = False) -> None:
        """Append one batch of metrics, each (metric, step) once: the first value stands.

        Args:
            values: By name.
            step: Theirs.
            rising: This process will not tell them for an earlier step, so that those need not be remembered: a long
                training tells millions.
        """
        new = {key: value for key, value in values.items() if step not in self._known[key]}
        if new:
            self.put({"metrics": new, "step": step, "time": now()})
        for key in values:
            self._known[key].add(step)
            if rising:
                self._known[key] = {known for known in self._known[key] if known >= step}

    def next_step(self, prefix: str) -> int:
        """The step after the last one of the metrics whose name begins so, in what this spool held when opened."""
        return 1 + max(
            (max(steps, default=-1) for key, steps in self._known.items() if key.startswith(prefix)), default=-1
        )

    def artifact(self, path: Path, folder: str) -> None:
        """Append a file to upload; until it is sent it must stay where it is, beside the spool or anywhere."""
        self.put({"artifact": self._place(path), "folder": folder})

    def image(self, path: Path, key: str, step: int) -> None:
        """Append a picture; those of one key get a step slider. It must stay where it is until it is sent."""
        self.put({"image": self._place(path), "key": key, "step": step, "time": now()})

    def _place(self, path: Path) -> str:
        """A file's place as seen from the spool, so that the folder can be moved."""
        place, beside = path.resolve(), self.path.parent.resolve()
        return str(place.relative_to(beside) if place.is_relative_to(beside) else place)

    def put(self, entry: Mapping[str, Any]) -> None:
        """Append any entry that :func:`pipeline.tracking.sender.send` understands."""
        line = (json.dumps({"run_id": self.run_id, **entry}) + "\n").encode()
        with self._lock:
            end = os.fstat(self._file.fileno()).st_size
            try:
                durable.write_all(self._file.fileno(), line)
            except OSError:
                self._file.truncate(end)
                raise

    def sync(self) -> None:
        """Make sure that what was said outlives a failure of the power."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the file; unsent lines stay."""
        self._file.close()


def now() -> int:
    """Unix time, ms."""
    return int(time.time() * 1000)


def sent_bytes(path: Path) -> int:
    """How many bytes of a spool MLflow has taken."""
    sent = path.with_suffix(".sent")
    return int(sent.read_text() or 0) if sent.exists() else 0  # empty: killed while writing it


def note_sent(path: Path, offset: int) -> None:
    """Note how many bytes of a spool MLflow has taken."""
    path.with_suffix(".sent").write_text(str(offset))


def is_sent(path: Path) -> bool:
    """Whether MLflow has taken all of it."""
    return sent_bytes(path) >= path.stat().st_size


def header(path: Path) -> dict[str, Any]:
    """The first entry: of a run that begins here, what it begins with; empty for an empty spool."""
    with path.open("rb") as file:
        line = file.readline()
    return _parse(path, line) if line.endswith(b"\n") else {}


def unsent(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The next entries not sent yet, at most a batch, and the offset behind them. A torn last line is left."""
    offset = sent_bytes(path)
    entries: list[dict[str, Any]] = []
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n") or len(entries) == BATCH:
                break
            offset += len(line)
            entries.append(_parse(path, line))
    return entries, offset


def read_all(path: Path, containing: bytes = b"", newest: bool = False) -> list[dict[str, Any]]:
    """What a spool holds, sent or not, of the lines that contain these bytes; optionally only the newest of them."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")  # without half a line at the end
    lines = [line for line in whole.splitlines() if containing in line]
    return [_parse(path, line) for line in (lines[-1:] if newest else lines)]


def _metrics_in(path: Path) -> defaultdict[str, set[int]]:
    """The steps of each metric."""
    known: defaultdict[str, set[int]] = defaultdict(set)
    for entry in read_all(path) if path.exists() else []:
        for key in entry.get("metrics", ()):
            known[key].add(entry["step"])
    return known


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    """An entry; an empty one for a line that a crash of the machine spoiled."""
    try:
        return dict(json.loads(line))
    except ValueError:
        log.warning("%s: a spoiled line is left out: %.80r", path, line)
        return {}


def _drop_torn_line(path: Path) -> None:
    """Take away half a line that a killed process left, lest the next one is glued to it."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
