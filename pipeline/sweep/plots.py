"""Optuna's plots of a study: history, parallel coordinates, slices, importance, intermediate values."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

log = logging.getLogger(__name__)

NAMES = {
    "history": "plot_optimization_history",
    "parallel_coordinate": "plot_parallel_coordinate",
    "slice": "plot_slice",
    "importance": "plot_param_importances",
    "intermediate_values": "plot_intermediate_values",
}
"""File -> Optuna's name of the plot."""


def draw(study: optuna.Study, folder: Path) -> list[Path]:
    """Draw what there is enough for, as PNG files; the importance of parameters needs two different scores."""
    import matplotlib as mpl

    mpl.use("Agg")  # Optuna draws with pyplot, which would look for a screen
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    scores = [t.value for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    names = [name for name in NAMES if scores and (name != "importance" or len(set(scores)) > 1)]
    drawn: list[Path] = []
    for name in names:
        with warnings.catch_warnings(), mpl.rc_context():  # Optuna sets a style for all that is drawn after it
            warnings.simplefilter("ignore")  # that they are experimental, and layouts that don't fit
            try:
                axes: Any = getattr(optuna.visualization.matplotlib, NAMES[name])(study)
            except (ValueError, RuntimeError) as error:
                log.info("no plot of %s: %s", name, error)
                continue
            figure = np.ravel(axes)[0].figure
            figure.set_size_inches(max(8.0, figure.get_size_inches()[0]), 4.8)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
        drawn.append(path)
    return drawn
