"""The page on scaling: its tables are those of the measured figures, its model that of hand-computed cases, its
examples at least well-formed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from docs import make_scaling
from docs.make_scaling import DECIDING, NETWORK, SIMULATORS, UPDATE, Learner, best, step
from tests.conftest import ROOT

CORE = Learner("one core", 1.0, 1.0, 1.0)
FREE = {
    "simulator_us_per_decision": 0.0,
    "inference_us_per_decision": 0.0,
    "update_us_per_sample": 0.0,
    "learner_us_per_message": 0.0,
    "learner_us_per_observation": 0.0,
    "actor_us_per_message": 0.0,
    "actor_us_per_observation": 0.0,
}


def test_the_pages_tables_are_those_of_the_measured_figures() -> None:
    text = (ROOT / make_scaling.PAGE).read_text(encoding="utf-8")
    section = json.loads((ROOT / make_scaling.METRICS).read_text(encoding="utf-8"))["rollouts"]
    assert make_scaling.page(text, section) == text, "run python -m docs.make_scaling"


@pytest.mark.parametrize(
    ("costs", "part", "microseconds"),
    [
        ({"simulator_us_per_decision": 300.0, "actor_us_per_observation": 20.0}, SIMULATORS, 1024 / 16 * 320),
        ({"inference_us_per_decision": 80.0, "learner_us_per_message": 500.0}, DECIDING, 1024 * 80 + 2 * 16 * 500),
        ({}, NETWORK, 1024 * 7056 * 8 / 10e9 * 1e6),
        ({"update_us_per_sample": 100.0}, UPDATE, 1024 * 4 * 100),
    ],
)
def test_each_part_by_hand(costs: dict[str, float], part: str, microseconds: float) -> None:
    plan = step(FREE | costs, 4, 7056, 16, CORE)
    assert plan.parts[part] == pytest.approx(microseconds)
    assert plan.bottleneck == part


def test_what_works_side_by_side_counts_once_and_the_update_on_top() -> None:
    costs = FREE | {"simulator_us_per_decision": 320.0, "inference_us_per_decision": 10.0, "update_us_per_sample": 5.0}
    plan = step(costs, 4, 0, 16, CORE)
    assert plan.microseconds == pytest.approx(1024 / 16 * 320 + 1024 * 4 * 5)


def test_no_more_actors_are_used_than_bring_something() -> None:
    costs = FREE | {"simulator_us_per_decision": 320.0, "learner_us_per_message": 500.0}
    # 1024 x 320 / n against 2 x n x 500: equal at n = 18.1, and a node has 16 cores.
    assert [best(costs, 1, 0, nodes, CORE).actors for nodes in (1, 10, 1000)] == [16, 18, 18]
    simulators = FREE | {"simulator_us_per_decision": 320.0}
    assert [best(simulators, 1, 0, nodes, CORE).actors for nodes in (10, 1000)] == [160, 512]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash")
def test_the_slurm_script_is_bash() -> None:
    for script in sorted((ROOT / "examples").rglob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True)


def documents() -> list[tuple[str, dict[str, Any]]]:
    files = sorted((ROOT / "examples/kubernetes").glob("*.yaml"))
    return [(file.name, document) for file in files for document in YAML(typ="safe", pure=True).load_all(file)]


def test_kubernetes_pods_have_a_token_and_no_rights() -> None:
    pods = [document["spec"]["template"]["spec"] for _, document in documents() if "template" in document["spec"]]
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        (container,) = pod["containers"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environment["RAY_AUTH_MODE"] == "token"
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert environment["RAY_AUTH_TOKEN_PATH"] == f"{mounted['token']}/token"
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_names_refer_to_each_other() -> None:
    everything = {(document["kind"], document["metadata"]["name"]): document for _, document in documents()}
    head = everything["Deployment", "ray-head"]["spec"]["template"]["metadata"]["labels"]
    assert everything["Service", "ray-head"]["spec"]["selector"].items() <= head.items()
    text = "".join(path.read_text() for path in Path(ROOT / "examples/kubernetes").glob("*.yaml"))
    assert text.count("--address=ray-head:6379") == 2
    assert ("PersistentVolumeClaim", "carracing-runs") in everything
