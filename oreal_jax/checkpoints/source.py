"""Where a model comes from: a Hugging Face directory, or a run directory of ours."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from oreal_jax import model, sharding
from oreal_jax.checkpoints import gguf, hf, run
from oreal_jax.errors import InputError
from oreal_jax.files import read_json
from oreal_jax.model import ModelConfig, Params

OnTensor = Callable[[str], None]
ignore: OnTensor = lambda name: None


class ModelSource(NamedTuple):
    """A model on disk. `files` is the directory with its config.json and tokenizer;
    `system_prompt` is what a run trained with, None for other models."""

    path: Path
    config: ModelConfig
    files: Path
    system_prompt: str | None = None

    def load(
        self, mesh: Mesh, dtype=jnp.float32, on_tensor: OnTensor = ignore
    ) -> Params:
        """The weights, each tensor straight into its place on the mesh."""
        shardings = sharding.of_params(self.config, mesh)
        if self.files == self.path:
            return hf.load(self.path, dtype, shardings, on_tensor=on_tensor)
        target = sharding.placed(model.abstract(self.config, dtype), shardings)
        return run.load_params(run.newest_policy(self.path), target)


def open_model(path: str | Path) -> ModelSource:
    """Looks at a model without reading its weights.

    Raises:
        InputError: neither kind of directory, or one of an unsupported model.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        raise InputError(f"{path}: convert it first: oreal convert from-hf {path} DIR")
    if not path.is_dir():
        raise InputError(f"{path}: no such model directory")
    files = path / "model" if (path / "model").is_dir() else path
    if not (files / "config.json").is_file():
        raise InputError(
            f"{path}: neither a Hugging Face nor a run directory "
            "(no config.json, no model/config.json)"
        )
    run_config = path / "config.json"
    own = {}
    if files != path and run_config.is_file():
        own = read_json(run_config)
    return ModelSource(path, hf.read_config(files), files, own.get("system_prompt"))


def copy_files(source: ModelSource, destination: Path) -> None:
    """Copies what goes with a model beside its weights: config, tokenizer, template."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in hf.companions(source.files):
        shutil.copy2(source.files / name, destination / name)
    shutil.copy2(source.files / "config.json", destination / "config.json")


def import_model(
    source: Path,
    destination: Path,
    mesh_of: Callable[[ModelConfig], Mesh],
    dtype,
    on_tensor: OnTensor = ignore,
) -> None:
    """Makes a run directory at step 0 from a Hugging Face directory or a .gguf file.

    Raises:
        InputError: the source is unusable, or the destination is not empty.
    """
    if destination.exists() and not destination.is_dir():
        raise InputError(f"{destination}: exists and is no directory")
    if destination.exists() and any(destination.iterdir()):
        raise InputError(f"{destination}: exists and is not empty")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        room = tempfile.TemporaryDirectory(
            dir=destination.parent, prefix=f".{destination.name}-"
        )
    except OSError as error:
        raise InputError(
            f"{destination}: cannot be written: {error.strerror}"
        ) from None
    with room as scratch:
        if source.suffix == ".gguf":
            directory = Path(scratch) / "gguf"
            gguf.to_hugging_face_directory(
                source, directory, dtype, on_tensor=on_tensor
            )
            source = directory
        opened = open_model(source)
        params = opened.load(mesh_of(opened.config), dtype, on_tensor)
        made = Path(scratch) / "run"
        copy_files(opened, made / "model")
        run.save_params(made / "checkpoints" / "0" / "policy", params)
        if destination.exists():
            destination.rmdir()
        made.rename(destination)
