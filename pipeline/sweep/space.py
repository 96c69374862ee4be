"""A search space: parameters of the training by their own names, each with the values it may take."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config import TrainParams
from pipeline.config.sources import Value, broken_relations, check_each, rules, shown_value
from pipeline.config.words import describe

if TYPE_CHECKING:
    from optuna import Trial

NOT_SEARCHED = {
    "run_name": "it only names the run",
    "log_root": "it only names a folder",
    "seed": "luck is not a setting; `seeds` says on how many each trial is tried",
    "n_workers": "it changes no result",
    "num_threads": "each training gets a share of the machine's cores",
    "save_freq": "it changes no result",
    "eval_freq": "trials are compared by their validations, which must be the same",
    "n_eval_episodes": "trials are compared by their validations, which must be the same",
    "validation_seed": "trials are compared by their validations, which must be the same",
}
"""Parameters that a search can't or must not choose, and why."""
FEW = 64
"""A range of so many integers is checked at each of them, a longer one (or one of numbers) at both ends."""
MOST_CHECKED = 20_000


@dataclass(frozen=True)
class Dimension:
    """One parameter and what it may be: a choice, or a range.

    Attributes:
        key: The parameter.
        choices: What it may be; empty for a range.
        low: Least value of a range.
        high: Largest value, which belongs to it.
        log: Whether each factor is as likely as the next, rather than each difference.
        step: From one value to the next; 0 = any number, and 1 for integers.
        whole: Whether the range is of integers.
        when: Parameters written above it, and the values with which it is searched; with others it keeps its own value.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float = 0.0
    whole: bool = False
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def is_searched(self, chosen: Mapping[str, Any]) -> bool:
        """Whether it is searched beside these values."""
        return all(key in chosen and chosen[key] in values for key, values in self.when.items())

    def suggest(self, trial: Trial) -> Any:
        """A value for a trial, as its sampler sees fit; the same one again for a trial that has one."""
        if self.choices:
            return self.read(trial.suggest_categorical(self.key, [self.written(choice) for choice in self.choices]))
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step) or 1
            return trial.suggest_int(self.key, low, high, step=step, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step or None, log=self.log)

    def written(self, value: Any) -> Any:
        """A value as a trial holds it: lists as texts, which Optuna doesn't know."""
        return as_text(value) if isinstance(value, list) else value

    def read(self, written: Any) -> Any:
        """The value that a trial holds so."""
        return next((choice for choice in self.choices if self.written(choice) == written), written)

    def all_values(self) -> list[Any] | None:
        """All it may be; None where that is any number."""
        if self.choices:
            return list(self.choices)
        if self.whole:
            return list(range(int(self.low), int(self.high) + 1, int(self.step) or 1))
        if self.step:
            return [self.low + n * self.step for n in range(round((self.high - self.low) / self.step) + 1)]
        return None

    def probes(self) -> list[Any]:
        """What stands for it where combinations are checked."""
        values = self.all_values()
        if values is not None and len(values) <= FEW:
            return values
        return [int(self.low), int(self.high)] if self.whole else [self.low, self.high]

    def __str__(self) -> str:
        if self.choices:
            text = "one of " + ", ".join(map(as_text, self.choices))
        else:
            text = f"{self.low:g} to {self.high:g}" + (f" by {self.step:g}" if self.step else "")
            text += ", log" if self.log else ""
        conditions = [f"{key} in {as_text(list(values))}" for key, values in self.when.items()]
        return text + (f" (when {', '.join(conditions)})" if conditions else "")


Space = tuple[Dimension, ...]


def as_text(value: Any) -> str:
    """A value as JSON."""
    return json.dumps(value)


def suggest(space: Space, trial: Trial) -> dict[str, Any]:
    """The values of a trial: of all dimensions that are searched beside those before them."""
    chosen: dict[str, Any] = {}
    for dimension in space:
        if dimension.is_searched(chosen):
            chosen[dimension.key] = dimension.suggest(trial)
    return chosen


def configurations(dimensions: Sequence[Dimension], exhaustive: bool = False) -> Iterator[dict[str, Any]]:
    """Combinations of values: all of them where ``exhaustive``, else of what stands for each dimension.

    Raises:
        ValueError: Exhaustive, and one of them may be any number.
    """
    if not dimensions:
        yield {}
        return
    *earlier, last = dimensions
    values = last.all_values() if exhaustive else last.probes()
    if values is None:
        raise ValueError(last.key)
    for chosen in configurations(earlier, exhaustive):
        yield from ({**chosen, last.key: value} for value in values) if last.is_searched(chosen) else (chosen,)


def read_space(given: Value, mistakes: list[str]) -> Space:
    """The space as a sweep's file has it; what is wrong in it is added to ``mistakes``."""
    dimensions: dict[str, Dimension] = {}
    for key, words in given.value.items():
        where = f"{given.origin}, space.{key}"
        if not isinstance(key, str) or key not in TrainParams.model_fields:
            check_each({str(key): Value(words, where)}, mistakes, (TrainParams,))
        elif key in NOT_SEARCHED:
            mistakes.append(f"{key} ({where}): can't be searched: {NOT_SEARCHED[key]}")
        elif not isinstance(words, dict):
            mistakes.append(
                f"{key} = {shown_value(words)} ({where}): expected {{choice: [...]}} or {{low: ..., high: ...}}"
            )
        elif dimension := _read(key, words, where, dimensions, mistakes):
            dimensions[key] = dimension
    return tuple(dimensions.values())


