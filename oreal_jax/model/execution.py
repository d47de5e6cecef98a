"""How the layers are run on packed rows: what the numbers depend on up to rounding.

The model itself knows neither devices nor kernels; whoever runs it says where things
lie (`sharding.execution`) and how memory is traded for time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from oreal_jax.model.attention import ATTENDED, attend_packed

# What is computed again in the backward pass instead of being kept. "everything": all
# of a layer but its input; "but_attention": attention's result is kept too;
# "elementwise": the results of all matrix products are kept; "nothing": all is kept.
# "offloaded" is "everything" with the layers' inputs in the host's memory.
Remat = Literal["everything", "but_attention", "elementwise", "nothing", "offloaded"]

PRODUCTS = ("query", "key", "value", ATTENDED, "merged", "gate", "up")
INPUT = "layer_input"

same: Callable[[Any], Any] = lambda x: x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """`attend` is attention on whole rows (query, key, value, segments); `place` puts
    [rows, tokens, embed] where its devices are, `gather` a vocabulary head where all
    of its chunks are multiplied; `row_ways` and `column_ways` are in how many parts
    rows and their tokens lie; `dtype` is that of activations (None: the weights')."""

    attend: Callable[..., jax.Array] = attend_packed
    place: Callable[[jax.Array], jax.Array] = same
    gather: Callable[[jax.Array], jax.Array] = same
    row_ways: int = 1
    column_ways: int = 1
    remat: Remat = "everything"
    dtype: Any = None

    def remembering(self, layer: Callable) -> Callable:
        """`layer` with what `remat` says kept for the backward pass."""
        keep = jax.checkpoint_policies.save_only_these_names
        policies = {
            "everything": None,
            "but_attention": keep(ATTENDED),
            "elementwise": keep(*PRODUCTS),
            "offloaded": jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            ),
        }
        if self.remat == "nothing":
            return layer
        return jax.checkpoint(layer, policy=policies[self.remat])


ALONE = Execution()  # one device, attention as XLA does it


def exact(program: Callable, dtype) -> Callable:
    """`program`, to be traced with matrix products as exact as `dtype`. TPUs and GPUs
    otherwise round factors of float32 to bfloat16 and TF32, in kernels too."""
    if dtype != jnp.float32:
        return program

    @functools.wraps(program)
    def run(*arguments):
        with jax.default_matmul_precision("highest"):
            return program(*arguments)

    return run


named = checkpoint_name  # (array, name): what `remat` may refer to
