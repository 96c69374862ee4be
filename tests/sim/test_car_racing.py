"""FastCarRacing's claim: all but the picture is gym.make("CarRacing-v3")'s, to the bit."""

import gc
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
from Box2D import b2World
from gymnasium.envs.box2d.car_dynamics import Car
from gymnasium.envs.box2d.car_racing import CarRacing
from gymnasium.utils.env_checker import check_env
from pygame.surfarray import pixels3d

from pipeline.sim.car_racing import MAX_FRAMES, FastCarRacing, LazyCarRacing
from tests.sim.driving import Driver, donut, erratic, follow_road, leave, play, varied

STOCK_INFO = {"lap_finished"}
"""What the stock class puts in ``info``, at the end of an episode only."""


class Undrawn(CarRacing):
    """The stock class without pictures: they take 98% of its time."""

    def _render(self, mode: str) -> Any:
        return np.zeros((96, 96, 3), np.uint8)


def state(env: Any) -> list[Any]:
    """Every float of the physics, exact."""
    car = env.unwrapped.car
    bodies = [car.hull, *car.wheels]
    moving = [(*b.position, b.angle, *b.linearVelocity, b.angularVelocity) for b in bodies]
    wheels = [(w.omega, w.phase, w.gas, w.brake, w.steer, w.joint.angle, len(w.tiles)) for w in car.wheels]
    skids = [(p.color, p.grass, p.poly) for p in car.particles]
    return [moving, wheels, skids, car.fuel_spent, env.unwrapped.reward, env.unwrapped.tile_visited_count]


def lockstep(ours: Any, stock: Any, seed: int, driver: Driver, frames: int) -> int:
    """Play both, compare everything but the picture; returns the number of frames."""
    ours.reset(seed=seed)
    stock.reset(seed=seed)
    assert ours.unwrapped.track == stock.unwrapped.track
    assert state(ours) == state(stock)
    for frame in range(frames):
        action = driver(stock.unwrapped, frame)
        _, *ours_says, ours_info = ours.step(action)
        _, *stock_says, stock_info = stock.step(action)
        assert ours_says == stock_says
        assert state(ours) == state(stock)
        assert stock_info.items() <= ours_info.items()
        assert ours_info["lap_finished"] == stock_info.get("lap_finished", False)
        if stock_says[1] or stock_says[2]:
            return frame + 1
    return frames


def undrawn_pair() -> tuple[Any, Any]:
    """Ours and stock, both with the stock time limit and without pictures."""
    ours = FastCarRacing()
    ours.drawing = False
    return gym.wrappers.TimeLimit(ours, MAX_FRAMES), gym.wrappers.TimeLimit(Undrawn(), MAX_FRAMES)


@pytest.mark.parametrize("driver", [follow_road, donut, leave, erratic(1), varied(2)])
def test_physics_and_rules_are_stock(driver: Driver) -> None:
    ours, stock = undrawn_pair()
    assert lockstep(ours, stock, 11, driver, 300) > 100


def test_whole_episodes_are_stock() -> None:
    """A finished or timed-out lap, a drive off the field, and the reset after each."""
    ours, stock = undrawn_pair()
    assert lockstep(ours, stock, 1, follow_road, 2000) > 500
    assert lockstep(ours, stock, 2, leave, 2000) < 500


@pytest.mark.slow
def test_hundred_whole_episodes_are_stock() -> None:
    ours, stock = undrawn_pair()
    drivers = [follow_road, varied(0), erratic(3), varied(5)]
    for seed in range(100):
        lockstep(ours, stock, seed, drivers[seed % 4], 2000)


def test_drawing_changes_no_number() -> None:
    drawn = gym.make("FastCarRacing-v3", disable_env_checker=True)
    lockstep(drawn, gym.make("CarRacing-v3", disable_env_checker=True), 3, varied(1), 60)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("domain_randomize", [True, False])
