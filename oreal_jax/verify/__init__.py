"""Verification of completions: correct, incorrect or undecided. Imports no JAX.

`completions.verify_completions` and `llm_judge` are not imported here: they load an
HTTP client, which worker processes do not need.
"""

from oreal_jax.verify.pool import Pool
from oreal_jax.verify.rule import by_rule, judge
from oreal_jax.verify.verdict import Candidate, Verdict, Verifier

__all__ = ["Candidate", "Pool", "Verdict", "Verifier", "by_rule", "judge"]
