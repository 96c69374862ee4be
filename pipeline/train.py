"""Stage ``train``: parameters -> a policy that drives.

python -m pipeline.train [--config FILE] [--KEY VALUE ...]

Reads ``params.yaml``. Leaves ``models/best_model.safetensors`` (the best on the validation tracks) and
``models/final_model.safetensors``, ``metrics/train.json`` and ``plots/``, a run folder under ``log_root``, and a run in
MLflow, whose id is in ``metrics/mlflow.json`` for the next stages.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.config import Parser, TrainParams, cores, fail, parse_args, project_root

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import CallbackList

    from pipeline.agent.checkpoint import State
    from pipeline.agent.ppo import DrivingPPO
    from pipeline.evaluation import Evaluator
    from pipeline.tracking.run import Run
    from pipeline.tracking.spool import Spool

log = logging.getLogger("pipeline.train")

BEST, FINAL = Path("models/best_model.safetensors"), Path("models/final_model.safetensors")
LOG = "train.log"
STATE_SECONDS = 10.0
"""At most so much work is lost with a killed training, or one rollout, update and validation; saving takes 20 ms."""
METRICS, CURVE, CURVE_PICTURE = (
    Path("metrics/train.json"),
    Path("plots/validation.csv"),
    Path("plots/learning_curve.png"),
)


class RunFolderError(Exception):
    """Another process trains with the same parameters."""


def train(params: TrainParams) -> dict[str, float]:
    """Train one policy; returns what is written to ``metrics/train.json``.

    Raises:
        TrackingError: MLflow's store can't be reached.
        RunFolderError: Another process trains with the same parameters.
        CheckpointError: The training was interrupted and every state it left is damaged.
        WorkerError: An environment failed again and again.
    """
    # Imported here: they take 4 s, and a mistake in the parameters is told before that.
    from pipeline.agent import checkpoint
    from pipeline.agent.ppo import build_model
    from pipeline.evaluation import Evaluator
    from pipeline.sim.env import make_training_env
    from pipeline.sim.vec_env import SharedMemoryVecEnv
    from pipeline.tracking.run import Run
    from pipeline.tracking.spool import Sender, Spool

    folder = run_folder(params)
    with one_writer(folder):
        state = checkpoint.latest(folder / "checkpoints")
        if state is None:
            set_aside(folder)
        start_log(folder, params)
        run = Run.resume(state.header["extra"]["run_id"]) if state else None
        run = run or Run.begin(params.run_name, params.model_dump(), {"fingerprint": params.fingerprint()})
        workers = min(params.n_workers or cores(), params.n_envs)
        run.spool = Spool(folder / f"spool-{run.id}.jsonl", run.id)
        with run.spool as spool, run, Evaluator(workers) as evaluator, ExitStack() as stack:
            stack.enter_context(Sender(run.client, spool))
            env = SharedMemoryVecEnv(
                [partial(make_training_env, params, index) for index in range(params.n_envs)],
                n_workers=workers if params.n_envs > 1 else 0,
            )
            stack.callback(env.close)
            model = build_model(params, env)
            model.set_logger(build_logger(folder, spool))
            session = Session(params, model, evaluator, folder, spool)
            if state:
                session.resume(state, run)
            announce(run, model, folder, workers)
            run.track_set(validation_tracks(params), "validation", "validation")
            run.artifact(folder / "config.json")
            remaining = params.total_timesteps - model.num_timesteps
            model.learn(max(remaining, 0), session.callbacks(), reset_num_timesteps=state is None)
            figures = session.publish()
            spool.metrics({f"best/{k}": v for k, v in session.best.items()}, step=int(session.best["agent_steps"]))
            for path, where in ((BEST, "models"), (FINAL, "models"), (CURVE_PICTURE, "plots"), (Path(LOG), "")):
                spool.artifact(folder / path.name, where)
        for path in checkpoint.states(folder / "checkpoints"):
            path.unlink()  # done: the next training of these parameters starts from the beginning
    log.info("best validation mean %.1f in %.1f minutes", figures["best_mean_reward"], figures["minutes"])
    return figures


class Session:
    """What a training does beside learning: validates, keeps the best policy and its own state, publishes the result.

    Attributes:
        best: Validation figures of the best policy so far, and its agent steps.
        history: One row per validation, for the curves.
    """

    def __init__(
        self, params: TrainParams, model: DrivingPPO, evaluator: Evaluator, folder: Path, spool: Spool
    ) -> None:
        from pipeline.agent.callbacks import EpisodeStatistics, Periodic

        self.params, self.model, self.evaluator, self.folder, self.spool = params, model, evaluator, folder, spool
        self.best: dict[str, float] = {"score": float("-inf")}
        self.history: list[dict[str, float]] = []
        self.statistics = EpisodeStatistics()
        self.validations = Periodic(params.eval_freq, self.validate)
        self.checkpoints = Periodic(params.save_freq, self.checkpoint)
        self._began = self._state_saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock spent on this training, over all its sessions."""
        return time.monotonic() - self._began

    def callbacks(self) -> CallbackList:
        """In the order in which they act: a state is saved when everything else of its moment is done."""
        from stable_baselines3.common.callbacks import CallbackList

        from pipeline.agent.callbacks import EveryRollout, Progress

        progress = Progress(self.params.total_timesteps)
        return CallbackList(
            [self.statistics, self.validations, self.checkpoints, EveryRollout(self.save_state_sometimes), progress]
        )

    def save_state_sometimes(self) -> None:
        """Save the state if the last one is older than ``STATE_SECONDS``."""
        if time.monotonic() - self._state_saved >= STATE_SECONDS:
            self.save_state()

    def save_state(self) -> None:
        """Save everything that an exact resume needs."""
        from pipeline.agent import checkpoint

        extra = {
            "run_id": self.spool.run_id,
            "seconds": self.seconds,
            "best": self.best,
            "history": self.history,
            "statistics": list(self.statistics.episodes),
            "last_validation": self.validations.last,
            "last_checkpoint": self.checkpoints.last,
        }
        checkpoint.publish(self.folder / "checkpoints", checkpoint.capture(self.model, extra))
        self._state_saved = time.monotonic()

    def resume(self, state: State, run: Run) -> None:
        """Go on from ``state``; says so, and whether the result will be the same to the bit."""
        from pipeline.agent import checkpoint

        checkpoint.restore(self.model, state)
        extra, here = state.header["extra"], checkpoint.machine(self.model)
        self.best, self.history = extra["best"], extra["history"]
        self.statistics.episodes.extend(extra["statistics"])
        self.validations.last, self.checkpoints.last = extra["last_validation"], extra["last_checkpoint"]
        self._began -= extra["seconds"]
        exact = state.header["machine"] == here
        run.tags({"resumed": "exact" if exact else f"statistical: {state.header['machine']} -> {here}"})
        log.info("resumed at %s steps%s", f"{self.model.num_timesteps:,}", "" if exact else " (on another machine)")

    def save(self, path: Path) -> Path:
        """Write the present policy."""
        from pipeline.agent import policy

        policy.save(path, self.model.policy, self.params, self.params, self.model.num_timesteps)
        return path

    def checkpoint(self, steps: int) -> None:
        """Keep the present policy under its number of steps."""
        self.spool.artifact(self.save(self.folder / "checkpoints" / f"policy_{steps:012}.safetensors"), "checkpoints")
        self.save_state()

    def validate(self, steps: int) -> None:
        """Drive the validation tracks on the stock game; keep the policy if none scored higher before."""
        from pipeline.evaluation import summarize

        path = self.save(self.folder / "candidate.safetensors")
        episodes = self.evaluator.play(path, validation_tracks(self.params))
        figures = summarize(episodes, bootstrap_samples=1000)
        logged = {
            "mean_reward": figures["mean"],
            "std_reward": figures["std"],
            "mean_length": figures["mean_frames"],
            "std_length": float(_std([e.frames for e in episodes])),
            "min_reward": figures["min"],
            "laps_finished": figures["laps_finished"],
        }
        for key, value in logged.items():
            self.model.logger.record(f"eval/{key}", value)
        # Steady beats fast: a mean that hides a lost track is not chosen.
        score = figures["mean"] - 0.5 * figures["std"]
        if score > self.best["score"]:
            self.best = {"score": score, **logged, "agent_steps": steps}
            shutil.copyfile(path, self.folder / "best_model.safetensors")
        self.model.logger.record("best/mean_reward", self.best["mean_reward"])
        self.model.logger.dump(steps)
        self._remember(steps, figures)
        log.info("validation at %s steps: %.1f +- %.1f", f"{steps:,}", figures["mean"], figures["std"])

    def _remember(self, steps: int, figures: Mapping[str, float]) -> None:
        episodes = self.model.ep_info_buffer or ()
        self.history.append(
            {
                "agent_steps": steps,
                "frames": steps * self.params.frame_skip,
                "seconds": round(self.seconds, 1),
                "ep_rew_mean": float(_mean([e["r"] for e in episodes])),
                "eval_mean": figures["mean"],
                "eval_std": figures["std"],
                "laps_finished": figures["laps_finished"],
            }
        )

    def publish(self) -> dict[str, float]:
        """Write the stage's outputs: best and final policy, curves, ``metrics/train.json``."""
        import pandas as pd

        from pipeline.media import charts

        self.save(FINAL)
        shutil.copyfile(self.folder / BEST.name, BEST)
        shutil.copyfile(FINAL, self.folder / FINAL.name)  # what is sent to MLflow must outlive the next training
        CURVE.parent.mkdir(exist_ok=True)
        pd.DataFrame(self.history).drop(columns="seconds").to_csv(CURVE, index=False)
        charts.learning_curve(self.history, CURVE_PICTURE)
        for curve in (CURVE, CURVE_PICTURE):
            shutil.copyfile(curve, self.folder / curve.name)
        seconds = self.seconds
        solved = [row["seconds"] / 60 for row in self.history if row["eval_mean"] >= 900]
        figures = {
            "agent_steps": self.model.num_timesteps,
            "frames": self.model.num_timesteps * self.params.frame_skip,
            "minutes": round(seconds / 60, 2),
            "frames_per_second": round(self.model.num_timesteps * self.params.frame_skip / seconds, 1),
            "best_mean_reward": self.best["mean_reward"],
            "best_std_reward": self.best["std_reward"],
            "best_agent_steps": self.best["agent_steps"],
            "final_mean_reward": self.history[-1]["eval_mean"],
            "minutes_to_900": round(solved[0], 2) if solved else -1.0,
        }
        METRICS.parent.mkdir(exist_ok=True)
        METRICS.write_text(json.dumps(figures, indent=2) + "\n")
        return figures


