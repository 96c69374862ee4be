"""Charts are read back through their figures: what is drawn must be what was given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from pipeline.media import charts

TRACKS = {11: 930.0, 12: 424.0, 13: 905.0, 14: 860.0}
FINISHED = {11: True, 12: False, 13: True, 14: False}
HISTORY: list[dict[str, float | None]] = [
    {"frames": 1000, "ep_rew_mean": -20, "seconds": 60},
    {"frames": 2000, "ep_rew_mean": 300, "eval_mean": 350, "eval_std": 100, "seconds": 120},
    {"frames": 3000, "ep_rew_mean": 700, "eval_mean": None, "eval_std": None, "seconds": 300},
    {"frames": 4000, "ep_rew_mean": 880, "eval_mean": 910, "eval_std": 20, "seconds": 360},
]
ANGLES = np.linspace(0, 2 * np.pi, 200, endpoint=False)
CIRCLE = 100 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
SPEEDS = np.linspace(20, 80, 150)
ACTIONS = np.random.default_rng(0).uniform(0, 1, 400)
SIZES = [1, 2, 4, 8, 16]

PAIRS = {"B − A": [30.0, -10.0, 5.0]}
MEANS = {"B − A": (8.3, -10.0, 30.0)}
PROFILES = {
    "A": ([800.0, 900.0], [1.0, 0.5], [1.0, 0.25], [1.0, 0.75]),
    "B": ([800.0, 900.0], [1.0, 0.75], [1.0, 0.5], [1.0, 1.0]),
}

CHARTS: dict[str, Callable[..., Figure]] = {
    "learning_curve": lambda **to: charts.learning_curve(HISTORY, **to),
    "returns_by_track": lambda **to: charts.returns_by_track(TRACKS, FINISHED, **to),
    "lap_time_vs_tiles": lambda **to: charts.lap_time_vs_tiles(
        [250, 300, 340], [14, 20, 18], [True, False, True], **to
    ),
    "track_map": lambda **to: charts.track_map(CIRCLE, CIRCLE[:150], SPEEDS, [[100, 5]], **to),
    "heat_map": lambda **to: charts.heat_map(
        [[5, 20, 80]] * 5, SIZES, SIZES[:3], title="Speed", x="threads", y="envs", **to
    ),
    "paired_comparison": lambda **to: charts.paired_comparison(PAIRS, MEANS, PROFILES, **to),
    "action_histograms": lambda **to: charts.action_histograms(ACTIONS * 2 - 1, ACTIONS, ACTIONS, **to),
}


def line(figure: Figure, label: str) -> Line2D:
    return next(found for found in figure.axes[0].lines if str(found.get_label()).startswith(label))


def dots(figure: Figure, label: str) -> list[tuple[float, float]]:
    found = (c for c in figure.axes[0].collections if isinstance(c, PathCollection))
    return [tuple(p) for p in next(c for c in found if str(c.get_label()).startswith(label)).get_offsets().tolist()]


@pytest.mark.parametrize("name", CHARTS)
def test_png_decodes_and_is_not_blank(name: str, tmp_path: Path) -> None:
    CHARTS[name](path=tmp_path / "new" / "chart.png")
    with Image.open(tmp_path / "new" / "chart.png") as png:
        pixels = np.asarray(png.convert("RGB"))
    assert min(pixels.shape[:2]) >= 300
    ink = (pixels != 255).any(axis=2)
    assert 0.01 < ink.mean() < (0.9 if name == "heat_map" else 0.6)
    assert not ink[:2].any() or name == "track_map"  # nothing is cut off at the upper edge


@pytest.mark.parametrize("name", CHARTS)
def test_same_data_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    CHARTS[name](path=tmp_path / "a.png")
    CHARTS[name](path=tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_global_figures_are_kept() -> None:
    for draw in CHARTS.values():
        draw()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_learning_curve_draws_only_known_values() -> None:
    figure = charts.learning_curve(HISTORY)
    assert line(figure, "training").get_xydata().tolist() == [[1000, -20], [2000, 300], [3000, 700], [4000, 880]]
    assert line(figure, "validation").get_xydata().tolist() == [[2000, 350], [4000, 910]]


def band(figure: Figure) -> set[tuple[float, float]]:
    found = next(c for c in figure.axes[0].collections if isinstance(c, PolyCollection))
    return {(float(x), float(y)) for x, y in found.get_paths()[0].vertices}


def test_band_is_one_standard_deviation() -> None:
    assert band(charts.learning_curve(HISTORY)) == {(2000, 250), (2000, 450), (4000, 890), (4000, 930)}


def test_interval_is_taken_before_the_deviation() -> None:
    rows = [{**row, "eval_low": 1.0 * i, "eval_high": 1000.0 + i} for i, row in enumerate(HISTORY)]
    corners = band(charts.learning_curve(rows))
    assert {(2000, 1), (2000, 1001), (4000, 3), (4000, 1003)} <= corners


def test_wall_clock_stands_above_the_frames_reached_then() -> None:
    top = charts.learning_curve(HISTORY).axes[1]
    at = dict(zip((text.get_text() for text in top.get_xticklabels()), top.get_xticks(), strict=True))
    assert at["2"] == 2000  # minutes: 120 s
    assert at["5"] == 3000  # 300 s
    assert at["4"] == pytest.approx(2000 + 1000 * (240 - 120) / 180)
    assert "wall-clock [minutes]" in top.get_xlabel()


def test_learning_curve_without_clock_or_scores() -> None:
    figure = charts.learning_curve([{"frames": 1000, "ep_rew_mean": 5.0}])
    assert len(figure.axes) == 1


def test_returns_are_sorted_and_laps_told_apart() -> None:
    figure = charts.returns_by_track(TRACKS, FINISHED)
    assert dots(figure, "not finished (2)") == [(1, 424), (2, 860)]
    assert dots(figure, "lap finished (2)") == [(3, 905), (4, 930)]
    levels = {float(np.asarray(found.get_ydata())[0]) for found in figure.axes[0].lines}
    assert levels == {900.0, 914.0, np.mean(list(TRACKS.values()))}
    assert figure.axes[0].get_title(loc="left").startswith("779.8 ± 206.9 on 4 tracks, 2 ≥ 900")
    assert "12, 14, 13" in figure.axes[0].get_xlabel()


def test_finished_and_unfinished_differ_in_shape_too() -> None:
    figure = charts.returns_by_track(TRACKS, FINISHED)
    done, lost = (c for c in figure.axes[0].collections if isinstance(c, PathCollection))
    assert len(done.get_paths()[0].vertices) != len(lost.get_paths()[0].vertices)


def test_names_of_close_levels_do_not_touch() -> None:
    returns = {0: 400.0} | dict.fromkeys(range(1, 23), 930.0)  # mean 907, between 900 and 914 on a long axis
    figure = charts.returns_by_track(returns, dict.fromkeys(returns, True))
    figure.draw_without_rendering()
    boxes = sorted(text.get_window_extent().extents[[1, 3]].tolist() for text in figure.axes[0].texts)
    assert len(boxes) == 3
    assert all(lower[1] <= upper[0] + 2 for lower, upper in pairwise(boxes))


def test_lap_times_and_their_returns() -> None:
    figure = CHARTS["lap_time_vs_tiles"]()
    assert dots(figure, "lap finished (2)") == [(250, 14), (340, 18)]
    assert dots(figure, "not finished (1)") == [(300, 20)]
    assert charts._lap_return(14.0) == pytest.approx(1000 - 0.1 * 14 * 50)  # 0.1 for each of 50 frames a second
    assert charts._lap_seconds(charts._lap_return(14.0)) == pytest.approx(14.0)


def test_unfinished_laps_alone_are_inside_the_picture() -> None:
    axes = charts.lap_time_vs_tiles([250, 300], [20.0, 20.0], [False, False]).axes[0]
    assert axes.get_xlim()[0] < 250 < 300 < axes.get_xlim()[1]
    assert axes.get_ylim()[0] < 20 < axes.get_ylim()[1]


def test_lines_of_equal_speed_start_at_the_origin() -> None:
    slopes = {
        round(3.5 / (y[1] / x[1]))  # a tile is 3.5 units long
        for x, y in (found.get_data() for found in CHARTS["lap_time_vs_tiles"]().axes[0].lines)
    }
    assert slopes
    assert slopes <= {40, 50, 60, 70, 80, 90}


def test_map_shows_the_driven_line_in_its_speed() -> None:
    figure = CHARTS["track_map"]()
    driven = next(c for c in figure.axes[0].collections if isinstance(c, LineCollection))
    np.testing.assert_allclose(np.array(driven.get_segments())[:, 0], CIRCLE[:149])
    np.testing.assert_allclose(np.asarray(driven.get_array()), (SPEEDS[1:] + SPEEDS[:-1]) / 2)
    assert line(figure, "left the road").get_xydata().tolist() == [[100, 5]]


def test_road_is_as_wide_as_the_games_road() -> None:
    radii = np.linalg.norm(CHARTS["track_map"]().axes[0].patches[0].get_path().vertices, axis=1)
    np.testing.assert_allclose(
        np.unique(radii.round(3)), [100 - 40 / 6, 100 + 40 / 6], atol=0.01
    )  # TRACK_WIDTH = 40/SCALE


def test_histograms_count_every_decision() -> None:
    steer = [-1.0, -1.0, 0.05, 0.05, 0.05, 1.0, 1.0, 3.0]
    figure = charts.action_histograms(steer, ACTIONS, ACTIONS)
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    assert bars[0] == pytest.approx(25)
    assert bars[-1] == pytest.approx(37.5)
    for axes in figure.axes:
        assert sum(patch.get_height() for patch in axes.patches) == pytest.approx(100)
    assert figure.axes[0].get_xlabel() == "mean 0.39, at full 62%"


def test_colours_are_the_colour_blind_safe_ones() -> None:
    figure = charts.action_histograms(ACTIONS, ACTIONS, ACTIONS)
    seen = [axes.patches[0].get_facecolor() for axes in figure.axes]
    assert seen == [to_rgba(color) for color in ("#0072b2", "#009e73", "#d55e00")]


def test_heat_map_writes_each_value_in_its_cell_and_frames_the_largest() -> None:
    axes = charts.heat_map([[10, 20], [3000, 40], [50, 60]], [1, 2, 4], [1, 8], title="", x="threads", y="envs").axes[0]
    written = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts}
    assert written == {(0, 0): "10", (1, 0): "20", (0, 1): "3,000", (1, 1): "40", (0, 2): "50", (1, 2): "60"}
    (frame,) = axes.patches
    assert frame.get_extents().transformed(axes.transData.inverted()).bounds == pytest.approx((-0.5, 0.5, 1, 1))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "4"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("threads", "envs")


def test_a_paired_comparison_shows_sorted_differences_and_profiles() -> None:
    figure = charts.paired_comparison(PAIRS, MEANS, PROFILES)
    differences = line(figure, "B − A: +8.3 (−10.0 to +30.0)")
    assert list(differences.get_ydata()) == [-10, 5, 30]
    assert list(differences.get_xdata()) == pytest.approx([100 / 6, 50, 500 / 6])
    curves = {str(found.get_label()): found for found in figure.axes[1].lines}
    assert list(curves["A"].get_ydata()) == [100, 50]
    assert list(curves["B"].get_ydata()) == [100, 75]
    assert curves["B"].get_color() == differences.get_color() != curves["A"].get_color()
