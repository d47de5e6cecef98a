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

from oreal_jax import model
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
    "pages": None,
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


def make_mesh(shape: MeshShape, config: ModelConfig, devices=None) -> Mesh:
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
    _check_splits(config, fsdp=sizes[1], tensor=sizes[2])
    # make_mesh's default axes are Explicit, under which an embedding lookup fails.
    return jax.make_mesh(
        sizes,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def _check_splits(config: ModelConfig, *, fsdp: int, tensor: int) -> None:
    if max(tensor, config.kv_heads) % min(tensor, config.kv_heads):
        raise BadInput(
            f"mesh: kv_heads={config.kv_heads} and tensor={tensor}: neither divides "
            "the other"
        )
    for name, ways in [
        ("heads", tensor),
        ("mlp", tensor),
        ("vocab", tensor),
        ("embed", fsdp),
    ]:
        size = getattr(config, name)
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


def of_params(config: ModelConfig, mesh: Mesh) -> Any:
    """Shardings of a parameter tree. Key-value heads that are fewer than the devices
    of a tensor axis are whole on each of them."""
    few = config.kv_heads % mesh.shape["tensor"]
    rules = RULES | {"kv_heads": None} if few else RULES
    return _of_names(model.axes(config), mesh, rules)


def of_weights(axes: Any, mesh: Mesh) -> Any:
    """Shardings of decoding's weights, from the names of their axes."""
    return _of_names(axes, mesh, DECODING)


def _of_names(axes: Any, mesh: Mesh, rules) -> Any:
    is_names = lambda x: (
        isinstance(x, tuple) and not any(isinstance(name, tuple | dict) for name in x)
    )
    place = lambda names: _on(mesh, *names, rules=rules)
    return jax.tree.map(place, axes, is_leaf=is_names)


def per_engine(work: Callable, mesh: Mesh, engines: Sequence[bool]) -> Callable:
    """`work` on every data shard by itself, in one program.

    `engines` says which arguments have a leading axis of engines, of which `work` does
    not know (the others are whole everywhere); what it returns has one too.
    """
    if row_ways(mesh) > 1:
        axes = [0 if is_split else None for is_split in engines]
        return jax.vmap(work, in_axes=axes, spmd_axis_name=RULES["rows"])

    def alone(*arguments):
        given = (
            jax.tree.map(lambda x: x[0], argument) if is_split else argument
            for argument, is_split in zip(arguments, engines, strict=True)
        )
        return jax.tree.map(lambda x: x[None], work(*given))

    return alone


def per_head(attend: Callable, mesh: Mesh) -> Callable:
    """Attention to pages, each device on the heads that it has and nothing else.

    For `Cached.attend`. The compiler does not see into kernels, so that it cannot split
    them itself.
    """
    if mesh.size == 1:
        return attend
    spec = lambda *names: _on(mesh, *names).spec

    def run(pages, query, table, lengths):
        lie = type(pages)(*(spec(*names) for names in pages.axes))
        heads = spec(None, "heads")
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(lie, heads, spec(), spec()),
            out_specs=heads,
            check_vma=False,
        )(pages, query, table, lengths)

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


def of_pages(form: Any, mesh: Mesh) -> Any:
    """Shardings of a layer's pages behind the axis of engines; heads over tensor."""
    return form(*(_on(mesh, "rows", *names) for names in form.axes))
