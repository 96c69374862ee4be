"""Trainings to be killed: forked from this process, which has done the imports already, and led to their failpoints.

A training that is forked costs 1 s of start where a new interpreter takes 6; everything it starts itself (workers,
evaluators, MLflow's server) is started as always. Nothing here touches MLflow before a fork (stores are read with SQL,
by :mod:`tests.chaos.evidence`), and torch computes on one thread: a child with its parent's OpenMP pool waits forever.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing.util
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import torch as th
from ruamel.yaml import YAML

from pipeline import train
from pipeline.interrupts import is_alive
from tests.chaos import failpoints
from tests.conftest import MLFLOW_AND_DVC, ROOT

for _module in (  # what every training imports sooner or later, and its own process would import again
    "gymnasium.envs.box2d.car_racing",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "torch._dynamo",
    "torch.utils.tensorboard",
):
    importlib.import_module(_module)
th.set_num_threads(1)

# The default recipe in small, and the champion's other tries: what params.yaml says of everything else holds.
TINY: dict[str, object] = {
    "run_name": "tiny",
    "n_envs": 4,
    "n_steps": 16,
    "batch_size": 32,
    "n_epochs": 2,
    "retries": 3,
    "total_timesteps": 1024,
    "cnn_channels": [8, 8, 8],
    "features_dim": 32,
    "eval_freq": 512,
    "n_eval_episodes": 1,
    "save_freq": 64,
    "num_threads": 1,
    "n_workers": 2,
}


def new_project(folder: Path, database: Path, **changes: object) -> Path:
    """A project folder with tiny parameters and an empty MLflow database."""
    folder.mkdir(parents=True)
    shutil.copy(database, folder / "mlflow.db")
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params.update({**TINY, **changes})
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return folder


class Victim:
    """A training in a process, and a session, of its own.

    Args:
        project: Its folder; params.yaml there says what to train.
        prepare: Called in its process before it begins, for example to arm a failpoint.
        environment: Variables beside those of this process.
    """

    def __init__(
        self,
        project: Path,
        prepare: Callable[[], None] = lambda: None,
        work: Callable[[], None] = lambda: train.main([]),
        **environment: str,
    ) -> None:
        self.project, self.began = project, time.monotonic()
        self.output = project / "output.txt"
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._live(prepare, work, environment)
        self.seconds = 0.0

    def _live(self, prepare: Callable[[], None], work: Callable[[], None], environment: dict[str, str]) -> None:
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            _redirect(self.output)
            for name in MLFLOW_AND_DVC:
                os.environ.pop(name, None)
            os.environ.update({"DVC_ROOT": str(self.project), **environment})
            os.chdir(self.project)
            failpoints.note_result(self.project / "result.json")
            prepare()
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                multiprocessing.util._exit_function()  # type: ignore[attr-defined]
            sys.stderr.flush()
            os._exit(code)

    def processes(self) -> list[psutil.Process]:
        """Its living processes: all of its session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Its environment workers, in the order in which they were started: children of the fork server."""
        servers = [p for p in self.processes() if "multiprocessing.forkserver" in " ".join(p.cmdline())]
        top = [p for p in servers if p.ppid() == self.pid]
        return sorted((p for p in servers if p.ppid() in {t.pid for t in top}), key=lambda p: p.create_time())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 900) -> int:
        """Its exit code, negative for a signal, as ``subprocess`` has it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.seconds = time.monotonic() - self.began
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError(f"not ended after {seconds} s:\n{self.said()[-3000:]}")

    def finish(self) -> None:
        """Wait for its good end."""
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.said()[-3000:]}"

    def said(self) -> str:
        """What it printed, and all before it in this folder."""
        return self.output.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 300, count: int = 1) -> None:
        """Until so many files of its project match."""
        until = time.monotonic() + seconds
        while len(list(self.project.glob(pattern))) < count:
            assert time.monotonic() < until, f"no {pattern} after {seconds} s:\n{self.said()[-3000:]}"
            assert is_alive(psutil.Process(self.pid)), self.said()[-3000:]
            time.sleep(0.02)

    def survivors(self, seconds: float = 10) -> list[str]:
        """Its processes that are still there so long after its end, ended now."""
        until = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        names = [" ".join(p.cmdline()) for p in left]
        for process in left:
            process.kill()
        return names


def _redirect(output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def result(project: Path) -> dict[str, str]:
    """What the finished training of a project came to: digests of its learning state and of its policies."""
    return dict(json.loads((project / "result.json").read_text()))
