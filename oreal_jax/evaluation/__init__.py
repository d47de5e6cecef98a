"""Evaluation: completions of problems, their measures, and comparisons of models."""

# ruff: noqa: F401 (re-exports)
from oreal_jax.evaluation.compare import compare
from oreal_jax.evaluation.completions import VerifiedCompletion
from oreal_jax.evaluation.evaluator import Evaluator
from oreal_jax.evaluation.report import Report, report
from oreal_jax.evaluation.sets import PRESETS, ProblemSet, load_set, load_sets
