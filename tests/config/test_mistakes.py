"""Each listed mistake in a parameter file gives the message a person needs: key, value, range, and where it stands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError, relations
from pipeline.config.params import all_fields
from pipeline.config.sources import check, read_sources
from tests.conftest import ROOT

INT_SEED = "expected integer, 0 to 2147483647"

# (the file, each line that must be told; a mistake stands on line 1 unless it says otherwise)
MISTAKES: dict[str, tuple[str, list[str]]] = {
    "yes is no number": ("n_envs: yes", ['n_envs = "yes" (c.yaml:1): expected integer, 1 to 1024']),
    "true is no number": ("n_envs: true", ["n_envs = true (c.yaml:1): expected integer, 1 to 1024"]),
    "yes is no bool in YAML 1.2": (
        "grayscale: yes",
        ['grayscale = "yes" (c.yaml:1): expected true or false; yes is a text in YAML 1.2'],
    ),
    "1 is no bool": ("grayscale: 1", ["grayscale = 1 (c.yaml:1): expected true or false"]),
    "a text for a number": ("seed: lucky", [f'seed = "lucky" (c.yaml:1): {INT_SEED}']),
    "a broken number": ("n_envs: 1.5", ["n_envs = 1.5 (c.yaml:1): expected integer, 1 to 1024"]),
    "a quoted number": ('gamma: "0.9"', ['gamma = "0.9" (c.yaml:1): expected number, 0 to 1; in quotes it is a text']),
    "nan": ("gamma: .nan", ["gamma = NaN (c.yaml:1): expected number, 0 to 1"]),
    "infinity": ("reward_clip: .inf", ["reward_clip = Infinity (c.yaml:1): expected number, 0 to 1000"]),
    "an overflowing number": ("seed: 1e400", [f"seed = Infinity (c.yaml:1): {INT_SEED}"]),
    "a null": ("seed:", [f"seed = null (c.yaml:1): {INT_SEED}; nothing is written after the colon"]),
    "above its range": ("gamma: 1.5", ["gamma = 1.5 (c.yaml:1): expected number, 0 to 1"]),
    "below its range": ("clip_range: -0.2", ["clip_range = -0.2 (c.yaml:1): expected number, > 0, <= 1"]),
    "on an open border": ("max_grad_norm: 0.0", ["max_grad_norm = 0.0 (c.yaml:1): expected number, > 0, <= 1000"]),
    "none of the choices": (
        "action_head: softmax",
        ['action_head = "softmax" (c.yaml:1): expected one of beta, gaussian, gsde'],
    ),
    "an unknown key": ("learning_rte: 1e-4", ["learning_rte (c.yaml:1): unknown key; did you mean learning_rate?"]),
    "a key in another spelling": ("N-Envs: 8", ["N-Envs (c.yaml:1): unknown key; did you mean n_envs?"]),
    "a key like no other": (
        "zzz: 1",
        ["zzz (c.yaml:1): unknown key; `python -m pipeline.config show` lists the known ones"],
    ),
    "a duplicate key": ("seed: 1\ngamma: 0.9\nseed: 2", ["seed (c.yaml:3): duplicate key; first given at c.yaml:1"]),
    "a short list": ("cnn_channels: [1, 2]", ["cnn_channels = [1, 2] (c.yaml:1): expected list of 3 x integer"]),
    "a long list": ("net_arch: [8, 8, 8, 8, 8]", ["net_arch = [8, 8, 8, 8, 8] (c.yaml:1): expected list of 0 to 4 x"]),
    "no list": ("net_arch: 64", ["net_arch = 64 (c.yaml:1): expected list of 0 to 4 x integer, 1 to 4096"]),
    "a list with a text": ("net_arch: [64, big]", ['net_arch = [64, "big"] (c.yaml:1): expected list of 0 to 4 x']),
    "a mapping": ("seed:\n  value: 1", [f'seed = {{"value": 1}} (c.yaml:1): {INT_SEED}']),
    "a policy that is not there": (
        "warm_start: models/none.safetensors",
        ['warm_start = "models/none.safetensors" (c.yaml:1): no such file; expected a policy file'],
    ),
    "a policy outside the project": (
        "warm_start: ../best.safetensors",
        ['warm_start = "../best.safetensors" (c.yaml:1): expected a policy file inside the project'],
    ),
    "a film twice": (
        "video_tracks: [best, best]",
        ['video_tracks = ["best", "best"] (c.yaml:1): expected each of best, median, worst at most once'],
    ),
    "a batch that does not divide": (
        "n_envs: 8\nn_steps: 100\nbatch_size: 64",
        ["batch_size = 64 (c.yaml:3): expected a divisor of n_steps x n_envs = 100 x 8 = 800, such as 50"],
    ),
    "less than a rollout": (
        "total_timesteps: 100\nn_envs: 8\nn_steps: 128",
        ["total_timesteps = 100 (c.yaml:1): expected at least one rollout, n_steps x n_envs = 1024"],
    ),
    "too many environments": (
        "n_envs: 1000\nn_steps: 64",
        ["n_envs = 1000 (c.yaml:1): expected at most 64 per core, 128 on this machine with 2 cores"],
    ),
    "idle workers": ("n_envs: 4\nn_workers: 8\nn_steps: 64", ["n_workers = 8 (c.yaml:2): expected at most n_envs = 4"]),
    "too many threads": ("num_threads: 99", ["num_threads = 99 (c.yaml:1): expected at most 2, the cores of this"]),
    "no such device": ("device: gpu", ['device = "gpu" (c.yaml:1): expected auto, cpu, cuda, cuda:N or mps']),
    "an absent device": ("device: cuda:1", ['device = "cuda:1" (c.yaml:1): this machine (or this build of torch) has']),
    "validation among the test tracks": (
        "validation_seed: 10090\ntracks: 10000:10100\nn_eval_episodes: 20",
        ["validation_seed = 10090 (c.yaml:1): validation tracks 10090:10110 overlap the test tracks 10000:10100"],
    ),
    "test among the training tracks": (
        "tracks: 999990:1000010",
        ['tracks = "999990:1000010" (c.yaml:1): expected first:stop below 1000000, such as 10000:10100'],
    ),
    "tracks backwards": ("tracks: 20:10", ['tracks = "20:10" (c.yaml:1): expected first:stop below 1000000']),
    "a path out of the project": (
        "log_root: runs/../../elsewhere",
        ['log_root = "runs/../../elsewhere" (c.yaml:1): expected a folder inside the project, as a relative path'],
    ),
    "an absolute path": ("log_root: /var/runs", ['log_root = "/var/runs" (c.yaml:1): expected a folder inside']),
    "a name with a slash": ("run_name: a/b", ['run_name = "a/b" (c.yaml:1): expected 1 to 64 letters, digits']),
    "an unclosed list": ("seed: 1\nnet_arch: [64\ngamma: 1", ["c.yaml:3: not valid YAML: expected ',' or ']'"]),
    "a tab": ("\tseed: 1", ["c.yaml:1: not valid YAML: a tab; YAML indents with spaces only"]),
    "two documents": ("seed: 1\n---\nseed: 2", ["c.yaml:2: not valid YAML: expected a single document"]),
    "a list for a file": ("- seed", ["c.yaml: expected `key: value` lines, got a list"]),
    "a text for a file": ("seed = 1", ["c.yaml: expected `key: value` lines, got text"]),
    "an empty file": ("", ["c.yaml: expected `key: value` lines, got nothing"]),
    "comments alone": ("# seed: 1", ["c.yaml: expected `key: value` lines, got nothing"]),
    "a list for a key": ("? [seed]\n: 1", ["c.yaml:1: expected a key, got a list or a mapping in its place"]),
    "an unclosed JSON object": ('{"seed": 1', ["c.yaml:1: not valid YAML: expected ',' or '}'"]),
    "code in a tag": (
        "seed: !!python/object/apply:os.mkdir [executed]",
        ["seed (c.yaml:1): not a plain value, and nothing else is read or run"],
    ),
    "several at once": (
        "seed: -1\ngama: 0.9\nseed: 3\nn_envs: no",
        [
            "seed (c.yaml:3): duplicate key; first given at c.yaml:1",
            f"seed = -1 (c.yaml:1): {INT_SEED}",
            "gama (c.yaml:2): unknown key; did you mean gamma?",
            'n_envs = "no" (c.yaml:4): expected integer, 1 to 1024',
        ],
    ),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two cores and no GPU."""
    import torch

    monkeypatch.setattr(relations, "cores", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def mistakes_of(*files: Path) -> list[str]:
    mistakes: list[str] = []
    try:
        check(read_sources(files, {}, mistakes), mistakes)
    except ConfigError as error:
        return error.mistakes
    return mistakes


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_says_what_where_and_what_instead(name: str, params_here: Path) -> None:
    text, expected = MISTAKES[name]
    Path("c.yaml").write_text(text)
    told = mistakes_of(Path("c.yaml"))
    assert len(told) == len(expected), told
    for line in expected:
        assert [t for t in told if t.startswith(line)], told
    assert [p.name for p in params_here.iterdir() if p.is_dir()] == [], "something in the file was executed"


def test_files_that_are_no_text(params_here: Path) -> None:
    Path("u16.yaml").write_text("seed: 1", encoding="utf-16")
    assert mistakes_of(Path("u16.yaml")) == ["u16.yaml: not UTF-8 text; save it as UTF-8"]
    Path("folder").mkdir()
    assert mistakes_of(Path("folder")) == ["folder: can't be read: Is a directory"]
    assert mistakes_of(Path("nowhere.yaml")) == ["nowhere.yaml: no such file"]
    Path("bom.yaml").write_text("seed: -1", encoding="utf-8-sig")  # Windows' Notepad; its mark is no part of the key
    assert mistakes_of(Path("bom.yaml")) == [f"seed = -1 (bom.yaml:1): {INT_SEED}"]


def test_a_short_file_with_billions_of_items_is_told_like_any_other(params_here: Path) -> None:
    levels = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 12)]
    Path("c.yaml").write_text("\n".join(["x0: &x0 [1, 1]", *levels, "seed: *x11"]))
    told = mistakes_of(Path("c.yaml"))
    (line,) = [t for t in told if t.startswith("seed")]
    assert line.startswith('seed = [["...", "...", ')
    assert line.endswith(f" (c.yaml:13): {INT_SEED}")


