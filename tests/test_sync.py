"""Sync, against DVC's and git's own refs and MLflow's own client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.sync import send_spools, sync, tie
from pipeline.tracking.experiments import Experiment, experiments
from pipeline.tracking.run import Run
from pipeline.tracking.spool import Spool
from pipeline.tracking.store import TrackingError, connect
from pipeline.tracking.stored import RESTORED_FROM
from tests.tracking.runs import begun, stored

ROOT = Path(__file__).parent.parent
UNKNOWN = "f" * 32


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    result = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return result.stdout.strip()


@pytest.fixture
def repository(project: Path) -> Path:
    """A git repository that says it is a DVC project."""
    git(project, "init", "-q")
    (project / ".dvc").mkdir()
    (project / ".gitignore").write_text("/mlflow.db*\n/mlruns/\n/runs/\n")
    git(project, "add", ".gitignore")
    git(project, "commit", "-qm", "start")
    return project


def add_experiment(folder: Path, name: str, run_id: str | None, mean: float | None = 900.0) -> str:
    """An experiment as DVC keeps it: a commit under refs/exps, of which the workspace shows nothing."""
    baseline = git(folder, "rev-parse", "HEAD")
    written = {"params.yaml": "seed: 3\nlearning_rate: 1e-5\nnet_arch: [64]\ndevice: cpu\n"}
    if run_id:
        written["metrics/mlflow.json"] = json.dumps({"run_id": run_id})
    if mean is not None:
        written["metrics/train.json"] = json.dumps({"minutes": 17.5})
        written["metrics/evaluate.json"] = json.dumps({"mean": mean, "std": 12.0})
    for path, text in written.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    git(folder, "add", *written)
    git(folder, "commit", "-qm", name)
    rev = git(folder, "rev-parse", "HEAD")
    git(folder, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", rev)
    git(folder, "reset", "-q", "--hard", baseline)
    return rev


def finished_run() -> Run:
    with Run.begin("one", {}, {}, run_id_file=Path("runs/mlflow.json")) as run:
        pass
    return run


def test_experiments_are_those_of_git_that_trained(repository: Path):
    rev = add_experiment(repository, "blunt-axle", UNKNOWN)
    add_experiment(repository, "queued-without-a-run", None)
    git(repository, "update-ref", "refs/exps/exec/EXEC_HEAD", rev)
    git(repository, "update-ref", "refs/exps/stash", rev)
    git(repository, "update-ref", "refs/exps/celery/stash", rev)
    baseline = git(repository, "rev-parse", "HEAD")
    assert experiments() == [Experiment("blunt-axle", rev, UNKNOWN, baseline)]


def test_a_known_run_is_named_after_its_experiment_and_otherwise_left_alone(repository: Path):
    run = finished_run()
    before = stored(run)
    rev = add_experiment(repository, "blunt-axle", run.id, mean=901.234)
    (row,) = tie(connect(), experiments())
    assert row == ("blunt-axle", run.id, "FINISHED", "901.23")
    after = stored(run)
    assert after.data.tags["dvc.experiment"] == "blunt-axle"
    assert after.data.tags["dvc.experiment_rev"] == rev
    assert after.info.end_time == before.info.end_time
    assert (after.data.params, after.data.metrics) == (before.data.params, before.data.metrics)


def test_experiments_that_share_a_run_are_both_named_each_with_its_own_score(repository: Path):
    run = finished_run()
    revs = [add_experiment(repository, name, run.id, mean) for name, mean in (("one-a", 900.0), ("two-b", 910.0))]
    rows = {(row[0], row[3]) for row in tie(connect(), experiments())}
    assert rows == {("one-a", "900.00"), ("two-b", "910.00")}
    tags = stored(run).data.tags
    assert set(tags["dvc.experiment"].split(", ")) == {"one-a", "two-b"}
    assert set(tags["dvc.experiment_rev"].split(", ")) == set(revs)


def test_an_unknown_run_is_restored_from_git_once(repository: Path):
    add_experiment(repository, "blunt-axle", UNKNOWN, mean=901.0)
    first, second = (tie(connect(), experiments()) for _ in range(2))
    assert first == second
    ((name, run_id, status, mean),) = first
    assert (name, status, mean) == ("blunt-axle", "FINISHED, restored", "901.00")
    run = MlflowClient().get_run(run_id)
    assert run.data.tags[RESTORED_FROM] == UNKNOWN
    assert run.info.run_name == "blunt-axle (restored)"
    assert run.data.params["device"] == "cpu"
    assert {key: json.loads(run.data.params[key]) for key in ("seed", "learning_rate", "net_arch")} == {
        "seed": 3,
        "learning_rate": 1e-5,
        "net_arch": [64],
    }
    assert run.data.metrics == {"train/minutes": 17.5, "evaluate/mean": 901.0, "evaluate/std": 12.0}
    assert run.data.tags["dvc.experiment"] == "blunt-axle"


def test_a_spool_that_can_not_be_sent_does_not_hold_up_the_others(project: Path, caplog: pytest.LogCaptureFixture):
    run = begun()
    for folder, run_id in (("a", UNKNOWN), ("b", run.id)):
        Spool(project / f"runs/{folder}/spool-{run_id}.jsonl", run_id).metrics({"k": 1.0}, 4)
    send_spools(connect(), project / "runs")
    assert [(m.step, m.value) for m in connect().get_metric_history(run.id, "k")] == [(4, 1.0)]
    assert f"spool-{UNKNOWN}.jsonl can't be sent and stays" in caplog.text


def test_what_a_stage_has_told_so_far_is_sent_and_its_outbox_stays(project: Path) -> None:
    known = begun().id
    Path("id.json").write_text(json.dumps({"run_id": known}))
    stage = Run.attach("evaluate", Path("id.json"))  # it drives for minutes, and then has more to tell
    outbox = stage.spool.path.parent
    send_spools(connect(), outbox.parent)
    assert stage.spool.path.exists()
    with stage:
        stage.metrics({"evaluate/mean": 900.0})
    assert connect().get_run(known).data.metrics["evaluate/mean"] == 900.0
    assert not outbox.exists(), "all is sent, and nobody adds to it"


def test_sync_does_all_of_it_and_prints_a_table(repository: Path):
    from tests.tracking.test_lost import HERE, dead_pid

    killed = begun("killed", tags={"pid": f"{dead_pid()}@{HERE}"}, run_id_file=Path("runs/mlflow.json"))
    Spool(repository / "runs/a/spool-x.jsonl", killed.id).metrics({"k": 1.0}, 4)
    add_experiment(repository, "blunt-axle", killed.id, mean=None)
    lines = sync(repository / "runs").splitlines()
    assert [line.split() for line in lines] == [
        ["experiment", "run", "status", "evaluate/mean"],
        ["blunt-axle", killed.id, "KILLED", "-"],
    ]
    assert MlflowClient().get_run(killed.id).data.metrics == {"k": 1.0}


def test_no_experiments_is_said(repository: Path):
    assert sync(repository / "runs") == "No DVC experiments yet; `dvc exp run` makes one."


def test_outside_dvc_is_said(project: Path):
    assert sync(project / "runs") == f"{project} is not a DVC project: no experiments to tie to their runs."


def test_a_store_that_is_away_is_one_message(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:1 can't be used"):
        sync(project / "runs")


def test_outside_the_project_is_a_users_mistake(bare_project: Path):
    result = subprocess.run([sys.executable, "-m", "pipeline.sync"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: 1 mistake in the parameters\n  params.yaml: no such file here")


STAGE = """
import json, pathlib
from pipeline.tracking.run import Run
pathlib.Path("metrics").mkdir(exist_ok=True)
with Run.begin("one", {}, {}):
    pass