def validation_tracks(params: TrainParams) -> list[int]:
    """The fixed tracks that choose the best policy."""
    return list(range(params.validation_seed, params.validation_seed + params.n_eval_episodes))


def run_folder(params: TrainParams) -> Path:
    """Folder of these parameters and this code: the same again, to go on where a killed training stopped."""
    return project_root() / params.log_root / f"{params.run_name}-{params.fingerprint()}"


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder; a second trainer of the same parameters is told who does.

    Raises:
        RunFolderError: Another process holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "holder.txt"
    try:
        with FileLock(folder / "lock", timeout=0):
            holder.write_text(f"process {os.getpid()} on {platform.node()}\n")
            yield
    except Timeout:
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise RunFolderError(f"{folder} is being trained by {who}; wait for it, stop it, or change run_name") from None


def set_aside(folder: Path) -> None:
    """Move what an earlier, finished training of the same parameters left, so that nothing is written over."""
    leftovers = [path for path in folder.iterdir() if path.name not in ("lock", "holder.txt")]
    if leftovers:
        earlier = folder / f"earlier-{sum(1 for _ in folder.glob('earlier-*')) + 1}"
        earlier.mkdir()
        for path in leftovers:
            if not path.name.startswith("earlier-"):
                path.rename(earlier / path.name)


