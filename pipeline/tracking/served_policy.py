"""The model that MLflow stores as code and serves: a policy file -> the pedals to press.

MLflow copies this file into the model and runs it at loading ("models from code"), so no object is ever pickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from numpy.typing import NDArray

from pipeline.agent.policy import load


class ServedPolicy(PythonModel):
    """Deterministic actions for stacked pictures."""

    def load_context(self, context: Any) -> None:
        """Read the policy file that was stored with the model."""
        self.policy = load(Path(context.artifacts["policy"]))

    # MLflow knows the bare type alone; of any other it warns that it can't check it.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> NDArray[np.float32]:
        """(n, c, h, w) uint8 observations -> (n, 3) float32 steer [-1, 1], gas [0, 1], brake [0, 1]."""
        return self.policy.predict(np.array(model_input, np.uint8))  # a copy: torch wants to own what it may write


set_model(ServedPolicy())
