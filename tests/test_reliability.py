"""docs/reliability.md says what the harness wrote, and names only rows, files and commands that there are."""

from __future__ import annotations

import json
import re

from tests.chaos.conftest import table
from tests.chaos.mutations import MUTATIONS
from tests.conftest import ROOT

PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_harness_wrote() -> None:
    assert table(json.loads((ROOT / "metrics/chaos.json").read_text())["rows"]) in PAGE


def test_every_mutation_is_listed_with_its_row() -> None:
    rows = re.findall(r"^\| (.+?) \| (\w+) \| (fails|not run) \|", PAGE, re.MULTILINE)
    assert {(what, row) for what, row, _ in rows} == {(m.what, m.row) for m in MUTATIONS.values()}


def test_files_it_names_are_there() -> None:
    paths = set(re.findall(r"`((?:pipeline|tests|metrics)/[\w/.]+)`", PAGE))
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
