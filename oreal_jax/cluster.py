"""How the processes of a run find each other: options, variables, JAX's detection."""

import os
from collections.abc import Mapping
from typing import Any

from oreal_jax.errors import InputError

OPTIONS = ("--coordinator", "--processes", "--process")
VARIABLES = ("OREAL_COORDINATOR", "OREAL_PROCESSES", "OREAL_PROCESS")
SLURM_STEP = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"


def initialize_arguments(
    coordinator: str | None = None,
    processes: str | None = None,
    process: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any] | None:
    """Return arguments for `jax.distributed.initialize`; None for a single process.

    An option that is None is looked up in the environment. With `processes` "auto", in
    a SLURM step of several tasks and under Open MPI, JAX detects the other arguments.

    Raises:
        InputError: an option is missing or invalid.
    """
    options = [
        environment.get(variable) if option is None else option
        for option, variable in zip(
            (coordinator, processes, process), VARIABLES, strict=True
        )
    ]
    # Ranks of Open MPI inherit the variables of the SLURM step that started `mpirun`'s
    # daemons, one per node.
    tasks = environment.get(OPEN_MPI, environment.get("SLURM_NTASKS"))
    in_cluster = OPEN_MPI in environment or all(v in environment for v in SLURM_STEP)
    if options == [None, "auto", None] or (in_cluster and not any(options)):
        return None if tasks == "1" else _detection_arguments(environment)
    if options[1] == "1" or not any(options):
        return None
    names = [f"{o} (or {v})" for o, v in zip(OPTIONS, VARIABLES, strict=True)]
    missing = [name for name, value in zip(names, options, strict=True) if not value]
    if missing:
        raise InputError(
            f"{', '.join(missing)} must be given too, or --processes auto alone"
        )
    address, *numbers = map(str, options)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"{names[0]}: {address!r} is not HOST:PORT")
    if not 0 < int(port) < 2**16:
        raise InputError(f"{names[0]}: {address!r}: ports are 1 to {2**16 - 1}")
    for name, number in zip(names[1:], numbers, strict=True):
        if not number.isdigit():
            raise InputError(f"{name}: {number!r} is not a number")
    count, index = map(int, numbers)
    if index >= count:
        raise InputError(
            f"{names[2]}: {index}, but {count} processes are numbered 0 to {count - 1}"
        )
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _detection_arguments(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments that JAX would detect wrongly; it detects the others."""
    if OPEN_MPI in environment:
        if "OMPI_MCA_orte_hnp_uri" not in environment:
            raise InputError(
                f"{OPEN_MPI}={environment[OPEN_MPI]}: JAX detects Open MPI up to "
                f"version 4 only; start each rank with {', '.join(OPTIONS)}"
            )
        one_per_host = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    else:
        nodes = environment.get("SLURM_STEP_NUM_NODES")
        one_per_host = nodes is not None and nodes == environment.get("SLURM_NTASKS")
    # JAX gives each process one device; an empty list means all devices of its host.
    return {"local_device_ids": []} if one_per_host else {}
