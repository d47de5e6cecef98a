"""Plans of runs for devices that are not there: memory, and bounds of the speed."""

from oreal_jax.plan.planner import LargerCache, Plan, load_shape, make_plan

__all__ = ["LargerCache", "Plan", "load_shape", "make_plan"]
