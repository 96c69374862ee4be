"""Parameters: ``params.yaml`` as strict, immutable, documented types, one class per stage.

A value comes from, in rising order of precedence: ``params.yaml``, the files given by ``--config``, a flag of the
command line. The classes hold type, range and meaning of each key; ``params.yaml`` alone holds the defaults. Every
mistake of every source is collected, and all are told at once.
"""

from pipeline.config.cli import Parser, fail, integer, parse_args, track_seed
from pipeline.config.params import (
    FIRST_TRAINING_TRACK,
    EvaluateParams,
    NetworkParams,
    ObservationParams,
    Params,
    PromoteParams,
    RecordParams,
    TrainParams,
    recipe,
    track_bounds,
    track_list,
)
from pipeline.config.relations import cores
from pipeline.config.sources import ConfigError, load, project_root

__all__ = [
    "FIRST_TRAINING_TRACK",
    "ConfigError",
    "EvaluateParams",
    "NetworkParams",
    "ObservationParams",
    "Params",
    "Parser",
    "PromoteParams",
    "RecordParams",
    "TrainParams",
    "cores",
    "fail",
    "integer",
    "load",
    "parse_args",
    "project_root",
    "recipe",
    "track_bounds",
    "track_list",
    "track_seed",
]
