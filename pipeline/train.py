"""Stage ``train``: parameters -> a policy that drives.

python -m pipeline.train [--config FILE] [--KEY VALUE ...] [--visual ...] [--ray ADDRESS]

Reads ``params.yaml``. Leaves ``models/best_model.safetensors`` (the best on the validation tracks) and
``models/final_model.safetensors``, ``metrics/train.json`` and ``plots/``, a run folder under ``log_root``, and a run in
MLflow, whose id is in ``metrics/mlflow.json`` for the next stages. ``--visual`` opens windows on it; q or Esc closes
them, and the training goes on. ``--ray`` steps the environments on a Ray cluster: the result is the same.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipeline import durable
from pipeline.config import ConfigError, Parser, TrainParams, cores, fail, integer, parse_args
from pipeline.interrupts import Interrupts

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

    from pipeline.sim.ray_env import Cluster

log = logging.getLogger("pipeline.train")


def train(
    params: TrainParams,
    stop: Interrupts | None = None,
    onlookers: Sequence[BaseCallback] = (),
    cluster: Cluster | None = None,
) -> dict[str, float]:
    """Train one policy; returns what is written to ``metrics/train.json``.

    Args:
        params: Every number it depends on.
        stop: Asked before each rollout whether to save the state and end.
        onlookers: Callbacks that look on and change nothing.
        cluster: Where the environments are stepped instead of on this machine; changes nothing either.

    Raises:
        TrackingError: ``MLFLOW_TRACKING_URI`` names no store of MLflow's.
        RunFolderError: Another process trains with the same parameters.
        CheckpointError: The training was interrupted and every state it left is damaged.
        PolicyError: ``warm_start`` names a policy that does not fit the parameters.
        WorkerError: An environment failed again and again.
        ClusterError: A node of the cluster has other packages than this machine.
    """
    # Imported here: they take 4 s, and a mistake in the parameters is told before that.
    from pipeline.agent import checkpoint, policy
    from pipeline.agent.build import build_model
    from pipeline.agent.callbacks import EveryRollout
    from pipeline.evaluation import Evaluator
    from pipeline.session import Session, announce, build_logger, validation_tracks
    from pipeline.sim.training_env import make_training_env
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
                n_workers=cluster.n_actors if cluster else workers if params.n_envs > 1 else 0,
                make_worker=cluster.make_worker if cluster else None,
            )
            stack.callback(env.close)
            model = build_model(params, env)
            model.set_logger(build_logger(folder, run.spool))
            session = Session(params, model, evaluator, folder, run.spool)
            if state:
                session.resume(state, run)
            elif initial_weights:
                policy.load_weights(model.policy, initial_weights)
            announce(run, model, folder, str(cluster or f"{workers} workers"))
            run.track_set(validation_tracks(params), "validation", "validation")
            run.artifact(folder / "config.json")
            remaining = params.total_timesteps - model.num_timesteps
            ending = EveryRollout(partial((stop or Interrupts()).check, session.save_state))
            callbacks = [session.callbacks(), ending, *onlookers]
            model.learn(max(remaining, 0), callbacks, reset_num_timesteps=state is None)
            figures = session.publish()
        for path in checkpoint.states(folder / "checkpoints"):
            path.unlink()  # done: the next training of these parameters starts from the beginning
    log.info("best validation mean %.1f in %.1f minutes", figures["best_mean_reward"], figures["minutes"])
    return figures


def add_visual_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that are no parameters: looking changes nothing in the result."""
    group = parser.add_argument_group("windows on the training")
    group.add_argument("--visual", action="store_true", help="show one environment: its picture, what the network sees")
    group.add_argument(
        "--render-freq", type=integer(1, 1_000_000), metavar="N", help="show every N-th agent step [default 1]"
    )
    group.add_argument("--visual-only-preproc", action="store_true", help="without the game's own picture")
    group.add_argument(
        "--visual-scale", type=integer(1, 1_000_000), metavar="N", help="screen pixels per pixel [default 3]"
    )


