"""What a sweep is: a setting, its seeds, and for a search the space and how it is searched. Every mistake at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.config import ConfigError, TrainParams, project_root
from pipeline.config.params import Int, Name, Params
from pipeline.config.sources import Value, check, check_each, read_file, read_sources
from pipeline.sweep.space import Space, as_text, check_combinations, configurations, read_space

MOST_SEEDS = 1000


class SweepError(Exception):
    """A sweep can't be run so, or came to nothing; the message says why."""


def _seed_range(value: object) -> object:
    """Check ``"0:5"``: first seed, and the one after the last."""
    if isinstance(value, str):
        first, _, stop = value.partition(":")
        if first.isdecimal() and stop.isdecimal() and 0 < int(stop) - int(first) <= MOST_SEEDS and int(stop) < 2**31:
            return value
    raise ValueError


SeedRange = Annotated[
    str,
    BeforeValidator(_seed_range),
    Field(json_schema_extra={"meaning": f"first:stop, such as 0:5, at most {MOST_SEEDS} of them"}),
]
Mapped = Annotated[dict[Any, Any], Field(json_schema_extra={"meaning": "parameters, each on a line of its own"})]


class SweepFile(Params):
    """The keys of a sweep's file; docs/sweeping.md explains them."""

    name: Name = Field(description="name of the sweep in MLflow and of its folder")
    space: Mapped = Field(description="parameters to search, and what they may be")
    parameters: Mapped = Field({}, description="parameters that differ from params.yaml in all trials")
    sampler: Literal["tpe", "random", "gp", "qmc", "grid"] = Field("tpe", description="how values are chosen")
    pruner: Literal["none", "median", "asha"] = Field("median", description="which trials are given up early")
    trials: Int = Field(0, ge=0, le=100_000, description="trials to begin; 0 = as many as the hours allow")
    hours: float = Field(0.0, ge=0, le=10_000, description="after so many hours no trial begins; 0 = no limit")
    seeds: SeedRange = Field("0:1", description="seeds on which each trial is trained; its score is their mean")
    confirm_seeds: Int = Field(3, ge=0, le=100, description="fresh seeds on which the best is trained again; 0 = none")
    baseline: bool = Field(True, description="also train the unsearched setting on the fresh seeds, to compare with")
    sampler_seed: Int = Field(0, ge=0, le=2**31 - 1, description="seed of the sampler's own luck")


@dataclass(frozen=True)
class Sweep:
    """A sweep, whose mistakes have been told.

    Attributes:
        base: The setting; a search changes those of its parameters that are in the space.
        space: What is searched; empty for a setting on several seeds.
        plan: How it is searched, and how long.
        seeds: On which every setting is trained.
    """

    base: TrainParams
    space: Space
    plan: SweepFile
    seeds: tuple[int, ...]

    @cached_property
    def folder(self) -> Path:
        """Its folder: the same for the same sweep by the same code. More trials, hours or seeds go on in it."""
        return project_root() / self.base.log_root / self.label

    @cached_property
    def label(self) -> str:
        """Name and fingerprint."""
        identity = [self.base.fingerprint(), *map(str, self.space)]
        if self.space:
            identity += [self.plan.sampler, self.plan.pruner, self.plan.seeds, str(self.plan.sampler_seed)]
        return f"{self.plan.name[:50]}-{hashlib.sha256(as_text(identity).encode()).hexdigest()[:8]}"

    def params(self, chosen: Mapping[str, Any], seed: int) -> TrainParams:
        """The parameters of one training; its run folder lies in the sweep's."""
        changes = {"seed": seed, "run_name": self.plan.name, "log_root": f"{self.base.log_root}/{self.label}/runs"}
        return TrainParams(**{**self.base.model_dump(), **chosen, **changes})

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        """Seeds that no trial has been trained on."""
        return tuple(range(self.seeds[-1] + 1, self.seeds[-1] + 1 + self.plan.confirm_seeds))

    @cached_property
    def most_trials(self) -> int | None:
        """How many trials there may be; None where only the hours limit them."""
        limits = [self.plan.trials] if self.plan.trials else []
        if self.plan.sampler == "grid":
            limits.append(sum(1 for _ in configurations(self.space, exhaustive=True)))
        return min(limits, default=None)


