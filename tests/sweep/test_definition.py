"""A sweep's file: every mistake told at once, before anything starts; and the space that it means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from pipeline.config import ConfigError, relations
from pipeline.sweep.definition import Sweep, read_sweep
from pipeline.sweep.space import configurations, suggest
from tests.conftest import ROOT

BUDGET = "name: s\ntrials: 4\npruner: none\n"


@pytest.fixture(autouse=True)
def machine(params_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relations, "cores", lambda: 2)
    monkeypatch.delenv("DVC_ROOT", raising=False)


def read(text: str, seeds: str | None = None, **flags: str) -> Sweep:
    Path("s.yaml").write_text(text)
    return read_sweep([Path("s.yaml")], flags, seeds)


def mistakes(text: str, seeds: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as told:
        read(text, seeds)
    return told.value.mistakes


def test_every_mistake_of_a_space_is_told_at_once() -> None:
    told = mistakes("""
name: s
trials: 0
sampler: tpo
seeds: "5:0"
colour: red
parameters:
  gamma: 2.0
  n_epochs: 3
space:
  learnig_rate: {low: 1e-5, high: 1e-3}
  learning_rate: {low: 0, high: 1e-3, log: true}
  n_epochs: {low: 8, high: 2}
  clip_range: {low: 0.1}
  ent_coef: 0.1
  seed: {low: 0, high: 9}
  activation: {low: 1, high: 2}
  frame_skip: {choice: [2, 40]}
  resize: {choice: [84]}
  gae_lambda: {low: 0.9, high: 0.99, step: 0.04}
  log_std_init: {low: -2, high: 0, when: {action_head: gaussian}}
  max_grad_norm: {low: 0.1, high: 1, logarithmic: true}
  sde_sample_freq: {low: 1, high: 8, when: {frame_skip: 3}}
""")
    expected = [
        'sampler = "tpo" (s.yaml:4): expected one of tpe, random, gp, qmc, grid',
        'seeds = "5:0" (s.yaml:5): expected first:stop, such as 0:5, at most 1000 of them',
        "colour (s.yaml:6): unknown key",
        "learnig_rate (s.yaml:10, space.learnig_rate): unknown key; did you mean learning_rate?",
        "learning_rate = 0 (s.yaml:10, space.learning_rate.low): expected number, > 0, <= 1",
        "n_epochs (s.yaml:10, space.n_epochs): expected low below high, got 8 and 2",
        "clip_range (s.yaml:10, space.clip_range): expected low and high, or choice; high missing",
        "ent_coef = 0.1 (s.yaml:10, space.ent_coef): expected {choice: [...]} or {low: ..., high: ...}",
        "seed (s.yaml:10, space.seed): can't be searched: luck is not a setting",
        "activation (s.yaml:10, space.activation): expected {choice: [...]}, since it is one of relu, gelu, tanh",
        "frame_skip = 40 (s.yaml:10, space.frame_skip): expected integer, 1 to 16",
        "resize.choice = [84] (s.yaml:10, space.resize): expected a list of two values or more",
        "gae_lambda (s.yaml:10, space.gae_lambda): expected high - low to be whole steps of 0.04",
        "log_std_init (s.yaml:10, space.log_std_init): when action_head: expected a parameter with a choice",
        "max_grad_norm (s.yaml:10, space.max_grad_norm): unknown word logarithmic",
        "sde_sample_freq (s.yaml:10, space.sde_sample_freq): when frame_skip: expected a parameter with a choice",
        "n_epochs (s.yaml:7): expected in parameters or in space, got it in both",
        "gamma = 2.0 (s.yaml:7, parameters): expected number, 0 to 1",
    ]
    for line in expected:
        assert any(line in said for said in told), (line, told)
    assert len(told) == len(expected), told


def test_combinations_that_break_a_rule_are_told_with_their_values() -> None:
    (told,) = mistakes(BUDGET + "space:\n  batch_size: {choice: [256, 1024]}\n  n_steps: {choice: [16, 32]}\n")
    assert told.startswith("batch_size = 1024 with n_steps = 16 (the space): expected a divisor of")
    # Only together with 32 steps: what a condition rules out is no mistake.
    read(BUDGET + "space:\n  n_steps: {choice: [16, 32]}\n  batch_size: {choice: [256, 1024], when: {n_steps: 32}}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: s\nspace:\n  n_epochs: {low: 1, high: 2}\n", "expected a budget: trials, hours, or both"),
        (
            "name: s\nsampler: grid\nspace:\n  gamma: {low: 0.9, high: 0.99}\n",
            "sampler = grid: expected a choice, integers or a step for gamma",
        ),
        (
            "name: s\ntrials: 3\nparameters: {total_timesteps: 100000}\nspace:\n  n_epochs: {low: 1, high: 2}\n",
            "pruner = median: expected eval_freq from 1 to below total_timesteps = 100000",
        ),
        ("trials: 3\npruner: none\nspace:\n  n_epochs: {low: 1, high: 2}\n", "name: missing"),
        (BUDGET + "space: {}\n", "space: expected a parameter or more"),
        (BUDGET + "space: 3\n", "space = 3 (s.yaml:4): expected parameters, each on a line of its own"),
    ],
)
def test_a_plan_that_can_not_be_followed_is_refused(text: str, said: str) -> None:
    assert any(said in line for line in mistakes(text)), mistakes(text)


def test_the_command_refuses_with_exit_code_2_and_starts_nothing() -> None:
    Path("s.yaml").write_text(BUDGET + "space:\n  n_epochs: {low: 0, high: 200}\n")
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.sweep", "--config", "s.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.count("expected integer, 1 to 100") == 2, ended.stderr
    assert not Path("runs").exists()
    assert not Path("mlflow.db").exists()


def test_the_shipped_file_is_valid() -> None:
    sweep = read_sweep([ROOT / "configs/sweep.yaml"], {}, None)
    assert sweep.base.total_timesteps == 100_000
    assert sweep.fresh_seeds == (1, 2, 3)


def test_values_have_the_parameters_types_and_keep_their_conditions() -> None:
    space = read(
        BUDGET
        + """space:
  learning_rate: {low: 1e-4, high: 1e-2, log: true}
  n_epochs: {low: 2, high: 8, step: 3}
  net_arch: {choice: [[], [64, 64]]}
  normalize_reward: {choice: [true, false]}
  action_head: {choice: [beta, gaussian]}
  log_std_init: {low: -2.0, high: 0.0, when: {action_head: gaussian}}
