"""Watching: the drive is the evaluated one, keys do what they say, a person's drive is the stock game's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch

from pipeline.agent import policy as policy_files
from pipeline.agent.policy import Policy, load
from pipeline.evaluation import drive
from pipeline.media.canvas import TEXT
from pipeline.media.console import PLOTS, SIZE, Mind, with_console
from pipeline.media.overlay import SIZE as FILM_SIZE
from pipeline.media.viewer import Viewer
from pipeline.watch import WINDOW, Desk, human_moments, race_human, watch, watch_drive
from tests.conftest import ROOT
from tests.policies import NETWORK, OBSERVATION, write_policy
from tests.screen import Screen, screen, wait_until

__all__ = ["screen"]

TRACK = 10_000


class ScriptedViewer:
    """Keys by the number of the picture on which they are pressed; keeps what was shown."""

    def __init__(self, keys: dict[int, str], held: Callable[[str], bool] = lambda key: False) -> None:
        self.keys, self.held = dict(keys), held
        self.shown: list[np.ndarray] = []
        self.captions: list[str] = []

    def show(self, name: str, picture: np.ndarray, caption: str = "") -> None:
        self.shown.append(picture)
        self.captions.append(caption)

    def pressed(self) -> list[str]:
        due = [number for number in self.keys if number <= len(self.shown)]
        return [self.keys.pop(number) for number in due]


def desk(keys: dict[int, str], **more: Any) -> Desk:
    found = Desk(ScriptedViewer(keys, **more), TRACK, films=Path("videos"))  # type: ignore[arg-type]
    found._speed = 5  # four times as fast
    return found


@pytest.fixture
def random_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.chdir(tmp_path)
    return load(write_policy(tmp_path / "one.safetensors", seed=3))


def distinct(pictures: list[np.ndarray]) -> int:
    return len({picture.tobytes() for picture in pictures})


# What is in its head


def test_a_density_has_area_one_and_the_mean_that_is_shown(random_policy: Policy) -> None:
    observation = np.random.default_rng(0).integers(0, 256, (2, 36, 36), np.uint8)
    density = random_policy.density(observation, 2001)
    places = np.linspace(-1, 1, 2001)
    np.testing.assert_allclose(np.trapezoid(density, places, axis=0), 1, atol=1e-3)
    means = np.trapezoid(density * places[:, None], places, axis=0)
    np.testing.assert_allclose(means, random_policy.predict_axes(observation[None])[0], atol=1e-3)


def test_a_gaussian_density_is_the_bell_curve(tmp_path: Path) -> None:
    shape = NETWORK.model_copy(update={"action_head": "gaussian", "log_std_init": -1.0})
    seen = OBSERVATION.model_copy(update={"action_axes": "steer_gas_brake"})
    torch.manual_seed(0)
    policy_files.save(tmp_path / "g.safetensors", policy_files.build_network(seen, shape), seen, shape, 0)
    policy = load(tmp_path / "g.safetensors")
    observation = np.zeros((2, 36, 36), np.uint8)
    mean = policy.module.get_distribution(torch.from_numpy(observation[None])).mode()[0].detach().numpy()
    places = np.stack([np.linspace(low, 1, 11) for low in (-1, 0, 0)], axis=1)
    std = np.exp(-1.0)
    expected = np.exp(-(((places - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(policy.density(observation, 11), expected, rtol=1e-4)


def test_the_action_is_marked_where_it_is() -> None:
    film = np.zeros((FILM_SIZE[1], FILM_SIZE[0], 3), np.uint8)
    density = np.ones((50, 2), np.float32)
    console = with_console(film, Mind(density, np.array([-1.0, 0.5], np.float32), [1.0, 2.0]))[FILM_SIZE[1] :]
    assert console.shape == (SIZE[1] - FILM_SIZE[1], SIZE[0], 3)
    marks = np.flatnonzero((console[PLOTS.y + 2, : PLOTS.x + PLOTS.width] == TEXT).all(axis=1))
    width = (PLOTS.width - 20) // 2
    assert marks.tolist()[:2] == [PLOTS.x, PLOTS.x + 1]
    assert marks[2] == PLOTS.x + width + 20 + int(0.75 * (width - 2))


# Keys


@pytest.mark.slow
def test_watched_to_the_end_it_is_the_evaluated_drive(random_policy: Policy) -> None:
    seat = desk({})
    seat.viewer.show = lambda *_: None  # type: ignore[method-assign]  # 2 GB of pictures
    assert watch_drive(random_policy, "one", seat) == drive(random_policy, TRACK)


def test_pause_one_decision_and_leave(random_policy: Policy) -> None:
    keys = {5: "space", 30: "right", 60: "right", 100: "q"}
    seat = desk(keys)
    watch(random_policy, "one", seat, human=False)
    viewer: Any = seat.viewer
    skip = OBSERVATION.frame_skip
    assert distinct(viewer.shown[:29]) == skip, "the decision under way is finished, then it waits"
    assert distinct(viewer.shown[:59]) == 2 * skip
    assert distinct(viewer.shown) == 3 * skip
    assert "PAUSED" in viewer.captions[20]
    assert seat.done


def test_next_and_previous_track_and_a_film_of_what_was_shown(random_policy: Policy) -> None:
    seat = desk({10: "r", 40: "n", 60: "p", 80: "p", 90: "r", 95: "q"})
    watch(random_policy, "one", seat, human=False)
    assert seat.track == TRACK - 1
    viewer: Any = seat.viewer
    film = cv2.VideoCapture(f"videos/watch-{TRACK}-1.mp4")
    frames = [picture for ok, picture in iter(film.read, (False, None)) if ok]
    assert len(frames) == 90 - 10 + 1
    error = np.abs(frames[40][..., ::-1].astype(float) - viewer.shown[10 + 40 - 1]).mean()
    assert error < 4, "H.264 of the same picture"


def test_speed(random_policy: Policy) -> None:
    seat = desk({2: "-", 4: "-", 6: "-", 8: "+", 20: "q"})
    watch(random_policy, "one", seat, human=False)
    viewer: Any = seat.viewer
    assert [caption.rpartition("   ")[2].strip() for caption in viewer.captions[:8]] == [
        "4 x", "4 x", "2 x", "2 x", "", "", "0.5 x", "0.5 x"
    ]  # fmt: skip


# A person drives


def test_a_persons_drive_is_the_stock_games() -> None:
    down = {"up", "left"}
    moments = human_moments(desk({}, held=lambda key: key in down))
    stock = gym.make("CarRacing-v3")
    stock.reset(seed=TRACK)
    total, steer = 0.0, 0.0
    for frame in range(120):
        down.clear()
        down.update({"up"} if frame % 40 < 25 else {"down", "right"})
        target = 1.0 if "right" in down else 0.0
        steer += float(np.clip(target - steer, -0.15, 0.15))
        action = np.array([steer, "up" in down, 0.8 * ("down" in down)], np.float32)
        _, reward, *_ = stock.step(action)
        total += float(reward)
        moment = next(moments)
        assert (moment.x, moment.y) == tuple(stock.unwrapped.car.hull.position)
        assert moment.episode_return == pytest.approx(total)
        assert moment.picture is not None


def test_a_race_against_the_ghost(random_policy: Policy) -> None:
    seat = desk({25: "q"}, held=lambda key: key == "up")
    race_human(random_policy, "ghost", seat)
    viewer: Any = seat.viewer
    assert distinct(viewer.shown) == 25
    assert seat.done


# For real


def test_keys_of_a_real_keyboard(screen: Screen) -> None:
    with Viewer() as viewer:
        viewer.show(WINDOW, np.zeros((100, 200, 3), np.uint8))
        wait_until(lambda: screen.window(WINDOW) and (viewer.pressed() or True))
        screen.press("space", WINDOW)
        seen: list[str] = []
        wait_until(lambda: seen.extend(viewer.pressed()) or "space" in seen)
        assert not viewer.held("up")
        screen.hold("Up")
        wait_until(lambda: viewer.held("up"))
        screen.release("Up")
        wait_until(lambda: not viewer.held("up"))


@pytest.mark.slow
def test_the_shipped_champion_is_watched_on_a_screen(params_here: Path, screen: Screen) -> None:
    champion = str(ROOT / "models/champion.safetensors")
    command = [sys.executable, "-m", "pipeline.watch", champion, "--track", "20001"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=params_here
    )
    wait_until(lambda: screen.window(WINDOW), shown)
    before = screen.pixels()
    wait_until(lambda: (screen.pixels() != before).any(axis=2).sum() > 10_000, shown)
    screen.press("q", WINDOW)
    output, _ = shown.communicate(timeout=60)
    assert shown.returncode == 0, output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [([], "no screen to open a window on"), (["--track", "-1"], "--track: expected 0 to")],
)
def test_mistakes_are_told(params_here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str) -> None:
    for name, value in {"DISPLAY": "", "WAYLAND_DISPLAY": "", "SDL_VIDEODRIVER": "", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "pipeline.watch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert told in done.stderr
