"""The project's charts, in one style: readable when small, safe for colour-blind eyes, same data -> same bytes.

Every chart returns its `Figure` and, given a path, also writes it there as PNG. Figures are made without pyplot, whose
global state keeps every figure alive and is not safe in threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.box2d.car_racing import FPS, TRACK_DETAIL_STEP, TRACK_WIDTH
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

INK = "#1b1f24"
FAINT = "#6b7480"
GRID = "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"  # Okabe and Ito's palette
ROAD = "#d5d9de"
RUNS = (BLUE, ORANGE, GREEN, RED, "#cc79a7", "#56b4e9")
MARKERS = "osD^vP"
"""Colour and mark of each of several runs, in their order."""

SOLVED = 900.0
"""Mean return at which CarRacing counts as solved."""
ANCHOR = 914.0
"""Best published mean raw return: AttentionAgent, 914 +- 15 over 100 episodes (Tang, Nguyen and Ha, 2020)."""
COST_PER_SECOND = 0.1 * FPS
"""A frame costs 0.1, and a full lap earns 1000: a lap of t seconds returns 1000 - 5 t."""


def learning_curve(
    history: Sequence[Mapping[str, float | None]], path: str | Path | None = None, *, interval: str = "95% interval"
) -> Figure:
    """Training return and validation score against frames, with wall-clock on top when it is known.

    Args:
        history: One row per log line with ``frames`` and any of ``ep_rew_mean``, ``eval_mean``, ``eval_std`` (band: one
            standard deviation), ``eval_low`` and ``eval_high`` (band: that interval), ``seconds`` since the start. A
            value that is absent or None leaves no point.
        path: PNG to write.
        interval: What ``eval_low`` and ``eval_high`` are.
    """
    figure, axes = _figure("Learning curve", "environment frames", "raw return")
    frames = _column(history, "frames")
    _line(axes, frames, _column(history, "ep_rew_mean"), "training, sampled actions", color=ORANGE)
    score = _column(history, "eval_mean")
    band = "± 1 std" if not np.isfinite(_column(history, "eval_low")).any() else interval
    _line(axes, frames, score, f"validation, {band}", color=BLUE, marker="o", markersize=5)
    _band(axes, frames, *_interval(history, score))
    _levels(axes, [(SOLVED, "900", FAINT)])
    axes.set_xlim(0, max(float(np.nanmax(frames, initial=1)), 1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(axes, loc="lower right")
    seconds = _column(history, "seconds")
    if np.isfinite(seconds).any():
        _clock(axes, frames, seconds)
    return _finish(figure, path)


def learning_curves(
    histories: Mapping[str, Sequence[Mapping[str, float | None]]], path: str | Path | None = None
) -> Figure:
    """Validation score of several runs against frames, with their intervals.

    Args:
        histories: Rows as of :func:`learning_curve`, by the run's name; at most six runs.
        path: PNG to write.
    """
    figure, axes = _figure("Learning curves: validation", "environment frames", "raw return")
    for (name, history), color, marker in zip(histories.items(), RUNS, MARKERS, strict=False):
        frames, score = _column(history, "frames"), _column(history, "eval_mean")
        _line(axes, frames, score, name, color=color, marker=marker, markersize=5)
        _band(axes, frames, *_interval(history, score), color)
    _levels(axes, [(SOLVED, "900", FAINT)])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(axes, loc="lower right")
    return _finish(figure, path)


def curves_over_seeds(
    groups: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: str | Path | None = None, *, y: str
) -> Figure:
    """Learning curves of settings on several seeds: each seed thin, their median thick, their range as a band.

    Args:
        groups: By the setting's name, per seed its points (frames, value); at most six settings.
        path: PNG to write.
        y: What the values are.
    """
    figure, axes = _figure("Learning curves over seeds: median and range", "environment frames", y)
    for (name, seeds), color in zip(groups.items(), RUNS, strict=False):
        curves = [np.asarray(points, float).reshape(-1, 2) for points in seeds if len(points)]
        for curve in curves:
            axes.plot(*curve.T, color=color, linewidth=0.7, alpha=0.6)
        frames = np.unique(np.concatenate([curve[:, 0] for curve in curves])) if curves else np.zeros(0)
        first, last = (max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)) if curves else (0.0, 0.0)
        frames = frames[(first <= frames) & (frames <= last)]  # where all of them are
        values = np.array([np.interp(frames, *curve.T) for curve in curves]).reshape(-1, len(frames))  # (seeds, n)
        if values.size:
            label = f"{name}, {len(curves)} {'seed' if len(curves) == 1 else 'seeds'}"
            _line(axes, frames, np.median(values, axis=0), label, color=color, marker="o", markersize=4)
            _band(axes, frames, values.min(axis=0), values.max(axis=0), color)
    _levels(axes, [(SOLVED, "900", FAINT)])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(axes, loc="lower right")
    return _finish(figure, path)


def sorted_returns(returns: Mapping[str, Sequence[float]], path: str | Path | None = None) -> Figure:
    """Returns of several runs, each sorted, over the share of tracks: the curve that lies higher is the better driver.

    Args:
        returns: Raw returns by the run's name; at most six runs.
        path: PNG to write.
    """
    figure, axes = _figure("Returns, worst track first", "share of the tracks [%]", "raw return")
    for (name, values), color in zip(returns.items(), RUNS, strict=False):
        share = 100 * np.arange(1, len(values) + 1) / max(len(values), 1)
        axes.plot(
            share, np.sort(np.asarray(values, float)), label=name, color=color, linewidth=2, drawstyle="steps-mid"
        )
    _levels(axes, [(ANCHOR, "914 published", GREEN), (SOLVED, "900 solved", FAINT)])
    axes.set_xlim(0, 100)
    _legend(axes, loc="lower right")
    return _finish(figure, path)


def paired_comparison(
    differences: Mapping[str, ArrayLike],
    means: Mapping[str, tuple[float, float, float]],
    profiles: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    path: str | Path | None = None,
) -> Figure:
    """What ``compare`` found: differences by track, each sorted, and performance profiles.

    A performance profile is the share of drives that return more than a score, over all scores (Agarwal et al. 2021):
    of two drivers, the one whose curve is higher everywhere is the better one.

    Args:
        differences: Returns less the first side's on the same tracks, by the name of the pair.
        means: Their mean with the ends of its interval, by the same names.
        profiles: Scores, shares above them, and the ends of the shares' intervals, by the side's name; the first first.
        path: PNG to write.
    """
    figure = Figure(figsize=(11.0, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    _style(left, "Difference on each track, sorted")
    left.set_xlabel("share of the tracks [%]")
    left.set_ylabel("difference of the raw returns")
    left.axhline(0, color=FAINT, linewidth=1.2)
    colors = {name: RUNS[place % len(RUNS)] for place, name in enumerate(profiles)}
    for color, (name, values) in zip(list(colors.values())[1:], differences.items(), strict=False):
        ordered = np.sort(np.asarray(values, float))
        share = 100 * (np.arange(len(ordered)) + 0.5) / max(len(ordered), 1)
        mean, low, high = means[name]
        label = f"{name}: {mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
        left.plot(share, ordered, color=color, marker="o", markersize=3, linewidth=1, label=label)
        left.axhspan(low, high, color=color, alpha=0.15, linewidth=0)
        left.axhline(mean, color=color, linewidth=1.2, linestyle=(0, (5, 3)))
    left.set_xlim(0, 100)
    if differences:
        _legend(left, loc="upper left")
    _style(right, "Performance profile")
    right.set_xlabel("raw return")
    right.set_ylabel("share of drives above it [%]")
    for place, (name, curve) in enumerate(profiles.items()):
        scores, share, lower, upper = (np.asarray(values, float) for values in curve)
        right.plot(
            scores, 100 * share, color=colors[name], linewidth=2, label=name, linestyle="-:"[place // len(RUNS) % 2]
        )
        _band(right, scores, 100 * lower, 100 * upper, colors[name])
    right.set_ylim(0, 102)
    _legend(right, loc="lower left")
    return _finish(figure, path)


def returns_by_track(
    returns: Mapping[int, float], finished: Mapping[int, bool], path: str | Path | None = None
) -> Figure:
    """Return of every track, worst first; finished and unfinished laps differ in colour and in shape.

    Args:
        returns: Raw return by track seed.
        finished: Whether the lap was finished, by track seed.
        path: PNG to write.
    """
    tracks = sorted(returns, key=lambda track: returns[track])
    values = np.array([returns[track] for track in tracks])
    whole = np.array([finished[track] for track in tracks], dtype=bool)
    rank = np.arange(1, len(tracks) + 1)
    solved = int((values >= SOLVED).sum())
    title = f"{values.mean():.1f} ± {values.std():.1f} on {len(values)} tracks, {solved} ≥ 900"
    worst = ", ".join(str(track) for track in tracks[:3]) + (" …" if len(tracks) > 3 else "")
    figure, axes = _figure(title, f"tracks, worst first: {worst}", "raw return")
    _two_kinds(axes, rank, values, whole)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    mean = float(values.mean())
    _levels(axes, [(ANCHOR, "914 published", GREEN), (SOLVED, "900 solved", FAINT), (mean, f"{mean:.0f} mean", BLUE)])
    return _finish(figure, path)


def lap_time_vs_tiles(
    n_tiles: ArrayLike, lap_times: ArrayLike, finished: ArrayLike, path: str | Path | None = None
) -> Figure:
    """Lap time against the track's length, over lines of equal average speed; return of a full lap on the right.

    Args:
        n_tiles: Tiles of each track.
        lap_times: Seconds until the lap, or the episode, ended.
        finished: Whether every tile was visited.
        path: PNG to write.
    """
    tiles, times, whole = np.asarray(n_tiles, float), np.asarray(lap_times, float), np.asarray(finished, bool)
    figure, axes = _figure(
        "Lap time and track length", "tiles of the track; faint: equal speed [units/s]", "lap time [s]"
    )
    _two_kinds(axes, tiles, times, whole)
    axes.margins(0.08)
    axes.set_xlim(
        axes.get_xlim()
    )  # the points alone decide what is shown; autoscale(False) would come before they count
    axes.set_ylim(axes.get_ylim())
    _equal_speeds(axes, (40, 50, 60, 70, 80, 90))
    right = axes.secondary_yaxis("right", functions=(_lap_return, _lap_seconds))
    right.set_ylabel("return of a full lap", color=FAINT)
    right.tick_params(colors=FAINT, labelsize=9)
    right.spines["right"].set_visible(False)
    return _finish(figure, path)


def track_map(
    track: ArrayLike,
    trajectory: ArrayLike,
    speed: ArrayLike,
    lost: ArrayLike = (),
    path: str | Path | None = None,
    *,
    title: str = "Driven line",
) -> Figure:
    """The road from above with the driven line in the colour of its speed.

    Args:
        track: Centre line of the road, (n, 2) world units.
        trajectory: Positions of the car, (t, 2) world units.
        speed: Speed at each of them, (t,) world units per second.
        lost: Places where the car left the road, (m, 2) world units.
        path: PNG to write.
        title: Written above the map.
    """
    points, pace = np.asarray(trajectory, float), np.asarray(speed, float)
    figure, axes = _figure(title, size=(7.0, 6.2))
    _draw_road(axes, np.asarray(track, float))
    line = _colored_line(axes, points, pace)
    axes.plot(*points[0], "o", color="white", markeredgecolor=INK, markersize=8, label="start", zorder=4)
    places = np.asarray(lost, float).reshape(-1, 2)
    if len(places):
        style: dict[str, Any] = {"color": RED, "markeredgecolor": "white", "markersize": 12}
        axes.plot(*places.T, "X", label="left the road", zorder=5, **style)
    axes.set_aspect("equal")
    axes.set_axis_off()
    _legend(axes, loc="best")
    bar = figure.colorbar(line, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label("speed [units/s]", color=INK)
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
    return _finish(figure, path)


def action_histograms(steer: ArrayLike, gas: ArrayLike, brake: ArrayLike, path: str | Path | None = None) -> Figure:
    """How often each action was used: three histograms in per cent of the decisions.

    Args:
        steer: -1 to 1, one value per decision.
        gas: 0 to 1.
        brake: 0 to 1.
        path: PNG to write.
    """
    figure = Figure(figsize=(9.6, 3.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    kinds = (("steer", steer, -1.0, BLUE), ("gas", gas, 0.0, GREEN), ("brake", brake, 0.0, RED))
    for axes, (name, values, low, color) in zip(panels, kinds, strict=True):
        _histogram(axes, name, np.asarray(values, float), low, color)
    panels[0].set_ylabel("share of decisions [%]")
    return _finish(figure, path)


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[int],
    columns: Sequence[int],
    path: str | Path | None = None,
    *,
    title: str,
    x: str,
    y: str,
) -> Figure:
    """A number per cell, written in it; the largest cell has a frame.

    Args:
        values: (rows, columns), larger is better.
        rows: Name of each row, the first at the bottom.
        columns: Name of each column.
        path: PNG to write.
        title: Written above the map.
        x: What the columns are.
        y: What the rows are.
    """
    cells = np.asarray(values, float)
    figure, axes = _figure(title, x, y, size=(2.4 + 0.9 * len(columns), 2.0 + 0.5 * len(rows)))
    axes.grid(False)
    axes.imshow(cells, cmap="viridis", vmin=0, origin="lower", aspect="auto")
    axes.set_xticks(range(len(columns)), [str(name) for name in columns])
    axes.set_yticks(range(len(rows)), [str(name) for name in rows])
    for row, column in np.ndindex(cells.shape):
        dark = cells[row, column] < 0.6 * cells.max()  # viridis is dark below
        color = "white" if dark else INK
        axes.text(column, row, f"{cells[row, column]:,.0f}", ha="center", va="center", size=9, color=color)
    top, side = np.unravel_index(int(cells.argmax()), cells.shape)
    corner = (float(side) - 0.5, float(top) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=3, clip_on=False))
    return _finish(figure, path)


def _figure(title: str, x: str = "", y: str = "", size: tuple[float, float] = (8.0, 4.5)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _style(axes, title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})  # no version inside: same data, same bytes
    return figure


def _column(history: Sequence[Mapping[str, float | None]], key: str) -> Floats:
    values = [row.get(key) for row in history]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _line(axes: Axes, x: Floats, y: Floats, label: str, **style: Any) -> None:
    known = np.isfinite(x) & np.isfinite(y)  # rows without this value must not cut the line
    if known.any():
        axes.plot(x[known], y[known], label=label, linewidth=1.8, **style)


def _interval(history: Sequence[Mapping[str, float | None]], score: Floats) -> tuple[Floats, Floats]:
    low, high, spread = (_column(history, key) for key in ("eval_low", "eval_high", "eval_std"))
    return np.where(np.isfinite(low), low, score - spread), np.where(np.isfinite(high), high, score + spread)


def _band(axes: Axes, x: Floats, low: Floats, high: Floats, color: str = BLUE) -> None:
    known = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
    if known.any():
        axes.fill_between(x[known], low[known], high[known], color=color, alpha=0.15, linewidth=0)


def _levels(axes: Axes, levels: Sequence[tuple[float, str, str]]) -> None:
    """Dashed lines at (value, label, color), named at the right edge without writing one name over another."""
    for value, _, color in levels:
        axes.axhline(value, color=color, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    low, high = axes.get_ylim()
    place = 0.0
    for value, label, color in sorted(levels):
        place = max(place + 0.045, (value - low) / (high - low))  # a name is 0.04 of the axes high
        axes.text(1.008, place, label, color=color, size=8, va="center", transform=axes.transAxes)
    axes.set_ylim(low, high)


def _legend(axes: Axes, **place: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **place)


def _clock(axes: Axes, frames: Floats, seconds: Floats) -> None:
    """Wall-clock ticks on the upper edge, each above the frame count reached at that time."""
    known = np.isfinite(frames) & np.isfinite(seconds)
    x, time = np.append(0, frames[known]), np.append(0, np.maximum.accumulate(seconds[known]))
    unit, name = (3600.0, "hours") if time[-1] > 3 * 3600 else (60.0, "minutes")
    ticks = [
        tick
        for tick in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(0, time[-1] / unit)
        if 0 <= tick * unit <= time[-1]
    ]
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.set_xticks(np.interp(np.array(ticks) * unit, time, x), [f"{tick:g}" for tick in ticks])
    top.set_xlabel(f"wall-clock [{name}]", color=FAINT)
    top.tick_params(colors=FAINT, labelsize=9)
    top.spines[:].set_visible(False)


def _two_kinds(axes: Axes, x: Floats | NDArray[np.int64], y: Floats, whole: NDArray[np.bool_]) -> None:
    kinds = ((whole, 34, BLUE, "o", "lap finished"), (~whole, 46, RED, "X", "not finished"))
    for these, size, color, marker, name in kinds:
        if these.any():
            style: dict[str, Any] = {"color": color, "marker": marker, "edgecolors": "white", "linewidths": 0.6}
            axes.scatter(x[these], y[these], size, label=f"{name} ({these.sum()})", zorder=3, **style)
    _legend(axes, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1, handletextpad=0.1)


def _equal_speeds(axes: Axes, speeds: Sequence[float]) -> None:
    """Faint lines of equal average speed along the centre line, each named where it leaves the picture."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for speed in speeds:
        slope = TRACK_DETAIL_STEP / speed  # seconds per tile
        x = min(right, top / slope)
        if x <= left + 0.03 * (right - left) or x * slope <= bottom:
            continue
        axes.plot([left, x], [left * slope, x * slope], color=GRID, linewidth=1.2, zorder=1)
        side, up = ("right", 2) if x == right else ("left", -10)  # above the line, or beside it under the upper edge
        axes.annotate(
            f"{speed:g}",
            (x, x * slope),
            (3 if up < 0 else -3, up),
            textcoords="offset points",
            color=FAINT,
            size=8,
            ha=side,
        )


