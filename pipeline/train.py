"""Stage ``train``: parameters -> a policy that drives.

python -m pipeline.train [--config FILE] [--KEY VALUE ...]

Reads ``params.yaml``. Leaves ``models/best_model.safetensors`` (the best on the validation tracks) and
``models/final_model.safetensors``, ``metrics/train.json`` and ``plots/``, a run folder under ``log_root``, and a run in
MLflow, whose id is in ``metrics/mlflow.json`` for the next stages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from pipeline import durable
from pipeline.config import Parser, TrainParams, cores, fail, parse_args
from pipeline.interrupts import Interrupts

log = logging.getLogger("pipeline.train")


def train(params: TrainParams, stop: Interrupts | None = None) -> dict[str, float]:
    """Train one policy; returns what is written to ``metrics/train.json``.

    Args:
        params: Every number it depends on.
        stop: Asked before each rollout whether to save the state and end.

    Raises:
        TrackingError: ``MLFLOW_TRACKING_URI`` names no store of MLflow's.
        RunFolderError: Another process trains with the same parameters.
        CheckpointError: The training was interrupted and every state it left is damaged.
        PolicyError: ``warm_start`` names a policy that does not fit the parameters.
        WorkerError: An environment failed again and again.
    """
    # Imported here: they take 4 s, and a mistake in the parameters is told before that.
    from pipeline.agent import checkpoint, policy
    from pipeline.agent.callbacks import EveryRollout
    from pipeline.agent.ppo import build_model
    from pipeline.evaluation import Evaluator
    from pipeline.session import Session, announce, build_logger, validation_tracks
    from pipeline.sim.env import make_training_env
    from pipeline.sim.vec_env import SharedMemoryVecEnv
    from pipeline.tracking.folder import one_writer, run_folder, set_aside, start_log
    from pipeline.tracking.run import Run

    initial_weights = policy.warm_start(params) if params.warm_start else None
    folder = run_folder(params)
    with one_writer(folder):
        if not checkpoint.states(folder / "checkpoints"):
            set_aside(folder)
        start_log(folder, params)  # before the states are read: a damaged one is told there too
        state = checkpoint.latest(folder / "checkpoints")
        interrupted = state.header["extra"]["run_id"] if state else None
        tags = {"fingerprint": params.fingerprint()}
        run = Run.begin(params.run_name, params.model_dump(), tags, folder, interrupted)
        workers = min(params.n_workers or cores(), params.n_envs)
        with run, Evaluator(workers) as evaluator, ExitStack() as stack:
            env = SharedMemoryVecEnv(
                [partial(make_training_env, params, index) for index in range(params.n_envs)],
                n_workers=workers if params.n_envs > 1 else 0,
            )
            stack.callback(env.close)
            model = build_model(params, env)
            model.set_logger(build_logger(folder, run.spool))
            session = Session(params, model, evaluator, folder, run.spool)
            if state:
                session.resume(state, run)
            elif initial_weights:
                policy.load_weights(model.policy, initial_weights)
            announce(run, model, folder, workers)
            run.track_set(validation_tracks(params), "validation", "validation")
            run.artifact(folder / "config.json")
            remaining = params.total_timesteps - model.num_timesteps
            ending = EveryRollout(partial((stop or Interrupts()).check, session.save_state))
            model.learn(max(remaining, 0), [session.callbacks(), ending], reset_num_timesteps=state is None)
            figures = session.publish()
        for path in checkpoint.states(folder / "checkpoints"):
            path.unlink()  # done: the next training of these parameters starts from the beginning
    log.info("best validation mean %.1f in %.1f minutes", figures["best_mean_reward"], figures["minutes"])
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exit code 2 for mistakes of the user and a full disk, 128 + n for signal n."""
    params, _ = parse_args(TrainParams, Parser(prog="python -m pipeline.train", description=__doc__), argv)
    with Interrupts() as stop:
        from pipeline.agent.checkpoint import CheckpointError
        from pipeline.agent.policy import PolicyError
        from pipeline.tracking.folder import RunFolderError
        from pipeline.tracking.store import TrackingError

        try:
            train(params, stop)
        except (TrackingError, RunFolderError, CheckpointError, PolicyError) as error:
            fail(error)
        except OSError as error:
            if not durable.is_full(error):
                raise
            fail(f"{error}: no room to write. Free some and run the same command again: it goes on where it was.")


if __name__ == "__main__":
    main()
