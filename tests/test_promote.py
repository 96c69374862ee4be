"""Promotion: what is registered and who is champion, read back with MLflow's own client and with scipy."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from numpy.typing import NDArray
from scipy import stats

from pipeline import promote as command
from pipeline.agent.policy import load
from pipeline.config import PromoteParams
from pipeline.evaluation import Episode
from pipeline.promote import promote
from pipeline.statistics import paired_test
from pipeline.tracking.registry import Registry, sha256
from pipeline.tracking.run import Run
from pipeline.tracking.store import TrackingError, connect
from tests.policies import write_policy
from tests.tracking.runs import begun

PARAMS = PromoteParams(
    registered_model="carracing-ppo", promote_alpha=0.05, tracks="10000:10100", bootstrap_samples=10_000
)
Scores = Callable[[Path, NDArray[np.float64]], None]


def returns(mean: float, seed: int = 0, n: int = 100) -> NDArray[np.float64]:
    """(n,) returns; the same seed gives the same luck on each track."""
    return np.round(mean + 20 * np.random.default_rng(seed).standard_normal(n), 6)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Scores:
    """Says what a policy file scores on each track, in the place of driving."""
    given: dict[str, NDArray[np.float64]] = {}

    def drive_tracks(policies: Sequence[Path], tracks: Sequence[int]) -> list[list[Episode]]:
        played = [given[sha256(policy)] for policy in policies]
        return [[Episode(t, float(r), 800, True, 300, 300) for t, r in zip(tracks, p, strict=True)] for p in played]

    monkeypatch.setattr(command, "drive_tracks", drive_tracks)
    return lambda path, values: given.update({sha256(path): values})


def aliases() -> dict[str, int]:
    found = connect().get_registered_model(PARAMS.registered_model).aliases
    return {alias: int(version) for alias, version in found.items()}


def n_versions() -> int:
    return len(connect().search_model_versions(f"name = '{PARAMS.registered_model}'"))


def test_promotion_from_the_first_champion_to_the_next(project: Path, scores: Scores):
    first, worse, better = (write_policy(project / f"{seed}.safetensors", seed) for seed in range(3))
    scores(first, returns(900))
    scores(worse, returns(899))
    scores(better, returns(905))

    assert "version 1 (" in (said := promote(PARAMS, first))
    assert "becomes the first" in said
    assert aliases() == {"champion": 1, "challenger": 1}

    said = promote(PARAMS, worse)
    assert "Version 1 stays champion: version 2 is not better" in said
    assert "mean difference -1.00, 95% bootstrap interval -1.00 to -1.00, higher on 0 of 100 tracks" in said
    assert aliases() == {"champion": 1, "challenger": 2}

    said = promote(PARAMS, better)
    assert "Version 3 is the new champion: better than version 1 at promote_alpha = 0.05" in said
    assert "one-sided paired" in said
    assert "p = 0.0001" in said
    assert aliases() == {"champion": 3, "challenger": 3}


def test_the_same_file_is_registered_once(project: Path, scores: Scores):
    first, second = (write_policy(project / f"{seed}.safetensors", seed) for seed in range(2))
    scores(first, returns(900))
    scores(second, returns(890))
    promote(PARAMS, first)
    promote(PARAMS, second)
    copy = Path(shutil.copy(first, project / "copy.safetensors"))
    assert "registered as version 1 already, and is the champion: nothing to do" in promote(PARAMS, copy)
    said = promote(PARAMS, second)
    assert "registered as version 2 already: nothing new is registered" in said
    assert "Version 1 stays champion" in said
    assert n_versions() == 2
    assert aliases() == {"champion": 1, "challenger": 2}


def test_a_version_is_a_policy_file_and_code_tied_to_its_run(project: Path, scores: Scores):
    with Run.begin("one", {"seed": 3}, {}) as run:
        pass
    ended = connect().get_run(run.id).info.end_time
    policy = write_policy(project / command.POLICY, 0)
    scores(policy, returns(900))
    promote(PARAMS)

    client = MlflowClient()
    version = client.get_model_version("carracing-ppo", "1")
    assert version.run_id == run.id
    assert version.tags["sha256"] == sha256(policy)
    assert float(version.tags["evaluate/mean"]) == pytest.approx(returns(900).mean(), abs=1e-4)
    assert float(version.tags["evaluate/std"]) == pytest.approx(returns(900).std(), abs=1e-4)
    info = client.get_run(run.id).info
    assert (info.status, info.end_time) == ("FINISHED", ended)
    (model,) = client.get_run(run.id).outputs.model_outputs
    assert version.source == f"models:/{model.model_id}"

    stored = project / "mlruns/CarRacing/models"
    files = [file for file in stored.rglob("*") if file.is_file()]
    (kept,) = [file for file in files if file.suffix == ".safetensors"]
    assert kept.read_bytes() == policy.read_bytes()
    assert {file.suffix for file in files} <= {".safetensors", ".py", ".html", ".txt", ".yaml", ""}, "no pickles"
    pins = next(file for file in files if file.name == "requirements.txt").read_text().split()
    assert f"mlflow=={mlflow.__version__}" in pins
    assert all("==" in pin and "+" not in pin for pin in pins)
    assert {"torch", "gymnasium", "safetensors"} < {pin.partition("==")[0] for pin in pins}

    uri = "models:/carracing-ppo@champion/artifacts/policy.safetensors"
    assert Path(mlflow.artifacts.download_artifacts(uri)).read_bytes() == policy.read_bytes()


def test_another_runs_policy_is_not_tied_to_the_pipelines_run(project: Path, scores: Scores):
    begun()
    write_policy(project / command.POLICY, 0)
    other = write_policy(project / "other.safetensors", 1)
    scores(other, returns(900))
    promote(PARAMS, other)
    assert not connect().get_model_version("carracing-ppo", "1").run_id


def test_a_champion_whose_file_was_changed_in_the_store_is_not_driven(project: Path, scores: Scores):
    first, second = (write_policy(project / f"{seed}.safetensors", seed) for seed in range(2))
    scores(first, returns(900))
    scores(second, returns(990))
    promote(PARAMS, first)
    (stored,) = (project / "mlruns").rglob("*.safetensors")
    stored.write_bytes(second.read_bytes())
    with pytest.raises(TrackingError, match=r"carracing-ppo version 1 .* has sha256 .* was registered"):
        promote(PARAMS, second)
    stored.unlink()
    with pytest.raises(TrackingError, match=r"carracing-ppo version 1 .* can't be read"):
        promote(PARAMS, second)
    assert aliases() == {"champion": 1, "challenger": 1}


def test_the_p_value_is_that_of_scipys_permutation_test():
    champion = returns(900, seed=0)
    for shift, seed in ((0.0, 1), (3.0, 2), (-2.0, 3)):
        challenger = returns(900 + shift, seed)
        expected = stats.permutation_test(
            (challenger, champion),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            alternative="greater",
            n_resamples=20_000,
            vectorized=True,
            random_state=0,
        )
        result = paired_test(challenger, champion, 20_000)
        assert result.mean == pytest.approx(expected.statistic)
        assert result.p_value == pytest.approx(expected.pvalue, abs=0.015)  # 3 standard errors of two estimates


def test_the_interval_is_that_of_scipys_bootstrap():
    challenger, champion = returns(903, 1), returns(900, 2)
    expected = stats.bootstrap(
        (challenger - champion,), np.mean, method="percentile", n_resamples=20_000, random_state=0
    ).confidence_interval
    result = paired_test(challenger, champion, 20_000)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=0.15)


def test_a_little_faster_but_sometimes_off_the_road_is_not_better():
    champion = returns(900)
    challenger = champion + np.where(np.arange(100) < 10, -300.0, 5.0)
    assert stats.wilcoxon(challenger, champion, alternative="greater").pvalue < 0.001
    assert paired_test(challenger, champion, 10_000).p_value > 0.9


def test_equal_drives_are_not_better():
    result = paired_test(returns(900), returns(900), 1000)
    assert (result.p_value, result.mean, result.wins) == (1.0, 0.0, 0)


def test_one_track_can_not_tell():
    assert 0.4 < paired_test(np.array([950.0]), np.array([900.0]), 10_000).p_value < 0.6


ROOT = Path(__file__).parent.parent


def run_command(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "params.yaml", project)
    return subprocess.run(
        [sys.executable, "-m", "pipeline.promote", *arguments], text=True, capture_output=True, check=False, cwd=project
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nowhere.safetensors"], "nowhere.safetensors: expected a .safetensors policy file"),
        (["--policy", "third-party.zip"], "third-party.zip: expected a .safetensors policy file"),
        (["--promote-alpha", "0.7"], "promote_alpha = 0.7 (--promote-alpha): expected number, > 0, < 0.5"),
        (["--registred-model", "x"], "did you mean --registered-model?"),
    ],
)
def test_a_users_mistake_is_told_at_once(arguments: list[str], message: str, bare_project: Path):
    (bare_project / "third-party.zip").write_bytes(b"")
    began = time.monotonic()
    result = run_command(bare_project, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < 2
    assert not (bare_project / "mlflow.db").exists()


@pytest.mark.slow
def test_a_damaged_policy_is_refused_under_its_own_name(bare_project: Path):
    (bare_project / "mine.safetensors").write_bytes(b"not a policy")
    result = run_command(bare_project, "--policy", "mine.safetensors")
    assert result.returncode == 2
    assert result.stderr.startswith("error: mine.safetensors: not a policy file, or damaged")


PREDICT = """
import sys, mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/carracing-ppo@champion")
np.save(sys.argv[2], model.predict(np.load(sys.argv[1])))
"""


@pytest.fixture
def served(project: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, NDArray[np.uint8], NDArray[np.float32]]:
    """A folder whose store has a champion, observations (5, 2, 36, 36), and the pedals that the policy wants."""
    path = write_policy(project / "0.safetensors", 0)
    registry = Registry("carracing-ppo")
    registry.point("champion", registry.register(path, (2, 36, 36), None, {}))
    observations = np.random.default_rng(0).integers(0, 256, (5, 2, 36, 36), np.uint8)
    monkeypatch.delenv("PYTHONPATH")  # the model brings its own code
    return project, observations, load(path).predict(observations)


@pytest.mark.slow
def test_the_champion_predicts_in_a_fresh_process(served: tuple[Path, Any, Any]):
    folder, observations, expected = served
    np.save(folder / "in.npy", observations)
    subprocess.run([sys.executable, "-c", PREDICT, "in.npy", "out.npy"], cwd=folder, check=True)
    pedals = np.load(folder / "out.npy")
    assert (pedals.dtype, pedals.shape) == (np.float32, (5, 3))
    np.testing.assert_array_equal(pedals, expected)


@pytest.mark.slow
def test_mlflow_serves_the_champion(served: tuple[Path, Any, Any]):
    folder, observations, expected = served
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--port", str(port)]
    server = subprocess.Popen([*command, "-m", "models:/carracing-ppo@champion"], cwd=folder, start_new_session=True)
    try:
        answer = ask(f"http://127.0.0.1:{port}/invocations", {"inputs": observations.tolist()}, server)
    finally:
        stop_group(server)
    np.testing.assert_allclose(np.array(answer["predictions"]), expected, atol=1e-6)


def ask(url: str, body: Any, server: subprocess.Popen[bytes], seconds: float = 120) -> Any:
    """The server's answer, once it is up."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + seconds
    while True:
        try:
            return json.load(urllib.request.urlopen(request, timeout=30))
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > deadline or server.poll() is not None:
                raise
            time.sleep(0.5)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a server and the workers it started."""
    import os
    import signal

    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)
