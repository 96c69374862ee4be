"""The rules of the house, read off the code: who imports whom, and what each stage of ``dvc.yaml`` depends on."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from tests.conftest import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "pipeline").rglob("*.py"))
}
MAY_IMPORT = {
    "config": set(),
    "durable": set(),
    "interrupts": set(),
    "sim": {"config"},
    "agent": {"sim", "config", "durable"},
    "tracking": {"sim", "config", "durable"},
    "media": {"sim", "config"},
    "statistics": set(),
    "evaluation": {"agent", "sim", "statistics", "config"},
    "comparison": {"statistics"},
    "score_cache": {"evaluation", "tracking", "agent", "sim", "config", "durable"},
    "policy_source": {"agent", "tracking", "sim", "config"},
    "racing": {"evaluation", "agent", "media", "sim", "config"},
    "live": {"agent", "media", "sim", "config"},
    "filming": {"evaluation", "agent", "media", "sim", "config"},
}
# What MLflow runs when it serves a policy: a script inside the registered model, which nothing here imports.
SERVED = "pipeline.tracking.served_policy"


@cache
def imports(module: str, type_checking: bool = False) -> frozenset[str]:
    """Names a module imports anywhere in its code, as ``package.module``; optionally those for type checkers too."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return frozenset(name for node in nodes(tree, type_checking) for name in names(node))


def nodes(node: ast.AST, type_checking: bool) -> Iterator[ast.AST]:
    """All nodes below one, in functions too; without the blocks that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        yield child
        hidden = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not hidden or type_checking:
            yield from nodes(child, type_checking)


def names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide who imports whom"
        submodules = [f"{node.module}.{alias.name}" for alias in node.names]
        known = [name for name in submodules if name in MODULES]
        yield from known
        if len(known) < len(submodules):
            yield str(node.module)


def project_imports(module: str, type_checking: bool = False) -> set[str]:
    return {name for name in imports(module, type_checking) if name in MODULES}


def reachable(module: str) -> set[str]:
    """All project modules that running ``module`` may import."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {name for known in new for name in project_imports(known)} - found
    return found


def room(module: str) -> str:
    """The room of a module: a folder, or ``evaluation``; everything else under ``pipeline/`` is a verb."""
    return module.removeprefix("pipeline").removeprefix(".").partition(".")[0]


# Imports


def test_rooms_import_only_the_rooms_below_them() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if room(module) in MAY_IMPORT and module != SERVED
        for name in project_imports(module, type_checking=True)
        if room(name) not in {*MAY_IMPORT[room(module)], room(module), ""}
    ]
    assert wrong == []
    assert [module for module in MODULES if SERVED in project_imports(module)] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    circles = {name: path for name in MODULES if (path := way_back(name))}
    assert circles == {}


def way_back(start: str) -> list[str]:
    """The shortest way from a module to itself, if there is one."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:
        for name in sorted(project_imports(way[-1])):
            if name == start:
                return [*way, name]
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("mlflow", r"pipeline\.tracking\..*"),
        ("ray", r"pipeline\.(sweep\.on_ray|sim\.ray_cluster)"),
        ("optuna", r"pipeline\.sweep\.(study|search|plots|space)"),
    ],
)
def test_each_large_package_has_one_home(package: str, home: str) -> None:
    users = [m for m in MODULES if any(name.partition(".")[0] == package for name in imports(m))]
    assert [module for module in users if not re.fullmatch(home, module)] == []


def test_windows_are_opened_by_the_viewer_alone() -> None:
    calls = re.compile(r"\bcv2\.(imshow|namedWindow|waitKey)\b|\bpygame\.(Window|display)\b")
    users = [m for m, path in MODULES.items() if calls.search(path.read_text(encoding="utf-8"))]
    assert set(users) <= {"pipeline.media.viewer"}


def test_an_environment_steps_without_torch_and_mlflow() -> None:
    code = """
