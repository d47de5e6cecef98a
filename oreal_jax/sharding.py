"""Every sharding decision in the project, in one table.

A weight names its logical axes where it is declared; `RULES` says on which mesh axis
each lies. To try another layout, change this mapping and nothing else.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from oreal_jax import model
from oreal_jax.errors import InputError
from oreal_jax.model import Execution, ModelConfig, Remat, flash

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

# Decoding: every data shard is an engine of its own with whole weights, split over
# tensor alone. A token then costs no communication between engines. It is chosen by the
# device that has the slot's logits; gathered by all, they would be `tensor` times more.
DECODING = RULES | {"embed": None, "slots": "tensor"}


AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices share each way of splitting the work; -1 takes the rest.

    data: whole copies of the weights; fsdp: weights and rows split; context: the tokens
    of a row split; tensor: heads, mlp and vocabulary split.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def make_mesh(
    shape: MeshShape, config: ModelConfig, devices: Sequence | None = None
) -> Mesh:
    """The device mesh of a run. What talks most lies closest: the devices of a tensor
    axis are neighbours of one process, where that has enough of them.

    Raises:
        InputError: the devices do not fill the shape, or a weight cannot be split
            evenly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = sizes_of(shape, config, len(devices))
    return _mesh(sorted(devices, key=lambda d: d.process_index), sizes)


