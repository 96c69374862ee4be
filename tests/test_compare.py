"""``compare`` on real drives of tiny policies, on MLflow's runs and on DVC's experiments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import compare
from pipeline.agent.policy import load
from pipeline.compare_experiments import sides_of
from pipeline.compare_sides import known_noise
from pipeline.comparison import Side
from pipeline.config import EvaluateParams, recipe
from pipeline.config import load as load_params
from pipeline.evaluation import Episode, drive, write_table
from pipeline.policy_source import find, members
from pipeline.score_cache import ScoreCache
from pipeline.tracking.registry import Registry
from pipeline.tracking.run import Run
from pipeline.tracking.store import TrackingError, connect
from tests.conftest import ROOT
from tests.policies import write_policy
from tests.test_sync import git, repository  # noqa: F401 (a fixture)
from tests.tracking.runs import begun

TRACKS = (10_000, 10_001)


@pytest.fixture
def folder(project: Path) -> Path:
    """A project with parameters."""
    shutil.copy(ROOT / "params.yaml", project)
    return project


# Policies


def test_policies_drive_once_and_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_policy(folder / f"{seed}.safetensors", seed) for seed in (3, 4)]
    command = [*map(str, paths), "--tracks", "10000:10002", "--bootstrap-samples", "200", "--json", "found/it.json"]
    compare.main(command)
    found = json.loads(Path("found/it.json").read_text())
    scores = [[drive(load(path), track).episode_return for track in TRACKS] for path in paths]
    assert found["sides"]["3"]["mean"]["value"] == pytest.approx(sum(scores[0]) / 2)
    assert found["contests"][0]["difference"]["value"] == pytest.approx((sum(scores[1]) - sum(scores[0])) / 2)
    said = capsys.readouterr()
    assert found["contests"][0]["words"][0] in said.out
    with Image.open(compare.CHART) as png:
        assert png.size[0] > 1000

    (run,) = connect().search_runs([connect().get_experiment_by_name("CarRacing").experiment_id])
    assert run.data.metrics["side-2-vs-1/difference"] == pytest.approx(found["contests"][0]["difference"]["value"])
    assert run.data.params["side-1"] == str(paths[0])
    assert {file.path for file in connect().list_artifacts(run.info.run_id)} == {
        "comparison", "comparison.json", "comparison.png", "comparison.txt"
    }  # fmt: skip
    assert not Path("metrics/mlflow.json").exists(), "the pipeline's own run is another"

    kept = ScoreCache(folder / "runs", paths[0], load_params(EvaluateParams))
    kept.add([Episode(10_000, 1234.5, 800, True, 300, 300)])  # it is read, then: nobody drives like that
    compare.main([*command[:-2], "--json", "-"])
    said = capsys.readouterr()
    assert json.loads(said.out)["sides"]["3"]["highest"] == 1234.5
    assert "4 of 4 drives are known" in said.err


@pytest.mark.slow
def test_fresh_drives_again_and_a_cut_off_comparison_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_policy(folder / f"{seed}.safetensors", seed) for seed in (3, 4)]
    params = load_params(EvaluateParams)
    caches = [ScoreCache(folder / "runs", path, params) for path in paths]
    for cache in caches:
        cache.add([Episode(10_000, 1234.5, 800, True, 300, 300)])
    command = [*map(str, paths), "--tracks", "10000:10002", "--bootstrap-samples", "200", "--json", "-"]
    compare.main(command)
    said = capsys.readouterr()
    scores = [[drive(load(path), track).episode_return for track in TRACKS] for path in paths]
    assert "2 of 4 drives are known" in said.err
    ends = [(side["lowest"], side["highest"]) for side in json.loads(said.out)["sides"].values()]
    assert ends == [(scores[0][1], 1234.5), (scores[1][1], 1234.5)]
    compare.main([*command, "--fresh"])
    said = capsys.readouterr()
    assert "are known" not in said.err
    ends = [(side["lowest"], side["highest"]) for side in json.loads(said.out)["sides"].values()]
    assert ends == [(min(each), max(each)) for each in scores]
    assert [cache.read()[10_000].episode_return for cache in caches] == [each[0] for each in scores]


def test_known_drives_are_of_this_policy_and_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(EvaluateParams)
    first, other = (write_policy(tmp_path / f"{seed}.safetensors", seed) for seed in (3, 4))
    episode = Episode(10_000, 900.0, 800, True, 300, 300)
    cache = ScoreCache(tmp_path, first, params)
    cache.add([episode])
    cache.add([Episode(10_001, 800.0, 900, False, 300, 300)])
    copy = Path(shutil.copy(first, tmp_path / "copy.safetensors"))
    assert ScoreCache(tmp_path, copy, params).read()[10_000] == episode
    assert set(ScoreCache(tmp_path, first, params).read()) == {10_000, 10_001}
    assert ScoreCache(tmp_path, other, params).read() == {}
    write_policy(first, 5)
    assert ScoreCache(tmp_path, first, params).read() == {}
    monkeypatch.setattr("pipeline.score_cache.DRIVING_CODE", ("evaluation.py",))
    assert ScoreCache(tmp_path, copy, params).read() == {}
    monkeypatch.undo()
    cache.path.write_text(cache.path.read_text()[:-20])
    assert cache.read() == {}, "a damaged file is no score"


def test_policies_of_runs_of_the_registry_and_of_run_folders(project: Path) -> None:
    policy = write_policy(project / "runs/one-abc/best_model.safetensors", 3)
    (policy.parent / "config.json").write_text('{"seed": 7, "learning_rate": 1e-4}')
    assert find(str(policy), project).params == {"seed": 7, "learning_rate": 1e-4}
    with Run.begin("one", {"seed": 3}, {}) as run:
        run.artifact(policy, "models")
    registry = Registry("car")
    registry.point("champion", registry.register(policy, (2, 36, 36), run.id, {}))
    for place, name in enumerate((run.id, "one", f"runs:/{run.id}", f"runs:/{run.id}/models/best_model.safetensors")):
        found = find(name, project / f"there-{place}")
        assert found.path.read_bytes() == policy.read_bytes()
        assert found.params == {"seed": "3"}
    assert find("models:/car@champion", project / "registered").params == {"seed": "3"}
    with pytest.raises(TrackingError, match=r"nobody: expected policy file, .* there is none of this name"):
        find("nobody", project / "nobody")
    empty = begun("empty", run_id_file=project / "empty.json")
    with pytest.raises(TrackingError, match=f"run {empty.id} has no models/best_model.safetensors"):
        find("empty", project / "empty")


def test_a_word_names_one_policy_or_several(project: Path) -> None:
    odd = write_policy(project / "a,b.safetensors", 3)
    assert members(str(odd)) == [str(odd)]
    assert members("x.safetensors,models:/car@champion") == ["x.safetensors", "models:/car@champion"]
    assert members("models:/car/1,models:/car/2") == ["models:/car/1", "models:/car/2"]
    parent = begun("parent", run_id_file=project / "x.json")
    tags = {"mlflow.parentRunId": parent.id}
    seeds = [begun(f"s{seed}", {"seed": seed}, tags, project / "x.json").id for seed in range(3)]
    assert sorted(members("parent")) == sorted(seeds)
    assert members("s1") == ["s1"]


def test_a_group_with_one_policy_twice_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_policy(folder / "1.safetensors", 1)
    shutil.copy(first, folder / "2.safetensors")
    other = write_policy(folder / "3.safetensors", 3)
    with pytest.raises(SystemExit) as stopped:
        compare.main([f"{first},{folder / '2.safetensors'}", str(other)])
    assert stopped.value.code == 2
    assert "expected the policies of different trainings, got one of them twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a.safetensors"], "expected two policies or more, or --experiments; got 1"),
        (["a.safetensors", "a.safetensors"], "got one of them twice"),
        (["a.safetensors", "--experiments"], "expected policies or --experiments, got both"),
        (["a.safetensors", "b.safetensors", "--track", "1"], "expected --race"),
        (["a.safetensors", "b.safetensors"], "a.safetensors: no such file"),
        (["a.safetensors", "b.safetensors", "--freh"], "did you mean --fresh?"),
    ],
)
def test_mistakes_are_told(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_seed_noise_is_that_of_the_runs_of_the_same_recipe(project: Path) -> None:
    def finished(seed: int, mean: float, learning_rate: float = 1e-4) -> None:
        params = {"seed": seed, "learning_rate": learning_rate, "run_name": f"r{seed}"}
        with Run.begin("one", params, {}, run_id_file=None) as run:
            run.metrics({"evaluate/mean": mean})

    for seed, mean in ((0, 900.0), (1, 910.0), (2, 890.0)):
        finished(seed, mean)
    finished(3, 100.0, learning_rate=1e-2)
    side = Side("A", np.zeros((1, 2)), np.zeros((1, 2)), (recipe({"seed": 5, "learning_rate": 1e-4}),))
    (noise,) = known_noise([side]).values()
    assert (noise.deviation, noise.freedom) == (pytest.approx(10.0), 2)
    assert "3 seeds of the recipe of A" in noise.known_from
    assert known_noise([Side("A", side.returns, side.laps, (None,))]) == {}


# DVC's experiments


def add_experiment(
    folder: Path, name: str, score: float, params: str, evaluated: bool = True, code: str = "c0de", first: int = 10_000
) -> str:
    """An experiment as DVC keeps it, with two tracks of this score."""
    baseline = git(folder, "rev-parse", "HEAD")
    episodes = [Episode(first + n, score + n, 800, score > 800, 300, 300) for n in range(2)]
    write_table(folder / "plots/tracks.csv", episodes)
    policy = {"path": "models/best_model.safetensors", "md5": name}
    stages = {
        "train": {"deps": [{"path": "pipeline/agent", "md5": code}], "outs": [policy]},
        "evaluate": {"deps": [policy if evaluated else {**policy, "md5": "another"}]},
    }
    (folder / "metrics").mkdir(exist_ok=True)
    (folder / "metrics/mlflow.json").write_text(json.dumps({"run_id": "f" * 32}))
    (folder / "dvc.lock").write_text(json.dumps({"stages": stages}))
    (folder / "params.yaml").write_text(params)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", name)
    rev = git(folder, "rev-parse", "HEAD")
    git(folder, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", rev)
    git(folder, "reset", "-q", "--hard", baseline)
    return rev


def params_yaml(seed: int, learning_rate: str) -> str:
    return f"seed: {seed}\nlearning_rate: {learning_rate}\nvideo_fps: {seed + 10}\nrun_name: r{seed}\n"


def test_experiments_are_grouped_by_all_but_the_seed(repository: Path) -> None:  # noqa: F811
    for seed in range(3):
        add_experiment(repository, f"low-{seed}", 800.0 + 10 * seed, params_yaml(seed, "1e-4"))
        add_experiment(repository, f"high-{seed}", 900.0 + 10 * seed, params_yaml(seed, "0.001"))
    sides, tracks, notes = sides_of([])
    assert tracks == (10_000, 10_001)
    assert sorted(notes) == [
        "learning_rate=0.0001: low-0 (seed 0), low-1 (seed 1), low-2 (seed 2)",
        "learning_rate=0.001: high-0 (seed 0), high-1 (seed 1), high-2 (seed 2)",
    ]
    assert {side.label: side.returns.mean(axis=1).tolist() for side in sides} == {
        "learning_rate=0.0001": [800.5, 810.5, 820.5],
        "learning_rate=0.001": [900.5, 910.5, 920.5],
    }
    assert {side.label: side.laps.mean() for side in sides}["learning_rate=0.001"] == 1
    assert {side.label for side in sides_of(["high-1", "low-2"])[0]} == {"learning_rate=0.001", "learning_rate=0.0001"}
    assert [side.n for side in sides_of([git(repository, "rev-parse", "HEAD")])[0]] == [3, 3]
    with pytest.raises(TrackingError, match="nothing: expected the name of a DVC experiment"):
        sides_of(["nothing"])


def test_what_can_not_be_compared_is_left_out_and_said(repository: Path) -> None:  # noqa: F811
    add_experiment(repository, "a-first", 800.0, params_yaml(0, "1e-4"))
    add_experiment(repository, "b-from-cache", 800.0, params_yaml(0, "1e-4"))
    add_experiment(repository, "c-not-evaluated", 1.0, params_yaml(1, "1e-4"), evaluated=False)
    add_experiment(repository, "d-elsewhere", 700.0, params_yaml(2, "1e-4"), first=20_000)
    add_experiment(repository, "e-other-code", 600.0, params_yaml(1, "1e-4"), code="beef")
    sides, _, notes = sides_of([])
    assert sorted(side.returns.mean() for side in sides) == [600.5, 800.5]
    assert all(side.label.startswith("code=") for side in sides)
    assert any("is the training of" in note for note in notes)
    assert any(note.endswith("than a-first: d-elsewhere") for note in notes)
    assert "1 experiments were not evaluated" in notes


def test_no_evaluated_experiment_is_a_users_mistake(repository: Path) -> None:  # noqa: F811
    with pytest.raises(TrackingError, match="expected DVC experiments that were evaluated, got none of 0"):
        sides_of([])


STAGE = """
import json, pathlib, sys
import yaml
from pipeline.evaluation import Episode, write_table
from pipeline.tracking.run import Run
params = yaml.safe_load(open("params.yaml"))
score = 900 + 10 * params["seed"] - 100 * params["n_epochs"]
pathlib.Path("metrics").mkdir(exist_ok=True)
if sys.argv[1] == "train":
    with Run.begin("one", params, {}):
        pass
    pathlib.Path("models").mkdir(exist_ok=True)
    pathlib.Path("models/best_model.safetensors").write_text(str(score))