def test_a_key_missing_in_params_yaml_is_named(params_here: Path) -> None:
    lines = Path("params.yaml").read_text().splitlines(keepends=True)
    Path("params.yaml").write_text("".join(line for line in lines if not line.startswith("gamma:")))
    assert mistakes_of() == ["gamma: missing in params.yaml; expected number, 0 to 1"]


def test_a_broken_params_yaml_is_one_mistake_and_not_one_per_key(params_here: Path) -> None:
    Path("params.yaml").write_text("seed: [1\n")
    (told,) = mistakes_of()
    assert told.startswith("params.yaml:2: not valid YAML")
    Path("params.yaml").unlink()
    assert mistakes_of() == ["params.yaml: no such file here; run this from the project's folder"]


def test_mistakes_of_all_sources_come_together(params_here: Path) -> None:
    Path("a.yaml").write_text("gamma: 2.0\nseed: 1")
    Path("b.json").write_text('{"seed": -1}')
    mistakes: list[str] = []
    check(read_sources([Path("a.yaml"), Path("b.json")], {"n_envs": "0"}, mistakes), mistakes)
    assert mistakes == [
        f"seed = -1 (b.json:1): {INT_SEED}",
        "n_envs = 0 (--n-envs): expected integer, 1 to 1024",
        "gamma = 2.0 (a.yaml:1): expected number, 0 to 1",
    ]