def seeds_of(text: str) -> tuple[int, ...]:
    """``"0:5"`` as the seeds 0 to 4."""
    first, _, stop = text.partition(":")
    return tuple(range(int(first), int(stop)))


def read_sweep(files: Sequence[Path], flags: dict[str, str], seeds: str | None) -> Sweep:
    """The sweep of these files and flags: a search where one of the files has a ``space``, else a setting on ``seeds``.

    Args:
        files: At most one sweep's file; the others are partial parameter files, as for ``pipeline.train``.
        flags: Parameters from the command line, which win.
        seeds: ``--seeds``, which wins too.

    Raises:
        ConfigError: With all mistakes.
    """
    mistakes: list[str] = []
    given = {path: read_file(path, mistakes) for path in files}
    searches = [path for path in files if "space" in given[path]]
    plain = [path for path in files if path not in searches]
    if len(searches) > 1:
        mistakes.append(f"expected one file with a space, got {' and '.join(map(str, searches))}")
    if mistakes:  # of the files' syntax: all that follows would be called missing
        raise ConfigError(mistakes)
    values = read_sources(plain, flags, mistakes)
    if searches:
        return _read_search(given[searches[0]], values, seeds, mistakes)
    return _read_seeds(values, seeds, mistakes)


def _read_seeds(values: dict[str, Value], seeds: str | None, mistakes: list[str]) -> Sweep:
    valid = check(values, mistakes)
    words = {"seeds": Value(seeds, "--seeds")} if seeds else {}
    checked = check_each(words, mistakes, (SweepFile,))
    if not seeds:
        mistakes.append("expected --seeds, such as --seeds 0:5, or a file with a space, such as configs/sweep.yaml")
    if mistakes:
        raise ConfigError(mistakes)
    plan = SweepFile(**{"name": f"{valid['run_name'][:50]}-seeds", "space": {}, **checked})
    return Sweep(_base(valid), (), plan, seeds_of(plan.seeds))


def _read_search(file: Mapping[str, Value], values: dict[str, Value], seeds: str | None, mistakes: list[str]) -> Sweep:
    words = dict(file)
    if seeds:
        words["seeds"] = Value(seeds, "--seeds")
    checked = check_each(words, mistakes, (SweepFile,))
    if "name" not in words:
        mistakes.append("name: missing; expected a name for the sweep")
    space = read_space(words["space"], mistakes) if "space" in checked else ()
    flagged = {key for key, value in values.items() if value.origin.startswith("--")}
    for key, value in checked.get("parameters", {}).items():
        if key in checked.get("space", {}):
            mistakes.append(f"{key} ({words['parameters'].origin}): expected in parameters or in space, got it in both")
        elif key not in flagged:
            values[str(key)] = Value(value, f"{words['parameters'].origin}, parameters")
    valid = check_each(values, mistakes)
    if not mistakes:
        check_combinations(space, valid, mistakes)
        plan = SweepFile(**checked)
        _check_plan(plan, space, valid, mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    return Sweep(_base(valid), space, plan, seeds_of(plan.seeds))


def _check_plan(plan: SweepFile, space: Space, valid: Mapping[str, Any], mistakes: list[str]) -> None:
    if not space:
        mistakes.append("space: expected a parameter or more; a setting on several seeds needs --seeds alone")
    endless = [d.key for d in space if d.all_values() is None]
    if plan.sampler == "grid" and endless:
        mistakes.append(f"sampler = grid: expected a choice, integers or a step for {', '.join(endless)}")
    if not plan.trials and not plan.hours and (plan.sampler != "grid" or endless):
        mistakes.append("expected a budget: trials, hours, or both")
    shortest = min([valid["total_timesteps"], *(d.low or min(d.choices) for d in space if d.key == "total_timesteps")])
    if plan.pruner != "none" and not 0 < valid["eval_freq"] < shortest:
        mistakes.append(
            f"pruner = {plan.pruner}: expected eval_freq from 1 to below total_timesteps = {shortest}, since "
            f"trials are given up by their validations; got {valid['eval_freq']}"
        )


def _base(valid: Mapping[str, Any]) -> TrainParams:
    return TrainParams(**{key: valid[key] for key in TrainParams.model_fields})