else:
    score = float(pathlib.Path("models/best_model.safetensors").read_text())
    episodes = [Episode(10000 + n, score + n, 800, True, 300, 300) for n in range(5)]
    write_table(pathlib.Path("plots/tracks.csv"), episodes)
    pathlib.Path("metrics/evaluate.json").write_text(json.dumps({"mean": score + 2}))
"""
PIPELINE = """
stages:
  train:
    cmd: python stage.py train
    deps: [stage.py]
    params: [seed, n_epochs]
    outs: [models/best_model.safetensors]
    metrics:
      - metrics/mlflow.json: {cache: false}
  evaluate:
    cmd: python stage.py evaluate
    deps: [models/best_model.safetensors]
    metrics:
      - metrics/evaluate.json: {cache: false}
    plots:
      - plots/tracks.csv: {cache: false}
"""


@pytest.mark.slow
def test_a_real_grid_and_what_dvc_took_from_its_cache(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid runs in DVC's queue; then the database is lost, and one of it is run again, from the cache."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DVC_ROOT")
    dvc = [sys.executable, "-m", "dvc"]
    git(project, "init", "-q")
    git(project, "config", "user.name", "test")
    git(project, "config", "user.email", "test@example.org")
    subprocess.run([*dvc, "init", "-q"], check=True)
    shutil.copy(ROOT / "params.yaml", project)
    for path, text in (("stage.py", STAGE), ("dvc.yaml", PIPELINE)):
        (project / path).write_text(text)
    (project / ".gitignore").write_text("/mlflow.db*\n/mlruns/\n/models/\n/plots/comparison.png\n")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "start")
    grid = ["-S", "n_epochs=choice(2,4)", "-S", "seed=range(0,3)"]
    subprocess.run([*dvc, "exp", "run", "-q", "--queue", *grid], check=True)
    subprocess.run([*dvc, "exp", "run", "-q", "--run-all"], check=True)
    for file in (*project.glob("mlflow.db*"), *(project / "metrics").glob("*.json")):
        file.unlink()
    subprocess.run([*dvc, "exp", "run", "-q", "-n", "again", "-S", "n_epochs=2", "-S", "seed=1"], check=True)
    command = [sys.executable, "-m", "pipeline.compare", "--experiments", "--bootstrap-samples", "500", "--json", "it"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(Path("it").read_text())
    by_epochs = {"n_epochs=2": 900 + 10 - 200 + 2.0, "n_epochs=4": 900 + 10 - 400 + 2.0}
    assert {label: side["mean"]["value"] for label, side in found["sides"].items()} == pytest.approx(by_epochs)
    assert {side["n_seeds"] for side in found["sides"].values()} == {3}
    assert found["contests"][0]["about"] == "recipes"
    assert found["contests"][0]["verdict"] in ("better", "worse")
    assert "The recipe of n_epochs=2 is better than that of n_epochs=4, fairly sure" in said.stdout
    assert "counted once" in said.stderr
    policy = find("again", project / "fetched")
    assert policy.path.read_text() == "710"
    assert policy.params is not None
    assert policy.params["n_epochs"] == 2
