"""A run directory at work: its model, state, checkpoints and record.

    RUN/config.json        what is run
    RUN/model/             config.json, tokenizer, chat template
    RUN/metrics.jsonl      one object a step
    RUN/trajectories/      one file per step, written while the next one samples
    RUN/interrupted/       what a step that was interrupted had drawn
    RUN/checkpoints/       all that is needed to go on
    RUN/reference/         the initial policy
    RUN/data/              the prompts as a TFDS data set
    RUN/profile/           a trace of some steps, where asked for
    RUN/evaluations.jsonl  one object an evaluation, and
    RUN/best/              the best policy by them, where the config asks for it

Opening a run that has checkpoints resumes it from the newest one; what later steps had
written belongs to steps that will be run again, and is removed. Where several processes
run it, they share the directory: all write their part of checkpoints and of the
reference, process 0 alone writes the rest.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from oreal_jax import config as configuration
from oreal_jax import distributed, efficiency, model, sharding
from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.checkpoints.run import Progress
from oreal_jax.checkpoints.source import ModelSource, copy_files, open_model
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.console import Screen
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.data.packing import Batch
from oreal_jax.distributed import uninterrupted
from oreal_jax.efficiency import PhaseTotals
from oreal_jax.errors import Diverged, InputError
from oreal_jax.files import BackgroundWriter, read_json, write_text
from oreal_jax.interrupts import ignoring_interrupts
from oreal_jax.metrics import MetricsLog, compilations
from oreal_jax.model import ModelConfig, Params
from oreal_jax.train.discard import discard_after
from oreal_jax.train.profile import Profile
from oreal_jax.train.programs import compute_dtype, learners_of
from oreal_jax.train.state import TrainState
from oreal_jax.train.step import Scores, TrainStep

# What a run is made of; changing it would make another run.
IDENTITY = ("class", "model", "seed", "prompts", "examples", "chat_template")


def source_of(config: TrainConfig | SftConfig, run: Path) -> ModelSource:
    """The model a run works on: its own once it has begun, else the config's.

    Raises:
        InputError: it is unusable, or not the same to all processes.
    """
    for name, value in configuration.as_json(config).items():
        distributed.assert_equal(f"config: {name}", value)
    newest = checkpoints.newest_step(run, checkpoints.ITEMS)
    distributed.assert_equal(
        f"{run}: step of the newest checkpoint, seen by all", newest
    )
    if newest is not None:
        return open_model(run)
    if checkpoints.steps(run):
        raise InputError(
            f"{run}: its checkpoints hold a policy but no state to resume from; train "
            f"this policy in another run: --set model={run} --run ANOTHER"
        )
    return open_model(config.model)


def progress_of(run: Path) -> tuple[int | None, Progress]:
    """The step that a run resumes after, None before it has begun, and its progress.

    Raises:
        InputError: they cannot be read.
    """
    step = checkpoints.newest_step(run, checkpoints.ITEMS)
    if step is None:
        return None, Progress()
    progress = checkpoints.read_progress(run, step)
    return step, progress or _unrecorded_progress(run, step)


def _unrecorded_progress(run: Path, step: int) -> Progress:
    """The progress of a checkpoint that does not record it: every step before it took
    as many as the run's config says."""
    config = read_json(run / "config.json")
    per_step = config.get("prompts_per_step") or config["examples_per_step"]
    return Progress(taken=step * per_step)


def chat_of(
    config: TrainConfig | SftConfig,
    run: Path,
    source: ModelSource,
    stop_strings: Sequence[str] = (),
) -> Chat:
    """The chat template of a run: its own once it has begun, else what the config says.

    Raises:
        InputError: no usable tokenizer or template.
    """
    begun = source.path == run
    template = Path(config.chat_template) if config.chat_template else None
    return Chat(
        load_tokenizer(source.files),
        config.system_prompt,
        None if begun else template,
        stop_strings,
    )


class Data(NamedTuple):
    """What a run learns from.

    `rows` is the fingerprint of all rows of `source`, `order` that of the list that
    each step takes the next `per_step` of.
    """

    source: str
    rows: str
    order: str
    per_step: int


