"""SB3's logger -> one batch per dump -> the spool."""

from __future__ import annotations

import math
from typing import Any

from stable_baselines3.common.logger import KVWriter

from pipeline.tracking.spool import Spool


class SpoolWriter(KVWriter):
    """An SB3 output format that appends each dump's numbers to a spool."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Keep the finite numbers that aren't excluded from ``mlflow``."""
        kept = {key: value for key, value in sorted(key_values.items()) if "mlflow" not in (key_excluded[key] or ())}
        numbers = {key: float(value) for key, value in kept.items() if _is_number(value)}
        self.spool.metrics({k: value for k, value in numbers.items() if math.isfinite(value)}, step, rising=True)

    def close(self) -> None:
        """Nothing: the run closes the spool."""


def _is_number(value: Any) -> bool:
    """Python's, numpy's and torch's, also as an array of no dimensions."""
    return isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0
