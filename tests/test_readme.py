"""What README shows in Python, as it stands there."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT


def test_the_champion_and_the_fast_game_are_used_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (shown,) = [block for block in blocks if "FastCarRacing-v3" in block]
    names: dict[str, Any] = {}
    exec(shown, names)
    assert names["observation"].shape == (4, 84, 84)
    assert names["info"]["tiles"] > 0
    picture, _ = names["fast"].reset(seed=7)
    stock, _ = names["gym"].make("CarRacing-v3").reset(seed=7)
    assert picture.shape == stock.shape
    assert np.abs(picture.astype(int) - stock).mean() < 1
