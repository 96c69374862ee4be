from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Tests that open no window must not look for a screen either.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


@pytest.fixture
def params_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the project's ``params.yaml``, which is the current one for the test."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
