"""MLflow's real pages and the report in a real browser: what people look at shows what was logged.

Pictures of every page are left in ``.ci/artifacts/``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Metric
from PIL import Image

from pipeline.evaluation import Episode, read_table, summarize
from pipeline.media.video import FilmWriter
from pipeline.report import report
from pipeline.tracking.registry import Registry
from pipeline.tracking.store import connect
from tests.conftest import MLFLOW_AND_DVC, ROOT
from tests.policies import write_policy
from tests.tracking.runs import begun, stored

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements-dev.txt")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

PICTURES = ROOT / ".ci/artifacts"
PATIENCE = 90_000
"""Milliseconds that a page gets; a machine that also trains is slow."""
LIGHT_PHONE, DARK_PHONE = (
    {"color_scheme": scheme, "viewport": {"width": 390, "height": 844}} for scheme in ("light", "dark")
)


class Store(NamedTuple):
    """A project with two runs, one of them the champion's, and `mlflow ui` on it."""

    folder: Path
    url: str
    experiment: str
    first: str
    second: str


CURVES = [pd.read_csv(ROOT / f"docs/recipe/before/at_240k_seed_{seed}.csv") for seed in (0, 1)]
"""The validations of two trainings."""
TRACKS = read_table(ROOT / "plots/tracks.csv")
FIGURES = summarize(TRACKS, bootstrap_samples=1000)
METRIC = "eval/mean_reward"
FRAMES_PER_SECOND = 1700
"""About what they made."""


def film(path: Path) -> Path:
    """The README's moving picture as a film."""
    with Image.open(ROOT / "docs/drive.gif") as gif, FilmWriter(path, gif.size, 12.5) as writer:
        for frame in range(gif.n_frames):
            gif.seek(frame)
            writer.write(np.asarray(gif.convert("RGB")))
    return path


