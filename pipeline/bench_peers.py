"""Other projects' CarRacing in an environment of their own, ``.venv-bench``, made by ``make bench-peers``.

Their pins are theirs to choose, so they never share an environment with the pipeline. :func:`peer_process` runs this
very file there as a script: a line on its stdin asks for a piece of work, a line on its stdout says how many frames it
was. A round trip takes 0.05 ms, the smallest piece 30 ms. Imports nothing of the pipeline.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PYTHON = Path(".venv-bench") / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

DRIVE = tuple((0.3 * math.sin(t / 15), 0.3, 0.0) for t in range(50))
"""Actions of all environment cases: steer, gas (or throttle), brake."""


class PeerError(Exception):
    """A peer is missing or ended."""


# Here: start them, ask them


def check_installed(packages: Sequence[str]) -> None:
    """Raise :class:`PeerError`, with what to do, if one of the packages is missing."""
    missing = [package for package in packages if not _installed(package)]
    if missing:
        raise PeerError(
            f"peers: expected {' and '.join(packages)} in {PYTHON.parts[0]}, not found: {', '.join(missing)}; "
            "`make bench-peers` installs them (EnvPool needs Python 3.11 or later), or leave --peers out"
        )


def _installed(package: str) -> bool:
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        return subprocess.run([PYTHON, "-I", "-c", question], timeout=60).returncode == 0
    except OSError:
        return False


@contextmanager
def peer_process(name: str, *arguments: str) -> Iterator[Callable[[], int]]:
    """A peer in its own process; yields the function that has it do a piece of work."""
    # -I: else this script's folder would come first on the path, and `import config` in a peer find the pipeline's.
    command = [str(PYTHON.absolute()), "-I", str(Path(__file__).resolve()), name, *arguments]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen(command, cwd=folder, bufsize=1, **pipes) as process:
            assert process.stdin
            try:
                _answer(process, name, log)  # it is ready
                yield lambda: _ask(process, name, log)
            finally:
                process.kill()


def _ask(process: subprocess.Popen[str], name: str, log: Any) -> int:
    assert process.stdin
    process.stdin.write("go\n")
    return _answer(process, name, log)


def _answer(process: subprocess.Popen[str], name: str, log: Any) -> int:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        log.seek(0)
        said = "".join(log.readlines()[-10:]).rstrip()
        raise PeerError(f"{name}: ended with status {process.wait()} before its work was done; it said last:\n{said}")
    return int(line)


# There: this file as a script


def envpool_work(n_envs: int, threads: int) -> Callable[[], int]:
    """EnvPool's CarRacing-v3, every frame drawn; it starts ended episodes again by itself."""
    import numpy as np

    envpool = importlib.import_module("envpool")  # by name: type checkers run where it isn't installed
    env = envpool.make_gymnasium("CarRacing-v3", num_envs=n_envs, num_threads=threads, seed=1)
    env.reset()
    actions = np.repeat(np.array(DRIVE, np.float32)[:, None], n_envs, axis=1)  # (50, n_envs, 3)

    def work() -> int:
        for action in actions:
            env.step(action)
        return len(actions) * n_envs

    return work


def rl_zoo3_work() -> Callable[[], int]:
    """RL Zoo's trainer with its own CarRacing-v3 settings; a piece is a rollout with its update."""
    manager = importlib.import_module("rl_zoo3.exp_manager").ExperimentManager(
        importlib.import_module("argparse").Namespace(),
        "ppo",
        "CarRacing-v3",
        log_folder="logs",
        eval_freq=-1,
        verbose=0,
    )
    model, settings = manager.setup_experiment()
    rollout = model.n_steps * model.n_envs
    frame_skip = _frame_skip(settings["env_wrapper"])

    def work() -> int:
        model.learn(rollout, reset_num_timesteps=model._last_obs is None)
        return int(rollout) * frame_skip

    return work


def _frame_skip(wrappers: Sequence[Any]) -> int:
    """``skip`` of the FrameSkip in RL Zoo's list of wrappers: names, or {name: arguments}."""
    skips = [
        v["skip"] for wrapper in wrappers if isinstance(wrapper, dict) for k, v in wrapper.items() if "FrameSkip" in k
    ]
    return int(skips[0]) if skips else 1


def serve(name: str, arguments: Sequence[str]) -> None:
    """Say that it is ready, then do a piece of work per line; ends with the input."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the peers print must not be taken for answers
    peers: dict[str, Callable[..., Callable[[], int]]] = {"envpool": envpool_work, "rl_zoo3": rl_zoo3_work}
    work = peers[name](*map(int, arguments))
    print(0, file=answers, flush=True)
    for _ in sys.stdin:
        print(work(), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
