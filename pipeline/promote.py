"""Register the best policy, and make it champion if it drives better than the present one.

python -m pipeline.promote [--policy FILE] [--config FILE] [--KEY VALUE]

The policy becomes a version of ``registered_model`` in MLflow's registry with the alias ``challenger``. Champion and
challenger drive the same held-out tracks; the alias ``champion`` moves if the challenger is better at
``promote_alpha``, or if there is no champion yet. Exit code 0 either way.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.config import Parser, PromoteParams, fail, parse_args, track_list

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.evaluation import Episode
    from pipeline.tracking.registry import Registry, Version

POLICY = Path("models/best_model.safetensors")


def drive_tracks(policies: Sequence[Path], tracks: Sequence[int]) -> list[list[Episode]]:
    """Every policy on every track, on all cores; per policy the episodes in the order of ``tracks``."""
    from tqdm import tqdm

    from pipeline.evaluation import Evaluator

    total = len(policies) * len(tracks)
    with Evaluator() as evaluator, tqdm(total=total, unit="track", disable=not sys.stderr.isatty()) as bar:
        return [evaluator.play(policy, tracks, on_episode=lambda _: bar.update()) for policy in policies]


def promote(params: PromoteParams, policy: Path = POLICY) -> str:
    """Register, compare, decide; returns what was done and why.

    Raises:
        PolicyError: The file is not a policy of this project.
        TrackingError: MLflow can't be used, or has lost the champion's policy file.
    """
    import shutil

    from pipeline.agent.policy import load
    from pipeline.tracking.registry import Registry, sha256

    load(policy)  # refused here, under the name it was given
    registry = Registry(params.registered_model)
    with TemporaryDirectory() as name:
        # What is driven is what is registered, also if a training replaces the file meanwhile.
        contender = Path(shutil.copyfile(policy, Path(name) / POLICY.name))
        champion, known = registry.champion(), registry.find(sha256(contender))
        if champion and champion == known:
            return f"{policy} is registered as version {known.number} already, and is the champion: nothing to do."
        rival = [registry.download(champion, Path(name))] if champion else []
        episodes = drive_tracks([contender, *rival], track_list(params.tracks))
        challenger = known or register(registry, contender, params, episodes[0])
    if known:
        said = f"{policy} is registered as version {known.number} already: nothing new is registered."
    else:
        said = f"{policy} is registered as {params.registered_model} version {challenger.number}."
    return f"{said}\n{decide(registry, params, challenger, champion, episodes)}"


def register(registry: Registry, policy: Path, params: PromoteParams, episodes: Sequence[Episode]) -> Version:
    """A new version, tied to the pipeline's run if this is the policy that run produced."""
    from importlib.metadata import version

    from pipeline.agent.policy import load, spaces_of
    from pipeline.evaluation import summarize

    figures = summarize(episodes, params.bootstrap_samples)
    tags = {
        "evaluate/mean": str(figures["mean"]),
        "evaluate/std": str(figures["std"]),
        "tracks": params.tracks,
        "gymnasium": version("gymnasium"),
    }
    observation, _ = spaces_of(load(policy).observation)
    return registry.register(policy, observation.shape, run_of(registry.client, policy), tags)


def run_of(client: Any, policy: Path) -> str | None:
    """The MLflow run that produced a policy file: the pipeline's, if the pipeline's best policy is the same file."""
    from pipeline.tracking.registry import sha256
    from pipeline.tracking.run import RUN_ID_FILE, read_run_id
    from pipeline.tracking.stored import known_or_restored

    if not (RUN_ID_FILE.exists() and POLICY.exists() and sha256(POLICY) == sha256(policy)):
        return None
    return known_or_restored(client, read_run_id(), "promote")


def decide(
    registry: Registry,
    params: PromoteParams,
    challenger: Version,
    champion: Version | None,
    episodes: Sequence[Sequence[Episode]],
) -> str:
    """Move the aliases; ``episodes`` are the challenger's, then the champion's. Returns why, in words."""
    from pipeline.statistics import paired_test
    from pipeline.tracking.registry import CHALLENGER, CHAMPION

    registry.point(CHALLENGER, challenger)
    means = [f"{returns(each).mean():.2f} +- {returns(each).std():.2f}" for each in episodes]
    if champion is None:
        registry.point(CHAMPION, challenger)
        return f"There was no champion: version {challenger.number} ({means[0]}) becomes the first."
    result = paired_test(returns(episodes[0]), returns(episodes[1]), params.bootstrap_samples)
    better = result.p_value <= params.promote_alpha
    if better:
        registry.point(CHAMPION, challenger)
    verdict = (
        f"Version {challenger.number} is the new champion: better than version {champion.number}"
        if better
        else f"Version {champion.number} stays champion: version {challenger.number} is not better"
    )
    return (
        f"challenger, version {challenger.number}: {means[0]}\nchampion, version {champion.number}: {means[1]}\n"
        f"{result}\n{verdict} at promote_alpha = {params.promote_alpha}."
    )


def returns(episodes: Sequence[Episode]) -> NDArray[np.float64]:
    """(n_tracks,) raw returns."""
    import numpy as np

    return np.array([episode.episode_return for episode in episodes])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.promote", description=__doc__)
    parser.add_argument("--policy", type=Path, default=POLICY, metavar="FILE", help=f"policy file [default {POLICY}]")
    params, arguments = parse_args(PromoteParams, parser, argv)
    if arguments.policy.suffix != ".safetensors" or not arguments.policy.is_file():
        fail(f"{arguments.policy}: expected a .safetensors policy file; train one with `python -m pipeline.train`")
    from pipeline.agent.policy import PolicyError
    from pipeline.tracking.store import TrackingError, in_one_message

    for noisy in ("alembic", "mlflow"):  # after its import, which sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with in_one_message():
            print(promote(params, arguments.policy))
    except (PolicyError, TrackingError) as error:
        fail(error)


if __name__ == "__main__":
    main()
