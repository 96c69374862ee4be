"""Stage ``train``: parameters -> a policy that drives.

python -m pipeline.train [--config FILE] [--KEY VALUE ...]

Reads ``params.yaml``. Leaves ``models/best_model.safetensors`` (the best on the validation tracks) and
``models/final_model.safetensors``, ``metrics/train.json`` and ``plots/``, a run folder under ``log_root``, and a run in
MLflow, whose id is in ``metrics/mlflow.json`` for the next stages.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.config import Parser, TrainParams, fail, parse_args, project_root

if TYPE_CHECKING:
    from pipeline.agent.ppo import DrivingPPO
    from pipeline.evaluation import Evaluator
    from pipeline.tracking.spool import Spool

log = logging.getLogger("pipeline.train")

BEST, FINAL = Path("models/best_model.safetensors"), Path("models/final_model.safetensors")
METRICS, CURVE, CURVE_PICTURE = (
    Path("metrics/train.json"),
    Path("plots/validation.csv"),
    Path("plots/learning_curve.png"),
)


def train(params: TrainParams) -> dict[str, float]:
    """Train one policy; returns what is written to ``metrics/train.json``.

    Raises:
        TrackingError: MLflow's store can't be reached.
        WorkerError: An environment failed again and again.
    """
    # Imported here: they take 4 s, and a mistake in the parameters is told before that.
    from stable_baselines3.common.callbacks import CallbackList

    from pipeline.agent.callbacks import EpisodeStatistics, Periodic, Progress
    from pipeline.agent.ppo import build_model
    from pipeline.config import cores
    from pipeline.evaluation import Evaluator
    from pipeline.sim.env import make_training_env
    from pipeline.sim.vec_env import SharedMemoryVecEnv
    from pipeline.tracking.run import Run
    from pipeline.tracking.spool import Sender, Spool

    began = time.monotonic()
    folder = open_run_folder(params)
    workers = min(params.n_workers or cores(), params.n_envs)
    run = Run.begin(params.run_name, params.model_dump(), {"fingerprint": params.fingerprint()})
    spool = Spool(folder / f"spool-{run.id}.jsonl", run.id)
    sender = Sender(run.client, spool)
    with run, Evaluator(workers) as evaluator:
        run.track_set(validation_tracks(params), "validation", "validation")
        run.artifact(folder / "config.json")
        env = SharedMemoryVecEnv(
            [partial(make_training_env, params, index) for index in range(params.n_envs)],
            n_workers=workers if params.n_envs > 1 else 0,
        )
        try:
            model = build_model(params, env)
            announce(run, model, folder, workers)
            model.set_logger(build_logger(folder, spool))
            keeper = Keeper(params, model, evaluator, folder, spool, began)
            callbacks: list[Any] = [
                EpisodeStatistics(),
                Periodic(params.eval_freq, keeper.validate),
                Periodic(params.save_freq, keeper.checkpoint),
                Progress(params.total_timesteps),
            ]
            model.learn(params.total_timesteps, CallbackList(callbacks))
        finally:
            env.close()
            sender.close()
        keeper.save(FINAL)
        figures = keeper.publish(began)
        run.metrics({f"best/{key}": value for key, value in keeper.best.items()}, step=int(keeper.best["agent_steps"]))
        for path, where in ((BEST, "models"), (FINAL, "models"), (CURVE_PICTURE, "plots"), (folder / "train.log", "")):
            run.artifact(path, where)
    log.info("best validation mean %.1f; look at it with `mlflow ui`", figures["best_mean_reward"])
    return figures


@dataclass
class Keeper:
    """Plays the validation tracks, keeps the best policy and every checkpoint, and writes what comes out."""

    params: TrainParams
    model: DrivingPPO
    evaluator: Evaluator
    folder: Path
    spool: Spool
    began: float
    best: dict[str, float] = field(default_factory=lambda: {"score": float("-inf")})
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path) -> Path:
        """Write the present policy."""
        from pipeline.agent import policy

        policy.save(path, self.model.policy, self.params, self.params, self.model.num_timesteps)
        return path

    def checkpoint(self, steps: int) -> None:
        """Keep the present policy under its number of steps."""
        self.spool.artifact(self.save(self.folder / "checkpoints" / f"policy_{steps:010}.safetensors"), "checkpoints")

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
                "seconds": round(time.monotonic() - self.began, 1),
                "ep_rew_mean": float(_mean([e["r"] for e in episodes])),
                "eval_mean": figures["mean"],
                "eval_std": figures["std"],
                "laps_finished": figures["laps_finished"],
            }
        )

    def publish(self, began: float) -> dict[str, float]:
        """Write the stage's outputs: best policy, curves, ``metrics/train.json``."""
        import pandas as pd

        from pipeline.media import charts

        BEST.parent.mkdir(exist_ok=True)
        shutil.copyfile(self.folder / "best_model.safetensors", BEST)
        CURVE.parent.mkdir(exist_ok=True)
        pd.DataFrame(self.history).drop(columns="seconds").to_csv(CURVE, index=False)
        charts.learning_curve(self.history, CURVE_PICTURE)
        seconds = time.monotonic() - began
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


def open_run_folder(params: TrainParams) -> Path:
    """Make the run folder with the effective parameters, and send the log there and to the console."""
    folder = project_root() / params.log_root / f"{params.run_name}-{params.fingerprint()}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(params.model_dump_json(indent=2) + "\n")
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(), logging.FileHandler(folder / "train.log", encoding="utf-8")],
        force=True,
    )
    for noisy in ("alembic", "mlflow", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return folder


def build_logger(folder: Path, spool: Spool) -> Any:
    """SB3's logger to TensorBoard files, CSV and the spool for MLflow."""
    from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat

    from pipeline.tracking.writer import SpoolWriter

    formats = [TensorBoardOutputFormat(str(folder / "tensorboard")), CSVOutputFormat(str(folder / "progress.csv"))]
    return Logger(str(folder), [*formats, SpoolWriter(spool)])


def announce(run: Any, model: DrivingPPO, folder: Path, workers: int) -> None:
    """Say, in the log and as tags, on what the training runs."""
    import torch

    dtype = str(model.policy.features_extractor.dtype).removeprefix("torch.")
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
    run.tags(
        {
            "device": str(model.device),
            "precision": dtype,
            "torch_threads": str(torch.get_num_threads()),
            "workers": str(workers),
            **({"gpu": gpu} if gpu else {}),
        }
    )
    log.info(
        "%s on %s %s, %s, %d torch threads, %d environments in %d workers",
        folder, model.device, gpu, dtype, torch.get_num_threads(), model.n_envs, workers,
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
    from pipeline.tracking.store import TrackingError

    try:
        train(params)
    except TrackingError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
