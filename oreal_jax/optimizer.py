"""AdamW with warm-up and cosine decay: how one model is optimized."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import optax

from oreal_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW under a linear warm-up and a cosine decay, counted in training steps.

    The learning rate is 0 at step 0.
    """

    learning_rate: float
    """Learning rate after the warm-up."""
    final_learning_rate: float
    """Learning rate at the last step."""
    warmup_steps: int = 10
    """Steps of the linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Global norm to which gradients are clipped."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment, which needs the range of float32."""
    momentum: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment."""
    offload: bool = False
    """Keep both moments in host memory between steps."""

    def __post_init__(self):
        """Raise InputError where a number is out of range."""
        for name in ("learning_rate", "final_learning_rate", "warmup_steps"):
            self._check(name, lambda x: x >= 0, "at least 0")
        self._check("weight_decay", lambda x: x >= 0, "at least 0")
        self._check("clip_norm", lambda x: x > 0, "above 0")
        for name in ("beta1", "beta2"):
            self._check(name, lambda x: 0 <= x < 1, "at least 0 and below 1")

    def _check(self, name: str, is_valid: Callable[..., bool], range_: str) -> None:
        value = getattr(self, name)
        if not is_valid(value):
            raise InputError(f"optimizer: {name}={value} must be {range_}")

    def transformation(self) -> optax.GradientTransformation:
        """Return the update direction; the caller multiplies by the step's rate."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(self.beta1, self.beta2, mu_dtype=self.momentum),
            optax.add_decayed_weights(self.weight_decay),
        )

    def rate(self, steps: int) -> optax.Schedule:
        """Return the learning rate by step, for a run of `steps` steps."""
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(steps, self.warmup_steps + 1),
            end_value=self.final_learning_rate,
        )
