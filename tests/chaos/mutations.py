"""Each mechanism broken on purpose: the row that is there for it must fail.

python -m tests.chaos.mutations [NAME ...]

A mutation replaces one function in the harness's process, from which trainings are forked. Runs each mutation's row in
a pytest of its own, prints which failed and by what, and ends with 1 if a row held although its mechanism was broken.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import ROOT


class Mutation(NamedTuple):
    """A mechanism broken.

    Attributes:
        row: pytest's ``-k`` expression of the row that must fail.
        what: What is broken, in words.
        apply: Breaks it in this process.
    """

    row: str
    what: str
    apply: Callable[[], None]


def generators_forgotten() -> None:
    from pipeline.agent import checkpoint

    checkpoint.th.set_rng_state = lambda state: None


def metrics_said_again() -> None:
    from pipeline.tracking import spool

    spool._metrics_in = lambda path: set()


def written_in_place() -> None:
    from pipeline import durable

    def publish(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            durable.write_all(file.fileno(), data)

    durable.publish = publish


def digest_unchecked() -> None:
    from pipeline.agent import checkpoint

    checkpoint.digest = lambda tensors, header: "unchecked"


def workers_not_replayed() -> None:
    from pipeline.sim.vec_env import SharedMemoryVecEnv

    def fresh(self: Any, worker: Any) -> list[Any]:
        starts = {index: {} for index in worker.indices}
        return [self._build(worker), ("reset", starts, 0)]

    SharedMemoryVecEnv._recovery = fresh  # type: ignore[method-assign]


def signals_unheard() -> None:
    from pipeline import interrupts

    interrupts._numbers = lambda: []


def never_in_time() -> None:
    from pipeline import interrupts

    interrupts.GRACE = interrupts.LIMIT = 3600.0
    interrupts.Interrupts.check = lambda self, save: None  # type: ignore[method-assign]


def seed_of_the_clock() -> None:
    import time

    from pipeline.agent import build

    seed = build.set_random_seed
    build.set_random_seed = lambda number, using_cuda=False: seed(time.time_ns() % 2**31, using_cuda)


def dropped_when_away() -> None:
    from pipeline.tracking import spool
    from pipeline.tracking.sender import Sender

    attempt = Sender._try

    def drop(self: Any) -> bool:
        if not attempt(self):
            spool.note_sent(self._spool.path, self._spool.path.stat().st_size)
        return True

    Sender._try = drop  # type: ignore[method-assign]


def training_waits_for_mlflow() -> None:
    from pipeline.tracking.sender import send
    from pipeline.tracking.spool import Spool
    from pipeline.tracking.store import connect

    put = Spool.put

    def put_and_send(self: Any, entry: Any) -> None:
        put(self, entry)
        try:
            send(connect(), self.path)
        except Exception:
            return

    Spool.put = put_and_send  # type: ignore[method-assign]


def dvc_unwatched() -> None:
    os.environ["CHAOS_PATH"] = str(Path(__file__).parent / "unwatched")


def types_unchecked() -> None:
    from pydantic import TypeAdapter

    from pipeline.config import sources

    sources._adapter = lambda key: TypeAdapter(Any)


def zips_unpickled() -> None:
    from pipeline.agent import policy

    load = policy.th.load
    policy.th.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})


def memory_kept() -> None:
    from pipeline.agent.ppo import DrivingPPO

    collect, kept = DrivingPPO.collect_rollouts, []

    def keep(*args: Any, **kwargs: Any) -> bool:
        kept.append(bytearray(os.urandom(1 << 20)))
        return collect(*args, **kwargs)

    DrivingPPO.collect_rollouts = keep  # type: ignore[method-assign]


def version_unknown() -> None:
    from pipeline.tracking.registry import Registry

    Registry.find = lambda self, digest: None  # type: ignore[method-assign]


MUTATIONS = {
    f"{function.__name__}-{row}": Mutation(row, what, function)
    for row, what, function in (
        ("sigkill", "torch's generator is not restored", generators_forgotten),
        ("sigkill", "a resumed training tells MLflow again what it told before", metrics_said_again),
        ("full_disk", "states are written in place", written_in_place),
        ("failpoints", "states are written in place", written_in_place),
        ("damaged", "a state's SHA-256 is not checked", digest_unchecked),
        ("workers", "a new worker begins new episodes instead of replaying", workers_not_replayed),
        ("signals", "no signal is handled", signals_unheard),
        ("signals", "a signal is noted, and nothing comes of it", never_in_time),
        ("same_again", "weights are seeded by the clock", seed_of_the_clock),
        ("server_away", "what MLflow does not take is dropped", dropped_when_away),
        ("server_away", "the training itself sends, and waits", training_waits_for_mlflow),
        ("postgres_killed", "what MLflow does not take is dropped", dropped_when_away),
        ("killed_dvc", "the stage does not watch its dvc", dvc_unwatched),
        ("parameter_files", "types and ranges are not checked", types_unchecked),
        ("hostile", "SB3 zips are unpickled", zips_unpickled),
        ("soak", "each rollout leaves 1 MiB behind", memory_kept),
        ("registration", "a registered policy is not recognised", version_unknown),
    )
}


def fails(mutation: str) -> tuple[bool, str]:
    """Whether the mutation's row fails, and by what."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "CHAOS_KILLS": "2",
            "CHAOS_SIGNALS": "2",
            "CHAOS_SOAK_MINUTES": "1.5",
            **os.environ,
            "CHAOS_MUTATION": mutation,
            "CHAOS_RESULTS": f"{folder}/chaos.json",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/chaos", "-m", "chaos"]
        command += ["-k", MUTATIONS[mutation].row, "-p", "no:cacheprovider"]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    reasons = re.findall(r"^[ |]*E +(.*)", ended.stdout, re.MULTILINE)  # behind bars: of a group of exceptions
    reasons.sort(key=lambda line: not line.startswith("assert "))  # what was asserted says more than what was printed
    reason = (reasons or ended.stdout.strip().splitlines()[-1:])[0][:160]
    return ended.returncode == 1 and "1 failed" in ended.stdout, reason


def main(names: list[str]) -> None:
    """Run the mutations of these names, or all."""
    held = []
    for name in names or MUTATIONS:
        failed, reason = fails(name)
        verdict = "fails" if failed else "HOLDS"
        print(f"| {MUTATIONS[name].what} | {MUTATIONS[name].row} | {verdict} | {reason} |", flush=True)
        if not failed:
            held.append(name)
    sys.exit(1 if held else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
