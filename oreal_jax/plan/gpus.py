"""GPUs as the devices of a plan. Their compiler needs one, so nothing is compiled.

A run is laid out on stand-ins for GPUs: its arrays, and how much of them is on a
device, are those of the real run. Temporary memory and collectives are unknown.
"""

import dataclasses
import os

from oreal_jax.errors import InputError
from oreal_jax.plan.findings import Compiled
from oreal_jax.plan.programs import Program, device_bytes

# Kinds in `efficiency.PEAKS`, and bytes of memory (NVIDIA's data sheets).
GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 80 * 10**9),
    "h100": ("NVIDIA H100 80GB HBM3", 80 * 10**9),
    "h200": ("NVIDIA H200", 141 * 10**9),
}
PER_PROCESS = 8
# The share of the memory that JAX allocates, and the variables that set it
# (docs.jax.dev/en/latest/gpu_memory_allocation.html).
SHARE = "0.75"
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class _Memory(str):
    kind = property(str)


@dataclasses.dataclass(frozen=True)
class AbsentGpu:
    """A stand-in for a GPU, with the attributes that meshes and shardings read."""

    id: int
    process_index: int
    device_kind: str
    platform: str = "gpu"

    def default_memory(self) -> _Memory:
        """Return the GPU's own memory."""
        return _Memory("device")

    def addressable_memories(self) -> list[_Memory]:
        """Return the GPU's memory and its host's."""
        return [_Memory("device"), _Memory("pinned_host")]


def gpu_devices(topology: str) -> list[AbsentGpu]:
    """Return the devices of a topology such as h100:8.

    Raises:
        InputError: an unknown GPU, or a number of them that does not fill processes.
    """
    name, _, text = topology.partition(":")
    count = int(text) if text.isdigit() else 0
    if name not in GPUS or not count or count > PER_PROCESS and count % PER_PROCESS:
        raise InputError(
            f"--topology {topology}: expected one of {', '.join(GPUS)} and a number of "
            f"GPUs up to {PER_PROCESS}, or a multiple of it, e.g. h100:{PER_PROCESS}"
        )
    kind, _ = GPUS[name]
    return [AbsentGpu(i, i // PER_PROCESS, kind) for i in range(count)]


def gpu_memory(topology: str) -> int:
    """Return the bytes that JAX allocates on a GPU of a topology.

    Raises:
        InputError: one of `SHARE_VARIABLES` is not a share.
    """
    _, memory = GPUS[topology.partition(":")[0]]
    name = next(filter(os.environ.get, SHARE_VARIABLES), "")
    text = os.environ.get(name, SHARE)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"{name}={text} must be a number above 0 and at most 1")
    return int(share * memory)


def measure_arguments(program: Program) -> Compiled:
    """Return the memory of a program without its temporaries and new outputs."""
    size, others = device_bytes(program.arguments), program.others
    sizes = size, 0, None, others, size + others
    return Compiled(program.name, program.phase, *sizes, moved={}, seconds=0.0)