def sizes_of(shape: MeshShape, config: ModelConfig, devices: int) -> tuple[int, ...]:
    """The sizes of `AXES` on so many devices. Raises as `make_mesh`."""
    sizes = dataclasses.astuple(shape)
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(f"{shape}: sizes are positive, at most one is -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    rest, left_over = divmod(devices, known)
    if left_over or rest == 0 or (-1 not in sizes and rest != 1):
        raise InputError(
            f"mesh: {shape} needs {'a multiple of ' if -1 in sizes else ''}{known} "
            f"devices, there are {devices}"
        )
    sizes = tuple(rest if size == -1 else size for size in sizes)
    _check_splits(config, fsdp=sizes[1], tensor=sizes[3])
    return sizes


class EngineMeshes(NamedTuple):
    """Where completions are drawn: `tensor` devices make an engine.

    `all` has the engines of all processes, `own` those of one; the weights are
    resharded to the first and used on the second, so that no process waits for another.
    """

    all: Mesh
    own: Mesh


def engine_meshes(
    mesh: Mesh, config: ModelConfig, tensor: int = 0, own: Sequence | None = None
) -> EngineMeshes:
    """The engines of a run's devices, `tensor` devices each (0: as in the mesh); `own`
    are a process's devices, this one's unless given.

    Raises:
        InputError: a process cannot make whole engines of its devices.
    """
    tensor = tensor or mesh.shape["tensor"]
    devices = list(mesh.devices.flat)
    if own is None:
        here = jax.process_index()
        own = [device for device in devices if device.process_index == here]
    if len(own) % tensor:
        raise InputError(
            f"an engine of {tensor} devices: a process has {len(own)}, which is no "
            "multiple; set decode_tensor, or start fewer processes with more devices "
            "each (under SLURM: one task per node)"
        )
    _check_splits(config, fsdp=1, tensor=tensor)
    of = lambda devices: _mesh(devices, (len(devices) // tensor, 1, 1, tensor))
    return EngineMeshes(of(devices), of(own))


def _mesh(devices: Sequence, sizes: Sequence[int]) -> Mesh:
    # Axes are Explicit unless told otherwise; an embedding lookup then fails.
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=types)


def _check_splits(config: ModelConfig, *, fsdp: int, tensor: int) -> None:
    if max(tensor, config.kv_heads) % min(tensor, config.kv_heads):
        raise InputError(
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
            raise InputError(f"mesh: {name}={size} does not divide by {axis}={ways}")


def _on(mesh: Mesh, *names: str | None, rules=RULES) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(n and rules[n] for n in names)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return _on(mesh)


def of_rows(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Rows of a batch over the data axes, behind `leading` unsplit axes."""
    return _on(mesh, *(None,) * leading, "rows")


def of_tokens(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Rows over the data axes and the tokens of each over context."""
    return _on(mesh, *(None,) * leading, "rows", "sequence")


def put(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array of the host, the same on every process, put where it lies. (Given
    devices of several processes, `jax.device_put` would compare all of it first.)"""
    return jax.make_array_from_callback(value.shape, sharding, lambda at: value[at])


def row_ways(mesh: Mesh) -> int:
    """Into how many parts rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def of_params(config: ModelConfig, mesh: Mesh) -> Any:
    """Shardings of a parameter tree. Key-value heads that are fewer than the devices
    of a tensor axis are whole on each of them."""
    few = config.kv_heads % mesh.shape["tensor"]
    rules = RULES | {"kv_heads": None} if few else RULES
    return _of_names(model.axes(config), mesh, rules)


def placed(shapes: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s that say where their arrays lie."""
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, shapes, shardings)


def of_weights(axes: Any, mesh: Mesh) -> Any:
    """Shardings of decoding's weights, from the names of their axes."""
    return _of_names(axes, mesh, DECODING)


def own_part(array: jax.Array, where: NamedSharding) -> jax.Array:
    """What this process has of an array, as an array of its own (no copy)."""
    if array.is_fully_addressable:
        return jax.device_put(array, where)
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, where, shards)


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


def execution(mesh: Mesh, remat: Remat = "everything", dtype: Any = None) -> Execution:
    """How a mesh runs packed rows: split by rows, tokens and heads, each device at its
    own part; the vocabulary head whole but for its split over tensor."""
    # Cast where it is stored, then gathered: not the other way around.
    stored, whole = (_constrain(_on(mesh, x, "vocab")) for x in ("embed", None))
    return Execution(
        attend=per_part(mesh, rows="rows"),
        place=_constrain(_on(mesh, "rows", "sequence", None)),
        gather=lambda x: whole(stored(x)),
        row_ways=row_ways(mesh),
        column_ways=mesh.shape["context"],
        remat=remat,
        dtype=dtype,
    )


def of_prompts(mesh: Mesh) -> Execution:
    """How an engine runs prompts, inside `per_engine`."""
    return Execution(attend=per_part(mesh))


def _constrain(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jax.lax.with_sharding_constraint(x, where)


def per_part(mesh: Mesh, rows: str | None = None) -> Callable:
    """Attention to packed rows with the mesh's fastest kernel, each device on the heads
    and queries that it has; keys and values of a row are gathered. `rows` None leaves
    the rows to `per_engine`."""
    spec = lambda *names: _on(mesh, *names).spec

    def attend(query, key, value, segments):
        length, heads = query.shape[1:3]
        context, tensor = mesh.shape["context"], mesh.shape["tensor"]
        prepare = flash.prepare_for(platform(mesh), length, context)
        kernel, lies = prepare(heads, length, _on(mesh, "heads", "sequence"))
        if key.shape[2] % tensor:  # fewer than devices: each gets the one it reads
            more = tensor // key.shape[2]
            key, value = (flash.repeat_heads(x, more) for x in (key, value))

        def own(kernel, query, key, value, of_queries, segments):
            first = jax.lax.axis_index("context") * query.shape[1]
            if context > 1:
                key, value = _gather_tokens(key), _gather_tokens(value)
            return kernel(query, key, value, of_queries, segments, first)

        part = spec(rows, "sequence", "heads", None)
        # Naming an axis of one device changes how XLA on CPU rounds the gradients.
        keys = part if context > 1 else spec(rows, None, "heads", None)
        ids, whole_ids = spec(rows, "sequence"), spec(rows, None)
        names = (lies, part, keys, keys, ids, whole_ids)
        return jax.shard_map(
            own, mesh=mesh, in_specs=names, out_specs=part, check_vma=False
        )(kernel, query, key, value, segments, segments)

    return attend


@jax.custom_vjp
def _gather_tokens(x: jax.Array) -> jax.Array:
    """All tokens of rows [B, S, ...] on each device of context; the gradients of the
    devices are summed in float32."""
    return jax.lax.all_gather(x, "context", axis=1, tiled=True)


def _scatter_tokens(_, slope: jax.Array) -> tuple[jax.Array]:
    total = jax.lax.psum_scatter(
        slope.astype(jnp.float32), "context", scatter_dimension=1, tiled=True
    )
    return (total.astype(slope.dtype),)


_gather_tokens.defvjp(lambda x: (_gather_tokens(x), None), _scatter_tokens)


def platform(mesh: Mesh) -> str:
    """What the devices of a mesh are: "tpu", "gpu" or "cpu"."""
    return mesh.devices.flat[0].platform


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


def per_slot(choose: Callable, mesh: Mesh) -> Callable:
    """`choose(logits, common, *state)` inside `per_engine`, split by slot over the
    devices of an engine; all arguments but `common` have a leading axis of slots, and
    results are replicated. Where the devices do not divide the slots, each does all."""
    tensor, slots = mesh.shape["tensor"], _on(mesh, "slots", rules=DECODING).spec
    # Said of what comes in, or the split would spread to all that it is made of.
    by_token, whole = _constrain(_on(mesh, None, "vocab")), _constrain(_on(mesh))

    def own(*parts):
        return jax.lax.all_gather(choose(*parts), "tensor", tiled=True)

    def run(logits, common, *state):
        if tensor == 1 or len(logits) % tensor:
            return choose(logits, common, *state)
        split = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(slots, PartitionSpec(), *(slots for _ in state)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return split(by_token(logits), common, *jax.tree.map(whole, state))

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


def on_host(shardings: Any) -> Any:
    """The same places in the memory of the devices' hosts, but for scalars."""

    def host(where: NamedSharding) -> NamedSharding:
        return where.with_memory_kind("pinned_host") if where.spec else where

    return jax.tree.map(host, shardings)


def of_pages(form: Any, mesh: Mesh) -> Any:
    """Shardings of a layer's pages behind the axis of engines; heads over tensor."""
    return form(*(_on(mesh, "rows", *names) for names in form.axes))
