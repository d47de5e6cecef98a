"""Plan a run before its devices are rented: does it fit, and what limits its speed."""

from oreal_jax.plan.planner import LargerCache, Plan, load_shape, make_plan

__all__ = ["LargerCache", "Plan", "load_shape", "make_plan"]
