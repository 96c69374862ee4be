"""The team's set-up, for real: ``compose.yaml``'s own server command on PostgreSQL and an S3 service, all on loopback.

Docker isn't needed: what its containers would be is started here. Of a client only environment variables change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from ruamel.yaml import YAML

from tests.conftest import ROOT
from tests.services import NO_POSTGRES, S3, Postgres, Service, free_port, postgres_tools, responds

COMPOSE = (ROOT / "compose.yaml").read_text(encoding="utf-8")
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(:-(?P<default>[^}]*)|:\?[^}]*)}")
"""Compose's ``${NAME:-default}`` and ``${NAME:?message}``."""
TINY = """
run_name: team
n_envs: 4
n_steps: 16
batch_size: 32
n_epochs: 1
total_timesteps: 256
cnn_channels: [8, 8, 8]
features_dim: 32
eval_freq: 128
n_eval_episodes: 1
save_freq: 128
num_threads: 1
n_workers: 1
tracks: "10000:10002"
bootstrap_samples: 100
video_tracks: [worst]
gif_seconds: 1
"""
BY_THE_CLOCK = ("time/", "system/")
MINUTES = "train/minutes"


def services(**values: str) -> dict[str, Any]:
    """The services of compose.yaml with the values of an .env file."""

    def value(match: re.Match[str]) -> str:
        found = values.get(match["name"], match["default"])
        assert found is not None, f"{match['name']} is required"
        return found

    return dict(YAML(typ="safe", pure=True).load(VARIABLE.sub(value, COMPOSE))["services"])


# compose.yaml, as it stands there


def test_images_are_pinned_and_every_service_says_whether_it_is_well() -> None:
    found = services(POSTGRES_PASSWORD="p", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="s")
    assert set(found) == {"postgres", "s3", "mlflow"}
    for name, service in found.items():
        assert service["healthcheck"]["test"], name
        assert re.fullmatch(r".+:v?\d+\.\d+[\w.]*", service.get("image", "built:1.0")), "a release, not what is newest"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "open on loopback alone"
    page = (ROOT / "docs/team.md").read_text(encoding="utf-8")
    images = [service["image"] for service in found.values() if "image" in service]
    assert [image for image in images if f"`{image}`" not in page] == []
    assert "--constraint constraints.txt" in found["mlflow"]["build"]["dockerfile_inline"]
    assert found["mlflow"]["depends_on"] == {name: {"condition": "service_healthy"} for name in ("postgres", "s3")}