class Unwritten:
    """The record of a run in processes that leave it to process 0."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Process 0 writes it."""

    def close(self) -> None:
        """Nothing is open."""


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
        data: Data,
        steps: int,
        profile: int = 0,
    ):
        """Loads the newest state, or the model to start from; then opens the record.

        Nothing is written before everything has been read. `profile` steps are traced
        into RUN/profile.

        Raises:
            InputError: the run began with another config or other data, the weights do
                not fit, or the directory cannot be written.
        """
        if jax.process_count() != distributed.process_count():
            raise InputError(
                f"the devices are those of {jax.process_count()} processes, which do "
                "not know of each other: --processes auto on each host"
            )
        self.config, self.run, self.screen = config, run, screen
        self.mesh, self.chat, self.data, self.steps = mesh, chat, data, steps
        self.model: ModelConfig = source.config
        self.dtype = compute_dtype(config.compute, mesh)
        self.rows = config.packing.rows * sharding.row_ways(mesh)
        self.learners = learners_of(config, source.config, mesh, steps)
        self._rates = {"actor/lr": jax.jit(self.learners.policy.rate)}
        if self.learners.token_reward:
            self._rates["token_reward/lr"] = jax.jit(self.learners.token_reward.rate)
        newest, progress = progress_of(run)
        begun = newest is not None
        self._compare_config(begun)
        self._first, self.taken = newest or 0, progress.taken
        self._compare_progress(progress)
        state = self._restore() if begun else None
        params = None if begun else self._load(source)
        self._open_directory()
        self.state = state or self._start(source, params)
        self._checkpoints = checkpoints.Checkpoints(run, keep=config.saving.keep)
        self.writer = BackgroundWriter()
        self._log = Unwritten()
        if distributed.is_first():
            self._log = MetricsLog(run, self.step, tensorboard=config.tensorboard)
        self._profile = Profile(run / "profile", profile, screen)
        self._began = time.perf_counter()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind, error, trace) -> None:
        with uninterrupted(), contextlib.ExitStack() as closing:
            for part in (self._profile, self._log, self._checkpoints):
                closing.callback(part.close)
            closing.callback(self._close_writer, error)
            if kind is KeyboardInterrupt:
                self.screen.say(f"stopped after step {self.step}; saving")
                distributed.stop_together("saving the run")
                self._save()
            elif error and not isinstance(error, Diverged):
                self._save_after(error)

    def _close_writer(self, error: BaseException | None) -> None:
        """Raises what the last write raised, unless there is an error already."""
        try:
            self.writer.close()
        except Exception as failure:
            if error is None:
                raise
            self.screen.say(f"{type(failure).__name__}: {failure}")

    def _save_after(self, error: BaseException) -> None:
        """Saves the last finished step, so that an error does not cost it, too.

        Nothing here may replace the error: neither a save that fails, nor Ctrl-C, nor
        other processes that wait for this one in a collective and cannot save.
        """
        log = self.screen.say if distributed.is_first() else distributed.warn
        with ignoring_interrupts("saving the last finished step"):
            try:
                if self.step == self._first:
                    return  # nothing is new
                distributed.report(error)
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                distributed.stop_together(
                    f"saving the run after {reason}", distributed.STOP_LIMIT
                )
                self._save()
                self._checkpoints.wait()
                log(f"{reason}; saved step {self.step}")
            except Exception as failure:
                log(f"not saved: {type(failure).__name__}: {failure}")

    @property
    def step(self) -> int:
        """Steps done so far."""
        return int(self.state.step)

    def _save(self) -> None:
        """Saves the state and the progress, in the background; first the files of the
        steps up to it are complete, since a resumed run does not write them again. One
        that cannot be written ends the run afterwards: steps are not lost for it, and
        all processes save together."""
        self.writer.wait()
        rates = {name: float(rate(self.step)) for name, rate in self._rates.items()}
        progress = Progress(self.taken, self.data.rows, self.data.order, rates)
        self._checkpoints.save(self.state, progress)

    def _compare_config(self, begun: bool) -> None:
        """Says what has changed since the run began; another identity is refused."""
        path = self.run / "config.json"
        if not path.exists():
            return
        old, new = read_json(path), configuration.as_json(self.config)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                change = f"{name}: {old.get(name)} -> {new.get(name)}"
                if name in IDENTITY:
                    raise InputError(f"{path}: this run began otherwise; {change}")
                appears = None in (old.get(name), new.get(name))
                if name == "token_reward" and appears and begun:
                    raise InputError(
                        f"{path}: its checkpoints are with a token reward model or "
                        f"without, as it began; {change}"
                    )
                self.screen.say(f"changed since this run began: {change}")

    def _compare_progress(self, progress: Progress) -> None:
        """Logs what the new config changes at the step that the run resumes after;
        other data are refused."""
        where = f"{self.run}: step {self._first + 1}"
        if progress.data not in ("", self.data.rows):
            raise InputError(
                f"{self.data.source}: has changed since {self.run} began; restore it, "
                f"or train on it in another run: --set model={self.run} --run ANOTHER"
            )
        if progress.order not in ("", self.data.order):
            self.screen.say(
                f"{where}: the usable prompts or examples have changed, and so "
                "has their order: in this pass some will repeat and some will "
                "be skipped"
            )
        for name, before in progress.rates.items():
            now = (
                float(self._rates[name](self._first)) if name in self._rates else before
            )
            if not math.isclose(before, now, rel_tol=1e-6):
                self.screen.say(f"{where}: {name} jumps from {before:.4g} to {now:.4g}")

    def _restore(self) -> TrainState:
        """The state of the newest checkpoint."""
        count = f"{model.parameter_count(self.model):,} parameters"
        self.screen.say(f"resuming {self.run} after step {self._first} ({count})")
        with self.screen.phase("restore"):
            abstract = self.learners.abstract(self.mesh)
            return checkpoints.restore(self.run, self._first, abstract)

    def _load(self, source: ModelSource) -> Params:
        count = f"{model.parameter_count(source.config):,} parameters"
        with self.screen.phase("load") as advance:
            params = source.load(self.mesh, on_tensor=lambda name: advance())
        self.screen.say(f"{source.path}: {count} on {self.mesh.size} device(s)")
        return params

    def _open_directory(self) -> None:
        """Makes the run directory, or removes from it what steps have left that will be
        run again."""
        text = json.dumps(configuration.as_json(self.config), indent=2) + "\n"
        path = self.run / "config.json"
        if distributed.is_first():
            # It follows from the config that is replaced here.
            for step in checkpoints.steps(self.run, checkpoints.ITEMS):
                if not checkpoints.has_progress(self.run, step):
                    progress = _unrecorded_progress(self.run, step)
                    checkpoints.add_progress(self.run, step, progress)
            write_text(path, text)
            for line in discard_after(self.run, self._first):
                self.screen.say(line)
        distributed.barrier(f"{path} was written")
        if not path.exists():
            raise InputError(
                f"{path}: written by process 0 and not to be seen from here; --run "
                "must be on a file system that all processes share"
            )

    def _start(self, source: ModelSource, params: Params) -> TrainState:
        """The state at step 0; saves what the run will need of the model."""
        if distributed.is_first():
            copy_files(source, self.run / "model")
            if self.config.chat_template:
                template = self.chat.tokenizer.chat_template
                write_text(self.run / "model" / "chat_template.jinja", template)
        if not (self.run / "reference").is_dir():
            cast = jax.jit(model.cast, static_argnums=1)
            with uninterrupted():
                directory = self.run / "reference"
                checkpoints.save_params(directory, cast(params, self.dtype))
        return self.learners.start(params, self.mesh)

    def load_reference(self) -> Params:
        """The initial policy, in the compute dtype."""
        shardings = sharding.of_params(self.model, self.mesh)
        shapes = model.abstract(self.model, self.dtype)
        return checkpoints.load_params(
            self.run / "reference", sharding.placed(shapes, shardings)
        )

    def learn(self, update: TrainStep, batch: Batch) -> tuple[dict[str, float], Scores]:
        """Takes one training step; what it measured, and its scores.

        Raises:
            Diverged: a loss or a gradient is not finite; the step is not saved.
        """
        state, measured, scores = update(self.state, batch)
        self._advance(state)
        values = {name: float(value) for name, value in measured.items()}
        for name, value in values.items():
            if name.endswith(("loss", "grad_norm")) and not math.isfinite(value):
                raise Diverged(f"step {self.step}: {name}={value}; it is not saved")
        return values, scores

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What takes place here is not part of a step's time."""
        start = time.perf_counter()
        yield
        self._began += time.perf_counter() - start

    def skip_step(self) -> None:
        """Counts a step that had nothing to learn from."""
        self._advance(self.state._replace(step=self.state.step + 1))

    def _advance(self, state: TrainState) -> None:
        self.state = state
        self.taken += self.data.per_step

    def finish_step(
        self,
        values: Mapping[str, float],
        tokens: int,
        line: str,
        done: Mapping[str, PhaseTotals],
    ) -> None:
        """Records the step just done, says it, and saves where it is time to.

        `tokens` are all tokens of the step; throughput is per second and device. `done`
        is what each phase that computes has computed.
        """
        seconds = time.perf_counter() - self._began
        self._began = time.perf_counter()
        timed = {
            "perf/time_per_step": seconds,
            "perf/throughput": tokens / seconds / self.mesh.size,
            "perf/total_num_tokens": float(tokens),
        }
        timed |= compilations.take() | self.screen.take_timings()
        rates = efficiency.metrics(
            done,
            {phase: timed[f"timing_s/{phase}"] for phase in done},
            devices=self.mesh.size,
            peak=efficiency.PEAKS.get(self.mesh.devices.flat[0].device_kind),
        )
        self._log.write(self.step - 1, dict(values) | timed | rates)
        self.screen.say(f"{line}  {seconds:.1f} s")
        if self.step % self.config.saving.every == 0 or self.step == self.steps:
            with self.screen.phase("save"):
                self._save()
        self._profile.step_done(self.step, last=self.step == self.steps)
