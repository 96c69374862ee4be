"""The demo: a film of a drive on a new track, and a champion where there was none; read back with other tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from safetensors import safe_open

from pipeline import demo as command
from pipeline.agent.policy import load
from pipeline.config import FIRST_TRAINING_TRACK, PromoteParams
from pipeline.demo import demo, new_track
from pipeline.evaluation import drive
from pipeline.ship import ship
from pipeline.tracking.registry import sha256
from pipeline.tracking.store import connect
from tests.conftest import ROOT
from tests.policies import write_policy

PARAMS = PromoteParams(
    registered_model="carracing-ppo", promote_alpha=0.05, tracks="10000:10100", bootstrap_samples=1000
)


def test_the_film_shows_the_drive_and_the_first_policy_becomes_champion(project: Path) -> None:
    policy = write_policy(Path("models/mine.safetensors"), seed=3)
    expected = drive(load(policy), 20_001)
    said = demo(PARAMS, policy, 20_001)

    film = cv2.VideoCapture(str(command.FILM))
    assert int(film.get(cv2.CAP_PROP_FRAME_COUNT)) == expected.frames
    assert f"track 20001: return {expected.episode_return:.1f}" in said
    version = connect().get_model_version_by_alias(PARAMS.registered_model, "champion")
    assert (int(version.version), version.tags["sha256"]) == (1, sha256(policy))

    other = write_policy(Path("models/other.safetensors"), seed=4)
    assert "has a champion, version 1: nothing is registered" in demo(PARAMS, other, 20_001)
    assert len(connect().search_model_versions(f"name = '{PARAMS.registered_model}'")) == 1


def test_the_shipped_policy_is_the_same_in_half_the_size(project: Path) -> None:
    policy, champion = write_policy(Path("models/mine.safetensors"), seed=3), Path("models/champion.safetensors")
    champion.with_suffix(".json").write_text('{"mean": 900.0}')  # of the champion before
    ship(policy, champion)
    assert not champion.with_suffix(".json").exists()
    weights, rounded = (load(path).module.state_dict() for path in (policy, champion))
    assert all(torch.equal(rounded[name], weights[name].half().float()) for name in weights)
    assert load(champion).observation == load(policy).observation
    sizes = [sum(w.numel() * w.element_size() for w in stored(path)) for path in (policy, champion)]
    assert sizes[0] == 2 * sizes[1]


def stored(path: Path) -> list[torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (not a dict)


def test_a_new_track_is_one_that_nothing_was_done_with() -> None:
    tracks = {new_track("10000:30000") for _ in range(1000)}
    assert len(tracks) > 950
    assert 30_000 <= min(tracks) <= max(tracks) < FIRST_TRAINING_TRACK


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--policy", "none.safetensors"], "none.safetensors: no such file"),
        (["--track", "-1"], "--track: expected 0 to 2147483647, got -1"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(project: Path, flags: list[str], told: str) -> None:
    Path("params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    run = subprocess.run([sys.executable, "-m", "pipeline.demo", *flags], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert told in run.stderr
    assert "Traceback" not in run.stderr
