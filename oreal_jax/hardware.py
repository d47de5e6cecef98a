"""Detection of this machine's devices, before JAX is imported.

JAX loads every installed device plugin. Without its device, a plugin prints errors or
waits for it, so plugins of absent devices are hidden. In doubt a device counts as
present and JAX decides, as it does if JAX_PLATFORMS is set.
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
NOT_TPUS = ("0x001f", "0x0042")  # Google's disks and network cards
TPU_VARIABLES = ("JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH", "TPU_NAME", "TPU_WORKER_ID")


def hide_absent_devices(root: Path = Path("/")) -> None:
    """Keep JAX from looking for devices that do not exist under `root`.

    Without effect once JAX is imported.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if "jax" in sys.modules or {"cuda", "gpu"} & set(platforms.split(",")):
        return
    gpu = has_gpu(root)
    if not gpu:
        for name in CUDA_PACKAGES:
            sys.modules[name] = None  # pyright: ignore  # Python's "cannot be imported"
        for name in CUDA_PLUGINS:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__["initialize"] = lambda: None
    if not platforms and not gpu and not has_tpu(root) and not other_plugins():
        os.environ["JAX_PLATFORMS"] = "cpu"


def has_gpu(root: Path) -> bool:
    """Return whether there is an NVIDIA GPU, by the files that JAX checks."""
    return any((root / "dev" / x).exists() for x in ("nvidia0", "nvidiactl", "dxg"))


def has_tpu(root: Path) -> bool:
    """Return whether there may be a TPU.

    Signs are an environment variable, a device file, or a PCI device of Google that is
    not known to be another.
    """
    if any(name in os.environ for name in TPU_VARIABLES):
        return True
    if any([*root.glob("dev/accel*"), *root.glob("dev/vfio/*")]):
        return True
    read = lambda path: path.read_text(encoding="utf-8").strip()
    return any(
        read(card / "vendor") == GOOGLE and read(card / "device") not in NOT_TPUS
        for card in root.glob("sys/bus/pci/devices/*")
    )


def other_plugins() -> set[str]:
    """Return the installed JAX plugins except those for NVIDIA GPUs."""
    plugins = {point.value for point in metadata.entry_points(group="jax_plugins")}
    spec = util.find_spec("jax_plugins")
    if spec and spec.submodule_search_locations:
        paths = list(spec.submodule_search_locations)
        plugins |= {m.name for m in pkgutil.iter_modules(paths, "jax_plugins.")}
    return plugins - set(CUDA_PLUGINS)