def test_secrets_come_from_a_file_that_git_ignores_and_have_no_default() -> None:
    used = {match["name"]: match["default"] for match in VARIABLE.finditer(COMPOSE)}
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    known = {match[1]: match[2] for match in re.finditer(r"^#?([A-Z_0-9]+)=(.*)$", example, re.MULTILINE)}
    assert set(known) == set(used)
    required = {name for name, default in used.items() if default is None}
    assert {name for name in required if not known[name]} == {"POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY"}
    assert {name: known[name] for name in set(used) - required} == {n: d for n, d in used.items() if d is not None}
    ignored = subprocess.run(["git", "check-ignore", ".env", ".env.example"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == [".env"]


# The set-up at work


class ComposedServer(Service):
    """What compose.yaml starts as ``mlflow``, with nothing in its environment that isn't written there."""

    def __init__(self, folder: Path, postgres: Postgres, s3: S3) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        service = services(
            POSTGRES_PASSWORD=postgres.password, AWS_ACCESS_KEY_ID="tester", AWS_SECRET_ACCESS_KEY=s3.secret
        )["mlflow"]
        places = {"postgres:5432": f"127.0.0.1:{postgres.port}", "http://s3:7070": s3.uri}
        environment = {key: replaced(value, places) for key, value in service["environment"].items()}
        command = [{"0.0.0.0": "127.0.0.1", "5000": str(port)}.get(word, word) for word in service["command"]]
        super().__init__(folder, "server", command, {"PATH": path(), "HOME": str(folder), **environment})

    def answers(self) -> bool:
        return responds(f"{self.uri}/health")


def replaced(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


def path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


class Team(NamedTuple):
    """The servers, and what a client's environment says of them, with a password in the address."""

    postgres: Postgres
    s3: S3
    server: ComposedServer
    environment: dict[str, str]
    password: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.server.uri)

    def run_of(self, project: Path) -> Run:
        return self.client.get_run(json.loads((project / "metrics/mlflow.json").read_text())["run_id"])


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    if postgres_tools() is None:
        pytest.skip(NO_POSTGRES)
    folder = tmp_path_factory.mktemp("team")
    postgres, s3, password = Postgres(), S3(folder), secrets.token_hex(20)
    server = ComposedServer(folder, postgres, s3)
    try:
        postgres.start()
        s3.start()
        postgres.create("mlflow")
        for bucket in ("mlflow", "dvc"):
            s3.client().create_bucket(Bucket=bucket)
        server.start()
        address = server.uri.replace("http://", f"http://ann:{password}@")
        yield Team(postgres, s3, server, {"MLFLOW_TRACKING_URI": address, **s3.environment}, password)
    finally:
        for service in (server, s3):
            service.kill()
        postgres.remove()


def said(project: Path, *words: str, environment: dict[str, str] | None = None) -> str:
    """What a command prints; it is kept in the project too."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "AWS_", "DVC_"))}
    settings = {"PATH": path(), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", **(environment or {})}
    ended = subprocess.run(
        words,
        cwd=project,
        env={**clean, **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, f"{words}: exit code {ended.returncode}\n{ended.stdout[-5000:]}"
    with (project / "said.log").open("a") as log:
        log.write(ended.stdout)
    return ended.stdout


def git(project: Path, *words: str) -> None:
    said(project, "git", "-c", "user.name=test", "-c", "user.email=test@example.org", *words)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the files that are here, committed or not, with tiny parameters."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "tiny.yaml").write_text(TINY)
    said(folder, "python", "-m", "pipeline.config", "apply", "tiny.yaml")
    (folder / "said.log").unlink()
    git(folder, "init", "-q")
    (folder / ".git/info/exclude").write_text("said.log\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    return folder


def copy_of(checkout: Path, name: str) -> Path:
    return Path(shutil.copytree(checkout, checkout.parent / name))


@pytest.fixture(scope="module")
def embedded(checkout: Path) -> Path:
    """A project whose training told its own database."""
    project = copy_of(checkout, "embedded")
    said(project, "python", "-m", "pipeline.train")
    return project


@pytest.fixture(scope="module")
def piped(checkout: Path, team: Team) -> Path:
    """A project whose three stages and promotion told the team's server."""
    project = copy_of(checkout, "piped")
    said(project, "dvc", "repro", environment=team.environment)
    said(project, "python", "-m", "pipeline.promote", environment=team.environment)
    return project


@pytest.fixture(scope="module")
def late(checkout: Path, team: Team) -> Path:
    """A project that trained and evaluated while the server was away."""
    project = copy_of(checkout, "late")
    team.server.kill()
    try:
        for stage in ("train", "evaluate"):
            said(project, "python", "-m", f"pipeline.{stage}", environment=team.environment)
        assert "not all reached MLflow; send it later" in (project / "said.log").read_text()
    finally:
        team.server.start()
    said(project, "python", "-m", "pipeline.sync", environment=team.environment)
    return project


def curves(client: MlflowClient, run: Run) -> set[tuple[str, int, float]]:
    """All metrics that the clock doesn't decide; (name, step, value)."""
    keys = [key for key in run.data.metrics if not key.startswith(BY_THE_CLOCK) and key != MINUTES]
    found = [point for key in keys for point in client.get_metric_history(run.info.run_id, key)]
    points = [(point.key, point.step, point.value) for point in found]
    assert len({(key, step) for key, step, _ in points}) == len(points), "doubled"
    return set(points)


def files(client: MlflowClient, run: Run, folder: str = "") -> set[str]:
    """Paths of a run's artifacts."""
    listed = client.list_artifacts(run.info.run_id, folder or None)
    below = [files(client, run, entry.path) for entry in listed if entry.is_dir]
    return {entry.path for entry in listed if not entry.is_dir}.union(*below)


def kinds(names: set[str]) -> list[str]:
    """Artifacts; of pictures without the time and the random id that MLflow puts into their names."""
    return sorted(re.sub(r"(\+[0-9a-f-]{36})|(\+\d{13})", "", name) for name in names)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_the_three_stages_leave_what_they_leave_without_a_server(team: Team, embedded: Path, piped: Path) -> None:
    own = MlflowClient(f"sqlite:///{embedded}/mlflow.db")
    (before,) = own.search_runs([own.get_experiment_by_name("CarRacing").experiment_id])
    run = team.run_of(piped)
    assert run.info.status == "FINISHED"
    assert run.data.params == before.data.params
    assert curves(own, before) == {p for p in curves(team.client, run) if not p[0].startswith("evaluate/")}
    assert set(before.data.tags) <= set(run.data.tags)
    figures = json.loads((piped / "metrics/evaluate.json").read_text())
    assert {key: run.data.metrics[f"evaluate/{key}"] for key in figures} == figures
    assert set(kinds(files(own, before))) <= set(kinds(files(team.client, run)))
    assert {"videos/worst.mp4", "plots/returns.png", "evaluate/tracks.json"} <= files(team.client, run)
    assert not (piped / "mlflow.db").exists()


@pytest.mark.slow
def test_postgres_and_the_bucket_hold_it_by_their_own_word(team: Team, piped: Path) -> None:
    run = team.run_of(piped)
    sql = f"SELECT status, name FROM runs WHERE run_uuid = '{run.info.run_id}'"
    assert team.postgres.query(sql, "mlflow") == [("FINISHED", "team")]
    objects = team.s3.objects("mlflow")
    (film,) = [data for key, data in objects.items() if key.endswith(f"{run.info.run_id}/artifacts/videos/worst.mp4")]
    assert sha256(film) == sha256((piped / "videos/worst.mp4").read_bytes())


@pytest.mark.slow
def test_the_champion_is_the_policy_in_the_bucket(team: Team, piped: Path) -> None:
    policy = sha256((piped / "models/best_model.safetensors").read_bytes())
    sql = "SELECT alias, version FROM registered_model_aliases WHERE name = 'carracing-ppo'"
    assert sorted(team.postgres.query(sql, "mlflow")) == [("challenger", 1), ("champion", 1)]
    stored = [data for key, data in team.s3.objects("mlflow").items() if key.endswith("/policy.safetensors")]
    assert [sha256(data) for data in stored] == [policy]
    again = said(piped, "python", "-m", "pipeline.promote", environment=team.environment)
    assert "registered as version 1 already, and is the champion: nothing to do" in again
    fetch = "from pathlib import Path; from pipeline.tracking.registry import resolve; "
    fetch += "registry, version = resolve('models:/carracing-ppo@champion'); "
    fetch += "print(registry.download(version, Path('fetched')))"
    (piped / "fetched").mkdir()
    said(piped, "python", "-c", fetch, environment={"MLFLOW_TRACKING_URI": team.server.uri})  # needs no S3 keys
    assert [sha256(file.read_bytes()) for file in (piped / "fetched").rglob("*.safetensors")] == [policy]


@pytest.mark.slow
def test_what_a_server_missed_reaches_it_later(team: Team, embedded: Path, late: Path) -> None:
    own = MlflowClient(f"sqlite:///{embedded}/mlflow.db")
    (before,) = own.search_runs([own.get_experiment_by_name("CarRacing").experiment_id])
    local_id = json.loads((late / "metrics/mlflow.json").read_text())["run_id"]
    (run,) = team.client.search_runs(
        [team.client.get_experiment_by_name("CarRacing").experiment_id], f"tags.local_id = '{local_id}'"
    )
    assert run.info.status == "FINISHED"
    assert curves(own, before) == {p for p in curves(team.client, run) if not p[0].startswith("evaluate/")}
    figures = json.loads((late / "metrics/evaluate.json").read_text())
    assert {key: run.data.metrics[f"evaluate/{key}"] for key in figures} == figures
    assert "evaluate/tracks.json" in files(team.client, run)


@pytest.mark.slow
def test_what_dvc_pushed_from_one_clone_another_pulls(team: Team, piped: Path) -> None:
    git(piped, "add", "-A")
    git(piped, "commit", "-qm", "trained")
    said(piped, "dvc", "remote", "add", "--local", "--default", "team", "s3://dvc")
    said(piped, "dvc", "push", environment=team.environment)
    other = piped.parent / "other"
    said(piped, "git", "clone", "-q", str(piped), str(other))
    for name in ("models/best_model.safetensors", "videos/worst.mp4", "plots/drive.gif"):
        assert not (other / name).exists()
    said(other, "dvc", "remote", "add", "--local", "--default", "team", "s3://dvc")
    said(other, "dvc", "pull", environment=team.environment)
    for name in ("models/best_model.safetensors", "videos/worst.mp4", "plots/drive.gif"):
        assert (other / name).read_bytes() == (piped / name).read_bytes()
    assert "up to date" in said(other, "dvc", "status")


@pytest.mark.slow
def test_sync_moves_a_training_to_the_team_once(team: Team, embedded: Path) -> None:
    own = MlflowClient(f"sqlite:///{embedded}/mlflow.db")
    (before,) = own.search_runs([own.get_experiment_by_name("CarRacing").experiment_id])
    local_id = before.data.tags["local_id"]
    for _ in range(2):
        said(embedded, "python", "-m", "pipeline.sync", environment=team.environment)
        (run,) = team.client.search_runs(
            [team.client.get_experiment_by_name("CarRacing").experiment_id], f"tags.local_id = '{local_id}'"
        )
        assert (run.info.status, run.info.start_time) == ("FINISHED", before.info.start_time)
        assert run.data.params == before.data.params
        assert curves(team.client, run) == curves(own, before)
        assert kinds(files(team.client, run)) == kinds(files(own, before))


@pytest.mark.slow
def test_a_dump_restores_into_an_empty_database(team: Team, piped: Path) -> None:
    dump = team.postgres.run("pg_dump", "--format", "custom", "mlflow")
    team.postgres.create("restored")
    team.postgres.run("pg_restore", "--clean", "--if-exists", "--dbname", "restored", data=dump)
    tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' ORDER BY 1"
    names = [name for (name,) in team.postgres.query(tables, "mlflow")]
    assert {"runs", "metrics", "registered_model_aliases"} <= set(names)
    for name in names:
        rows = [sorted(map(repr, team.postgres.query(f'SELECT * FROM "{name}"', d))) for d in ("mlflow", "restored")]
        assert rows[0] == rows[1], name


@pytest.mark.slow
def test_no_secret_is_in_anything_that_was_written(team: Team, piped: Path, late: Path, embedded: Path) -> None:
    written = {
        str(file): file.read_bytes()
        for folder in (piped, late, embedded)
        for file in folder.rglob("*")
        if file.is_file()
    }
    written |= {service.output.name: service.output.read_bytes() for service in (team.postgres, team.s3, team.server)}
    written |= {f"{name}/{key}": data for name in ("mlflow", "dvc") for key, data in team.s3.objects(name).items()}
    written["dump"] = team.postgres.run("pg_dump", "mlflow")
    assert b"learning_rate" in written["dump"]
    for secret in (team.password, team.postgres.password, team.s3.secret):
        assert [place for place, data in written.items() if secret.encode() in data] == []
