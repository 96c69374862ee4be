"""Stage ``train``: parameters -> a policy that drives.

python -m pipeline.train [--config FILE] [--KEY VALUE ...]

Reads ``params.yaml``. Leaves ``models/best_model.safetensors`` (the best on the validation tracks) and
``models/final_model.safetensors``, ``metrics/train.json`` and ``plots/``, a run folder under ``log_root``, and a run in
MLflow, whose id is in ``metrics/mlflow.json`` for the next stages.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import NoReturn

from pipeline.config import Parser, TrainParams, cores, fail, parse_args

log = logging.getLogger("pipeline.train")


def train(params: TrainParams) -> dict[str, float]:
    """Train one policy; returns what is written to ``metrics/train.json``.

    Raises:
        TrackingError: MLflow's store can't be reached.
        RunFolderError: Another process trains with the same parameters.
        CheckpointError: The training was interrupted and every state it left is damaged.
        PolicyError: ``warm_start`` names a policy that does not fit the parameters.
        WorkerError: An environment failed again and again.
    """
    # Imported here: they take 4 s, and a mistake in the parameters is told before that.
    from pipeline.agent import checkpoint, policy
    from pipeline.agent.ppo import build_model
    from pipeline.evaluation import Evaluator
    from pipeline.session import Session, announce, build_logger, validation_tracks
    from pipeline.sim.env import make_training_env
    from pipeline.sim.vec_env import SharedMemoryVecEnv
    from pipeline.tracking.folder import one_writer, run_folder, set_aside, start_log
    from pipeline.tracking.run import Run
    from pipeline.tracking.spool import Sender, Spool

    initial_weights = policy.warm_start(params) if params.warm_start else None
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
            elif initial_weights:
                policy.load_weights(model.policy, initial_weights)
            announce(run, model, folder, workers)
            run.track_set(validation_tracks(params), "validation", "validation")
            run.artifact(folder / "config.json")
            remaining = params.total_timesteps - model.num_timesteps
            model.learn(max(remaining, 0), session.callbacks(), reset_num_timesteps=state is None)
            figures = session.publish()
        for path in checkpoint.states(folder / "checkpoints"):
            path.unlink()  # done: the next training of these parameters starts from the beginning
    log.info("best validation mean %.1f in %.1f minutes", figures["best_mean_reward"], figures["minutes"])
    return figures


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exit code 2 for mistakes of the user, 130 for Ctrl-C, 143 for SIGTERM."""
    params, _ = parse_args(TrainParams, Parser(prog="python -m pipeline.train", description=__doc__), argv)
    signal.signal(signal.SIGTERM, _terminate)
    from pipeline.agent.checkpoint import CheckpointError
    from pipeline.agent.policy import PolicyError
    from pipeline.tracking.folder import RunFolderError
    from pipeline.tracking.store import TrackingError

    try:
        train(params)
    except (TrackingError, RunFolderError, CheckpointError, PolicyError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