def add_run(folder: Path, seed: int, tracks: list[Episode]) -> str:
    params = {"run_name": f"seed-{seed}", "seed": seed, "learning_rate": 4e-4, "frame_skip": 4}
    run = begun(f"seed-{seed}", params)
    client, start = connect(), stored(run).info.start_time
    for row in CURVES[seed].itertuples():
        spread, when = 1.96 * row.eval_std / 20**0.5, start + int(row.frames / FRAMES_PER_SECOND * 1000)
        figures = {METRIC: row.eval_mean, "eval/ci_low": row.eval_mean - spread, "eval/ci_high": row.eval_mean + spread}
        figures |= {"rollout/ep_rew_mean": row.ep_rew_mean, "best/mean_reward": CURVES[seed].eval_mean.max()}
        batch = [Metric(key, float(value), when, int(row.agent_steps)) for key, value in figures.items()]
        client.log_batch(run.id, metrics=batch)
        picture = np.full((40, 60, 3), 40 * row.Index, np.uint8)
        client.log_image(run.id, picture, key="filmstrip", step=int(row.agent_steps))
    run.metrics({f"evaluate/{key}": value for key, value in summarize(tracks, bootstrap_samples=1000).items()})
    run.table([asdict(e) for e in tracks], "evaluate/tracks.json")
    run.artifact(film(folder / "best.mp4"), "videos")
    run.artifact(ROOT / "docs/track_map.png", "plots")
    run.flush()
    client.set_terminated(run.id, "FINISHED")
    return run.id


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[Store]:
    import mlflow

    folder = tmp_path_factory.mktemp("project")
    shutil.copy(migrated_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        mlflow.set_tracking_uri(None)
        for name in MLFLOW_AND_DVC:
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setenv("DVC_ROOT", str(folder))
        patch.chdir(folder)
        first, second = add_run(folder, 0, TRACKS), add_run(folder, 1, TRACKS[:50])
        registry = Registry("carracing-ppo")
        policy = write_policy(folder / "models/policy.safetensors", seed=3)
        registry.point("champion", registry.register(policy, (2, 36, 36), first, {}))
        experiment = registry.client.get_run(first).info.experiment_id
        with serving(folder) as url:
            yield Store(folder, url, experiment, first, second)
        mlflow.set_tracking_uri(None)


class serving:
    """`mlflow ui` without a word about where the runs are, as the README has it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "_MLFLOW"))}
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "ui",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        self.log = (folder / "ui.log").open("w")
        self.server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> str:
        url = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + PATIENCE / 1000
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return url
            except OSError:
                assert self.server.poll() is None, "mlflow ui has ended"
                assert time.monotonic() < deadline, "mlflow ui does not answer"
                time.sleep(0.3)

    def __exit__(self, *exc: object) -> None:
        os.killpg(self.server.pid, 15)  # its own group: the server and its workers
        self.server.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium refuses its sandbox to root, which CI is.
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    found = browser.new_page(viewport={"width": 1500, "height": 860})
    found.set_default_timeout(PATIENCE)
    yield found
    PICTURES.mkdir(parents=True, exist_ok=True)
    found.screenshot(path=PICTURES / f"{request.node.name}.png")
    found.close()


def close_assistant(page: Any) -> None:
    """MLflow's assistant takes a third of the page."""
    page.get_by_role("button", name="Close", exact=True).click()


def plays(page: Any) -> None:
    """The page's first film gets on, and its pictures are decoded."""
    element = page.locator("video").first
    element.wait_for()
    element.evaluate("video => { video.muted = true; return video.play(); }")
    page.wait_for_function("document.querySelector('video').currentTime > 0.3")
    decoded = element.evaluate("video => video.getVideoPlaybackQuality().totalVideoFrames")
    assert decoded > 0
    assert element.evaluate("video => [video.videoWidth > 0, video.error === null]") == [True, True]


# MLflow


def test_the_run_list_shows_the_runs_and_their_score(store: Store, page: Any) -> None:
    page.goto(f"{store.url}/#/experiments/{store.experiment}/runs")
    page.get_by_role("link", name="seed-0", exact=True).wait_for()
    close_assistant(page)
    page.get_by_role("button", name="Columns").click()
    page.keyboard.type("evaluate/mean")
    page.locator("[class*=tree-treenode]").filter(has_text=re.compile("^evaluate/mean$")).click()
    page.keyboard.press("Escape")
    for tracks in (TRACKS, TRACKS[:50]):
        page.get_by_text(str(summarize(tracks, 100)["mean"])).first.wait_for()
    assert page.get_by_text("Cars trained from pixels").first.is_visible()


def test_two_runs_compared_are_two_curves(store: Store, page: Any) -> None:
    runs, metric = json.dumps([store.first, store.second]), json.dumps(METRIC)
    query = f"runs={runs}&metric={metric}&experiments={json.dumps([store.experiment])}"
    page.goto(f"{store.url}/#/metric?{query}&plot_metric_keys={json.dumps([METRIC])}")
    for name in ("seed-0", "seed-1"):
        page.get_by_text(f"{name} ({METRIC})").first.wait_for()
    close_assistant(page)
    page.locator(".js-plotly-plot .scatterlayer .trace").nth(1).wait_for(state="attached")
    for curve in CURVES:
        last = curve.iloc[-1]
        assert page.get_by_text(f"{last.eval_mean:.4f} (step={last.agent_steps:.0f})").count() >= 1


def test_a_film_plays_in_mlflow(store: Store, page: Any) -> None:
    page.goto(f"{store.url}/#/experiments/{store.experiment}/runs/{store.first}/artifacts/videos/best.mp4")
    plays(page)


def test_film_strips_have_a_slider_over_the_steps(store: Store, page: Any) -> None:
    page.goto(f"{store.url}/#/experiments/{store.experiment}/runs/{store.first}/model-metrics")
    close_assistant(page)
    page.get_by_placeholder("Search metric charts").fill("filmstrip")
    page.get_by_text("filmstrip").first.wait_for()
    page.get_by_role("slider").first.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("No image logged at this step").wait_for(state="detached")


def test_the_registry_shows_the_champion(store: Store, page: Any) -> None:
    page.goto(f"{store.url}/#/models/carracing-ppo")
    page.get_by_text("champion").first.wait_for()
    assert page.get_by_text("Version 1").first.is_visible()


# The report


@pytest.fixture(scope="module")
def reports(store: Store) -> dict[str, Path]:
    one, two = store.folder / "one.html", store.folder / "two.html"
    report(["seed-0"], one)
    report([store.first, "seed-1"], two)
    return {"one": one, "two": two}


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_report_needs_no_network_and_makes_no_error(reports: dict[str, Path], page: Any, name: str) -> None:
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(reports[name].as_uri())
    plays(page)
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.screenshot(path=PICTURES / f"report-{name}.png", full_page=True)
    text = page.inner_text("body")
    mean, low, high = (FIGURES[key] for key in ("mean", "mean_ci_low", "mean_ci_high"))
    assert f"{mean:.1f} ± {FIGURES['std']:.1f} (95% interval {low:.1f} to {high:.1f})" in text
    assert ("Parameters that differ between the runs" in text) == (name == "two")


def test_the_report_can_be_walked_by_keyboard_and_read_aloud(reports: dict[str, Path], page: Any) -> None:
    page.goto(reports["two"].as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0"), "seen when it has the focus"
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.tagName"))
    assert {"A", "VIDEO", "SUMMARY", "PRE"} <= set(reached)
    assert page.locator("html[lang]").count() == 1
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("figure > svg:not([aria-label])").count() == 0
    assert page.locator("video:not([aria-label])").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    levels = page.locator("h1, h2, h3").evaluate_all("found => found.map(each => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = page.locator("[id]").evaluate_all("found => found.map(each => each.id)")
    assert len(ids) == len(set(ids)), "several drawings in one page keep their names apart"


CONTRAST = """
element => {
  const rgb = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = color => {
    const [r, g, b] = rgb(color).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = element;
  while (behind && /rgba\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(behind).backgroundColor)) {
    behind = behind.parentElement;
  }
  const ink = element.closest('svg') ? getComputedStyle(element).fill : getComputedStyle(element).color;
  const pair = [light(ink), light(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
}
"""


@pytest.mark.parametrize("look", [LIGHT_PHONE, DARK_PHONE], ids=["light", "dark"])
def test_the_report_on_a_phone(reports: dict[str, Path], browser: Any, look: dict[str, Any]) -> None:
    page = browser.new_page(**look)
    page.goto(reports["two"].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is not wider than the phone"
    texts = page.locator("h1, h2, p, td, th, figcaption, code, a, summary, svg text").all()
    visible = [each for each in texts if each.is_visible() and each.text_content().strip()]
    low = [(each.text_content(), ratio) for each in visible if (ratio := each.evaluate(CONTRAST)) < 4.5]
    assert low == [], "WCAG's contrast of text, level AA"
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"report-phone-{look['color_scheme']}.png", full_page=True)
    page.close()
