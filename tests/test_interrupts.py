"""Being told to stop, by real signals to real processes; Windows' console by the call that Windows makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline import interrupts
from pipeline.interrupts import Interrupts, is_alive, started_by
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

SAFE = """
import sys, time
from pathlib import Path
from pipeline.interrupts import Interrupts
with Interrupts() as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        stop.check(lambda: Path(sys.argv[1]).write_text("saved"))
"""
NEVER_SAFE = """
import sys, threading
from pathlib import Path
from pipeline import interrupts
interrupts.GRACE = float(sys.argv[2])
with interrupts.Interrupts() as stop:
    print("ready", flush=True)
    try:
        threading.Event().wait()
    finally:
        Path(sys.argv[1]).write_text("cleaned up")
"""
STUCK = NEVER_SAFE.replace('Path(sys.argv[1]).write_text("cleaned up")', "threading.Event().wait()").replace(
    "interrupts.GRACE =", "interrupts.LIMIT = interrupts.GRACE ="
)


HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""Whoever runs the tests in the background of a shell has SIGINT ignored, and his processes too."""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HEARD + code, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=30)
    assert "Traceback" not in error
    return process.returncode, error


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_work_saves_at_its_next_safe_moment(name: str, tmp_path: Path) -> None:
    number = getattr(signal, name)
    process = start(SAFE, tmp_path / "mark")
    process.send_signal(number)
    code, error = end(process)
    assert code == 128 + number
    assert error.strip() == f"{name}: stopping at the next safe moment"
    assert (tmp_path / "mark").read_text() == "saved"


def test_work_without_a_safe_moment_is_interrupted_where_it_is(tmp_path: Path) -> None:
    process = start(NEVER_SAFE, tmp_path / "mark", 0.3)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143
    assert (tmp_path / "mark").read_text() == "cleaned up"


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    process = start(NEVER_SAFE, tmp_path / "mark", 60)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130
    assert not (tmp_path / "mark").exists()


def test_cleaning_up_that_hangs_is_cut_short(tmp_path: Path) -> None:
    process = start(STUCK, tmp_path / "mark", 0.3)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    process = start("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SAFE, tmp_path / "mark")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143


STARTED = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SAFE!r}, sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("stage", ["train", ""])
def test_a_killed_dvc_takes_its_stage_along_and_a_killed_shell_does_not(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", stage)
    command = [sys.executable, "-c", STARTED, str(tmp_path / "mark")]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=10 if stage else 1.5)
    for process in alive:
        process.kill()
    assert [process.pid for process in alive] == ([] if stage else [child.pid])
    assert (tmp_path / "mark").exists() == bool(stage)


def test_who_started_this_is_found_behind_the_shell() -> None:
    code = "from pipeline.interrupts import started_by; print(started_by().pid)"
    shell = ["/bin/sh", "-c", f"{sys.executable} -c '{code}'; true"]  # `true`: or the shell makes way for the command
    said = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(said) == os.getpid()
    assert started_by() is not None


def test_an_ended_process_that_nobody_waited_for_is_not_alive() -> None:
    process = subprocess.Popen(["/bin/sh", "-c", "read line"], stdin=subprocess.PIPE)
    seen = psutil.Process(process.pid)
    assert is_alive(seen)
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(seen)
    process.wait(10)


def test_windows_console_events_stop_the_work_and_keep_windows_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "CLOSE_GRACE", 0.2)
    stop = Interrupts()
    assert stop.on_console_event(0) == 0, "Ctrl-C comes as a signal"
    saved: list[bool] = []
    began = time.monotonic()
    closing = threading.Thread(target=stop.on_console_event, args=[2])

    def work() -> None:
        with stop:
            closing.start()
            while True:
                time.sleep(0.005)
                assert closing.is_alive(), "Windows ends the process when this returns"
                stop.check(lambda: saved.append(True))

    with pytest.raises(SystemExit) as ended:
        work()
    closing.join(5)
    assert ended.value.code == 143
    assert (saved, closing.is_alive()) == ([True], False)
    assert time.monotonic() - began < 5
