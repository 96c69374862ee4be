"""The windows on a training show the arrays themselves, read back from a real X server; looking changes nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.agent.build import build_model
from pipeline.agent.ppo import DrivingPPO
from pipeline.config import ConfigError, TrainParams, load
from pipeline.live import GAP, PREPROCESSED, RAW, Look, TrainingWindows
from pipeline.media.viewer import CAPTION_HEIGHT, Viewer
from pipeline.sim.training_env import make_training_env
from pipeline.sim.vec_env import SharedMemoryVecEnv
from pipeline.train import one_environment
from tests.conftest import ROOT
from tests.screen import Screen, screen, wait_until

__all__ = ["screen"]

SIZE, STACK, SCALE = 40, 3, 5
SMALL: dict[str, Any] = {
    "n_envs": 1,
    "n_steps": 16,
    "batch_size": 16,
    "n_epochs": 1,
    "total_timesteps": 32,
    "num_threads": 1,
    "cnn_channels": [2, 2, 2],
    "features_dim": 8,
    "resize": SIZE,
    "frames_stack": STACK,
}


def small(**changes: Any) -> TrainParams:
    return load(TrainParams, **{**SMALL, **changes})


def learn(params: TrainParams, onlookers: list[Any]) -> DrivingPPO:
    env = SharedMemoryVecEnv([partial(make_training_env, params, index) for index in range(params.n_envs)], n_workers=0)
    try:
        return build_model(params, env).learn(params.total_timesteps, onlookers)
    finally:
        env.close()


class Witness(TrainingWindows):
    """Beside what the network is called with, what the screen then shows and what the game draws."""

    def __init__(self, screen: Screen, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.screen = screen
        self.seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def _before_decision(self, network: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        super()._before_decision(network, arguments)
        if len(arguments[0]) and self.viewer.is_open:
            game = self.training_env.get_attr("unwrapped")[0]
            self.seen.append((arguments[0][0].numpy().copy(), game.stock_picture(), self.screen.pixels()))


def cut(pixels: np.ndarray, screen: Screen, window: str) -> np.ndarray:
    """The window's part of a screenshot, without the line of text."""
    geometry = screen.window(window)
    assert geometry is not None
    left, top, width, height = geometry
    return pixels[top : top + height - CAPTION_HEIGHT, left : left + width]


@pytest.mark.parametrize("grayscale", [True, False])
def test_the_windows_show_the_very_arrays(params_here: Path, screen: Screen, grayscale: bool) -> None:
    params = small(grayscale=grayscale)
    with Viewer() as viewer:
        witness = Witness(screen, params, viewer, Look(scale=SCALE))
        witness.close = lambda: None  # type: ignore[method-assign]  # they are measured when the training is over
        learn(params, [witness])
        assert len(witness.seen) == params.total_timesteps
        for observation, picture, pixels in witness.seen:
            raw, stack = cut(pixels, screen, RAW), cut(pixels, screen, PREPROCESSED)
            assert raw.shape == (96 * SCALE, 96 * SCALE, 3)
            np.testing.assert_array_equal(raw[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE], picture)
            assert stack.shape == (SIZE * SCALE, STACK * SIZE * SCALE + (STACK - 1) * GAP, 3)
            channels = len(observation) // STACK
            for place in range(STACK):
                left = place * (SIZE * SCALE + GAP)
                shown = stack[SCALE // 2 :: SCALE, left + SCALE // 2 : left + SIZE * SCALE : SCALE]
                given = observation[place * channels : (place + 1) * channels].transpose(1, 2, 0)
                np.testing.assert_array_equal(shown, np.broadcast_to(given, (SIZE, SIZE, 3)))
        assert len({picture.tobytes() for _, picture, _ in witness.seen}) > 16, "it moves"


def test_looking_changes_no_bit(params_here: Path, screen: Screen) -> None:
    plain = learn(small(), []).policy.state_dict()
    with Viewer() as viewer:
        looked = learn(small(), [TrainingWindows(small(), viewer, Look())]).policy.state_dict()
        assert not viewer.is_open, "the windows go with the training"
    assert all(torch.equal(plain[name], looked[name]) for name in plain)


def test_every_nth_decision_and_only_what_the_network_sees(params_here: Path, screen: Screen) -> None:
    shown: list[tuple[str, str]] = []

    class Counting(Viewer):
        def show(self, name: str, picture: np.ndarray, caption: str = "") -> None:
            super().show(name, picture, caption)
            shown.append((name, caption))

    with Counting() as viewer:
        learn(small(), [TrainingWindows(small(), viewer, Look(every=10, raw=False))])
    assert shown == [(PREPROCESSED, f"{STACK} x {SIZE} x {SIZE}, newest on the right")] * 4


def test_one_environment_learns_from_as_much(params_here: Path) -> None:
    many = small(n_envs=4, n_steps=8, total_timesteps=64)
    one = one_environment(many)
    assert (one.n_envs, one.n_steps) == (1, 32)
    assert one.fingerprint() != many.fingerprint()
    assert one_environment(one).fingerprint() == one.fingerprint()
    with pytest.raises(ConfigError, match=r"131,072: more than n_steps may be"):
        one_environment(small(n_envs=2, n_steps=65536, total_timesteps=10**6))


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.train", *flags]


@pytest.mark.parametrize(
    ("display", "driver", "told"),
    [("", "", "neither DISPLAY nor"), ("", "dummy", "driver 'dummy'"), (":4711", "", "no screen to open a window on")],
)
def test_without_a_screen_it_stops_before_training(
    project: Path, monkeypatch: pytest.MonkeyPatch, display: str, driver: str, told: str
) -> None:
    shutil.copy(ROOT / "params.yaml", project)
    for name, value in {"DISPLAY": display, "WAYLAND_DISPLAY": "", "SDL_VIDEODRIVER": driver}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(command("--visual"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert "xvfb-run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    "flags", [["--render-freq", "3"], ["--visual-only-preproc"], ["--visual", "--render-freq", "0"]]
)
def test_mistaken_flags_are_told(project: Path, flags: list[str]) -> None:
    shutil.copy(ROOT / "params.yaml", project)
    done = subprocess.run(command(*flags), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected" in done.stderr


@pytest.mark.slow
def test_escape_closes_the_windows_and_training_goes_on(project: Path, screen: Screen) -> None:
    shutil.copy(ROOT / "params.yaml", project)
    values = {**SMALL, "n_envs": 2, "total_timesteps": 1024, "eval_freq": 0, "n_eval_episodes": 1, "save_freq": 0}
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    training = subprocess.Popen(
        command("--visual", *flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=project
    )
    wait_until(lambda: screen.window(PREPROCESSED), training)
    screen.press("Escape", RAW)
    wait_until(lambda: screen.window(RAW) is None and screen.window(PREPROCESSED) is None, training)
    assert training.poll() is None
    output, _ = training.communicate(timeout=120)
    assert training.returncode == 0, output
    assert "one environment instead of 2, with n_steps 32 instead of 16" in output
    assert (project / "models/final_model.safetensors").exists()
