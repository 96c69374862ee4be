"""The record of trials: nothing lost or asked twice when the process dies, and bad trials given up."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import TrialState

from pipeline.sweep.definition import Sweep, read_sweep
from pipeline.sweep.study import STORAGE, Study, StudyError

SPACE = """
space:
  learning_rate: {low: 1e-4, high: 1e-2, log: true}
  n_epochs: {low: 1, high: 8}
  frame_skip: {choice: [2, 4]}
"""


@pytest.fixture
def project(params_here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv(STORAGE, raising=False)
    return params_here


def sweep(project: Path, text: str) -> Sweep:
    (project / "s.yaml").write_text(text)
    found = read_sweep([project / "s.yaml"], {"total_timesteps": "100000", "eval_freq": "10000"}, None)
    found.folder.mkdir(parents=True, exist_ok=True)
    return found


def test_trials_under_way_are_found_again_with_their_values(project: Path) -> None:
    searched = sweep(project, "name: s\ntrials: 9" + SPACE)
    asked = [Study(searched).ask()[1] for _ in range(3)]  # each by a process of its own, as it were
    assert [chosen for _, chosen in Study(searched).under_way()] == asked
    assert Study(searched).begun() == 3
    assert len({str(chosen) for chosen in asked}) == 3, "no two the same"


def test_a_trial_whose_process_died_before_it_had_values_gets_them(project: Path) -> None:
    searched = sweep(project, "name: s\ntrials: 9" + SPACE)
    Study(searched).optuna.ask()
    ((_, first),) = Study(searched).under_way()
    ((_, again),) = Study(searched).under_way()
    assert set(first) == {"learning_rate", "n_epochs", "frame_skip"}
    assert first == again


def test_the_same_sampler_seed_asks_the_same_whether_interrupted_or_not(project: Path) -> None:
    whole, parts = (sweep(project, f"name: {name}\ntrials: 20\nsampler: tpe{SPACE}") for name in "ab")
    study = Study(whole)
    found: dict[str, list[object]] = {"whole": [], "parts": []}
    for _ in range(12):  # beyond the ten random trials that TPE begins with
        trial, chosen = study.ask()
        study.tell(trial, -abs(chosen["n_epochs"] - 3), TrialState.COMPLETE, {})
        found["whole"].append(chosen)
        fresh = Study(parts)
        trial, chosen = fresh.ask()
        fresh.tell(trial, -abs(chosen["n_epochs"] - 3), TrialState.COMPLETE, {})
        found["parts"].append(chosen)
    assert found["whole"] == found["parts"]


def test_a_grid_is_every_combination_once_also_when_the_process_dies(project: Path) -> None:
    searched = sweep(
        project,
        "name: s\nsampler: grid\npruner: none\nspace:\n  n_epochs: {low: 1, high: 3}\n  frame_skip: {choice: [2, 4]}\n",
    )
    assert searched.most_trials == 6
    asked = [Study(searched).ask()[1] for _ in range(6)]
    assert {(c["n_epochs"], c["frame_skip"]) for c in asked} == {(n, skip) for n in (1, 2, 3) for skip in (2, 4)}


@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_a_bad_trial_is_given_up_after_good_ones_and_a_good_one_is_not(pruner: str, project: Path) -> None:
    searched = sweep(project, f"name: {pruner}\ntrials: 20\npruner: {pruner}" + SPACE)
    study = Study(searched)
    curves = [[100.0 + n, 200.0 + n, 300.0 + n] for n in range(6)]
    for curve in curves:
        trial, _ = study.ask()
        study.report(trial, curve)
        study.tell(trial, curve[-1], TrialState.COMPLETE, {})
    bad, _ = study.ask()
    given_up = [study.report(bad, [50.0]), study.report(bad, [50.0, 60.0])]
    good, _ = study.ask()
    assert not study.report(good, [500.0, 600.0, 700.0])
    assert any(given_up)
    assert len(study.frozen(bad.number).intermediate_values) == 2, "each validation is told once"


def test_the_best_is_the_complete_one_with_the_highest_score(project: Path) -> None:
    study = Study(sweep(project, "name: s\ntrials: 9" + SPACE))
    for score, state in ((-50.0, TrialState.COMPLETE), (-20.0, TrialState.COMPLETE), (None, TrialState.FAIL)):
        study.tell(study.ask()[0], score, state, {"failure": "Traceback"} if score is None else {})
    trial, _ = study.ask()
    study.report(trial, [900.0])
    study.tell(trial, None, TrialState.PRUNED, {})
    best = study.best()
    assert best is not None
    assert best.value == -20
    assert study.trials()[2].user_attrs["failure"] == "Traceback"


def test_hours_add_up_over_processes(project: Path) -> None:
    searched = sweep(project, "name: s\nhours: 1" + SPACE)
    Study(searched).spend(1800)
    assert Study(searched).spend(900) == pytest.approx(0.75)


def test_a_database_that_is_none_is_told_without_its_password(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = sweep(project, "name: s\ntrials: 9" + SPACE)
    monkeypatch.setenv(STORAGE, "postgresql+psycopg2://me:secret@127.0.0.1:1/none")
    with pytest.raises(StudyError, match=f"the database named by {STORAGE}") as told:
        Study(searched)
    assert "secret" not in str(told.value)
