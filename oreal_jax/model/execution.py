"""How the layers run on packed rows, which changes their results by rounding only.

The model knows neither devices nor kernels. The caller states how arrays are sharded
(`model_parallel.make_execution`) and how memory is traded for time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from oreal_jax.model.attention import ATTENDED, attend_packed

# What the backward pass computes again instead of storing it. "everything": all of a
# layer but its input; "but_attention": attention's result is stored too; "elementwise":
# the results of all matrix products are stored; "nothing": all is stored. "offloaded"
# is "everything" with the layers' inputs in host memory.
Remat = Literal["everything", "but_attention", "elementwise", "nothing", "offloaded"]

# Names of arrays that rematerialisation may store (`checkpoint_name`).
PRODUCTS = ("query", "key", "value", ATTENDED, "merged", "gate", "up")
LAYER_INPUT = "layer_input"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Attention, sharding, rematerialisation and dtypes of the layers.

    `attend(query, key, value, segments)` is attention on packed rows; `constrain`
    shards activations [rows, tokens, embed]; `gather_head` makes the vocabulary head
    available where its chunks are multiplied; `row_shards` and `context_shards` are
    the numbers of parts into which rows and the tokens of a row are split; `dtype` is
    that of activations, `gradient_sums` that of sums over devices of the gradients of
    the layers' matrices (both None: that of the weights).
    """

    attend: Callable[..., jax.Array] = attend_packed
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x
    gather_head: Callable[[jax.Array], jax.Array] = lambda weight: weight
    row_shards: int = 1
    context_shards: int = 1
    remat: Remat = "everything"
    dtype: Any = None
    gradient_sums: Any = None

    def rematerialise(self, layer: Callable) -> Callable:
        """Return `layer` with a backward pass that recomputes as `remat` sets."""
        if self.remat == "nothing":
            return layer
        store = jax.checkpoint_policies.save_only_these_names
        policies = {
            "everything": None,
            "but_attention": store(ATTENDED),
            "elementwise": store(*PRODUCTS),
            "offloaded": jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[LAYER_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            ),
        }
        return jax.checkpoint(layer, policy=policies[self.remat])


ONE_DEVICE = Execution()


def exact_matmuls(program: Callable, dtype) -> Callable:
    """Return `program`, traced with matrix products that are as exact as `dtype`.

    TPUs and GPUs otherwise round float32 factors to bfloat16 and TF32, in kernels too.
    """
    if dtype != jnp.float32:
        return program

    @functools.wraps(program)
    def run(*arguments):
        with jax.default_matmul_precision("highest"):
            return program(*arguments)

    return run
