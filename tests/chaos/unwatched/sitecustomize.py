"""For the mutation ``dvc_unwatched`` alone: a stage that never looks for its dvc."""

from pipeline import interrupts

interrupts.PARENT_INTERVAL = 1e6
