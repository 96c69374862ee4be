"""The run folder and who holds it."""

from __future__ import annotations

from pathlib import Path

from pipeline.tracking.folder import one_writer


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    torn = [tmp_path / "checkpoints/state_000000000512.safetensors.4711.tmp", tmp_path / "validation.csv.4711.tmp"]
    kept = tmp_path / "validation.csv"
    torn[0].parent.mkdir()
    for path in [*torn, kept]:
        path.touch()
    with one_writer(tmp_path):
        assert [path.exists() for path in [*torn, kept]] == [False, False, True]
