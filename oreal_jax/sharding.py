"""Every sharding decision in the project, in one table.

A weight names its logical axes where it is declared; `RULES` says on which mesh axis
each lies. To try another layout, change this mapping and nothing else.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oreal_jax.errors import BadInput
from oreal_jax.model import ModelConfig

RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "rows": ("data", "fsdp"),
}

# Decoding: every data shard is an engine of its own with whole weights, split over
# tensor alone. A token then costs no communication between engines.
DECODING = RULES | {"embed": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices share each way of splitting the work; -1 takes the rest.

    data: whole copies of the weights; fsdp: weights and rows split; tensor: heads, mlp
    and vocabulary split.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(shape: MeshShape, model: ModelConfig, devices=None) -> Mesh:
    """The device mesh of a run.

    Raises:
        BadInput: the devices do not fill the shape, or a weight does not split evenly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.astuple(shape)
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise BadInput(f"{shape}: sizes are positive, at most one is -1 (the rest)")
    known = 1
    for size in sizes:
        known *= max(size, 1) if size != -1 else 1
    rest, left_over = divmod(len(devices), known)
    if left_over or rest == 0 or (-1 not in sizes and rest != 1):
        raise BadInput(
            f"mesh: {shape} needs {'a multiple of ' if -1 in sizes else ''}{known} "
            f"devices, this process sees {len(devices)}"
        )
    sizes = tuple(rest if size == -1 else size for size in sizes)
    _check_splits(model, fsdp=sizes[1], tensor=sizes[2])
    # make_mesh's default axes are Explicit, under which an embedding lookup fails.
    return jax.make_mesh(
        sizes,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def _check_splits(model: ModelConfig, *, fsdp: int, tensor: int) -> None:
    for name, ways in [
        ("kv_heads", tensor),
        ("heads", tensor),
        ("mlp", tensor),
        ("vocab", tensor),
        ("embed", fsdp),
    ]:
        size = getattr(model, name)
        if size % ways:
            axis = RULES[name]
            raise BadInput(f"mesh: {name}={size} does not divide by {axis}={ways}")


def _on(mesh: Mesh, *names: str | None, rules=RULES) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(n and rules[n] for n in names)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return _on(mesh)


def of_rows(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Rows of a batch over the data axes, behind `leading` unsplit axes."""
    return _on(mesh, *(None,) * leading, "rows")


def row_ways(mesh: Mesh) -> int:
    """Into how many parts rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def of_params(axes: Any, mesh: Mesh, rules=RULES) -> Any:
    """Shardings of a parameter tree from the axis names of its weights."""
    is_names = lambda x: isinstance(x, tuple)
    place = lambda names: _on(mesh, *names, rules=rules)
    return jax.tree.map(place, axes, is_leaf=is_names)


def per_engine(work: Callable, mesh: Mesh, rows: Sequence[bool]) -> Callable:
    """`work` on every data shard by itself, in one program.

    `rows` says which arguments are split by their first axis (the others are whole
    everywhere); what it returns is split so.
    """
    ways = row_ways(mesh)
    if ways == 1:
        return work
    split = lambda x: x.reshape(ways, x.shape[0] // ways, *x.shape[1:])
    join = lambda x: x.reshape(-1, *x.shape[2:])
    each = jax.vmap(work, in_axes=[0 if is_rows else None for is_rows in rows])

    def run(*arguments):
        given = (
            jax.tree.map(split, argument) if is_rows else argument
            for argument, is_rows in zip(arguments, rows, strict=True)
        )
        return jax.tree.map(join, each(*given))

    return run


def of_optimizer(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Moments lie like their parameters, counters everywhere.

    Must be given to jit: `jit(optimizer.init)` alone puts all moments on one device.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def of_cache(mesh: Mesh) -> NamedSharding:
    """Cache pages [N, size, G2, K]: each data shard has its own, heads over tensor."""
    return _on(mesh, "rows", None, "kv_heads")
