"""A run directory at work: its model, state, checkpoints and record.

    RUN/config.json        what is run
    RUN/model/             config.json, tokenizer, chat template
    RUN/metrics.jsonl      one object a step
    RUN/trajectories/      one file a step
    RUN/checkpoints/       all that is needed to go on
    RUN/reference/         the initial policy
    RUN/data/              the prompts as a TFDS data set

Opening a run that has checkpoints goes on from the newest one.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oreal_jax import config as configuration
from oreal_jax import model, sharding
from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.checkpoints.source import ModelSource, copy_files, open_model
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.console import Screen
from oreal_jax.data import Chat
from oreal_jax.errors import BadInput
from oreal_jax.metrics import MetricsLog, replace_text
from oreal_jax.model import ModelConfig, Params
from oreal_jax.train.state import Learners, Optimizer, learners

# What a run is made of; changing it would make another run.
IDENTITY = ("model", "seed", "prompts", "examples")


def compute_dtype(name: str):
    """The dtype of activations: "auto" is bfloat16, on CPU float32."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def source_of(config: TrainConfig | SftConfig, run: Path) -> ModelSource:
    """The model a run works on: its own once it has begun, else the config's."""
    begun = (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir())
    return open_model(run if begun else config.model)


class Session:
    """An open run. Close it (or leave its `with` block) to finish what is saved."""

    def __init__(
        self,
        config: TrainConfig | SftConfig,
        run: Path,
        screen: Screen,
        *,
        source: ModelSource,
        mesh: Mesh,
        chat: Chat,
        steps: int,
        token_reward: Optimizer | None = None,
        freeze: bool = True,
    ):
        """Opens the run and loads its newest state, or starts it."""
        self.config, self.run, self.screen = config, run, screen
        self.mesh, self.chat, self.steps = mesh, chat, steps
        self.model: ModelConfig = source.config
        self.dtype = compute_dtype(config.compute)
        self.rows = config.packing.rows * sharding.row_ways(mesh)
        self.learners: Learners = learners(
            source.config, config.policy, token_reward, steps, mesh
        )
        self._write_config()
        if source.path != run:
            copy_files(source, run / "model")
        self._checkpoints = checkpoints.Checkpoints(run, keep=config.saving.keep)
        self.state = self._restore_or_start(source)
        self._log = MetricsLog(run, self.step, tensorboard=config.tensorboard)
        self._began = time.perf_counter()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is KeyboardInterrupt:
            self.screen.say(f"stopped after step {self.step}; saving")
            self._checkpoints.save(self.state)
        self._checkpoints.close()
        self._log.close()

    @property
    def step(self) -> int:
        """Steps done so far."""
        return int(self.state.step)

    def _write_config(self) -> None:
        """Records the config; a run that began with another identity is refused."""
        path = self.run / "config.json"
        new = configuration.as_json(self.config)
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            for name in sorted(old.keys() | new.keys()):
                if old.get(name) != new.get(name):
                    change = f"{name}: {old.get(name)} -> {new.get(name)}"
                    if name in IDENTITY:
                        raise BadInput(f"{path}: this run began otherwise; {change}")
                    self.screen.say(f"changed since this run began: {change}")
        self.run.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(new, indent=2) + "\n")

    def _restore_or_start(self, source: ModelSource):
        latest = self._checkpoints.latest()
        count = f"{model.parameter_count(source.config):,} parameters"
        if latest is not None:
            self.screen.say(f"going on after step {latest} of {self.run} ({count})")
            with self.screen.phase("restore"):
                return self._checkpoints.restore(
                    latest, self.learners.abstract(self.mesh)
                )
        with self.screen.phase("load") as advance:
            params = source.load(self.mesh, on_tensor=lambda name: advance())
        self.screen.say(f"{source.path}: {count} on {self.mesh.size} device(s)")
        if not (self.run / "reference").is_dir():
            checkpoints.save_params(
                self.run / "reference",
                jax.jit(model.cast, static_argnums=1)(params, self.dtype),
            )
        return self.learners.start(params, self.mesh)

    def load_reference(self) -> Params:
        """The initial policy, in the compute dtype."""
        shardings = sharding.of_params(model.axes(self.model), self.mesh)
        shapes = model.abstract(self.model, self.dtype)
        return checkpoints.load_params(
            self.run / "reference", checkpoints.with_shardings(shapes, shardings)
        )

    def skip_step(self) -> None:
        """Counts a step that had nothing to learn from."""
        self.state = self.state._replace(step=self.state.step + 1)

    def finish_step(self, values: Mapping[str, float], line: str) -> None:
        """Records the step just done, says it, and saves where it is time to."""
        seconds = time.perf_counter() - self._began
        self._began = time.perf_counter()
        timed = {"perf/time_per_step": seconds} | self.screen.take_timings()
        self._log.write(self.step - 1, dict(values) | timed)
        self.screen.say(f"{line}  {seconds:.1f} s")
        if self.step % self.config.saving.every == 0 or self.step == self.steps:
            with self.screen.phase("save"):
                self._checkpoints.save(self.state)
