"""Rows of the chaos table about a training: whatever befalls it, it ends with the undisturbed one's bits."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import evidence, failpoints
from tests.chaos.conftest import FULL, Reference
from tests.chaos.victims import Victim, new_project, result
from tests.conftest import ROOT

STATES = "runs/*/checkpoints/state_*.safetensors"
KILLS_IN_A_CHAIN = 4
rng = random.Random(int(os.environ.get("CHAOS_SEED", "0")))


def assert_equal_to(reference: Reference, project: Path) -> None:
    """Same bits, and MLflow has every figure once, in one run that is finished."""
    assert result(project) == reference.result
    assert evidence.compare(evidence.metrics(project), reference.metrics) == (0, 0), "figures lost, doubled"
    assert evidence.last_status(project) == "FINISHED"


def states(project: Path) -> list[Path]:
    return sorted(project.glob(STATES))


def interrupted(project: Path, count: int = 4) -> Path:
    """A project whose training was killed when it had written so many states."""
    victim = Victim(project)
    victim.wait_for("runs/*/checkpoints/policy_*.safetensors", count=count)
    victim.kill()
    victim.wait()
    assert victim.survivors() == []
    return project


def chains(project: Path, database: Path, n: int) -> list[tuple[Path, int]]:
    """Projects, and how many times each is to be interrupted; ``n`` in all."""
    sizes = [min(KILLS_IN_A_CHAIN, n - done) for done in range(0, n, KILLS_IN_A_CHAIN)]
    return [(new_project(project.parent / f"chain-{i}", database), size) for i, size in enumerate(sizes)]


def test_random_sigkill(reference: Reference, project: Path, database: Path, row: Callable[..., Any]) -> None:
    n = int(os.environ.get("CHAOS_KILLS", "100" if FULL else "10"))
    with row("random SIGKILL") as figures:
        done = 0
        for folder, kills in chains(project, database, n):
            for _ in range(kills):
                victim = Victim(folder)
                time.sleep(rng.uniform(0.1, 0.7) * reference.seconds)
                victim.kill()
                assert victim.wait() in (0, -signal.SIGKILL)
                assert victim.survivors() == [], "processes 10 s after kill -9"
                done += 1
                figures["kills"] = done
            Victim(folder).finish()
            assert_equal_to(reference, folder)


def test_failpoints(reference: Reference, project: Path, row: Callable[..., Any]) -> None:
    with row("crash at each failpoint") as figures:
        for count, point in enumerate(failpoints.TRAINING_POINTS, start=1):
            victim = Victim(project, partial(point, 2))
            assert victim.wait() == -signal.SIGKILL, victim.said()[-3000:]
            assert f"failpoint {point.__name__.replace('_', '-')}\n" in victim.said(), "it died elsewhere"
            assert victim.survivors() == []
            figures["points"] = count
        Victim(project).finish()
        assert_equal_to(reference, project)
        assert evidence.statuses(project) == {"FINISHED": 1}, "one training is one run"


def test_damaged_states(reference: Reference, project: Path, row: Callable[..., Any]) -> None:
    from pipeline.agent import checkpoint

    with row("damaged states") as figures:
        newest = states(interrupted(project))[-1]
        good, folder = newest.read_bytes(), newest.parent
        before = checkpoint.read(states(project)[-2]).header["num_timesteps"]

        def falls_back(data: bytes) -> None:
            newest.write_bytes(data)
            found = checkpoint.latest(folder)
            assert found is not None
            assert found.header["num_timesteps"] == before
            figures["damages"] = int(str(figures.get("damages", 0))) + 1

        for length in [0, *(rng.randrange(1, len(good)) for _ in range(19))]:
            falls_back(good[:length])
        for _ in range(50):
            place, bit = rng.randrange(len(good)), 1 << rng.randrange(8)
            falls_back(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])

        copies = [shutil.copytree(project, project.parent / name) for name in ("deleted", "all")]
        Victim(project).finish()  # the last bit is still flipped
        assert "trying the one before" in said_in(project)
        assert_equal_to(reference, project)

        states(copies[0])[-1].unlink()
        Victim(copies[0]).finish()
        assert_equal_to(reference, copies[0])

        for state in states(copies[1]):
            state.write_bytes(state.read_bytes()[:-1])
        left = len(states(copies[1]))
        refused = Victim(copies[1])
        assert refused.wait() == 2
        assert "delete these files to train from the start" in refused.said()
        assert len(states(copies[1])) == left
        figures["damages"] = int(str(figures["damages"])) + 2


def said_in(project: Path) -> str:
    return (project / "output.txt").read_text(errors="replace")


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk(reference: Reference, project: Path, row: Callable[..., Any]) -> None:
    with row("disk full"):
        interrupted(project)
        before = {path: hashlib.sha256(path.read_bytes()).digest() for path in states(project)}
        full = Victim(project, partial(limit_files, states(project)[-1].stat().st_size // 2))
        assert full.wait() == 2, full.said()[-3000:]
        assert "no room to write" in full.said()
        assert "Traceback" not in full.said()
        assert {path: hashlib.sha256(path.read_bytes()).digest() for path in states(project)} == before
        assert full.survivors() == []
        Victim(project).finish()
        assert_equal_to(reference, project)


def test_workers(reference: Reference, project: Path, row: Callable[..., Any]) -> None:
    with row("workers killed, stopped, raising") as figures:
        marks = project / "marks"

        def prepare() -> None:
            failpoints.short_deadline(3.0)
            failpoints.raising_environments(marks)
            failpoints.slow_rollouts(0.5)

        victim = Victim(project, prepare)
        fates = [(number, index) for number in (signal.SIGKILL, signal.SIGSTOP) for index in (0, 1)]
        for done, (number, index) in enumerate(fates):
            victim.wait_for("runs/*/checkpoints/policy_*.safetensors", count=2 * done + 2)
            workers = victim.workers()
            assert len(workers) == 2
            os.kill(workers[index].pid, number)
        victim.finish()
        assert len(list(marks.iterdir())) == 4, "an environment did not raise"
        figures |= {"killed": 2, "stopped": 2, "raised": 4}
        assert_equal_to(reference, project)
        assert victim.survivors() == []


def test_signals(reference: Reference, project: Path, database: Path, row: Callable[..., Any]) -> None:
    n = int(os.environ.get("CHAOS_SIGNALS", "50" if FULL else "10"))
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with row("SIGTERM, SIGINT, SIGHUP") as figures:
        longest, done = 0.0, 0
        for folder, times in chains(project, database, n):
            for _ in range(times):
                number = numbers[done % len(numbers)]
                victim = Victim(folder)
                time.sleep(rng.uniform(0.1, 0.7) * reference.seconds)
                asked = time.monotonic()
                victim.kill(number)
                code = victim.wait()
                longest, done = max(longest, time.monotonic() - asked), done + 1
                figures |= {"signals": done, "longest [s]": round(longest, 1)}
                assert code in (0, 128 + number), victim.said()[-3000:]
                assert longest <= 10
                assert evidence.last_status(folder) in ("KILLED", "FINISHED", "none"), "still RUNNING in MLflow"
                assert victim.survivors(0.5) == []
            Victim(folder).finish()
            assert_equal_to(reference, folder)


def test_the_same_again(reference: Reference, project: Path, database: Path, row: Callable[..., Any]) -> None:
    with row("same seed again, 1, 2, 4 processes") as figures:
        for n_workers in (1, 2, 4):
            folder = new_project(project.parent / f"workers-{n_workers}", database, n_workers=n_workers)
            Victim(folder).finish()
            assert_equal_to(reference, folder)
            figures["trainings"] = int(str(figures.get("trainings", 0))) + 1


def test_killed_dvc(reference: Reference, project: Path, row: Callable[..., Any]) -> None:
    n = int(os.environ.get("CHAOS_DVC", "10" if FULL else "1"))
    stage = "stages:\n  train:\n    cmd: python -m pipeline.train\n    outs: [models/best_model.safetensors]\n"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("CHAOS_PATH")])]),
        "DVC_NO_ANALYTICS": "1",
    }
    repro = [sys.executable, "-m", "dvc", "repro", "-q"]
    with row("dvc killed") as figures:
        for done in range(n):
            folder = shutil.copytree(project, project.parent / f"dvc-{done}")
            (folder / "dvc.yaml").write_text(stage)
            for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
                subprocess.run(command, cwd=folder, env=environment, check=True)
            dvc = subprocess.Popen(repro, cwd=folder, env=environment, start_new_session=True)
            until = time.monotonic() + 300
            while len(list(folder.glob("runs/*/checkpoints/policy_*"))) < 4:
                assert time.monotonic() < until
                assert dvc.poll() is None
                time.sleep(0.05)
            trainers = [p for p in psutil.Process(dvc.pid).children(recursive=True) if is_trainer(p)]
            assert len(trainers) == 1
            dvc.kill()
            dvc.wait()
            subprocess.run(repro, cwd=folder, env=environment, check=True)
            assert not trainers[0].is_running(), "the first trainer outlived its dvc"
            assert_same_policies(reference, folder)
            assert evidence.statuses(folder) == {"FINISHED": 1}, "one training is one run"
            assert evidence.compare(evidence.metrics(folder), reference.metrics) == (0, 0)
            figures["killed"] = done + 1


def is_trainer(process: psutil.Process) -> bool:
    return process.cmdline()[1:] == ["-m", "pipeline.train"]


def assert_same_policies(reference: Reference, folder: Path) -> None:
    for name, file in (("best policy", "best_model"), ("final policy", "final_model")):
        found = hashlib.sha256((folder / f"models/{file}.safetensors").read_bytes()).hexdigest()
        assert found == reference.result[name]


def test_soak(project: Path, database: Path, row: Callable[..., Any]) -> None:
    minutes = float(os.environ.get("CHAOS_SOAK_MINUTES", "120" if FULL else "10"))
    folder = new_project(project.parent / "soak", database, total_timesteps=10**9, eval_freq=0, save_freq=10**6)
    with row("soak") as figures:
        victim = Victim(folder)
        victim.wait_for("runs/*/spool-*.jsonl")
        samples = []
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            assert victim.processes(), victim.said()[-3000:]
            samples.append(measure(victim))
            time.sleep(2)
        victim.kill(signal.SIGTERM)
        assert victim.wait() == 143
        settled = samples[len(samples) // 2 :]  # a process grows for its first minute
        figures |= {"minutes": minutes, "files at most": max(s[2] for s in settled)}
        growth = slope(settled, 1) / 2**20
        grown = growth * (settled[-1][0] - settled[0][0])
        figures |= {"MiB/h": round(growth * 3600, 2), "MiB": round(settled[-1][1] / 2**20, 1)}
        figures |= {"run folder MiB/h": round(slope(settled, 3) * 3600 / 2**20, 1)}
        assert max(s[2] for s in settled) - min(s[2] for s in settled) <= 5, "open files grow"
        # Minutes are too short for a rate: memory of 0.9 GiB in all goes up and down by 20 MiB.
        assert growth * 3600 < 1 if FULL else grown < 32, "memory grows"


def measure(victim: Victim) -> tuple[float, float, int, float]:
    """Time [s], memory of all its processes [bytes], open files of the trainer, size of the run folder [bytes]."""
    memory = sum(process.memory_info().rss for process in victim.processes())
    files = psutil.Process(victim.pid).num_fds()
    sizes = [path.stat().st_size for path in victim.project.glob("runs/**/*") if path.is_file()]
    return time.monotonic(), float(memory), files, float(sum(sizes))


def slope(samples: list[tuple[float, float, int, float]], column: int) -> float:
    """Least squares, per second."""
    times, values = [s[0] for s in samples], [float(s[column]) for s in samples]
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    return sum((t - middle) * (v - mean) for t, v in zip(times, values, strict=True)) / sum(
        (t - middle) ** 2 for t in times
    )
