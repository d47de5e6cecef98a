"""Device meshes: of a run, and of the engines that generate completions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from oreal_jax.errors import InputError
from oreal_jax.model import ModelConfig
from oreal_jax.sharding import RULES

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices split the work along each axis; -1 is all remaining ones.

    data: rows, with copies of the weights; fsdp: rows and weights; context: the tokens
    of a row; tensor: heads, mlp and vocabulary.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def make_mesh(
    shape: MeshShape, config: ModelConfig, devices: Sequence | None = None
) -> Mesh:
    """Return the mesh of a run.

    The devices of a tensor axis communicate most, so they are neighbours, in one
    process if it has enough of them.

    Raises:
        InputError: the devices do not fill the shape, or a weight cannot be split
            evenly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.astuple(shape)
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(
            f"{shape}: sizes must be positive; one may be -1, for all other devices"
        )
    known = math.prod(size for size in sizes if size != -1)
    free, left_over = divmod(len(devices), known)
    if left_over or free == 0 or (-1 not in sizes and free != 1):
        raise InputError(
            f"mesh: {shape} needs {'a multiple of ' if -1 in sizes else ''}{known} "
            f"devices, there are {len(devices)}"
        )
    sizes = tuple(free if size == -1 else size for size in sizes)
    _check_splits(config, **dict(zip(AXES, sizes, strict=True)))
    return _mesh(sorted(devices, key=lambda d: d.process_index), sizes)


class EngineMeshes(NamedTuple):
    """The meshes that generate completions; `tensor` devices form an engine.

    `all` has the engines of all processes, `own` those of one. The weights are
    resharded to `all` and used on `own`, so that no process waits for another.
    """

    all: Mesh
    own: Mesh


def make_engine_meshes(
    mesh: Mesh, config: ModelConfig, tensor: int = 0, own: Sequence | None = None
) -> EngineMeshes:
    """Return the engines of a run's devices.

    `tensor` is the number of devices per engine (0: as in the mesh), `own` are the
    devices of a process (None: of this one).

    Raises:
        InputError: the devices of a process do not divide into engines.
    """
    tensor = tensor or mesh.shape["tensor"]
    devices = list(mesh.devices.flat)
    if own is None:
        here = jax.process_index()
        own = [device for device in devices if device.process_index == here]
    if len(own) % tensor:
        raise InputError(
            f"an engine of {tensor} devices: a process has {len(own)}, not a "
            "multiple; set decode_tensor, or start fewer processes with more devices "
            "each (under SLURM: one task per node)"
        )
    _check_splits(config, fsdp=1, tensor=tensor)
    make = lambda devices: _mesh(devices, (len(devices) // tensor, 1, 1, tensor))
    return EngineMeshes(make(devices), make(own))


def platform(mesh: Mesh) -> str:
    """Return the kind of devices of a mesh: "tpu", "gpu" or "cpu"."""
    return mesh.devices.flat[0].platform


def _mesh(devices: Sequence, sizes: Sequence[int]) -> Mesh:
    # By default axes are Explicit, and an embedding lookup fails.
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=types)


def _check_splits(config: ModelConfig, **sizes: int) -> None:
    """Raise InputError if these sizes of mesh axes do not divide the weights."""
    tensor = sizes["tensor"]
    if max(tensor, config.kv_heads) % min(tensor, config.kv_heads):
        raise InputError(
            f"mesh: kv_heads={config.kv_heads} and tensor={tensor}: neither divides "
            "the other"
        )
    for name in ("heads", "mlp", "vocab", "embed"):
        axis = str(RULES[name])
        size = getattr(config, name)
        if size % sizes[axis]:
            raise InputError(
                f"mesh: {name}={size} is not divisible by {axis}={sizes[axis]}"
            )
