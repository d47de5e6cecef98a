"""Present devices are never hidden, plugins of absent ones are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import ALONE, ROOT

from oreal_jax import hardware


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Simulate a machine without devices, before JAX is imported."""
    for name in [n for n in os.environ if n.startswith(("JAX_PLATFORMS", "TPU_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    del sys.modules["jax"]
    return tmp_path


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def card(machine: Path, vendor: str, device: str) -> None:
    folder = machine / "sys/bus/pci/devices/0000:00:05.0"
    write(folder / "vendor", vendor + "\n")
    write(folder / "device", device + "\n")


def test_without_devices_jax_uses_the_cpu(machine):
    hardware.hide_absent_devices(machine)
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert sys.modules["jax_cuda12_plugin"] is None


@pytest.mark.parametrize("name", ["nvidia0", "nvidiactl", "dxg"])
def test_a_gpu_is_not_hidden(machine, name):
    write(machine / "dev" / name)
    hardware.hide_absent_devices(machine)
    assert os.environ["JAX_PLATFORMS"] == ""
    assert "jax_cuda12_plugin" not in sys.modules


@pytest.mark.parametrize("name", ["accel0", "vfio/0"])
def test_a_tpu_is_not_hidden(machine, name):
    write(machine / "dev" / name)
    hardware.hide_absent_devices(machine)
    assert os.environ["JAX_PLATFORMS"] == ""


def test_a_tpu_is_detected_by_its_pci_card(machine):
    card(machine, "0x1ae0", "0x0063")
    hardware.hide_absent_devices(machine)
    assert os.environ["JAX_PLATFORMS"] == ""


@pytest.mark.parametrize("numbers", [("0x1ae0", "0x0042"), ("0x1af4", "0x0063")])
def test_other_cards_are_not_tpus(machine, numbers):
    card(machine, *numbers)
    hardware.hide_absent_devices(machine)
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_a_tpu_in_environment_variables_is_not_hidden(machine, monkeypatch):
    monkeypatch.setenv("TPU_NAME", "pod")
    hardware.hide_absent_devices(machine)
    assert os.environ["JAX_PLATFORMS"] == ""


def test_a_plugin_for_another_device_is_not_hidden(machine, monkeypatch):
    write(machine / "site/jax_plugins/another/__init__.py")
    monkeypatch.syspath_prepend(machine / "site")
    hardware.hide_absent_devices(machine)
    assert os.environ["JAX_PLATFORMS"] == ""


@pytest.mark.parametrize("platforms", ["cuda", "gpu,cpu", "tpu"])
def test_platforms_set_by_the_user_are_kept(machine, monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    hardware.hide_absent_devices(machine)
    assert os.environ["JAX_PLATFORMS"] == platforms
    assert ("jax_cuda12_plugin" in sys.modules) == (platforms == "tpu")


def test_without_gpu_its_plugins_are_not_loaded(tmp_path):
    if hardware.has_gpu(Path("/")):
        pytest.skip("this machine has a GPU")
    noise = "import sys; print('no driver!', file=sys.stderr)\n"
    write(tmp_path / "jax_cuda12_plugin/__init__.py", noise)
    write(tmp_path / "jax_plugins/xla_cuda12/__init__.py", noise + "initialize = 1\n")
    run = lambda code: subprocess.run(
        [sys.executable, "-c", code],
        env=ALONE | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert "no driver!" in run("import jax; jax.devices()").stderr  # alone, it does
    tried = run(
        "import sys, oreal_jax.cli as cli;"
        "code = cli.main(['sample', '--prompt', '', '--model', 'nowhere']);"
        "import jax; jax.devices(); sys.exit(code)"
    )
    assert tried.returncode == 2
    assert tried.stderr.startswith("oreal: nowhere") and tried.stderr.count("\n") == 1