import sys
import pipeline.sim.worker
from pipeline.config import TrainParams, load
from pipeline.sim.training_env import make_training_env
env = make_training_env(load(TrainParams), 0)
env.reset()
env.step(env.action_space.sample())
print([name for name in "torch mlflow stable_baselines3 pandas matplotlib scipy".split() if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


# Requirements


def pinned(path: Path) -> dict[str, str]:
    """Version by distribution, of the lines that count for this Python."""
    lines = [line.partition(" #")[0].strip() for line in path.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    mine = [r for r in requirements if r.marker is None or r.marker.evaluate()]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in mine}


def test_requirements_list_exactly_what_is_imported_or_run() -> None:
    imported = {name.partition(".")[0] for m in MODULES for name in imports(m, type_checking=True)}
    third_party = imported - set(sys.stdlib_module_names) - {"pipeline", "ray"}  # Ray: requirements-cluster.txt
    owners = {name: {canonicalize_name(d) for d in packages_distributions()[name]} for name in third_party}
    listed = set(pinned(ROOT / "requirements.txt"))
    of_a_listed_extra = {"pygame": "pygame-ce", "Box2D": "box2d"}  # gymnasium[box2d]
    missing = [n for n, ds in owners.items() if not same_package(ds) & listed and n not in of_a_listed_extra]
    assert missing == []
    run = {"dvc", "tensorboard"}  # commands of their own
    assert listed - {d for ds in owners.values() for d in same_package(ds)} - run == set()


def same_package(distributions: set[str]) -> set[str]:
    """OpenCV comes with or without windows under two names; MLflow's modules lie in several distributions."""
    twins = {"opencv-python-headless": "opencv-python", "mlflow-skinny": "mlflow"}
    return distributions | {twins[d] for d in distributions if d in twins}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="constraints.txt is for Python 3.11")
def test_constraints_hold_the_same_versions_as_the_requirements() -> None:
    constraints = pinned(ROOT / "constraints.txt")
    for file in ("requirements.txt", "requirements-dev.txt"):
        assert {name: constraints.get(name) for name in pinned(ROOT / file)} == pinned(ROOT / file)
    assert not re.search(r"file:|/|\+", (ROOT / "constraints.txt").read_text().partition("absl")[2])


# dvc.yaml

STAGES: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]


def script(stage: str) -> str:
    match = re.fullmatch(r"python -m (pipeline\.\w+)", STAGES[stage]["cmd"])
    assert match
    return match[1]


def listed(stage: str, *kinds: str) -> set[str]:
    """Paths of a stage, with their options dropped."""
    entries = [entry for kind in kinds for entry in STAGES[stage].get(kind, [])]
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_cover_the_code_a_stage_imports_and_nothing_else(stage: str) -> None:
    needed = {MODULES[m].relative_to(ROOT) for m in reachable(script(stage))} - {Path("pipeline/__init__.py")}
    needed = {path for path in needed if path.read_bytes().strip()}  # an empty __init__.py decides nothing
    code = {Path(dep) for dep in listed(stage, "deps") if dep.startswith("pipeline/")}
    uncovered = [str(path) for path in needed if not {path, *path.parents} & code]
    assert uncovered == [], f"imported by {stage}, but not among its deps"
    idle = [str(dep) for dep in code if not any(dep in (path, *path.parents) for path in needed)]
    assert idle == [], f"among the deps of {stage}, but not imported"


@pytest.mark.parametrize("stage", STAGES)
def test_data_files_are_those_the_script_names(stage: str) -> None:
    modules = {name for name in reachable(script(stage)) if room(name) not in {*MAY_IMPORT, ""}}  # it, and its helpers
    values = [value for name in modules for value in vars(importlib.import_module(name)).values()]
    named = {value.as_posix() for value in values if isinstance(value, Path)}
    text = MODULES[script(stage)].read_text(encoding="utf-8")
    if "Run.attach(" in text or "Run.begin(" in text:
        named.add("metrics/mlflow.json")
    outs = listed(stage, "outs", "metrics", "plots")
    deps = {dep for dep in listed(stage, "deps") if not dep.startswith("pipeline/")}
    assert deps | outs == named
    assert deps & outs == set()


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_reads_is_left_by_an_earlier_one(stage: str) -> None:
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    left = {path for name in earlier for path in listed(name, "outs", "metrics", "plots")}
    assert {dep for dep in listed(stage, "deps") if not dep.startswith("pipeline/")} <= left


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_fields_of_the_parameter_class(stage: str) -> None:
    module = importlib.import_module(script(stage))
    tree = ast.parse(MODULES[script(stage)].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_args"]
    (name,) = {ast.unparse(call.args[0]) for call in calls}
    assert sorted(STAGES[stage]["params"]) == sorted(getattr(module, name).model_fields)
