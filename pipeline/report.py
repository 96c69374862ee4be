"""One page about one run or several: what came out, how, and how to do it again.

python -m pipeline.report [RUN ...] [--output FILE]

RUN is the id or the name of a run in MLflow, of a name the newest [default: the run of this checkout]. The page is one
HTML file that needs nothing else: figures with intervals, curves, maps, films, the parameters that differ. It opens
from the disk, on a phone, in light and dark, without a network.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.config import EvaluateParams, Parser, fail, parse_args, project_root

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from pipeline.tracking.history import History, PastRun

OUTPUT = Path("report.html")
TEMPLATE = Path(__file__).with_suffix(".html")
MAX_RUNS = 6
FILM_WIDTH, FILM_FPS = 640, 25
PICTURES = {
    "plots/track_map.png": "The road from above, the driven line in the colour of its speed, crosses where it left",
    "plots/actions.png": "How often each amount of steering, gas and brake was used",
    "videos/filmstrip.png": "Eight pictures of the drive, from the start to the end",
}
"""Pictures of a run that the page carries, and what they show."""

FIGURES = {
    "evaluate/mean": "mean return",
    "evaluate/median": "median",
    "evaluate/min": "worst track",
    "evaluate/laps_finished": "laps finished",
    "best/mean_reward": "best validation",
    "minutes": "training",
}


@dataclass
class Chapter:
    """What the page says of one run.

    Attributes:
        run: Of MLflow.
        films: Data URI by title.
        pictures: Data URI by what it shows.
        differing: Parameters that differ from ``params.yaml`` as it was at the run's commit; None if that is unknown.
    """

    run: PastRun
    films: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    differing: dict[str, str] | None = None

    @property
    def commit(self) -> str:
        """Git commit of the code that trained."""
        return self.run.tags.get("mlflow.source.git.commit", "")

    @property
    def begun(self) -> str:
        """When, in UTC."""
        return datetime.fromtimestamp(self.run.begun, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

    @property
    def figures(self) -> dict[str, str]:
        """The run's figures as a person reads them, by :data:`FIGURES`."""
        return {title: _figure(self.run, key) for key, title in FIGURES.items()}

    @property
    def command(self) -> str:
        """What trains it again."""
        changed = {} if self.differing is None else self.differing
        values = self.run.params if self.differing is None else changed
        flags = [f"-S {shlex.quote(f'{key}={value}')}" for key, value in sorted(values.items())]
        return " ".join(["dvc exp run", *flags])


def _figure(run: PastRun, key: str) -> str:
    metrics = run.metrics
    if key == "minutes":
        seconds = [row["seconds"] for row in run.curve if row.get("seconds") is not None]
        return f"{max(filter(None, seconds), default=0) / 60:.1f} min" if seconds else "–"
    if key not in metrics:
        return "–"
    if key == "evaluate/laps_finished":
        return f"{metrics[key]:.0%}"
    text = f"{metrics[key]:.1f}"
    if key == "evaluate/mean" and "evaluate/mean_ci_low" in metrics:
        low, high = metrics["evaluate/mean_ci_low"], metrics["evaluate/mean_ci_high"]
        text += f" ± {metrics['evaluate/std']:.1f} (95% interval {low:.1f} to {high:.1f})"
    elif key == "evaluate/mean" and "evaluate/std" in metrics:
        text += f" ± {metrics['evaluate/std']:.1f}"
    return text.replace("-", "−")


# Reading


def read(history: History, reference: str, folder: Path) -> Chapter:
    """All that the page says of one run; its films are made smaller in ``folder``.

    Raises:
        TrackingError: There is no such run.
        FilmError: One of its films does not decode.
    """
    from pipeline.media.video import shrink_film

    run = history.run(reference)
    chapter = Chapter(run, differing=differing(run))
    place = folder / run.id
    place.mkdir(exist_ok=True)
    for path in history.artifacts(run.id, "videos"):
        if path.endswith(".mp4"):
            small = place / f"small-{Path(path).name}"
            shrink_film(history.download(run.id, path, place), small, FILM_WIDTH, FILM_FPS)
            chapter.films[Path(path).stem] = data_uri(small, "video/mp4")
    there = {*history.artifacts(run.id, "plots"), *history.artifacts(run.id, "videos")}
    for path, shown in PICTURES.items():
        if path in there:
            chapter.pictures[shown] = data_uri(history.download(run.id, path, place), "image/png")
    return chapter


def data_uri(path: Path, kind: str) -> str:
    """A file's contents as a URI."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def differing(run: PastRun) -> dict[str, str] | None:
    """The run's parameters that differ from ``params.yaml`` at its commit; None if git does not have that."""
    from ruamel.yaml import YAML

    commit = run.tags.get("mlflow.source.git.commit", "")
    command = ["git", "show", f"{commit}:params.yaml"]
    shown = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=False)
    if not commit or shown.returncode:
        return None
    defaults = YAML(typ="safe", pure=True).load(shown.stdout)
    return {key: text for key, text in run.params.items() if key not in defaults or text != as_logged(defaults[key])}