def _lap_return(seconds: ArrayLike) -> Floats:
    return 1000 - COST_PER_SECOND * np.asarray(seconds, dtype=np.float64)


def _lap_seconds(returns: ArrayLike) -> Floats:
    return (1000 - np.asarray(returns, dtype=np.float64)) / COST_PER_SECOND


def _draw_road(axes: Axes, center: Floats) -> None:
    """The road as a closed band, ``TRACK_WIDTH`` to either side of its centre line."""
    along = np.roll(center, -1, axis=0) - np.roll(center, 1, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = TRACK_WIDTH * np.stack([-along[:, 1], along[:, 0]], axis=1)
    ring = [np.concatenate([side, side[:1]]) for side in (center + across, center - across)]
    axes.fill(*np.concatenate([ring[0], ring[1][::-1]]).T, color=ROAD, linewidth=0, zorder=1)


def _colored_line(axes: Axes, points: Floats, speed: Floats) -> LineCollection:
    pieces = np.stack([points[:-1], points[1:]], axis=1)  # (t - 1, 2, 2)
    line = LineCollection(list(pieces), cmap="viridis", linewidths=2.2, capstyle="round", zorder=3)
    line.set_array((speed[:-1] + speed[1:]) / 2)
    axes.add_collection(line)
    axes.autoscale_view()
    return line


def _histogram(axes: Axes, name: str, values: Floats, low: float, color: str) -> None:
    _style(axes, name)
    share = np.full(len(values), 100 / max(len(values), 1))
    edges = np.linspace(low, 1, 21).tolist()
    axes.hist(np.clip(values, low, 1), bins=edges, weights=share, color=color, edgecolor="white", linewidth=0.6)
    axes.set_xlim(low, 1)
    axes.set_xticks(np.linspace(low, 1, 5))
    limit = np.mean(np.abs(values) >= 0.99)
    axes.set_xlabel(f"mean {values.mean():.2f}, at full {limit:.0%}".replace("-", "−"))
