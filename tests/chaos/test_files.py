"""Rows of the chaos table about files from elsewhere: parameters that make no sense, files that mean harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch as th
from hypothesis import settings
from safetensors.torch import save

from pipeline.agent import checkpoint, policy
from pipeline.agent.policy import PolicyError
from pipeline.config import ConfigError, TrainParams, load
from pipeline.tracking import spool
from tests.chaos.conftest import FULL
from tests.config import test_mistakes
from tests.policies import OBSERVATION, write_policy


def test_parameter_files(params_here: Path, row: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    n = int(os.environ.get("CHAOS_FILES", "10000" if FULL else "1000"))
    with row("parameter files by Hypothesis") as figures:
        for test in (
            test_mistakes.test_no_file_gets_a_traceback_or_a_wrong_type_through,
            test_mistakes.test_no_bytes_give_a_traceback,
        ):
            more = settings(test._hypothesis_internal_use_settings, max_examples=n // 2, database=None)
            monkeypatch.setattr(test, "_hypothesis_internal_use_settings", more)
            test(params_here=params_here)  # type: ignore[call-arg]
            figures["files"] = int(str(figures.get("files", 0))) + n // 2


class Executed:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr({"policy": "policy.pth", "outside": "../../policy.pth"}.get(name, name), data)
    return path


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    th.save(value, buffer)
    return buffer.getvalue()


def state_with(header: dict[str, Any]) -> bytes:
    """A state whose digest is right."""
    text, tensors = json.dumps(header), {"weights": th.zeros(3)}
    return save(tensors, metadata={checkpoint.HEADER_KEY: text, "sha256": checkpoint.digest(tensors, text)})


def hostile_files(folder: Path, mark: Path) -> Iterator[tuple[str, Path]]:
    """Name of the kind, and the file."""
    payload = pickle.dumps(Executed(mark))
    held = torch_file({"log_std": Executed(mark)})
    serialized = {"policy_class": {":type:": "<class 'type'>", ":serialized:": payload.hex()}}
    good = write_policy(folder / "good.safetensors", 0).read_bytes()
    laughs = [f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)]
    outside = "warm_start: ../../../etc/passwd.safetensors\nlog_root: /etc\nrun_name: ../x\n"
    plain: dict[str, bytes] = {
        "pickle as policy.safetensors": payload,
        "torch.save as policy.safetensors": held,
        "pickle behind a good policy.safetensors": good[:-8] + payload,
        "header longer than the file.safetensors": (2**62).to_bytes(8, "little") + good[8:],
        "serialized object in the header.safetensors": save(
            {"a": th.zeros(1)}, metadata={policy.HEADER_KEY: json.dumps(serialized)}
        ),
        "pickle as.zip": payload,
        "yaml that calls.yaml": f"seed: !!python/object/apply:os.mkdir ['{mark}']\n".encode(),
        "yaml tuple of a call.yaml": f"net_arch: !!python/object/new:os.mkdir ['{mark}']\n".encode(),
        "yaml with billions of items.yaml": ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(laughs)).encode(),
        "path out of the project.yaml": outside.encode(),
        "pickle as state_1.safetensors": payload,
        "torch.save as state_2.safetensors": held,
        "another format as state_3.safetensors": state_with({"format": 99, "extra": serialized, "num_timesteps": 3}),
        "pickle as spool-1.jsonl": payload + b"\n" + payload + b"\n",
    }
    for name, data in plain.items():
        (folder / name).write_bytes(data)
        yield name.rpartition(".")[0], folder / name
    for name, members in {
        "zip with a pickle": {"policy": payload, "data": b"{}"},
        "zip with an object in torch's format": {"policy": held, "data": b"{}"},
        "zip with serialized objects in data": {
            "policy": torch_file({"a": th.zeros(1)}),
            "data": json.dumps(serialized).encode(),
        },
        "zip that leads out of its folder": {"outside": payload, "data": b"{}"},
        "zip that unpacks to 300 MB": {"policy": bytes(300 * 2**20), "data": b"{}"},
    }.items():
        yield name, zipped(folder / f"{name}.zip", **members)


def refusal(path: Path) -> str:
    """How the pipeline refuses a file, by the reader that would get it."""
    if path.name.startswith("spool") or "spool" in path.name:
        entries, _ = spool.unsent(path)
        assert not any(entries), "spoiled lines are left out"
        return "left out"
    try:
        if path.suffix == ".yaml":
            load(TrainParams, [path])
        elif "state_" in path.name:
            home = path.parent / path.stem
            home.mkdir()
            path.rename(home / f"state_{1:012}.safetensors")
            checkpoint.latest(home)
        else:
            policy.load(path, OBSERVATION)
    except (PolicyError, ConfigError, checkpoint.CheckpointError) as error:
        return str(error)
    raise AssertionError(f"{path.name} was accepted")


def test_hostile_files(params_here: Path, row: Callable[..., Any]) -> None:
    mark, folder = params_here / "executed", params_here / "files"
    folder.mkdir()
    with row("hostile files") as figures:
        pickle.loads(pickle.dumps(Executed(mark)))
        assert mark.exists(), "the payload works"
        mark.rmdir()
        for name, path in hostile_files(folder, mark):
            assert len(refusal(path)) > 5, name
            assert not mark.exists(), f"{name}: executed"
            figures["kinds"] = int(str(figures.get("kinds", 0))) + 1
        figures["executions"] = 0
