"""Computation that is split over the devices of a mesh by hand.

The compiler splits most of a program by the shardings of its arrays (sharding.py). It
does not see into kernels and splits some other parts badly: these run under `shard_map`
(or `vmap`), each device on its own part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from oreal_jax.mesh import platform
from oreal_jax.model import Execution, Remat, flash
from oreal_jax.sharding import (
    DECODING_RULES,
    RULES,
    count_row_shards,
    make_sharding,
)


def make_execution(
    mesh: Mesh,
    remat: Remat = "everything",
    dtype: Any = None,
    gradient_sums: Any = None,
) -> Execution:
    """Return how packed rows run on a mesh: split by rows, tokens and heads.

    The vocabulary head is complete on every device, except for its split over tensor.
    """
    stored, gathered = (_constrain(mesh, axis, "vocab") for axis in ("embed", None))
    return Execution(
        attend=shard_attention(mesh, rows="rows"),
        constrain=_constrain(mesh, "rows", "sequence", None),
        # Constrained as it is stored, then gathered: so the cast precedes the gather.
        gather_head=lambda weight: gathered(stored(weight)),
        row_shards=count_row_shards(mesh),
        context_shards=mesh.shape["context"],
        remat=remat,
        dtype=dtype,
        gradient_sums=gradient_sums,
    )


def make_prompt_execution(mesh: Mesh) -> Execution:
    """Return how an engine runs prompts, inside `map_engines`."""
    return Execution(attend=shard_attention(mesh))


def _constrain(mesh: Mesh, *axes: str | None) -> Callable[[jax.Array], jax.Array]:
    sharding = make_sharding(mesh, *axes)
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def map_engines(work: Callable, mesh: Mesh, has_engines: Sequence[bool]) -> Callable:
    """Return `work` mapped over engines, the data shards of a mesh, in one program.

    Argument i has a leading axis of engines where `has_engines[i]`, which `work` does
    not see; engines share the other arguments. Every result has such an axis.
    """
    if count_row_shards(mesh) > 1:
        axes = [0 if has_axis else None for has_axis in has_engines]
        return jax.vmap(work, in_axes=axes, spmd_axis_name=RULES["rows"])

    def alone(*arguments):
        without_axis = (
            jax.tree.map(lambda x: x[0], argument) if has_axis else argument
            for argument, has_axis in zip(arguments, has_engines, strict=True)
        )
        return jax.tree.map(lambda x: x[None], work(*without_axis))

    return alone


def shard_attention(mesh: Mesh, rows: str | None = None) -> Callable:
    """Return attention on packed rows by the fastest kernel of a mesh.

    Each device attends from its heads and queries; the keys and values of a row are
    gathered. `rows` is None inside `map_engines`, which splits them.
    """
    spec = lambda *axes: make_sharding(mesh, *axes).spec

    def attend(query, key, value, segments):
        length, heads = query.shape[1:3]
        context, tensor = mesh.shape["context"], mesh.shape["tensor"]
        prepare = flash.choose_kernel(platform(mesh), length, context)
        kernel, kernel_specs = prepare(
            heads, length, make_sharding(mesh, "heads", "sequence")
        )
        if (
            key.shape[2] % tensor
        ):  # fewer KV heads than devices: each has the one it reads
            repeats = tensor // key.shape[2]
            key, value = (flash.repeat_heads(x, repeats) for x in (key, value))

        def attend_part(kernel, query, key, value, query_segments, segments):
            first = jax.lax.axis_index("context") * query.shape[1]
            if context > 1:
                key, value = _gather_tokens(key), _gather_tokens(value)
            return kernel(query, key, value, query_segments, segments, first)

        part = spec(rows, "sequence", "heads", None)
        # Naming an axis of one device changes how XLA on CPU rounds the gradients.
        keys = part if context > 1 else spec(rows, None, "heads", None)
        segment_specs = spec(rows, "sequence"), spec(rows, None)
        return jax.shard_map(
            attend_part,
            mesh=mesh,
            in_specs=(kernel_specs, part, keys, keys, *segment_specs),
            out_specs=part,
            check_vma=False,
        )(kernel, query, key, value, segments, segments)

    return attend


@jax.custom_vjp
def _gather_tokens(x: jax.Array) -> jax.Array:
    """Gather all tokens of rows [B, S, ...] on each device of context.

    The gradients of the devices are summed in float32.
    """
    return jax.lax.all_gather(x, "context", axis=1, tiled=True)


def _scatter_tokens(_, grad: jax.Array) -> tuple[jax.Array]:
    total = jax.lax.psum_scatter(
        grad.astype(jnp.float32), "context", scatter_dimension=1, tiled=True
    )
    return (total.astype(grad.dtype),)


_gather_tokens.defvjp(lambda x: (_gather_tokens(x), None), _scatter_tokens)


def shard_over_heads(attend: Callable, mesh: Mesh) -> Callable:
    """Return attention on pages (`Pages.attend`), each device for its own heads."""
    if mesh.size == 1:
        return attend
    spec = lambda *axes: make_sharding(mesh, *axes).spec

    def run(pages, query, table, lengths):
        page_specs = type(pages)(*(spec(*axes) for axes in pages.axes))
        heads = spec(None, "heads")
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(page_specs, heads, spec(), spec()),
            out_specs=heads,
            check_vma=False,
        )(pages, query, table, lengths)

    return run


def shard_over_slots(choose: Callable, mesh: Mesh) -> Callable:
    """Return `choose(logits, common, *state)`, each device for its own slots.

    For use inside `map_engines`. All arguments but `common` have a leading axis of
    slots; results are replicated. If the devices of an engine do not divide the slots,
    each computes all of them.
    """
    tensor = mesh.shape["tensor"]
    slots = make_sharding(mesh, "slots", rules=DECODING_RULES).spec
    # Constrained on entry, or the split would spread to the inputs of these arrays.
    by_token, complete = _constrain(mesh, None, "vocab"), _constrain(mesh)

    def choose_part(*arguments):
        return jax.lax.all_gather(choose(*arguments), "tensor", tiled=True)

    def run(logits, common, *state):
        if tensor == 1 or len(logits) % tensor:
            return choose(logits, common, *state)
        sharded = jax.shard_map(
            choose_part,
            mesh=mesh,
            in_specs=(slots, PartitionSpec(), *(slots for _ in state)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return sharded(by_token(logits), common, *jax.tree.map(complete, state))

    return run
