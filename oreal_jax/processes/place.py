"""Which of how many processes this one is: options, environment, or JAX's detection."""

import dataclasses
import os
from collections.abc import Mapping

from oreal_jax.errors import InputError

OPTIONS = ("--coordinator", "--processes", "--process")
VARIABLES = ("OREAL_COORDINATOR", "OREAL_PROCESSES", "OREAL_PROCESS")
SLURM_STEP = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
RANKS, LOCAL_RANKS = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"


@dataclasses.dataclass(frozen=True)
class Place:
    """Process `index` of `count`; process 0 listens at `host`:`port`.

    `devices` are the numbers of this host's devices that are its own, None for all.
    """

    host: str
    port: int
    count: int
    index: int
    devices: tuple[int, ...] | None = None


def place_of(
    coordinator: str | None = None,
    processes: str | None = None,
    process: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """This process's place; None where it is the only one.

    An option that is None is looked up in the environment. With `processes` "auto", or
    as one of several ranks of Open MPI or tasks of a SLURM step, all is as JAX detects
    it.

    Raises:
        InputError: half of it is given, or it makes no sense.
    """
    options = (coordinator, processes, process)
    given = [
        environment.get(variable) if option is None else option
        for option, variable in zip(options, VARIABLES, strict=True)
    ]
    if given == [None, "auto", None]:
        return detected(environment)
    if not any(given):
        in_step = all(name in environment for name in SLURM_STEP)
        several = (in_step or RANKS in environment) and _tasks(environment) != "1"
        return detected(environment) if several else None
    if given[1] == "1":
        return None
    names = [f"{o} (or {v})" for o, v in zip(OPTIONS, VARIABLES, strict=True)]
    missing = [n for n, value in zip(names, given, strict=True) if not value]
    if missing:
        raise InputError(
            f"{', '.join(missing)} must be given too, or --processes auto alone"
        )
    address, *numbers = (str(value) for value in given)
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
    return Place(host.strip("[]"), int(port), count, index)


def detected(environment: Mapping[str, str]) -> Place | None:
    """The place that a TPU pod, SLURM, Open MPI or Kubernetes gives this process."""
    # `jax.distributed.initialize` asks the same, but says what it found to nobody.
    from jax._src.clusters import ClusterEnv

    if _tasks(environment) == "1":
        return None
    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 300
    )
    address, count, index, devices = found
    if address is None or count is None or index is None:
        raise InputError(
            "--processes auto: neither a TPU pod nor a SLURM step, no Open MPI and no "
            "Kubernetes job is detected here"
        )
    ranks = environment.get(RANKS, str(count))
    if ranks != str(count):  # it found the SLURM step of Open MPI's daemons instead
        raise InputError(
            f"{RANKS}={ranks}: JAX detects Open MPI up to version 4 only; start each "
            f"rank with {', '.join(OPTIONS)}"
        )
    host, _, port = address.rpartition(":")
    own = None if devices is None or _is_alone(environment) else tuple(devices)
    return Place(host.strip("[]"), int(port), count, index, own) if count > 1 else None


def _tasks(environment: Mapping[str, str]) -> str | None:
    """The number of Open MPI's ranks, or of SLURM's tasks. Open MPI decides where both
    are set, as in JAX: its ranks inherit the variables of the SLURM step that started
    its daemons, one per node."""
    return environment.get(RANKS, environment.get("SLURM_NTASKS"))


def _is_alone(environment: Mapping[str, str]) -> bool:
    """Whether Open MPI or SLURM started one process per host, for which all devices of
    its host are meant; JAX gives each process of a cluster one."""
    if LOCAL_RANKS in environment:
        return environment[LOCAL_RANKS] == "1"
    nodes = environment.get("SLURM_STEP_NUM_NODES")
    return nodes is not None and nodes == environment.get("SLURM_NTASKS")