class Console(logging.Handler):
    """Log lines above the progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def start_log(folder: Path, params: TrainParams) -> None:
    """Write the effective parameters, and send the log to the run folder and to the console."""
    (folder / "config.json").write_text(params.model_dump_json(indent=2) + "\n")
    console, file = Console(), logging.FileHandler(folder / LOG, encoding="utf-8")
    console.setLevel(logging.INFO)  # the file also gets the lines that the progress bar stands for
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[console, file], force=True
    )
    logging.getLogger("pipeline").setLevel(logging.DEBUG)
    for noisy in ("alembic", "mlflow", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def build_logger(folder: Path, spool: Spool) -> Any:
    """SB3's logger to TensorBoard files and the spool for MLflow."""
    from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

    from pipeline.tracking.writer import SpoolWriter

    return Logger(str(folder), [TensorBoardOutputFormat(str(folder / "tensorboard")), SpoolWriter(spool)])


def announce(run: Any, model: DrivingPPO, folder: Path, workers: int) -> None:
    """Say, in the log and as tags, on what the training runs."""
    import torch

    dtype = str(model.policy.features_extractor.dtype).removeprefix("torch.")
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
    run.tags(
        {
            "device": str(model.device),
            "precision": dtype,
            "torch_threads": str(model.update_threads),
            "workers": str(workers),
            **({"gpu": gpu} if gpu else {}),
        }
    )
    log.info(
        "%s on %s %s, %s, %d torch threads, %d environments in %d workers",
        folder, model.device, gpu, dtype, model.update_threads, model.n_envs, workers,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return float(_mean([(v - mean) ** 2 for v in values]) ** 0.5)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exit code 2 for mistakes of the user, 130 for Ctrl-C, 143 for SIGTERM."""
    params, _ = parse_args(TrainParams, Parser(prog="python -m pipeline.train", description=__doc__), argv)
    signal.signal(signal.SIGTERM, _terminate)
    from pipeline.agent.checkpoint import CheckpointError
    from pipeline.tracking.store import TrackingError

    try:
        train(params)
    except (TrackingError, RunFolderError, CheckpointError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
