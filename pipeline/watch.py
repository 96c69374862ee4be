"""Watch a policy drive, live, and look into its head; or race it yourself.

python -m pipeline.watch [POLICY] [--track N] [--human]

POLICY is a file or a version of the registry, such as ``models:/carracing-ppo@champion`` [default: the shipped
champion]. The window shows the game, what the network sees, the distribution of its actions, its value estimate and
the return so far. Keys: space pauses, right makes one decision, n and p take the next and the previous track, - and +
change the speed, r records to ``videos/``, q or Esc leaves. With ``--human`` the arrow keys drive, and the policy is
the ghost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import EvaluateParams, Parser, fail, parse_args, track_bounds, track_seed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.agent.policy import Policy
    from pipeline.evaluation import Episode
    from pipeline.media.video import FilmWriter
    from pipeline.media.viewer import Viewer
    from pipeline.racing import Moment

CHAMPION = Path("models/champion.safetensors")
FILMS = Path("videos")
FPS = 50
WINDOW = "CarRacing"
LATEST = 120
"""Decisions whose value estimates are shown."""
SPEEDS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
KEYS = "space pause    right one decision    n / p track    − / + speed    r record    q quit"
HUMAN_KEYS = "arrows drive    space pause, again    n / p track    r record    q quit"
STEERING = 0.15
"""How far the wheel turns a frame while a key is down, and comes back when it is not."""


class Desk:
    """The window, its keys and the recorder: what a person does while somebody drives.

    Attributes:
        track: On which the next drive will be.
        leaving: The present drive is given up: for another track, or for good.
        done: For good.
    """

    def __init__(self, viewer: Viewer, track: int, keys: str = KEYS, films: Path = FILMS) -> None:
        self.viewer, self.track, self.keys, self.films = viewer, track, keys, films
        self.leaving = self.done = self.paused = self._step = False
        self._speed = SPEEDS.index(1.0)
        self._film: FilmWriter | None = None
        self._due = time.monotonic()

    @property
    def state(self) -> str:
        """What is unusual now, in words."""
        parts = ["PAUSED"] if self.paused else []
        parts += [f"{SPEEDS[self._speed]:g} x"] if SPEEDS[self._speed] != 1 else []
        return "   ".join([*parts, "RECORDING"] if self.recording else parts)

    @property
    def recording(self) -> bool:
        """Whether the frames go into a film."""
        return self._film is not None

    def _draw(self, picture: NDArray[np.uint8]) -> None:
        self.viewer.show(WINDOW, picture, f"{self.keys}        {self.state}")

    def show(self, picture: NDArray[np.uint8]) -> None:
        """Show a frame for as long as it lasts at the present speed, and do what the keys say."""
        self._draw(picture)
        if self._film:
            self._film.write(picture)
        self._due = max(self._due + 1 / (FPS * SPEEDS[self._speed]), time.monotonic())
        self._obey(picture)
        while not self.leaving and time.monotonic() < self._due:
            time.sleep(min(0.005, max(self._due - time.monotonic(), 0)))
            self._obey(picture)

    def wait_while_paused(self, picture: NDArray[np.uint8]) -> None:
        """Before a decision: wait until one is asked for, or the pause is over."""
        self._step = False
        while self.paused and not (self._step or self.leaving):
            self._draw(picture)
            time.sleep(0.02)
            self._obey(picture)

    def _obey(self, picture: NDArray[np.uint8]) -> None:
        for key in self.viewer.pressed():
            if key in ("q", "escape", "close"):
                self.leaving = self.done = True
            elif key in ("n", "p"):
                self.leaving = True
                self.track = max(self.track + (1 if key == "n" else -1), 0)
            elif key == "space":
                self.paused = not self.paused
            elif key == "right":
                self._step = True
            elif key in ("-", "[-]", "+", "=", "[+]"):
                slower = key in ("-", "[-]")
                self._speed = min(max(self._speed + (-1 if slower else 1), 0), len(SPEEDS) - 1)
            elif key == "r":
                self._toggle_recording(picture)

    def _toggle_recording(self, picture: NDArray[np.uint8]) -> None:
        from pipeline.media.video import FilmWriter

        if self._film:
            self.stop_recording()
            return
        taken = sum(1 for _ in self.films.glob(f"watch-{self.track}-*.mp4"))
        path = self.films / f"watch-{self.track}-{taken + 1}.mp4"
        self._film = FilmWriter(path, (picture.shape[1], picture.shape[0]), FPS)
        self._film.write(picture)

    def stop_recording(self) -> None:
        """Finish the film, if there is one."""
        if self._film:
            film, self._film = self._film, None
            film.close()
            print(f"{film.frames} frames -> {film.path}")

    def begin(self) -> None:
        """Before a drive."""
        self.leaving = self._step = False
        self._due = time.monotonic()


class Watcher:
    """Shows each frame of a policy's drive, with what the network makes of it."""

    def __init__(self, policy: Policy, title: str, desk: Desk) -> None:
        from pipeline.filming import Camera

        self.policy, self.desk = policy, desk
        self.camera = Camera(policy, title, self._write, keep_stills=False)
        self.values: deque[float] = deque(maxlen=LATEST)
        self._picture: Any = None

    def on_decision(self, observation: NDArray[np.uint8]) -> None:
        """Look into the head of the network, (c, h, w) uint8 before its eyes."""
        from pipeline.media.console import POINTS, Mind

        if self._picture is not None:
            self.desk.wait_while_paused(self._write_console())
        self.camera.on_decision(observation)
        self.values.append(self.camera.value)
        mean = self.policy.predict_axes(observation[None])[0]
        self.mind = Mind(self.policy.density(observation, POINTS), mean, self.values)

    def _write(self, picture: NDArray[np.uint8]) -> None:
        self._picture = picture
        if not self.desk.leaving:
            self.desk.show(self._write_console())

    def _write_console(self) -> NDArray[np.uint8]:
        from pipeline.media.console import with_console

        return with_console(self._picture, self.mind)


