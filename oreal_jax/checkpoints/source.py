"""Models on disk: Hugging Face and run directories; import of both and of .gguf."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from oreal_jax import model, sharding
from oreal_jax.checkpoints import gguf, hf, run
from oreal_jax.checkpoints.hf import OnTensor
from oreal_jax.errors import InputError
from oreal_jax.files import check_local, new_directory, read_json
from oreal_jax.model import ModelConfig, Params


class ModelSource(NamedTuple):
    """A model on disk.

    `files` is the directory of its config.json and tokenizer, `settings` is the config
    of the run that trained it (empty for other models).
    """

    path: Path
    config: ModelConfig
    files: Path
    settings: Mapping[str, Any] = {}

    def load(
        self, mesh: Mesh, dtype=jnp.float32, on_tensor: OnTensor = hf.ignore
    ) -> Params:
        """Load the weights, sharded over the mesh."""
        shardings = sharding.param_shardings(self.config, mesh)
        if self.files == self.path:
            return hf.load(self.path, dtype, shardings, on_tensor=on_tensor)
        target = sharding.with_shardings(model.abstract(self.config, dtype), shardings)
        return run.load_params(run.newest_policy(self.path), target)


def open_model(path: str | Path) -> ModelSource:
    """Describe a model without reading its weights.

    Raises:
        InputError: neither kind of directory, or an unsupported model.
    """
    path = Path(path)
    check_local(path)
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
    is_run = files != path and run_config.is_file()
    settings = read_json(run_config) if is_run else {}
    return ModelSource(path, hf.read_config(files), files, settings)


def copy_files(source: ModelSource, destination: Path) -> None:
    """Copy config, tokenizer and chat template of a model."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in [*hf.auxiliary_files(source.files), "config.json"]:
        shutil.copy2(source.files / name, destination / name)


def import_model(
    source: Path,
    destination: Path,
    make_mesh: Callable[[ModelConfig], Mesh],
    dtype,
    on_tensor: OnTensor = hf.ignore,
) -> None:
    """Make a run directory at step 0 from a Hugging Face directory or a .gguf file.

    Raises:
        InputError: the source is invalid, or the destination is not empty.
    """
    with new_directory(destination) as scratch:
        directory = source
        if source.suffix == ".gguf":
            directory = scratch / "gguf"
            gguf.to_hugging_face_directory(
                source, directory, dtype, on_tensor=on_tensor
            )
        opened = open_model(directory)
        params = opened.load(make_mesh(opened.config), dtype, on_tensor)
        copy_files(opened, scratch / "model")
        run.save_params(scratch / "checkpoints" / "0" / "policy", params)
        if directory != source:
            shutil.rmtree(directory)
