"""The report says what MLflow holds, carries its films along, and trusts nothing that a run is called."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline.evaluation import Episode
from pipeline.media.charts import learning_curves, sorted_returns
from pipeline.media.video import FilmWriter, shrink_film
from pipeline.report import Chapter, differing, parameters_apart, report, svg
from pipeline.tracking.history import History
from pipeline.tracking.run import Run
from pipeline.tracking.store import TrackingError
from tests.conftest import ROOT

HOSTILE = "<script>alert('x')</script>"
HISTORY = [
    {"frames": 100.0, "eval_mean": 5.0, "eval_low": 4.0, "eval_high": 6.0},
    {"frames": 200.0, "eval_mean": 7.0, "eval_low": 6.0, "eval_high": 8.0},
]


def add_run(name: str, seed: int, score: float, commit: str = "abc123") -> str:
    params = {"seed": seed, "learning_rate": 3e-4, "net_arch": [], "frame_skip": 4}
    run = Run.begin(name, params, {"mlflow.source.git.commit": commit})
    for step in (100, 200):
        run.metrics({"eval/mean_reward": score - step, "eval/ci_low": score - 300, "eval/ci_high": score}, step)
    episodes = [Episode(n, score + n, 900, True, 280, 280) for n in range(3)]
    run.metrics(
        {"evaluate/mean": score + 1, "evaluate/std": 0.8, "evaluate/mean_ci_low": score, "evaluate/mean_ci_high": 9e3}
    )
    run.table([asdict(e) for e in episodes], "evaluate/tracks.json")
    with FilmWriter("best.mp4", (976, 544), 50) as film:
        for frame in range(20):
            film.write(np.full((544, 976, 3), 5 * frame, np.uint8))
    run.artifact(Path("best.mp4"), "videos")
    return run.flush()


class Reader(HTMLParser):
    """The page's elements, read by a parser that isn't ours."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_says_what_mlflow_holds(project: Path) -> None:
    first, second = add_run("first", 0, 900.0), add_run(HOSTILE, 1, 800.0)
    report([first, HOSTILE], Path("page.html"))
    page = Path("page.html").read_text()
    found = Reader(page)
    assert found.of("script") == []
    assert "&lt;script&gt;" in page
    for element in ("link", "img", "video"):
        for attributes in found.of(element):
            assert (attributes.get("src") or attributes.get("href") or "").startswith("data:"), "nothing from elsewhere"
    assert "901.0 ± 0.8 (95% interval 900.0 to 9000.0)" in page
    assert first in page
    assert second in page
    assert "git checkout abc123" in page
    assert "dvc exp run -S frame_skip=4 -S learning_rate=0.0003 -S &#39;net_arch=[]&#39; -S seed=1" in page
    assert page.count("<svg") == 2
    film = base64.b64decode(str(found.of("video")[0]["src"]).partition("base64,")[2])
    Path("small.mp4").write_bytes(film)
    seen = cv2.VideoCapture("small.mp4")
    assert (seen.get(cv2.CAP_PROP_FRAME_WIDTH), seen.get(cv2.CAP_PROP_FPS)) == (640, 25)
    assert len(film) < Path("best.mp4").stat().st_size


def test_what_differs_from_the_parameters_of_its_commit(project: Path) -> None:
    (project / "params.yaml").write_text("seed: 0\nlearning_rate: 3e-4\nnet_arch: []\nframe_skip: 2\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    run = History().run(add_run("one", 1, 900.0, head))
    assert differing(run) == {"seed": "1", "frame_skip": "4"}
    assert Chapter(run, differing=differing(run)).command == "dvc exp run -S frame_skip=4 -S seed=1"


def test_a_run_is_found_by_id_and_by_its_newest_name(project: Path) -> None:
    old, new = add_run("same", 0, 900.0), add_run("same", 1, 800.0)
    history = History()
    assert history.run(old).params["seed"] == "0"
    assert history.run("same").id == new
    curve = history.run(new).curve
    assert [(row["step"], row["eval_mean"], row["eval_low"]) for row in curve] == [(100, 700, 500), (200, 600, 500)]
    assert [row["episode_return"] for row in history.run(new).tracks] == [800, 801, 802]
    assert parameters_apart([history.run(old), history.run(new)]) == {"seed": ["0", "1"]}
    with pytest.raises(TrackingError, match="other: expected the id or the name of a run"):
        history.run("other")


def test_a_step_of_a_curve_ends_with_its_validation(project: Path) -> None:
    """The training's figures of a step are told first, those of its validation half a minute later."""
    id_ = add_run("timed", 0, 900.0)
    client = MlflowClient()
    begun = client.get_run(id_).info.start_time
    client.log_metric(id_, "rollout/ep_rew_mean", 850.0, begun + 60_000, 300)
    client.log_metric(id_, "eval/mean_reward", 900.0, begun + 90_000, 300)
    last = History().run(id_).curve[-1]
    assert (last["step"], last["ep_rew_mean"], last["eval_mean"], last["seconds"]) == (300, 850, 900, 90)


def test_drawings_take_the_pages_colours() -> None:
    drawn = str(svg(learning_curves({"a": HISTORY, "b": HISTORY}), "c0", "two & more"))
    assert 'aria-label="two &amp; more"' in drawn
    assert "var(--ink)" in drawn
    assert "var(--blue)" in drawn
    assert not re.search(r"#(1b1f24|0072b2|ffffff)", drawn, re.IGNORECASE)
    assert "Learning curves" in re.sub(r"<[^>]+>", "", drawn), "text stays text"
    assert set(re.findall(r'\bid="([^-"]*)-', drawn)) == {"c0"}


def test_curves_of_several_runs() -> None:
    figure = learning_curves({"a": HISTORY, "b": [{"frames": 100.0, "eval_mean": None}]})
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "a"]
    assert line.get_xydata().tolist() == [[100, 5], [200, 7]]
    figure = sorted_returns({"a": [3.0, 1.0, 2.0], "b": [5.0]})
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["b"] == [[100, 5]]
    np.testing.assert_allclose(lines["a"], [[100 / 3, 1], [200 / 3, 2], [100, 3]])


def test_a_smaller_copy_of_a_film(tmp_path: Path) -> None:
    with FilmWriter(tmp_path / "a.mp4", (96, 64), 50) as film:
        for frame in range(50):
            film.write(np.full((64, 96, 3), 4 * frame, np.uint8))
    shrink_film(tmp_path / "a.mp4", tmp_path / "b.mp4", 48, 25)
    seen = cv2.VideoCapture(str(tmp_path / "b.mp4"))
    assert (seen.get(cv2.CAP_PROP_FRAME_WIDTH), seen.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (48, 32)
    assert seen.get(cv2.CAP_PROP_FRAME_COUNT) == 25


def test_mistakes_are_told(project: Path) -> None:
    (project / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    for arguments, told in ((["nobody"], "nobody: expected the id"), (list("abcdefg"), "at most 6 runs, got 7")):
        command = [sys.executable, "-m", "pipeline.report", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert told in done.stderr
