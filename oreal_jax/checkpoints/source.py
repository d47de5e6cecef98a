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
    of the run that trained it (empty for other models). `policy` is the directory of
    the weights in a run (None: its newest policy).
    """

    path: Path
    config: ModelConfig
    files: Path
    settings: Mapping[str, Any] = {}
    policy: Path | None = None

    @property
    def weights(self) -> Path:
        """The directory of the weights.

        Raises:
            InputError: a run without checkpoints.
        """
        if self.files == self.path:
            return self.path
        return self.policy or run.newest_policy(self.path)

    @property
    def steps(self) -> int:
        """The number of steps that the policy of a run was trained for."""
        weights = self.weights
        return 0 if weights.name == "reference" else int(weights.parent.name)

    def load(
        self, mesh: Mesh, dtype=jnp.float32, on_tensor: OnTensor = hf.ignore
    ) -> Params:
        """Load the weights, sharded over the mesh."""
        shardings = sharding.param_shardings(self.config, mesh)
        if self.files == self.path:
            return hf.load(self.path, dtype, shardings, on_tensor=on_tensor)
        target = sharding.with_shardings(model.abstract(self.config, dtype), shardings)
        return run.load_params(self.weights, target)


def open_model(path: str | Path, step: int | None = None) -> ModelSource:
    """Describe a model without reading its weights.

    RUN/checkpoints/N is the policy of a run after N steps, as is RUN with `step` N;
    RUN/reference is its initial policy, RUN/best a run directory of its own.

    Raises:
        InputError: neither kind of directory, an unsupported model, or a run without
            that checkpoint.
    """
    path, policy = Path(path), None
    check_local(path)
    if not (path / "config.json").is_file():
        if path.name == "reference" and (path.parent / "model").is_dir():
            path, policy = path.parent, path
        elif path.parent.name == "checkpoints" and path.name.isdigit():
            path, step = path.parents[1], int(path.name)
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
    if step is not None:
        policy = _policy_after(path, step)
    return ModelSource(path, hf.read_config(files), files, settings, policy)


def _policy_after(path: Path, step: int) -> Path:
    steps = run.steps(path)
    if step not in steps:
        existing = ", ".join(map(str, steps)) or "none"
        raise InputError(f"{path}: no checkpoint {step}; available: {existing}")
    return path / "checkpoints" / str(step) / "policy"


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