def as_logged(value: Any) -> str:
    """A parameter's value as the run's parameters have it."""
    return value if isinstance(value, str) else json.dumps(value)


def parameters_apart(runs: Sequence[PastRun]) -> dict[str, list[str]]:
    """Values of the parameters that are not the same in all runs, by key, in the order of the runs."""
    keys = sorted({key for run in runs for key in run.params})
    values = {key: [run.params.get(key, "–") for run in runs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


# Drawing


def names_of(chapters: Sequence[Chapter]) -> list[str]:
    """A name for each run, with the beginning of its id where several have the same."""
    names = [chapter.run.name for chapter in chapters]
    return [
        name if names.count(name) == 1 else f"{name} {chapter.run.id[:6]}"
        for name, chapter in zip(names, chapters, strict=True)
    ]


def charts_of(chapters: Sequence[Chapter]) -> dict[str, Figure]:
    """The charts of the page by what they show, for one run or for several."""
    from pipeline.media import charts

    names = names_of(chapters)
    histories = {name: with_frames(chapter.run) for name, chapter in zip(names, chapters, strict=True)}
    tracks = {name: c.run.tracks for name, c in zip(names, chapters, strict=True) if c.run.tracks}
    found: dict[str, Figure] = {}
    if len(chapters) > 1:
        if any(histories.values()):
            found["Mean return on the validation tracks over the training, of each run"] = charts.learning_curves(
                histories
            )
        if tracks:
            returns = {name: [row["episode_return"] for row in rows] for name, rows in tracks.items()}
            found["Returns on the held-out tracks, each run sorted"] = charts.sorted_returns(returns)
        return found
    if history := histories[names[0]]:
        found["Return over the training: the exploring policy, and the validation tracks"] = charts.learning_curve(
            history
        )
    if rows := tracks.get(names[0]):
        found |= track_charts(rows)
    return found


def track_charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Charts of one run's evaluated tracks."""
    from pipeline.media import charts

    returns = {row["track"]: row["episode_return"] for row in rows}
    finished = {row["track"]: bool(row["lap_finished"]) for row in rows}
    tiles, seconds = [row["n_tiles"] for row in rows], [row["frames"] / 50 for row in rows]
    return {
        "Return on each held-out track, worst first": charts.returns_by_track(returns, finished),
        "Lap time against the length of the track": charts.lap_time_vs_tiles(tiles, seconds, list(finished.values())),
    }


def with_frames(run: PastRun) -> list[dict[str, float | None]]:
    """The run's curve with a column ``frames``; validations of a run that logged no interval keep their deviation."""
    skip = int(run.params.get("frame_skip", "1"))
    return [{**row, "frames": (row["step"] or 0) * skip} for row in run.curve]


def svg(figure: Figure, name: str, label: str) -> Markup:
    """A chart as inline SVG that takes its colours from the page: dark on light, light on dark; its text stays text."""
    import matplotlib
    from markupsafe import Markup, escape

    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawing)
    for color, variable in colors().items():
        drawing = re.sub(re.escape(color), f"var(--{variable})", drawing, flags=re.IGNORECASE)
    drawing = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", drawing, count=1)
    drawing = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", drawing, count=1)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Markup(drawing)


def colors() -> dict[str, str]:
    """The charts' colours -> variables of the page's style."""
    from pipeline.media import charts

    return {
        charts.INK: "ink",
        charts.FAINT: "faint",
        charts.GRID: "grid",
        charts.BLUE: "blue",
        charts.ORANGE: "orange",
        charts.GREEN: "green",
        charts.RED: "red",
        charts.RUNS[4]: "purple",
        charts.RUNS[5]: "sky",
        "#ffffff": "card",
    }


def render(chapters: Sequence[Chapter]) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = [(label, svg(figure, f"c{n}", label)) for n, (label, figure) in enumerate(charts_of(chapters).items())]
    names = names_of(chapters)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=" and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}",
        chapters=list(zip(names, chapters, strict=True)),
        columns=list(FIGURES.values()),
        charts=drawn,
        apart=parameters_apart([chapter.run for chapter in chapters]),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )


def report(references: Sequence[str], output: Path = OUTPUT) -> list[Chapter]:
    """Write the page about these runs; returns what it says of each.

    Raises:
        TrackingError: MLflow can't be used, or has no such run.
        FilmError: A film does not decode.
    """
    from pipeline.tracking.history import History

    history = History()
    with TemporaryDirectory() as folder:
        chapters = [read(history, reference, Path(folder)) for reference in references]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(chapters), encoding="utf-8")
    return chapters


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.report", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="id or name [default: the run of this checkout]")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"[default {OUTPUT}]")
    _, arguments = parse_args(EvaluateParams, parser, argv)
    if len(arguments.runs) > MAX_RUNS:
        fail(f"expected at most {MAX_RUNS} runs, got {len(arguments.runs)}")
    from pipeline.media.video import FilmError
    from pipeline.tracking.run import read_run_id
    from pipeline.tracking.store import TrackingError

    for noisy in ("alembic", "mlflow"):  # after its import, which sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        report(arguments.runs or [read_run_id()], arguments.output)
    except (TrackingError, FilmError, OSError) as error:
        fail(error)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
