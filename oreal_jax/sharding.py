"""Where arrays are stored: one table from logical axes to mesh axes.

A weight names its logical axes where it is declared; `RULES` maps them to axes of the
mesh.
"""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from oreal_jax import model
from oreal_jax.model import ModelConfig, functional

RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "rows": ("data", "fsdp"),
    "sequence": "context",
    "pages": None,
}

# While decoding, each data shard is one engine: it holds a full copy of the weights,
# split only over `tensor`, and engines do not communicate. One device chooses the token
# of a slot: gathering the logits on all would move `tensor` times the data.
DECODING_RULES = RULES | {"embed": None, "slots": "tensor"}


def make_sharding(mesh: Mesh, *axes: str | None, rules=RULES) -> NamedSharding:
    """Return the sharding of an array by the logical names of its first axes."""
    return NamedSharding(mesh, PartitionSpec(*(axis and rules[axis] for axis in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device has in full."""
    return make_sharding(mesh)


def count_row_shards(mesh: Mesh) -> int:
    """Return the number of parts into which rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """Return the shardings of parameters.

    Key-value heads that `tensor` does not divide are replicated over it.
    """
    divides = config.kv_heads % mesh.shape["tensor"] == 0
    rules = RULES if divides else RULES | {"kv_heads": None}
    return _map_names(model.axes(config), mesh, rules)


def decoding_shardings(axes: Any, mesh: Mesh) -> Any:
    """Return the shardings of decoding's weights from `decoding.axes`."""
    return _map_names(axes, mesh, DECODING_RULES)


def _map_names(axes: Any, mesh: Mesh, rules) -> Any:
    place = lambda names: make_sharding(mesh, *names, rules=rules)
    return jax.tree.map(place, axes, is_leaf=functional.is_axis_names)


def page_shardings(pages: Any, mesh: Mesh) -> Any:
    """Return the shardings of a class of pages, with a leading axis of engines."""
    return pages(*(make_sharding(mesh, "rows", *names) for names in pages.axes))


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Return the shardings of an optimizer state.

    Moments are sharded like their parameters, counters are replicated. They must be
    given to jit: `jit(optimizer.init)` alone puts all moments on one device.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def in_host_memory(shardings: Any) -> Any:
    """Return the same shardings in the memory of the hosts, except for scalars."""

    def move(sharding: NamedSharding) -> NamedSharding:
        return sharding.with_memory_kind("pinned_host") if sharding.spec else sharding

    return jax.tree.map(move, shardings)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Return `ShapeDtypeStruct`s with shardings."""
    add = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(add, shapes, shardings)


def put(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """Put an array that is the same in every process on its devices.

    (For devices of several processes, `jax.device_put` would first compare all of it.)
    """
    return jax.make_array_from_callback(value.shape, sharding, lambda at: value[at])


def local_part(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return the shards on this process's devices as one array, without copying."""
    if array.is_fully_addressable:
        return jax.device_put(array, sharding)
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)
