"""Make the shipped champion of a policy: the same network, its weights rounded to 16 bits, so half the size.

python -m pipeline.ship [--policy FILE] [--champion FILE]

`make ship` scores the result on the held-out tracks too: the file that is shipped is the file that is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Parser, fail

POLICY, CHAMPION = Path("models/best_model.safetensors"), Path("models/champion.safetensors")


def ship(policy_path: Path = POLICY, champion: Path = CHAMPION) -> str:
    """Write ``champion``; returns what was done, in words.

    Raises:
        PolicyError: ``policy_path`` is not a policy.
    """
    import torch

    from pipeline.agent.policy import load, save

    policy = load(policy_path)
    steps = int(policy.info.get("agent_steps", 0))
    champion.with_suffix(".json").unlink(missing_ok=True)  # the score of another policy
    save(champion, policy.module, policy.observation, policy.network, steps, torch.float16)
    sizes = [path.stat().st_size / 1e6 for path in (policy_path, champion)]
    return f"{policy_path} ({sizes[0]:.1f} MB) -> {champion} ({sizes[1]:.1f} MB), {steps:,} agent steps"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.ship", description=__doc__)
    parser.add_argument("--policy", type=Path, default=POLICY, metavar="FILE", help=f"[default {POLICY}]")
    parser.add_argument("--champion", type=Path, default=CHAMPION, metavar="FILE", help=f"[default {CHAMPION}]")
    arguments = parser.parse_args(argv)
    from pipeline.agent.policy import PolicyError

    try:
        print(ship(arguments.policy, arguments.champion))
    except PolicyError as error:
        fail(error)


if __name__ == "__main__":
    main()
