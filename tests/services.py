"""Real servers on loopback, for tests: PostgreSQL, MLflow's own, moto's S3. Each has data and passwords of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import psutil
import psycopg2

PATIENCE = 300.0
"""Seconds for a server to answer, on a busy machine."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """A server in a session of its own, which writes what it says to ``<name>.txt``.

    Args:
        folder: Where it works.
        name: Of its output.
        command: What starts it.
        environment: All of it.
    """

    def __init__(self, folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.folder, self.output = folder, folder / f"{name}.txt"
        self._command, self._environment = command, environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **process: Any) -> None:
        """Start it, or start it again; back when it answers."""
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **process,
            )
        until = time.monotonic() + PATIENCE
        while not self.answers():
            said = self.output.read_text(errors="replace")[-3000:]
            assert self._process.poll() is None, f"ended with {self._process.returncode}:\n{said}"
            assert time.monotonic() < until, f"no answer after {PATIENCE} s:\n{said}"
            time.sleep(0.2)

    def answers(self) -> bool:
        raise NotImplementedError

    def kill(self) -> None:
        """As a failing machine would: no goodbye. Back when none of its processes is left."""
        if not self._process:
            return
        try:
            family = [(first := psutil.Process(self._process.pid)), *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:  # it went with its parent
                continue
        self._process.wait(10)
        psutil.wait_procs(family, 10)


class Mlflow(Service):
    """MLflow's server; ``store`` is its database, ``artifacts`` a folder or a bucket."""

    def __init__(
        self, folder: Path, store: str, artifacts: str = "artifacts", environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--artifacts-destination", artifacts),
        ]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": store}
        super().__init__(folder, "server", command, {**os.environ, **settings, **(environment or {})})

    def answers(self) -> bool:
        return responds(f"{self.uri}/health")


class S3(Service):
    """moto's S3 service: real requests over HTTP, objects in memory, and any key is accepted."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.uri, self.secret = f"http://127.0.0.1:{port}", secrets.token_hex(20)
        self.environment = {
            "AWS_ENDPOINT_URL": self.uri,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        super().__init__(folder, "s3", command, os.environ)

    def answers(self) -> bool:
        return responds(f"{self.uri}/moto-api/")

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.uri,
            aws_access_key_id="tester",
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Every object's content, by its key."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: self.client().get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


class Postgres(Service):
    """PostgreSQL's server with a cluster of its own, in which everybody needs a password."""

    def __init__(self) -> None:
        tools = postgres_tools()
        assert tools, "see postgres_tools"
        self.tools, self.port, self.password = tools, free_port(), secrets.token_hex(20)
        self.environment = {"PGPASSWORD": self.password}
        # Not in pytest's folder, which only its user may enter: initdb refuses root, so another one works here.
        folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._user = _unprivileged() if os.geteuid() == 0 else {}
        secret = folder / "password"
        secret.touch(0o600)
        secret.write_text(self.password)
        if self._user:
            for path in (folder, secret):
                shutil.chown(path, self._user["user"], self._user["group"])
        self._initialize(folder, secret)
        command = [
            *(str(tools / "postgres"), "-D", str(folder / "data"), "-p", str(self.port)),
            *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
        ]
        super().__init__(folder, "postgres", command, os.environ)

    def _initialize(self, folder: Path, secret: Path) -> None:
        command = [str(self.tools / "initdb"), "-D", str(folder / "data"), "-U", "mlflow", "-E", "UTF8", "--locale=C"]
        command += ["--auth=scram-sha-256", f"--pwfile={secret}"]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, **self._user)
        assert ended.returncode == 0, ended.stderr

    def start(self, **process: Any) -> None:
        super().start(**self._user, **process)

    def answers(self) -> bool:
        try:
            self.query("SELECT 1")
        except psycopg2.OperationalError:  # not up, or recovering from a kill
            return False
        return True

    def uri(self, database: str) -> str:
        """A database's address as SQLAlchemy has it, without the password: that is in ``environment``."""
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/{database}"

    def query(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Rows that a statement gives."""
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user="mlflow", password=self.password, dbname=database
        )
        try:
            connection.autocommit = True  # CREATE DATABASE wants no transaction
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()

    def create(self, database: str) -> str:
        """A new database; returns its address."""
        self.query(f'CREATE DATABASE "{database}"')
        return self.uri(database)

    def run(self, tool: str, *options: str, data: bytes = b"") -> bytes:
        """What one of PostgreSQL's programs prints."""
        command = [str(self.tools / tool), "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", *options]
        return subprocess.run(
            command, env={**os.environ, **self.environment}, input=data, stdout=subprocess.PIPE, check=True
        ).stdout

    def remove(self) -> None:
        """End it and delete its data."""
        self.kill()
        shutil.rmtree(self.folder)


def postgres_tools() -> Path | None:
    """Folder of PostgreSQL's programs, or None; Debian keeps them out of the path."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[4]))
    return places[-1].parent if places else None


def _unprivileged() -> dict[str, Any]:
    import pwd  # not on Windows

    entry = pwd.getpwnam("nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def responds(url: str) -> bool:
    """Whether a server answers there with success."""
    try:
        urllib.request.urlopen(url, timeout=5)
    except OSError:
        return False
    return True


NO_POSTGRES = "PostgreSQL's initdb is not here; Debian: apt-get install postgresql"
