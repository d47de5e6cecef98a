"""Compiles for devices that are not here, and reads what the compiler says.

libtpu compiles for any TPU topology on any machine (`pip install "oreal-jax[plan]"`).
"""

import os
import re
import tempfile
import time
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from oreal_jax import program_cache
from oreal_jax.efficiency import PEAKS
from oreal_jax.errors import InputError
from oreal_jax.plan.collectives import moved
from oreal_jax.plan.findings import Compiled
from oreal_jax.plan.programs import Program, on_device

# libtpu asks the machine which TPU it is, and the cloud if the machine does not know.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is held: others may have theirs
}


def devices_of(topology: str) -> list:
    """The devices of a topology such as v5p:2x2x4.

    Raises:
        InputError: libtpu is not installed, or it or we know no such topology.
    """
    if not util.find_spec("libtpu"):
        raise InputError(
            f"--topology {topology}: the TPU's compiler is not installed: "
            "pip install 'oreal-jax[plan]'"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        made = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--topology {topology}: {reason}") from None
    devices = list(made.devices)
    if devices[0].device_kind not in PEAKS:
        raise InputError(
            f"--topology {topology}: nothing is known of {devices[0].device_kind}, "
            f"only of {', '.join(name for name in PEAKS if 'TPU' in name)}"
        )
    return devices


def host_of(topology: str, devices: list) -> list:
    """The devices of one process, as a topology of its own: the compiler takes no part
    of a larger one.

    Raises:
        InputError: as `devices_of`.
    """
    kind, _, dimensions = topology.partition(":")
    first = devices[0].process_index
    coordinates = np.array([d.coords for d in devices if d.process_index == first])
    extent = np.ptp(coordinates, axis=0) + 1
    own = "x".join(str(size) for size in extent[: dimensions.count("x") + 1])
    return devices_of(f"{kind}:{own}")


def memory_of(device) -> int:
    """Bytes that programs may use on a device: what the compiler says of one that wants
    far too many."""
    where = SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=where)
    double = jax.jit(lambda x: x + x, out_shardings=where)
    try:
        with program_cache.disabled():
            double.lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        return _sizes(str(error))[-1]
    raise AssertionError(f"{device} holds {huge.shape} bytes")


def compile_program(program: Program) -> Compiled:
    """Compiles a program; one that does not fit comes back with its error."""
    start = time.perf_counter()
    lowered = program.lower()
    # A program for absent devices can be written to the cache but not read from it, and
    # the compiler dumps no text of a program that it loads.
    with program_cache.disabled(), tempfile.TemporaryDirectory() as scratch:
        options = {"xla_dump_to": scratch, "xla_dump_hlo_as_text": True}
        try:
            made = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _too_large(program, str(error), time.perf_counter() - start)
        texts = sorted(Path(scratch).glob("*.after_optimizations.txt"))
        assert texts, "the compiler wrote no text"
        by_kind = moved(texts[-1].read_text(), program.repeats)
    memory = made.memory_analysis()
    assert memory, "TPU's compiler always says"
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        program.name,
        program.phase,
        memory.argument_size_in_bytes,
        fresh,
        memory.temp_size_in_bytes,
        program.beside,
        memory.peak_memory_in_bytes + program.beside,
        by_kind,
        time.perf_counter() - start,
    )


def _too_large(program: Program, error: str, seconds: float) -> Compiled:
    wanted, given = (_sizes(error) or [0])[0], on_device(program.arguments)
    return Compiled(
        program.name,
        program.phase,
        given,
        0,
        max(0, wanted - given),
        program.beside,
        wanted + program.beside,
        {},
        seconds,
        error.splitlines()[0],
    )


def _sizes(text: str) -> list[int]:
    """Sizes such as (17.42G) in a message, in order, in bytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.findall(r"([\d.]+)([KMGT])\b", text)
    return [int(float(number) * units[unit]) for number, unit in found]
