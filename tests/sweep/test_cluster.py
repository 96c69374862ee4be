"""Sweeps on a real Ray cluster whose parts are killed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.sweep import scale


@pytest.mark.slow
def test_worker_driver_node_and_head_are_killed_and_nothing_is_lost_or_doubled(migrated_database: Path) -> None:
    with TemporaryDirectory(prefix="r") as name:  # short: Ray's sockets lie below it
        figures = scale.disturbed(Path(name), migrated_database)
    assert figures["trainings_finished"] == figures["trainings_asked"] == 3
    assert figures["doubled"] == 0
    assert int(str(figures["progress_lost_agent_steps"])) <= scale.STATE_STEPS
