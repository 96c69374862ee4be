"""Write the tables of docs/scaling.md from what ``pipeline.bench --ray`` measured: metrics/scale.json.

Run it from the repository's root: ``python -m docs.make_scaling``. The lines between the markers are replaced; a test
compares them, so that neither the figures nor the model can change without the page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS, PAGE = Path("metrics/scale.json"), Path("docs/scaling.md")
BEGIN, END = "<!-- python -m docs.make_scaling -->", "<!-- end -->"

# Assumptions: not measured here.
NODES = (1, 10, 100, 1000)
CORES = 16
"""Cores of a node."""
NODE_PRICE, LEARNER_PRICE = 0.70, 4.00
"""US dollars an hour: a node of 16 cores on demand, a node with an accelerator."""
GIGABITS = 10.0
"""Network of the learner's node, per second."""
N_ENVS = 1024
"""The most that ``n_envs`` allows; the size of a training that is worth a cluster."""


@dataclass(frozen=True)
class Learner:
    """How many times as fast as one measured core it decides and updates, and what its node costs an hour."""

    name: str
    inference: float
    update: float
    price: float


LEARNERS = (
    Learner("CPU: 16 cores, the update 8 times as fast as on one", 1.0, 8.0, NODE_PRICE),
    Learner("accelerator: 50 times as fast as one core", 50.0, 50.0, LEARNER_PRICE),
)


@dataclass(frozen=True)
class Plan:
    """One training on so many actors.

    Attributes:
        actors: Those that give the most; more than that would cost the learner more than they bring.
        parts: Microseconds that each part is busy in one step of all environments, and its update.
    """

    actors: int
    parts: dict[str, float]

    @property
    def microseconds(self) -> float:
        """Of a step of all environments and its share of the update: what works side by side counts once."""
        return max(value for name, value in self.parts.items() if name != UPDATE) + self.parts[UPDATE]

    @property
    def decisions_per_second(self) -> float:
        return N_ENVS / self.microseconds * 1e6

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


SIMULATORS, DECIDING, NETWORK, UPDATE = "simulators", "learner: decisions and messages", "network", "learner: update"


def step(costs: dict[str, float], n_epochs: int, bytes_per_decision: float, actors: int, learner: Learner) -> Plan:
    """A step of all environments, in two groups, one of which steps while the learner decides for the other."""
    c = costs
    messages = 2 * actors
    here = c["inference_us_per_decision"] / learner.inference + c["learner_us_per_observation"]
    there = c["simulator_us_per_decision"] + c["actor_us_per_observation"]
    parts = {
        SIMULATORS: N_ENVS / actors * there + 2 * c["actor_us_per_message"],
        DECIDING: N_ENVS * here + messages * c["learner_us_per_message"],
        NETWORK: N_ENVS * bytes_per_decision * 8 / GIGABITS / 1e3,
        UPDATE: N_ENVS * n_epochs * c["update_us_per_sample"] / learner.update,
    }
    return Plan(actors, parts)


def best(costs: dict[str, float], n_epochs: int, size: float, nodes: int, learner: Learner) -> Plan:
    """The fastest number of actors that ``nodes`` have the cores for, each with an environment in both groups."""
    numbers = range(1, min(nodes * CORES, N_ENVS // 2) + 1)
    return max((step(costs, n_epochs, size, n, learner) for n in numbers), key=lambda plan: plan.decisions_per_second)


def tables(section: dict[str, Any]) -> str:
    """What stands between the markers."""
    costs, settings, machine = section["costs"], section["settings"], section["machine"]
    size = costs["bytes_per_observation"] / settings["frames_stack"]
    skip, epochs = settings["frame_skip"], settings["n_epochs"]
    lines = [
        f"Measured on {machine['cpu']}, {machine['cores']} core(s), at a load of {machine['load']} before the start, "
        f"torch {machine['versions']['torch']}:",
        "",
        "| processor time of one core | microseconds |",
        "|---|---|",
        f"| one decision simulated ({skip} frames, picture, shaping) | {costs['simulator_us_per_decision']:,.0f} |",
        f"| the network deciding for one environment | {costs['inference_us_per_decision']:,.0f} |",
        f"| the update, per sample and pass ({epochs} passes) | {costs['update_us_per_sample']:,.0f} |",
        f"| an order and its reply, at the learner | {costs['learner_us_per_message']:,.0f} |",
        f"| and per observation in it | {costs['learner_us_per_observation']:,.0f} |",
        f"| an order and its reply, at the actor | {costs['actor_us_per_message']:,.0f} |",
        f"| and per observation in it | {costs['actor_us_per_observation']:,.0f} |",
        "",
        f"An observation has {costs['bytes_per_observation']:,} bytes, of which {size:,.0f} travel.",
        "",
        "| case, wall clock, in turns | frames/s | ratio |",
        "|---|---|---|",
    ]
    for name, row in section["cases"].items():
        ratios = ", ".join(f"{value:.2f} x `{other}`" for other, value in row["ratios"].items())
        lines.append(f"| `{name}` | {row['per_second']:,.0f} | {ratios} |")
    for learner in LEARNERS:
        lines += ["", f"**{learner.name[0].upper()}{learner.name[1:]}.**", ""]
        lines += ["| nodes | actors used | frames/s | what holds it up | USD/h | USD per 10^9 frames |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_row(best(costs, epochs, size, nodes, learner), nodes, learner, skip) for nodes in NODES]
    alone = best(costs, epochs, size, 1, LEARNERS[0])
    lines += ["", "**As many trainings as nodes** (a sweep, or seeds), each on a node of its own:", ""]
    lines += ["| nodes | frames/s of all | USD/h | USD per 10^9 frames |", "|---|---|---|---|"]
    for nodes in NODES:
        rate = nodes * alone.decisions_per_second * skip
        lines.append(f"| {nodes:,} | {_round(rate)} | {nodes * NODE_PRICE:,.2f} | {_price(nodes * NODE_PRICE, rate)} |")
    return "\n".join(lines)


def _row(plan: Plan, nodes: int, learner: Learner, skip: int) -> str:
    # A node is paid whether its actors are used or not; the learner's is one of them, or stands beside them.
    price = nodes * NODE_PRICE + (learner.price if learner.price != NODE_PRICE else 0)
    rate = plan.decisions_per_second * skip
    cells = (f"{nodes:,}", f"{plan.actors:,}", _round(rate), plan.bottleneck, f"{price:,.2f}", _price(price, rate))
    return f"| {' | '.join(cells)} |"


def _round(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def _price(per_hour: float, frames_per_second: float) -> str:
    return _round(per_hour / 3600 / frames_per_second * 1e9)


def page(text: str, section: dict[str, Any]) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(section)}\n{END}{after}"


def main() -> None:
    """Read, write, say so."""
    section = json.loads(METRICS.read_text(encoding="utf-8"))["rollouts"]
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), section), encoding="utf-8")
    print(tables(section))


if __name__ == "__main__":
    main()
