"""What this machine has to compute on, found out before JAX is imported.

JAX loads what is installed for every kind of device, and where there is no such device
that complains, or waits for it. So what is for a device that is not there is left out.
In doubt a device is there: then JAX decides, and so it does where JAX_PLATFORMS is set.
"""

import os
import pkgutil
import sys
import types
from importlib import metadata, util
from pathlib import Path

CUDA_PACKAGES = ("jax_cuda12_plugin", "jax_cuda13_plugin")
CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
GOOGLE = "0x1ae0"
NOT_TPUS = ("0x001f", "0x0042")  # its disks and network cards, on machines of all kinds


def leave_out_absent(root: Path = Path("/")) -> None:
    """Has JAX not look for devices that are not under `root`.

    Without effect once JAX is imported.
    """
    asked = os.environ.get("JAX_PLATFORMS", "")
    if "jax" in sys.modules or {"cuda", "gpu"} & set(asked.split(",")):
        return
    gpu = has_gpu(root)
    if not gpu:
        for name in CUDA_PACKAGES:
            sys.modules[name] = None  # pyright: ignore  # Python's "cannot be imported"
        for name in CUDA_PLUGINS:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__["initialize"] = lambda: None
    if not asked and not gpu and not has_tpu(root) and not other_plugins():
        os.environ["JAX_PLATFORMS"] = "cpu"


def has_gpu(root: Path) -> bool:
    """Whether there is a GPU of NVIDIA's: the files that JAX itself looks for."""
    return any((root / "dev" / x).exists() for x in ("nvidia0", "nvidiactl", "dxg"))


def has_tpu(root: Path) -> bool:
    """Whether there may be a TPU: a file to open it by, a PCI device of Google's that
    is not known as another, or somebody who says so."""
    said = ("JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH", "TPU_NAME", "TPU_WORKER_ID")
    if any(name in os.environ for name in said):
        return True
    if any([*root.glob("dev/accel*"), *root.glob("dev/vfio/*")]):
        return True
    read = lambda path: path.read_text(encoding="utf-8").strip()
    return any(
        read(card / "vendor") == GOOGLE and read(card / "device") not in NOT_TPUS
        for card in root.glob("sys/bus/pci/devices/*")
    )


def other_plugins() -> set[str]:
    """JAX plugins for devices that this file does not know."""
    found = {point.value for point in metadata.entry_points(group="jax_plugins")}
    space = util.find_spec("jax_plugins")
    if space and space.submodule_search_locations:
        paths = list(space.submodule_search_locations)
        found |= {m.name for m in pkgutil.iter_modules(paths, "jax_plugins.")}
    return found - set(CUDA_PLUGINS)