"""
    ).space
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = [suggest(space, study.ask()) for _ in range(200)]
    assert {chosen["n_epochs"] for chosen in found} == {2, 5, 8}
    assert {type(chosen["n_epochs"]) for chosen in found} == {int}
    assert all(chosen["net_arch"] in ([], [64, 64]) for chosen in found)
    assert {chosen["normalize_reward"] for chosen in found} == {True, False}
    assert all(("log_std_init" in chosen) == (chosen["action_head"] == "gaussian") for chosen in found)
    rates = [chosen["learning_rate"] for chosen in found]
    assert 1e-4 <= min(rates) <= max(rates) <= 1e-2
    assert 70 < sum(rate < 1e-3 for rate in rates) < 130, "half of a log range lies below its geometric middle"


def test_the_combinations_of_a_conditional_space_are_counted_by_hand() -> None:
    sweep = read(
        "name: s\nsampler: grid\npruner: none\nspace:\n  action_head: {choice: [beta, gaussian, gsde]}\n"
        "  sde_sample_freq: {low: 1, high: 4, when: {action_head: gsde}}\n  n_epochs: {low: 1, high: 2}\n"
    )
    assert sweep.most_trials == (1 + 1 + 4) * 2
    assert len(list(configurations(sweep.space, exhaustive=True))) == 12


def test_more_trials_or_hours_go_on_with_the_same_sweep_and_another_space_does_not() -> None:
    text = "name: s\ntrials: 4\npruner: none\nspace:\n  n_epochs: {low: 1, high: 2}\n"
    labels = [
        read(text).label,
        read(text.replace("trials: 4", "trials: 8\nhours: 1\nconfirm_seeds: 5")).label,
        read(text.replace("high: 2", "high: 3")).label,
        read(text, gamma="0.9").label,
    ]
    assert labels[0] == labels[1]
    assert len(set(labels)) == 3


def test_flags_win_over_the_files_parameters_and_seeds_over_its_seeds() -> None:
    text = BUDGET + "parameters: {gamma: 0.5}\nspace:\n  n_epochs: {low: 1, high: 2}\n"
    assert read(text).base.gamma == 0.5
    assert read(text, gamma="0.7").base.gamma == 0.7
    assert read(text, seeds="3:5").seeds == (3, 4)
    assert read(text, seeds="3:5").fresh_seeds == (5, 6, 7)


def test_seeds_alone_are_a_setting_on_each_of_them() -> None:
    sweep = read_sweep([], {"run_name": "mine"}, "0:3")
    assert sweep.seeds == (0, 1, 2)
    assert sweep.label == read_sweep([], {"run_name": "mine"}, "0:9").label, "more seeds go on"
    assert sweep.params({}, 2).seed == 2
    with pytest.raises(ConfigError, match="expected --seeds, such as --seeds 0:5, or a file with a space"):
        read_sweep([], {}, None)


@pytest.mark.parametrize(("file", "flags"), [(False, {"run_name": "r" * 64}), (True, {})])
def test_the_longest_name_makes_valid_trainings(file: bool, flags: dict[str, str]) -> None:
    if file:
        sweep = read(BUDGET.replace("name: s", f"name: {'s' * 64}") + "space:\n  n_epochs: {low: 1, high: 2}\n")
    else:
        sweep = read_sweep([], flags, "0:2")
    assert sweep.params({}, 0).log_root.endswith("/runs")
