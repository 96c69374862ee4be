"""What `make` starts: MLflow's pages for this machine alone. And the exceptions of the audit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from tests.conftest import ROOT


def answer(port: int, host: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1")
    request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_pages_answer_to_this_machines_name_alone_and_run_no_jobs(project: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = subprocess.run(
        ["make", "-n", "ui", f"PORT={port}", f"VENV={Path(sys.executable).parents[1]}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    command = said[said.index("MLFLOW_SERVER") :]
    server = subprocess.Popen(command, shell=True, cwd=project, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while answer(port, f"127.0.0.1:{port}") != 200 and time.monotonic() < until:
            time.sleep(0.3)
        assert answer(port, f"localhost:{port}") == 200
        for host in ("evil.example", f"evil.example:{port}", "192.168.0.1", f"127.0.0.1:{port + 1}"):
            assert answer(port, host) == 403, host
        family = psutil.Process(server.pid).children(recursive=True)
        listening = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        assert not [p.cmdline() for p in family if "huey" in " ".join(p.cmdline())], "nobody carries out jobs"
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_exception_of_the_audit_has_a_reason(audit: ModuleType) -> None:
    audit.exceptions(audit.EXCEPTIONS.read_text())
    assert audit.exceptions("# none\nGHSA-1 only on Windows\n") == {"GHSA-1": "only on Windows"}
    with pytest.raises(ValueError, match="GHSA-2: expected a reason"):
        audit.exceptions("GHSA-2\n")


@pytest.mark.parametrize(
    ("answer", "knows"),
    [('{"vulnerabilities": [{"id": "GHSA-1"}]}', True), ('{"vulnerabilities": []}', False), ("<", False)],
)
def test_a_mirror_that_knows_of_no_vulnerability_is_not_taken_for_the_service(
    answer: str, knows: bool, audit: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "json").write_text(answer)
    assert audit.is_answering((tmp_path / "json").as_uri()) == knows


def test_an_audit_that_could_not_ask_says_so(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert not audit.is_answering(url)
    monkeypatch.setattr(audit, "is_answering", lambda: False)
    assert audit.main() == audit.NOT_CHECKED == 75
    assert "NOT CHECKED" in capsys.readouterr().err