def add_ray_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that are no parameters: where environments are stepped changes nothing in the result."""
    group = parser.add_argument_group("environments on a Ray cluster, the learner here (docs/scaling.md)")
    group.add_argument("--ray", metavar="ADDRESS", help="HOST:PORT, or auto on a node of it; local starts one here")
    group.add_argument(
        "--ray-actors", type=integer(1, 1024), metavar="N", help="share the environments [default: one per free CPU]"
    )


def check_ray_flags(arguments: argparse.Namespace) -> None:
    """Exit with 2 where they don't go together."""
    if arguments.ray_actors and arguments.ray is None:
        fail("--ray-actors says how many: expected --ray with it, which says where, got none")
    if arguments.ray is not None and arguments.visual:
        fail("--visual trains in one environment: expected it without --ray, which is for many")


def connected(params: TrainParams, arguments: argparse.Namespace) -> AbstractContextManager[Cluster | None]:
    """The cluster that ``--ray`` names, or none; raises ``ClusterError`` where it can't be used."""
    if arguments.ray is None:
        return nullcontext()
    from pipeline.sim import ray_env

    return ray_env.connected(arguments.ray, arguments.ray_actors, params.n_envs)


def one_environment(params: TrainParams) -> TrainParams:
    """The parameters with one environment, whose rollouts are as long as all of theirs together: as large an update.

    Raises:
        ConfigError: Such a rollout is too long.
    """
    n_steps = params.n_steps * params.n_envs
    try:
        return TrainParams(**{**params.model_dump(), "n_envs": 1, "n_workers": 0, "n_steps": n_steps})
    except ValidationError:
        limit = "--visual makes one environment of all, whose rollout would be n_steps x n_envs"
        raise ConfigError(
            [f"{limit} = {n_steps:,}: more than n_steps may be; give a smaller n_steps or n_envs"]
        ) from None


def watched(params: TrainParams, arguments: argparse.Namespace) -> tuple[TrainParams, list[BaseCallback]]:
    """What ``--visual`` makes of the parameters, and its windows; says what it changed.

    Raises:
        ConfigError: These parameters can't be trained with one environment.
        ViewerError: There is no screen.
    """
    given = {"every": arguments.render_freq, "scale": arguments.visual_scale}
    chosen = {key: value for key, value in given.items() if value is not None}
    if not arguments.visual:
        if chosen or arguments.visual_only_preproc:
            fail("--render-freq, --visual-only-preproc and --visual-scale say how to look: expected --visual, got none")
        return params, []
    single = one_environment(params)
    from pipeline.media.viewer import Viewer

    viewer = Viewer()  # before the slow imports: a missing screen is told at once
    from pipeline.live import Look, TrainingWindows

    if single != params:
        print(
            f"--visual: one environment instead of {params.n_envs}, with n_steps {single.n_steps} instead of "
            f"{params.n_steps}, so that an update learns from as much. That is another training than without --visual: "
            f"run {single.fingerprint()}, not {params.fingerprint()}.",
            file=sys.stderr,
        )
    return single, [TrainingWindows(single, viewer, Look(raw=not arguments.visual_only_preproc, **chosen))]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exit code 2 for mistakes of the user and a full disk, 128 + n for signal n."""
    parser = Parser(prog="python -m pipeline.train", description=__doc__)
    add_visual_flags(parser)
    add_ray_flags(parser)
    params, arguments = parse_args(TrainParams, parser, argv)
    check_ray_flags(arguments)
    from pipeline.media.viewer import ViewerError

    with Interrupts() as stop:
        try:
            params, onlookers = watched(params, arguments)
        except (ConfigError, ViewerError) as error:
            fail(error)
        from pipeline.agent.checkpoint import CheckpointError
        from pipeline.agent.policy import PolicyError
        from pipeline.sim.ray_cluster import ClusterError
        from pipeline.tracking.folder import RunFolderError
        from pipeline.tracking.store import TrackingError

        try:
            with connected(params, arguments) as cluster:
                train(params, stop, onlookers, cluster)
        except (TrackingError, RunFolderError, CheckpointError, PolicyError, ClusterError) as error:
            fail(error)
        except OSError as error:
            if not durable.is_full(error):
                raise
            fail(f"{error}: no room to write. Free some and run the same command again: it goes on where it was.")


if __name__ == "__main__":
    main()