def watch_drive(policy: Policy, title: str, desk: Desk) -> Episode | None:
    """One drive, shown as it happens; None if it was left before its end."""
    from pipeline.evaluation import play
    from pipeline.sim.env import make_env

    desk.begin()
    watcher = Watcher(policy, title, desk)
    env = make_env(policy.observation, render_mode="rgb_array", on_frame=watcher.camera.on_frame)
    so_far = None
    with closing(env):
        for episode in play(policy, desk.track, env, watcher.on_decision):
            so_far = episode
            if desk.leaving:
                return None
    return so_far


def human_moments(desk: Desk) -> Iterator[Moment]:
    """A person's drive by the arrow keys, frame by frame, on the stock game."""
    import gymnasium as gym
    import numpy as np

    import pipeline.sim.car_racing  # noqa: F401  registers the game
    from pipeline.racing import Odometer

    env = gym.make("LazyCarRacing-v3", render_mode="rgb_array", disable_env_checker=True)
    with closing(env):
        env.reset(seed=desk.track)
        game: Any = env.unwrapped
        game.drawing = False  # nobody looks at the small picture
        odometer, steer, done = Odometer(draw=True), 0.0, False
        while not done:
            held = desk.viewer.held
            target = float(held("right")) - float(held("left"))
            steer += float(np.clip(target - steer, -STEERING, STEERING))
            action = np.array([steer, float(held("up")), 0.8 * float(held("down"))], np.float32)
            _, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            yield odometer.read(env, float(reward))


def race_human(policy: Policy, title: str, desk: Desk) -> None:
    """One race of a person against the policy's ghost, shown as it happens."""
    from pipeline.racing import Racer, draw_race, policy_moments, race

    desk.begin()
    track, racers = desk.track, [Racer("you"), Racer(title)]
    picture = None
    for _ in race(racers, [human_moments(desk), policy_moments(policy, track, draw=False)]):
        if picture is not None:
            desk.wait_while_paused(picture)
        picture = draw_race(racers, f"Track {track}")
        desk.show(picture)
        if desk.leaving or racers[0].out:
            break
    if racers[0].out and not desk.leaving:  # the result stays until a key is pressed
        desk.paused = True
        desk.wait_while_paused(draw_race(racers, f"Track {track}"))


def watch(policy: Policy, title: str, desk: Desk, human: bool) -> None:
    """Drive after drive until the person has seen enough.

    Raises:
        FilmError: A film can't be written.
    """
    try:
        while not desk.done:
            track = desk.track
            if human:
                race_human(policy, title, desk)
                continue
            episode = watch_drive(policy, title, desk)
            if episode:
                lap = "lap finished" if episode.lap_finished else f"{episode.tiles} of {episode.n_tiles} tiles"
                print(f"track {track}: return {episode.episode_return:.1f}, {lap} in {episode.frames / FPS:.2f} s")
                desk.track = track + 1
    finally:
        desk.stop_recording()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.watch", description=__doc__)
    parser.add_argument("policy", nargs="?", default=str(CHAMPION), metavar="POLICY", help=f"[default {CHAMPION}]")
    parser.add_argument(
        "--track", type=track_seed, metavar="N", help="seed of the first track [default: the first of tracks]"
    )
    parser.add_argument("--human", action="store_true", help="drive yourself; the policy is the ghost")
    params, arguments = parse_args(EvaluateParams, parser, argv)
    track = track_bounds(params.tracks)[0] if arguments.track is None else arguments.track
    from pipeline.media.viewer import Viewer, ViewerError

    try:
        with Viewer() as viewer:
            _watch(
                params, arguments.policy, Desk(viewer, track, HUMAN_KEYS if arguments.human else KEYS), arguments.human
            )
    except ViewerError as error:
        fail(error)


def _watch(params: EvaluateParams, source: str, desk: Desk, human: bool) -> None:
    from pipeline.agent.policy import PolicyError
    from pipeline.evaluation import one_thread
    from pipeline.media.video import FilmError
    from pipeline.policy_source import load_policies
    from pipeline.tracking.store import TrackingError

    try:
        ((title, policy),) = load_policies([source], params).items()
        one_thread()
        watch(policy, title, desk, human)
    except (PolicyError, FilmError, TrackingError) as error:
        fail(error)


if __name__ == "__main__":
    main()
