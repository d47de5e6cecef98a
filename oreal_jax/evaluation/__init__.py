"""The evaluation room: attempts at problems, what they say, and how sure that is."""

from oreal_jax.evaluation.attempts import Attempt, Journal, draw, judge, kept_beside
from oreal_jax.evaluation.compare import compare
from oreal_jax.evaluation.report import Report, evaluate, report
from oreal_jax.evaluation.sets import PRESETS, load_set, load_sets

__all__ = [
    "PRESETS",
    "Attempt",
    "Journal",
    "Report",
    "compare",
    "draw",
    "evaluate",
    "judge",
    "kept_beside",
    "load_set",
    "load_sets",
    "report",
]