pathlib.Path("metrics/evaluate.json").write_text(json.dumps({"mean": 900.5}))
"""
PIPELINE = """
stages:
  train:
    cmd: python stage.py
    deps: [stage.py]
    params: [seed]
    metrics:
      - metrics/mlflow.json: {cache: false}
      - metrics/evaluate.json: {cache: false}
"""


@pytest.mark.slow
def test_real_dvc_experiments_also_restored_ones_are_tied(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DVC_ROOT")  # DVC itself says where the project is
    dvc = [sys.executable, "-m", "dvc"]
    git(project, "init", "-q")
    git(project, "config", "user.name", "test")
    git(project, "config", "user.email", "test@example.org")
    subprocess.run([*dvc, "init", "-q"], check=True)
    shutil.copy(ROOT / "params.yaml", project)
    for path, text in (("stage.py", STAGE), ("dvc.yaml", PIPELINE), (".gitignore", "/mlflow.db*\n/mlruns/\n")):
        (project / path).write_text(text)
    git(project, "add", "-A")
    git(project, "commit", "-qm", "start")
    for name in ("blunt-axle", "from-cache"):  # the second finds the first in the run-cache
        subprocess.run([*dvc, "exp", "run", "-q", "-n", name, "-S", "seed=5"], check=True)
        git(project, "checkout", "-q", "-f", "HEAD")
        for file in (project / "metrics").glob("*.json"):
            file.unlink()
    said = subprocess.run([sys.executable, "-m", "pipeline.sync"], check=True, capture_output=True, text=True).stdout
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:]}
    assert rows["blunt-axle"][1:] == ["FINISHED", "900.50"]
    assert rows["from-cache"] == rows["blunt-axle"]
    tags = MlflowClient(f"sqlite:///{project}/mlflow.db").get_run(rows["blunt-axle"][0]).data.tags
    assert set(tags["dvc.experiment"].split(", ")) == {"blunt-axle", "from-cache"}
    assert tags["dvc.experiment_rev"].split(", ")[0] in git(project, "for-each-ref", "refs/exps")