def test_keywords_of_the_stock_class_work(continuous: bool, domain_randomize: bool) -> None:
    kwargs = {"continuous": continuous, "domain_randomize": domain_randomize, "lap_complete_percent": 0.5}
    ours, stock = FastCarRacing(**kwargs), Undrawn(**kwargs)
    assert ours.action_space == stock.action_space
    ours.action_space.seed(0)
    actions = [ours.action_space.sample() for _ in range(20)]
    lockstep(ours, stock, 4, lambda env, frame: actions[frame // 3], 60)
    np.testing.assert_array_equal(ours.road_color, stock.road_color)


def test_later_resets_and_options_are_stock() -> None:
    ours, stock = FastCarRacing(domain_randomize=True), Undrawn(domain_randomize=True)
    for options in (None, {"randomize": False}, {"randomize": True}):
        ours.reset(options=options, seed=5 if options is None else None)
        stock.reset(options=options, seed=5 if options is None else None)
        assert ours.track == stock.track
        np.testing.assert_array_equal(ours.grass_color, stock.grass_color)


def test_rgb_array_is_stock() -> None:
    """Skid marks, which only this picture shows, are kept too."""
    ours, stock = FastCarRacing(render_mode="rgb_array"), CarRacing(render_mode="rgb_array")
    play(ours, 6, donut, 60)
    play(stock, 6, donut, 60)
    assert len(ours.car.particles) > 0
    np.testing.assert_array_equal(ours.render(), stock.render())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the stock action space, which is not symmetric
@pytest.mark.parametrize("grayscale", [True, False])
def test_gymnasium_accepts_the_environment(grayscale: bool) -> None:
    env = gym.make("FastCarRacing-v3", grayscale=grayscale, render_mode="rgb_array")
    assert env.spec is not None
    assert env.spec.max_episode_steps == 1000
    check_env(env.unwrapped)
    env.close()


@pytest.mark.parametrize("env", [FastCarRacing(grayscale=True, continuous=False), LazyCarRacing(continuous=False)])
def test_pickling_keeps_the_keywords(env: LazyCarRacing) -> None:
    copy = pickle.loads(pickle.dumps(env))
    assert copy.observation_space == env.observation_space
    assert copy.action_space == env.action_space


def test_without_drawing_the_last_picture_stays() -> None:
    env = FastCarRacing(grayscale=True)
    first, _ = env.reset(seed=7)
    env.drawing = False
    action = np.array([0, 1, 0], np.float32)
    for _ in range(20):
        last = env.step(action)[0]
    assert last is first
    assert not np.array_equal(env.picture(), first)


def test_lazy_pictures_are_stock() -> None:
    lazy, stock = LazyCarRacing(), CarRacing()
    ours = [step[0] for step in play(lazy, 8, donut, 10)]
    theirs = [step[0] for step in play(stock, 8, donut, 10)]
    np.testing.assert_array_equal(ours, theirs)


def test_every_pixel_of_the_canvas_is_stock_wherever_the_car_is() -> None:
    """The lazy game leaves out what is out of sight; a picture would hide a mistake at its border."""
    lazy, stock = LazyCarRacing(domain_randomize=True), CarRacing(domain_randomize=True)
    for seed in range(3):
        lazy.reset(seed=seed)
        stock.reset(seed=seed)
        rng = np.random.default_rng(seed)
        for _ in range(25):
            place, angle, seconds = rng.uniform(-350, 350, 2), rng.uniform(-4, 4), rng.choice([0.02, 0.3, 0.9, 3.0])
            for game in (lazy, stock):
                assert game.car is not None
                game.car.hull.position, game.car.hull.angle, game.t = place.tolist(), angle, seconds
            assert np.array_equal(lazy.stock_picture(), stock._render("state_pixels"))
            assert np.array_equal(pixels3d(lazy.surf), pixels3d(stock.surf))


def test_a_car_is_freed_with_all_its_shapes() -> None:
    """Gymnasium's, with pybox2d's own definitions, keeps 2.4 KB: 10 MB here."""
    world = b2World((0, 0))

    def memory_after_cars(n: int) -> int:
        for _ in range(n):
            Car(world, 0.0, 1.0, 2.0).destroy()
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    before = memory_after_cars(500)
    assert memory_after_cars(4000) - before < 3e6