# The command line

SLOW_IMPORTS = "torch mlflow gymnasium stable_baselines3 cv2 pandas matplotlib"
PROBE = f"""
import importlib, sys
try:
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
finally:
    print([name for name in {SLOW_IMPORTS.split()} if name in sys.modules])
"""


def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROBE, f"pipeline.{module}", *arguments],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("module", ["train", "evaluate", "record_videos", "promote"])
def test_a_mistake_ends_with_2_at_once_and_before_any_slow_import(module: str, params_here: Path) -> None:
    Path("c.yaml").write_text("gamma: 7.0\nvideo_fps: fast\n")
    began = time.monotonic()
    ended = command(module, "--config", "c.yaml")
    assert time.monotonic() - began < 5  # 2 s on a quiet machine
    assert ended.returncode == 2
    assert ended.stdout == "[]\n"
    assert ended.stderr == (
        "error: 2 mistakes in the parameters\n"
        "  gamma = 7.0 (c.yaml:1): expected number, 0 to 1\n"
        '  video_fps = "fast" (c.yaml:2): expected integer, 10 to 100\n'
    )
    assert sorted(p.name for p in params_here.iterdir()) == ["c.yaml", "params.yaml"]


def test_a_wrong_flag_names_the_nearest_right_one(params_here: Path) -> None:
    ended = command("train", "--n-env", "8")
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: unrecognized arguments: --n-env 8; did you mean --n-envs?\n",
    )
    ended = command("train", "--learning-rate", "fast")
    assert ended.returncode == 2
    assert 'learning_rate = "fast" (--learning-rate): expected number, > 0, <= 1' in ended.stderr


# Arbitrary files

scalars = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=3))


def is_of(value: Any, kind: Any) -> bool:
    """The types of this project's keys once more, in the plainest words."""
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        whole = isinstance(value, int) or (isinstance(value, float) and (kind is float or value.is_integer()))
        return whole and not isinstance(value, bool) and abs(value) != float("inf") and value == value
    return isinstance(value, list) if getattr(kind, "__origin__", None) is list else isinstance(value, str)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(all_fields())) | st.text(max_size=8), values, min_size=1, max_size=4))
def test_no_file_gets_a_traceback_or_a_wrong_type_through(params_here: Path, content: dict[str, Any]) -> None:
    from ruamel.yaml import YAML

    with Path("c.yaml").open("w", encoding="utf-8", errors="surrogatepass") as file:
        YAML(typ="safe", pure=True).dump(content, file)
    told = mistakes_of(Path("c.yaml"))
    fields = all_fields()
    wrong = [k for k, v in content.items() if k not in fields or not is_of(v, fields[k].annotation)]
    if wrong:
        assert told, content


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(alphabet=":-[]{}!&*#?|>'\"%@`\t\n ,.~aeinsd019", max_size=60))
def test_no_bytes_give_a_traceback(params_here: Path, content: bytes | str) -> None:
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    told = mistakes_of(Path("c.yaml"))
    assert told, content  # no such file holds known keys alone
