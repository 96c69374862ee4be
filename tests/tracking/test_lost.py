"""Runs whose process is gone, with real processes."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.tracking.lost import SESSION_START, mark_killed, process_is_dead
from pipeline.tracking.run import Run
from pipeline.tracking.store import connect, experiment_id
from tests.tracking.runs import begun

HERE = platform.node()
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid


def begin(name: str, pid: str) -> Run:
    run = begun(name)
    run.tags({"pid": pid})
    run.flush()
    return run


def status(run: Run) -> str:
    return str(MlflowClient().get_run(run.id).info.status)


def test_a_dead_process_run_is_killed_and_all_others_are_left_alone(project: object):
    dead = begin("dead", f"{dead_pid()}@{HERE}")
    living = begin("living", f"{os.getpid()}@{HERE}")
    elsewhere = begin("elsewhere", f"{dead_pid()}@another-{HERE}")
    unnamed = begin("unnamed", "")
    finished = begin("finished", f"{dead_pid()}@{HERE}")
    connect().set_terminated(finished.id, "FINISHED")
    client = connect()
    assert mark_killed(client, experiment_id(client)) == ["dead"]
    assert status(dead) == "KILLED"
    assert {status(living), status(elsewhere), status(unnamed)} == {"RUNNING"}
    assert status(finished) == "FINISHED"
    assert mark_killed(client, experiment_id(client)) == []


def test_a_killed_run_ends_at_its_last_sign_of_life(project: object):
    run = begin("dead", f"{dead_pid()}@{HERE}")
    run.metrics({"a": 1.0, "b": 2.0})
    run.flush()
    client = connect()
    last = max(m.timestamp for key in "ab" for m in client.get_metric_history(run.id, key))
    time.sleep(0.05)
    mark_killed(client, experiment_id(client))
    assert client.get_run(run.id).info.end_time == last


def test_a_resumed_run_is_judged_by_the_process_that_took_it_up(project: object):
    run = begin("resumed", f"{os.getpid()}@{HERE}")
    client = connect()
    began = round((psutil.Process().create_time() - 3600) * 1000)  # by another process, an hour before this one started
    client.set_tag(run.id, SESSION_START, str(began))
    assert mark_killed(client, experiment_id(client)) == ["resumed"]
    client.update_run(run.id, status="RUNNING")
    client.set_tag(run.id, SESSION_START, str(round(time.time() * 1000)))
    assert mark_killed(client, experiment_id(client)) == []


def test_a_young_process_with_the_runs_number_is_another_one():
    process = subprocess.Popen(SLEEP)
    try:
        started = psutil.Process(process.pid).create_time()
        assert process_is_dead(f"{process.pid}@{HERE}", begun=started - 3600)
        assert not process_is_dead(f"{process.pid}@{HERE}", begun=started + 3600)
        assert not process_is_dead(f"{process.pid}@{HERE}", begun=started)
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.skipif(os.name == "nt", reason="no zombies on Windows")
def test_a_killed_process_that_nobody_waited_for_is_dead():
    process = subprocess.Popen(SLEEP)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_is_dead(f"{process.pid}@{HERE}", begun=time.time())
    process.wait(10)


@pytest.mark.parametrize("tag", ["", "@", f"@{HERE}", f"x@{HERE}", "12", f"-5@{HERE}"])
def test_a_tag_that_names_no_process_of_this_machine_says_nothing(tag: str):
    assert not process_is_dead(tag, time.time())