def _read(
    key: str, words: Mapping[Any, Any], where: str, above: Mapping[str, Dimension], mistakes: list[str]
) -> Dimension | None:
    before = len(mistakes)
    kinds = {"choice": {"choice"}, "low": {"low", "high", "log", "step"}}
    kind = "choice" if "choice" in words else "low"
    unknown = [str(word) for word in words if word not in kinds[kind] | {"when"}]
    if unknown:
        mistakes.append(
            f"{key} ({where}): unknown word {', '.join(unknown)}; expected choice, or low, high, log, step; and when"
        )
    when = _read_when(words.get("when", {}), f"{key} ({where})", above, mistakes)
    read = _read_choice if kind == "choice" else _read_range
    fields = read(key, words, where, mistakes)
    return Dimension(key, when=when, **fields) if len(mistakes) == before else None


def _read_choice(key: str, words: Mapping[Any, Any], where: str, mistakes: list[str]) -> dict[str, Any]:
    choices = words["choice"]
    if not isinstance(choices, list) or len(choices) < 2:
        mistakes.append(f"{key}.choice = {shown_value(choices)} ({where}): expected a list of two values or more")
        return {}
    valid = [v for c in choices for v in check_each({key: Value(c, where)}, mistakes, (TrainParams,)).values()]
    if len({as_text(value) for value in valid}) < len(valid):
        mistakes.append(f"{key}.choice = {shown_value(choices)} ({where}): expected each value once")
    return {"choices": tuple(valid)}


def _read_range(key: str, words: Mapping[Any, Any], where: str, mistakes: list[str]) -> dict[str, Any]:
    annotation = TrainParams.model_fields[key].annotation
    if annotation not in (int, float):
        mistakes.append(
            f"{key} ({where}): expected {{choice: [...]}}, since it is {describe(TrainParams.model_fields[key])}"
        )
        return {}
    if missing := [word for word in ("low", "high") if word not in words]:
        mistakes.append(f"{key} ({where}): expected low and high, or choice; {' and '.join(missing)} missing")
        return {}
    bounds = [
        check_each({key: Value(words[word], f"{where}.{word}")}, mistakes, (TrainParams,)) for word in ("low", "high")
    ]
    log, step = words.get("log", False), words.get("step", 0)
    if not isinstance(log, bool):
        mistakes.append(f"{key}.log = {shown_value(log)} ({where}): expected true or false")
    whole = annotation is int
    is_number = isinstance(step, (int, float)) and not isinstance(step, bool) and math.isfinite(step)
    if not is_number or step < 0 or (whole and step != int(step)):
        mistakes.append(
            f"{key}.step = {shown_value(step)} ({where}): expected {'a whole' if whole else 'a'} number above 0"
        )
        return {}
    if all(bounds):
        _check_range(key, where, bounds[0][key], bounds[1][key], bool(log), step, mistakes)
        return {"low": bounds[0][key], "high": bounds[1][key], "log": log, "step": float(step), "whole": whole}
    return {}


def _check_range(key: str, where: str, low: float, high: float, log: bool, step: float, mistakes: list[str]) -> None:
    if low >= high:
        mistakes.append(f"{key} ({where}): expected low below high, got {low} and {high}")
    elif step and not math.isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9):
        mistakes.append(f"{key} ({where}): expected high - low to be whole steps of {step}, got {low} to {high}")
    if log and low <= 0:
        mistakes.append(f"{key} ({where}): expected low above 0 with log, got {low}")
    if log and step:
        mistakes.append(f"{key} ({where}): expected log or step, got both")


def _read_when(
    given: Any, place: str, above: Mapping[str, Dimension], mistakes: list[str]
) -> dict[str, tuple[Any, ...]]:
    if not isinstance(given, dict):
        mistakes.append(f"{place}: when = {shown_value(given)}: expected {{parameter: [values]}}")
        return {}
    when: dict[str, tuple[Any, ...]] = {}
    for parent, values in given.items():
        values = values if isinstance(values, list) else [values]
        if parent not in above or not above[parent].choices:
            mistakes.append(f"{place}: when {parent}: expected a parameter with a choice, written above this one")
        elif strange := [value for value in values if value not in above[parent].choices]:
            mistakes.append(f"{place}: when {parent} is {shown_value(strange[0])}: not among its choices")
        else:
            when[parent] = tuple(values)
    return when


def check_combinations(space: Space, base: Mapping[str, Any], mistakes: list[str]) -> None:
    """Add each rule between parameters that some combination breaks, once, with that combination.

    Args:
        space: What is searched.
        base: The valid values of everything, of which those of the space take the place.
        mistakes: What is wrong.
    """
    for keys, rule in rules():
        for chosen in itertools.islice(configurations(_needed(space, keys)), MOST_CHECKED):
            values = {**base, **chosen}
            if all(key in values for key in keys) and (problem := rule(*(values[key] for key in keys))):
                beside = [f"{key} = {shown_value(chosen[key])}" for key in chosen if key != keys[0]]
                mistakes.append(
                    f"{keys[0]} = {shown_value(values[keys[0]])}"
                    f"{' with ' + ', '.join(beside) if beside else ''} (the space): {problem}"
                )
                break


def _needed(space: Space, keys: Sequence[str]) -> list[Dimension]:
    """The dimensions among ``keys``, and those that decide whether they are searched."""
    wanted = set(keys)
    for dimension in reversed(space):
        if dimension.key in wanted:
            wanted |= set(dimension.when)
    return [dimension for dimension in space if dimension.key in wanted]


def problem_of(base: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """What is wrong between the parameters of a trial; empty where nothing is."""
    return "; ".join(f"{keys[0]}: {problem}" for keys, problem in broken_relations({**base, **chosen}))
