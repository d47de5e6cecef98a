"""OREAL in JAX: outcome-reward reinforcement learning for mathematical reasoning."""

import os

# transformers advises to install torch, which is absent on purpose.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
