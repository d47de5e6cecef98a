"""Compilation for TPUs that are not attached, and the compiler's report.

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
from oreal_jax.plan.collectives import collective_bytes
from oreal_jax.plan.findings import Compiled
from oreal_jax.plan.programs import Program, device_bytes

# Without these, libtpu looks for its TPU type on this machine and in the cloud.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may hold TPUs
}


def tpu_devices(topology: str) -> list:
    """Return the devices of a TPU topology such as v5p:2x2x4.

    Raises:
        InputError: libtpu is not installed, or the topology is unknown.
    """
    kinds = "expected for example v4:2x2x4, v5p:2x2x4, v5e:4x4, v6e:4x4 or h100:8"
    if not re.fullmatch(r"(v|tpu)\d\w*:\d+(x\d+)+", topology):
        raise InputError(f"--topology {topology}: unknown; {kinds}")
    if not util.find_spec("libtpu"):
        raise InputError(
            f"--topology {topology}: the TPU's compiler is not installed: "
            "pip install 'oreal-jax[plan]'"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        description = topologies.get_topology_desc(topology, platform="tpu")
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--topology {topology}: {reason}; {kinds}") from None
    devices = list(description.devices)
    if devices[0].device_kind not in PEAKS:
        raise InputError(
            f"--topology {topology}: the peaks of {devices[0].device_kind} are not "
            f"known, only those of {', '.join(kind for kind in PEAKS if 'TPU' in kind)}"
        )
    return devices


def tpu_host(topology: str, devices: list) -> list:
    """Return the devices of one process, as a topology of its own.

    Programs for a part of a topology do not compile.

    Raises:
        InputError: as in `tpu_devices`.
    """
    kind, _, dimensions = topology.partition(":")
    first = devices[0].process_index
    coordinates = np.array([d.coords for d in devices if d.process_index == first])
    extent = np.ptp(coordinates, axis=0) + 1
    size = "x".join(map(str, extent[: dimensions.count("x") + 1]))
    return tpu_devices(f"{kind}:{size}")


def tpu_memory(device) -> int:
    """Return the bytes that programs may use on a TPU.

    The compiler's error about a program that needs far more names them.
    """
    sharding = SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=sharding)
    double = jax.jit(lambda x: x + x, out_shardings=sharding)
    try:
        with program_cache.disabled():
            double.lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        return _sizes(str(error))[-1]
    raise AssertionError(f"{device} holds {huge.shape} bytes")


def compile_program(program: Program) -> Compiled:
    """Compile a program; if it does not fit, the result has its error."""
    start = time.perf_counter()
    lowered = program.function.lower(*program.arguments)
    # Programs for absent devices can be written to the cache but not read from it, and
    # their text is only available as a dump.
    with program_cache.disabled(), tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = (_sizes(str(error)) or [0])[0]
            arguments, outputs = device_bytes(program.arguments), 0
            temporary, moved = max(0, needed - arguments), {}
            message = str(error).splitlines()[0]
        else:
            texts = sorted(Path(folder).glob("*.after_optimizations.txt"))
            assert texts, "the compiler wrote no text"
            moved = collective_bytes(texts[-1].read_text(), program.repeats)
            memory = compiled.memory_analysis()
            assert memory, "the TPU's compiler reports memory"
            needed = memory.peak_memory_in_bytes
            arguments = memory.argument_size_in_bytes
            outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
            temporary, message = memory.temp_size_in_bytes, ""
    return Compiled(
        program.name,
        program.phase,
        arguments=arguments,
        outputs=outputs,
        temporary=temporary,
        others=program.others,
        peak=needed + program.others,
        moved=moved,
        seconds=time.perf_counter() - start,
        error=message,
    )


def _sizes(text: str) -> list[int]:
    """Return the sizes in a message, such as 17.42G, in bytes and in order."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    matches = re.findall(r"([\d.]+)([KMGT])\b", text)
    return [int(float(number) * units[unit]) for number, unit in matches]
