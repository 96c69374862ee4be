"""Where values come from, what the file may say, and that each fact stands in one place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import config
from pipeline.config import ConfigError, EvaluateParams, PromoteParams, RecordParams, TrainParams, relations
from pipeline.config.__main__ import main, schema, show
from pipeline.config.cli import Parser, parse_args
from pipeline.config.params import STAGES, all_fields
from pipeline.config.words import describe
from tests.conftest import ROOT

CLASSES: dict[str, type[config.Params]] = {
    "train": TrainParams,
    "evaluate": EvaluateParams,
    "record_videos": RecordParams,
    "promote": PromoteParams,
}
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "\nspace:" not in path.read_text())


def train_params(*argv: str) -> TrainParams:
    return parse_args(TrainParams, Parser(prog="train"), argv)[0]


def plain(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path)


@pytest.mark.parametrize(("text", "said"), [(None, "no such file here"), ("seed: [", "params.yaml")])
def test_a_params_yaml_that_is_none_is_one_message(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("params.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        train_params()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# YAML 1.2 and JSON


def test_yaml_is_read_as_version_1_2(params_here: Path) -> None:
    Path("c.yaml").write_text("learning_rate: 1e-5\ntotal_timesteps: 1e6\nseed: 0o17\nrun_name: yes\n")
    params = config.load(TrainParams, [Path("c.yaml")])
    # PyYAML, which reads version 1.1, makes of these: the texts "1e-5", "1e6" and "0o17", and True
    assert (params.learning_rate, params.total_timesteps, params.seed, params.run_name) == (1e-5, 1_000_000, 15, "yes")
    assert type(params.total_timesteps) is int


def test_json_is_read_as_json(params_here: Path) -> None:
    content = {"learning_rate": 1e-5, "total_timesteps": 1e6, "net_arch": [64, 64], "grayscale": False, "run_name": "a"}
    Path("c.json").write_text(json.dumps(content))
    params = config.load(TrainParams, [Path("c.json")])
    assert {key: getattr(params, key) for key in content} == content
    Path("c.json").write_text('{"seed": 5,}')  # a slip of hand-written JSON, and YAML knows what it means
    assert config.load(TrainParams, [Path("c.json")]).seed == 5


# Precedence and origin


def test_flags_win_over_config_files_and_those_over_params_yaml(params_here: Path) -> None:
    Path("a.yaml").write_text("seed: 1\nn_envs: 8\ngamma: 0.5\n")
    Path("b.yaml").write_text("n_envs: 16\n")
    params = train_params("--config", "a.yaml", "--config", "b.yaml", "--gamma", "0.75", "--net-arch", "[32]")
    assert (params.seed, params.n_envs, params.gamma, params.net_arch) == (1, 16, 0.75, [32])
    assert params.gae_lambda == plain(Path("params.yaml"))["gae_lambda"]


def test_show_tells_values_and_origins(params_here: Path) -> None:
    Path("a.yaml").write_text("# a comment\nn_envs: 16\n")
    table = [re.split(r"  +", line) for line in show([Path("a.yaml")], {"seed": "7"}).splitlines()]
    rows = {key: (value, origin) for key, value, origin in table}
    line = next(i for i, text in enumerate(Path("params.yaml").read_text().splitlines(), 1) if text.startswith("gamma"))
    assert rows["n_envs"] == ("16", "a.yaml:2")
    assert rows["seed"] == ("7", "--seed")
    assert rows["gamma"] == ("0.99", f"params.yaml:{line}")
    assert set(rows) == set(all_fields())


def test_apply_keeps_the_comments_and_gives_what_show_config_showed(params_here: Path) -> None:
    before = Path("params.yaml").read_text()
    shown = values_of(show([ROOT / "configs/zoo.yaml"], {}))
    main(["apply", str(ROOT / "configs/zoo.yaml")])
    assert values_of(show([], {})) == shown
    assert comments(Path("params.yaml")) == comments(ROOT / "params.yaml")
    assert "\ntotal_timesteps: 4000000 " in Path("params.yaml").read_text()  # the file says 4e6
    main(["apply", str(ROOT / "configs/zoo.yaml")])  # and once more changes nothing
    changed = [
        a for a, b in zip(before.splitlines(), Path("params.yaml").read_text().splitlines(), strict=True) if a != b
    ]
    assert {line.partition(":")[0] for line in changed} <= set(plain(ROOT / "configs/zoo.yaml"))


def test_apply_writes_tracks_so_that_no_reader_takes_them_for_base_60(params_here: Path) -> None:
    Path("c.yaml").write_text("tracks: 20:50\n")
    main(["apply", "c.yaml"])
    assert '\ntracks: "20:50" ' in Path("params.yaml").read_text()


def test_apply_of_a_file_with_a_mistake_changes_nothing(params_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_bytes()
    Path("c.yaml").write_text("seed: 1\ngamma: 2.0\n")
    with pytest.raises(SystemExit) as stopped:
        main(["apply", "c.yaml"])
    assert stopped.value.code == 2
    assert "gamma = 2.0 (c.yaml:2)" in capsys.readouterr().err
    assert Path("params.yaml").read_bytes() == before


def values_of(table: str) -> list[list[str]]:
    return [re.split(r"  +", line)[:2] for line in table.splitlines()]


# One fact, one place


def comments(path: Path) -> dict[str, str]:
    """Comment of each key that has one on its line."""
    lines = [re.fullmatch(r"(\w+):.*?#\s(.*)", line) for line in path.read_text().splitlines()]
    return {line[1]: line[2] for line in lines if line}


def test_params_yaml_lists_exactly_the_known_keys_with_their_descriptions() -> None:
    assert comments(ROOT / "params.yaml") == {key: field.description for key, field in all_fields().items()}
    assert set(plain(ROOT / "params.yaml")) == set(all_fields())


def test_no_class_has_a_default_of_its_own() -> None:
    assert [key for key, field in all_fields().items() if not field.is_required()] == []


def test_a_key_of_two_classes_means_the_same_in_both() -> None:
    for key, field in all_fields().items():
        said = {(stage.model_fields[key].description, describe(stage.model_fields[key])) for stage in STAGES
                if key in stage.model_fields}  # fmt: skip
        assert said == {(field.description, describe(field))}


def test_parameters_are_immutable_and_named_by_their_values(params_here: Path) -> None:
    params = config.load(TrainParams)
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 3  # type: ignore[misc]
    assert params.fingerprint() == config.load(TrainParams, seed=params.seed).fingerprint()
    assert params.fingerprint() != config.load(TrainParams, seed=params.seed + 1).fingerprint()


# The files that come with the project


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_in_configs_is_valid(path: Path, params_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(relations, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # gpu.yaml is for a machine that has one
    for stage in CLASSES.values():
        params = config.load(stage, [path])
        given = {key: value for key, value in plain(path).items() if key in stage.model_fields}
        assert {key: getattr(params, key) for key in given} == given


def test_gpu_yaml_says_that_the_gpu_is_absent(params_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no CUDA GPU; use auto or cpu"):
        config.load(TrainParams, [ROOT / "configs/gpu.yaml"])


def test_the_schema_takes_the_projects_files_and_refuses_what_the_reader_refuses() -> None:
    published = json.loads(json.dumps(schema()))
    for path in [ROOT / "params.yaml", *CONFIGS]:
        assert faults(plain(path), published) == [], path
    wrong = {
        "gamma": 1.5,
        "seed": "1",
        "gama": 0.9,
        "net_arch": 64,
        "action_head": "x",
        "log_root": "/a",
        "cnn_channels": [0, 1, 1],
    }
    for key, value in wrong.items():
        assert faults({key: value}, published) == [key]
    assert set(published["properties"]) == set(all_fields())


def faults(content: dict[str, Any], published: dict[str, Any]) -> list[str]:
    """Keys that a JSON schema refuses."""
    assert published["additionalProperties"] is False
    rules = published["properties"]
    return [key for key, value in content.items() if key not in rules or not fits(value, rules[key])]


def fits(value: Any, rule: dict[str, Any]) -> bool:
    """The part of JSON schema (draft 2020-12) that is used; a number such as 1e6 is an integer there."""
    types = {"integer": int, "number": (int, float), "boolean": bool, "string": str, "array": list}
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, bool) != (rule["type"] == "boolean") or not isinstance(value, types[rule["type"]]):
        return False
    checks = {
        "minimum": lambda limit: value >= limit,
        "maximum": lambda limit: value <= limit,
        "exclusiveMinimum": lambda limit: value > limit,
        "exclusiveMaximum": lambda limit: value < limit,
        "minItems": lambda limit: len(value) >= limit,
        "maxItems": lambda limit: len(value) <= limit,
        "enum": lambda choices: value in choices,
        "pattern": lambda pattern: bool(re.search(pattern, value)),
        "items": lambda inner: all(fits(item, inner) for item in value),
    }
    words = rule.keys() - {"type", "title", "description", "meaning"}
    return all(checks[word](rule[word]) for word in words)


# Help


@pytest.mark.parametrize("module", CLASSES)
def test_help_shows_type_range_meaning_and_default_of_every_key(module: str) -> None:
    stage = CLASSES[module]
    ended = subprocess.run(
        [sys.executable, "-m", f"pipeline.{module}", "--help"], capture_output=True, text=True, cwd=ROOT,
        env={"COLUMNS": "500", "PATH": ""}, check=True,
    )  # fmt: skip
    said = " ".join(ended.stdout.split())
    defaults = plain(ROOT / "params.yaml")
    for key, field in stage.model_fields.items():
        default = json.dumps(defaults[key])
        assert f"--{key.replace('_', '-')} X {field.description}; {describe(field)} [default {default}]" in said
