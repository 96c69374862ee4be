"""The measurement of environments on a Ray cluster, without one; that it runs on one is a slow test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import bench_ray
from pipeline.bench_ray import _messages, _spent, counts, ray_cases, write_section
from tests.conftest import ROOT
from tests.sim.games import train_params
from tests.sim.test_ray_env import Neighbour


def test_numbers_of_actors_double() -> None:
    assert [counts(most) for most in (1, 2, 5)] == [[1], [1, 2], [1, 2, 4]]


def test_cases_are_compared_with_this_machine_and_with_one_actor() -> None:
    cluster: Any = SimpleNamespace(make_worker=Neighbour)
    cases = ray_cases(cluster, [1, 2])
    assert [(case.name, case.against) for case in cases] == [
        ("ray_1_actors", ("vectorised_1_worker",)),
        ("ray_2_actors", ("vectorised_1_worker", "ray_1_actors")),
        ("ray_training_2_actors", ("training",)),
    ]


def test_the_cases_drive_environments_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []

    def make_worker(indices: list[int], arrays: Any) -> Neighbour:
        made.append(indices)
        return Neighbour(indices, arrays)

    params = train_params(monkeypatch, n_envs=4, n_steps=8, batch_size=32, n_workers=1, num_threads=1)
    cluster: Any = SimpleNamespace(make_worker=make_worker)
    for case, workers in zip(ray_cases(cluster, [1, 2]), (1, 2, 2), strict=True):
        made.clear()
        with case.prepare(params) as work:
            assert work() > 0
        assert sorted(index for indices in made for index in indices) == [0, 1, 2, 3], case.name
        assert len(made) == workers, case.name


def test_a_price_is_the_least_that_the_clocks_say_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = iter([0.0, 0.0, 1.0, 2.0])  # two pieces of work
    monkeypatch.setattr(bench_ray.time, "monotonic", lambda: next(wall))
    here, there = iter([0.0, 6.0, 10.0, 14.0]), iter([1.0, 3.0, 3.0, 9.0])
    assert _spent(lambda: 100, 2.0, (lambda: next(here), lambda: next(there))) == pytest.approx([4e4, 2e4])


def test_a_message_is_an_order_and_its_reply() -> None:
    sent: list[int] = []

    class Counting(Neighbour):
        def post(self, message: Any) -> None:
            sent.extend([1] if message[0] == "step" else [])
            super().post(message)

    cluster: Any = SimpleNamespace(make_worker=Counting)
    here, there = _messages(cluster, (4, 84, 84), 0.05)
    assert here > 0
    assert there > 0
    assert len(sent) % 20 == 2, "twenty in a piece of work, two under way at its end"


def test_a_section_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics/scale.json"
    write_section(path, "rollouts", {"old": 1})
    path.write_text(json.dumps({**json.loads(path.read_text()), "sweep": {"lost": 0}}))
    write_section(path, "rollouts", {"new": 2})
    assert json.loads(path.read_text()) == {"rollouts": {"new": 2}, "sweep": {"lost": 0}}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ray's test clusters")
def test_it_runs_on_a_cluster(params_here: Path) -> None:
    pytest.importorskip("ray")
    small = ["--n-envs", "4", "--n-steps", "8", "--batch-size", "16", "--seconds", "0.2", "--repeats", "1"]
    command = [sys.executable, "-m", "pipeline.bench", "--ray", "local", "--ray-actors", "1", *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_ROOT": str(params_here)}
    # A process of its own: Ray keeps the token of the first cluster that one has used.
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    section = json.loads(bench_ray.METRICS.read_text())[bench_ray.SECTION]
    assert {"training", "ray_1_actors", "ray_training_1_actors"} <= set(section["cases"])
    assert all(value > 0 for name, value in section["costs"].items() if not name.endswith("per_observation"))
    assert "ray_1_actors" in output
