"""Policies in MLflow's model registry: numbered versions, and the aliases ``challenger`` and ``champion``.

A version is code and a policy file, never a pickle. ``models:/carracing-ppo@champion`` loads it for predictions, and
``models:/carracing-ppo@champion/artifacts/policy.safetensors`` is the policy file itself.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types.schema import Schema, TensorSpec

import pipeline
from pipeline.tracking.store import TrackingError, connect, experiment_id, first_line, is_missing

CHALLENGER, CHAMPION = "challenger", "champion"
POLICY_FILE = "policy.safetensors"
MODULES = (
    "torch",
    "numpy",
    "gymnasium",
    "stable_baselines3",
    "safetensors",
    "pydantic",
    "ruamel",
    "cv2",
    "Box2D",
    "pygame",
)
"""What :mod:`pipeline.tracking.served_policy` imports by way of the policy and the action axes."""


@dataclass(frozen=True)
class Version:
    """A registered policy.

    Attributes:
        number: Counts up from 1.
        sha256: Of the policy file, in hex.
        run_id: The run that trained it, if this store has it.
    """

    number: int
    sha256: str
    run_id: str = field(default="", compare=False)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Registry:
    """The versions of one registered model.

    Args:
        name: Of the registered model; it need not exist yet.

    Raises:
        TrackingError: MLflow can't be reached.
    """

    def __init__(self, name: str) -> None:
        self.client, self.name = connect(), name

    def champion(self) -> Version | None:
        """The best so far; None before the first."""
        return self.alias(CHAMPION)

    def alias(self, alias: str) -> Version | None:
        """The version that an alias points at; None if there is none."""
        try:
            aliases = self.client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if is_missing(error):
                return None
            raise
        return self.version(int(aliases[alias])) if alias in aliases else None

    def find(self, digest: str) -> Version | None:
        """The newest version of the policy file with this sha256."""
        found = self.client.search_model_versions(f"name = '{self.name}' and tags.sha256 = '{digest}'")
        return self.version(max(int(version.version) for version in found)) if found else None

    def version(self, number: int) -> Version:
        """A version by its number; raises what MLflow raises if there is none."""
        entity = self.client.get_model_version(self.name, str(number))
        return Version(number, entity.tags.get("sha256", ""), entity.run_id or "")

    def register(
        self, policy: Path, observation: tuple[int, ...], run_id: str | None, tags: Mapping[str, str]
    ) -> Version:
        """Store a policy file with the code that serves it, as a new version.

        Args:
            policy: The policy file.
            observation: Shape (c, h, w) of what it sees.
            run_id: The run that trained it, if this store has it.
            tags: What is known of the policy; its sha256 is added.
        """
        digest = sha256(policy)
        mlflow.set_experiment(experiment_id=experiment_id(self.client))  # else a model without a run goes to "Default"
        with TemporaryDirectory() as folder:
            artifact = Path(folder) / POLICY_FILE  # its name in the store, whatever the file is called here
            shutil.copyfile(policy, artifact)
            model = _log_model(self.name, artifact, observation, run_id)
        number = mlflow.register_model(model.model_uri, self.name, tags={**tags, "sha256": digest}).version
        return Version(int(number), digest)

    def point(self, alias: str, version: Version) -> None:
        """Set an alias."""
        self.client.set_registered_model_alias(self.name, alias, str(version.number))

    def download(self, version: Version, folder: Path) -> Path:
        """A version's policy file, in ``folder``.

        Raises:
            TrackingError: It is gone, or not the file that was registered.
        """
        uri = f"models:/{self.name}/{version.number}/artifacts/{POLICY_FILE}"
        try:
            path = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
        except (MlflowException, OSError) as error:
            reason = f"can't be read: {first_line(error)}"
        else:
            if sha256(path) == version.sha256:
                return path
            reason = f"has sha256 {sha256(path)[:12]}, but {version.sha256[:12]} was registered"
        raise TrackingError(
            f"the policy file of {self.name} version {version.number} ({uri}) {reason}\n"
            f"Restore MLflow's artifacts, or delete that version in `mlflow ui` if it is lost for good."
        )


def resolve(uri: str) -> tuple[Registry, Version]:
    """The version behind ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER``.

    Raises:
        TrackingError: The URI is spelled otherwise, or there is no such version.
    """
    spelled = re.fullmatch(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<number>\d+))", uri)
    if not spelled:
        raise TrackingError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/NUMBER")
    registry = Registry(spelled["name"])
    try:
        version = registry.alias(spelled["alias"]) if spelled["alias"] else registry.version(int(spelled["number"]))
    except MlflowException as error:
        if not is_missing(error):
            raise
        version = None
    if version is None:
        raise TrackingError(
            f"{uri}: no such version in the registry; `make promote` registers one, `make ui` lists them"
        )
    return registry, version


def _log_model(name: str, policy: Path, observation: tuple[int, ...], run_id: str | None) -> ModelInfo:
    # Not mlflow.pyfunc.log_model, which needs the run opened again: that resets its status and end time.
    warnings.filterwarnings("ignore", ".*input example was not provided", UserWarning)  # the signature says more
    info: ModelInfo = Model.log(
        artifact_path=None,
        name=name,
        flavor=mlflow.pyfunc,
        run_id=run_id,
        python_model=str(Path(__file__).with_name("served_policy.py")),
        artifacts={"policy": str(policy)},
        code_paths=[str(Path(pipeline.__file__).parent)],
        signature=signature(observation),
        pip_requirements=requirements(),
    )
    return info


def signature(observation: tuple[int, ...]) -> ModelSignature:
    """(n, c, h, w) uint8 -> (n, 3) float32."""
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *observation))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 3))]),
    )


def requirements() -> list[str]:
    """What serving needs, pinned to the versions installed here."""
    owners = importlib.metadata.packages_distributions()
    pins = {f"{owner}=={_public_version(owner)}" for module in MODULES for owner in owners.get(module, [])}
    return sorted(pins, key=str.lower)


def _public_version(distribution: str) -> str:
    """Without the local part: PyPI has no ``2.9.0+cpu``."""
    return importlib.metadata.version(distribution).partition("+")[0]
