"""What a training does beside learning: validate, keep the best policy and its own state, publish the result."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch as th
from numpy.typing import NDArray
from PIL import Image
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Image as TensorBoardImage
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

from pipeline import durable
from pipeline.agent import checkpoint, policy
from pipeline.agent.callbacks import EpisodeStatistics, EveryRollout, Periodic, Progress
from pipeline.agent.checkpoint import State
from pipeline.agent.ppo import DrivingPPO
from pipeline.config import TrainParams
from pipeline.evaluation import Evaluator, summarize
from pipeline.media import charts
from pipeline.media.video import filmstrip
from pipeline.tracking.folder import LOG
from pipeline.tracking.run import Run
from pipeline.tracking.spool import Spool
from pipeline.tracking.writer import SpoolWriter

log = logging.getLogger(__name__)

BEST, FINAL = Path("models/best_model.safetensors"), Path("models/final_model.safetensors")
METRICS, CURVE, CURVE_PICTURE = (
    Path("metrics/train.json"),
    Path("plots/validation.csv"),
    Path("plots/learning_curve.png"),
)
STATE_SECONDS = 10.0
"""At most so much work is lost with a killed training, or one rollout, update and validation; saving takes 20 ms."""


class Session:
    """What a training does beside learning: validates, keeps the best policy and its own state, publishes the result.

    Attributes:
        best: Validation figures of the best policy so far, and its agent steps.
        history: One row per validation, for the curves.
    """

    def __init__(
        self, params: TrainParams, model: DrivingPPO, evaluator: Evaluator, folder: Path, spool: Spool
    ) -> None:
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
        progress = Progress(self.params.total_timesteps)
        return CallbackList(
            [self.statistics, self.validations, self.checkpoints, EveryRollout(self.save_state_sometimes), progress]
        )

    def save_state_sometimes(self) -> None:
        """Save the state if the last one is older than ``STATE_SECONDS``, or if the policy has just become the best."""
        is_best = self.best.get("agent_steps") == self.model.num_timesteps
        if is_best or time.monotonic() - self._state_saved >= STATE_SECONDS:
            self.save_state()

    def save_state(self) -> None:
        """Save everything that an exact resume needs."""
        extra = {
            "run_id": self.spool.run_id,
            "seconds": self.seconds,
            "best": self.best,
            "history": self.history,
            "statistics": list(self.statistics.episodes),
            "last_validation": self.validations.last,
            "last_checkpoint": self.checkpoints.last,
        }
        self.spool.sync()  # a resumed training does not say again what it said before this state
        best = self.best.get("agent_steps")
        state = checkpoint.capture(self.model, extra)
        checkpoint.publish(self.folder / "checkpoints", state, None if best is None else int(best))
        self._state_saved = time.monotonic()

    def resume(self, state: State, run: Run) -> None:
        """Go on from ``state``; says so, and whether the result will be the same to the bit."""
        checkpoint.restore(self.model, state)
        extra, here = state.header["extra"], checkpoint.machine(self.model)
        self.best, self.history = extra["best"], extra["history"]
        self.statistics.episodes.extend(extra["statistics"])
        self.validations.last, self.checkpoints.last = extra["last_validation"], extra["last_checkpoint"]
        self._began -= extra["seconds"]
        for later in self._best_policies():  # of the time between this state and the end of that process
            if later > self._best_policy(self.model.num_timesteps):
                later.unlink()
        exact = state.header["machine"] == here
        run.tags({"resumed": "exact" if exact else f"statistical: {state.header['machine']} -> {here}"})
        log.info("resumed at %s steps%s", f"{self.model.num_timesteps:,}", "" if exact else " (on another machine)")

    def save(self, path: Path) -> Path:
        """Write the present policy."""
        policy.save(path, self.model.policy, self.params, self.params, self.model.num_timesteps)
        return path

    def checkpoint(self, steps: int) -> None:
        """Keep the present policy under its number of steps."""
        self.spool.artifact(self.save(self.folder / "checkpoints" / f"policy_{steps:012}.safetensors"), "checkpoints")
        self.save_state()

    def validate(self, steps: int) -> None:
        """Drive the validation tracks on the stock game; keep the policy if none scored higher before."""
        path = self.save(self.folder / "candidate.safetensors")
        # A logger of its own: the model's holds the last update's figures, which belong to the next rollout's step.
        logger = Logger(None, self.model.logger.output_formats)
        show = partial(self._show, logger, steps)
        episodes = self.evaluator.play(path, validation_tracks(self.params), on_stills=show)
        figures = summarize(episodes, bootstrap_samples=1000)
        logged = {
            "mean_reward": figures["mean"],
            "std_reward": figures["std"],
            "mean_length": figures["mean_frames"],
            "std_length": float(np.std([e.frames for e in episodes])),
            "ci_low": figures["mean_ci_low"],
            "ci_high": figures["mean_ci_high"],
            "min_reward": figures["min"],
            "laps_finished": figures["laps_finished"],
        }
        for key, value in logged.items():
            logger.record(f"eval/{key}", value)
        # Steady beats fast: a mean that hides a lost track is not chosen.
        score = figures["mean"] - 0.5 * figures["std"]
        logger.record("eval/score", score)
        if score > self.best["score"]:
            self.best = {"score": score, **logged, "agent_steps": steps}
            self._keep_best(path, steps)
        logger.record("best/mean_reward", self.best["mean_reward"])
        logger.dump(steps)
        self._remember(steps, figures)
        log.info("validation at %s steps: %.1f +- %.1f", f"{steps:,}", figures["mean"], figures["std"])

    def _keep_best(self, path: Path, steps: int) -> None:
        """Keep a policy under its number of steps, by which a state finds the one that was the best in its time."""
        durable.publish(self._best_policy(steps), path.read_bytes())
        for old in self._best_policies()[checkpoint.KEPT + 1 :]:  # as many as there are states
            old.unlink()

    def _best_policy(self, steps: int) -> Path:
        return self.folder / "checkpoints" / f"best_{steps:012}.safetensors"

    def _best_policies(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("best_*.safetensors"), reverse=True)

    def _show(self, logger: Logger, steps: int, pictures: Sequence[NDArray[np.uint8]]) -> None:
        """Put a strip of one validation drive into TensorBoard and MLflow, where it gets a slider over the steps."""
        strip = filmstrip(pictures, columns=5, rows=2, tile_width=240)
        logger.record("filmstrip", TensorBoardImage(strip, "HWC"), exclude="mlflow")
        path = self.folder / "filmstrips" / f"{steps:012}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(strip).save(path)
        self.spool.image(path, "filmstrip", steps)

    def _remember(self, steps: int, figures: Mapping[str, float]) -> None:
        episodes = self.model.ep_info_buffer or ()
        self.history.append(
            {
                "agent_steps": steps,
                "frames": steps * self.params.frame_skip,
                "seconds": round(self.seconds, 1),
                "ep_rew_mean": float(np.mean([e["r"] for e in episodes])) if episodes else float("nan"),
                "eval_mean": figures["mean"],
                "eval_std": figures["std"],
                "eval_low": figures["mean_ci_low"],
                "eval_high": figures["mean_ci_high"],
                "laps_finished": figures["laps_finished"],
            }
        )

    def publish(self) -> dict[str, float]:
        """Write the stage's outputs, and hand them to MLflow: best and final policy, curves, ``metrics/train.json``."""
        self.save(FINAL)
        best = self._best_policy(int(self.best["agent_steps"])).read_bytes()
        for place in (BEST, self.folder / BEST.name):
            durable.publish(place, best)
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
        durable.publish(METRICS, (json.dumps(figures, indent=2) + "\n").encode())
        rest = {f"best/{k}": v for k, v in self.best.items() if k != "mean_reward"}  # told with every validation
        self.spool.metrics(rest, step=int(self.best["agent_steps"]))
        for path, where in ((BEST, "models"), (FINAL, "models"), (CURVE_PICTURE, "plots"), (Path(LOG), "")):
            self.spool.artifact(self.folder / path.name, where)
        return figures


def validation_tracks(params: TrainParams) -> list[int]:
    """The fixed tracks that choose the best policy."""
    return list(range(params.validation_seed, params.validation_seed + params.n_eval_episodes))


def build_logger(folder: Path, spool: Spool) -> Logger:
    """SB3's logger to TensorBoard files and the spool for MLflow."""
    return Logger(str(folder), [TensorBoardOutputFormat(str(folder / "tensorboard")), SpoolWriter(spool)])


def announce(run: Run, model: DrivingPPO, folder: Path, workers: str) -> None:
    """Say, in the log and as tags, on what the training runs."""
    dtype = str(model.policy.features_extractor.dtype).removeprefix("torch.")
    gpu = th.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
    run.tags(
        {
            "device": str(model.device),
            "precision": dtype,
            "torch_threads": str(model.update_threads),
            "workers": workers,
            **({"gpu": gpu} if gpu else {}),
        }
    )
    log.info(
        "%s on %s %s, %s, %d torch threads, %d environments in %s",
        folder, model.device, gpu, dtype, model.update_threads, model.n_envs, workers,
    )  # fmt: skip
