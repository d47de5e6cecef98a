"""The directory of a run: model, state, checkpoints, metrics and trajectories.

    RUN/config.json        the settings
    RUN/history.jsonl      starts and ends, and how the settings changed
    RUN/model/             config.json, tokenizer, chat template
    RUN/metrics.jsonl      one object per step
    RUN/trajectories/      one file per step, written while the next one samples
    RUN/interrupted/       completions of an interrupted step
    RUN/checkpoints/       all that is needed to resume
    RUN/reference/         the initial policy
    RUN/data/              the prompts as a TFDS data set
    RUN/profile/           a trace of some steps, if requested
    RUN/evaluations.jsonl  one object per evaluation, and
    RUN/best/              the best policy by them, if the config has evaluations

Opening a run that has checkpoints resumes it from the newest one; files of later steps
are removed, because those steps are rerun. Several processes share the
directory: all write their part of checkpoints and of the reference, process 0 writes
the rest.
"""

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import orjson

from oreal_jax import config as configuration
from oreal_jax import distributed, efficiency, sharding
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.checkpoints.run import Progress
from oreal_jax.checkpoints.source import copy_files
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.console import Screen, time_text
from oreal_jax.data.chat import DATE_FILE
from oreal_jax.distributed import defer_interrupts
from oreal_jax.efficiency import PhaseTotals
from oreal_jax.errors import Diverged, InputError, summarize
from oreal_jax.files import BackgroundWriter, write_bytes, write_text
from oreal_jax.interrupts import ignoring_interrupts
from oreal_jax.loading import OpenModel
from oreal_jax.metrics import MetricsLog, compilations
from oreal_jax.model import Params, abstract, cast, parameter_count
from oreal_jax.train import resume
from oreal_jax.train.history import record_end, record_start
from oreal_jax.train.profile import Profile
from oreal_jax.train.programs import make_trained_models
from oreal_jax.train.resume import Data
from oreal_jax.train.trackers import Trackers
from oreal_jax.train_state import TrainState
from oreal_jax.trajectory import Group


class RunDirectory:
    """An open run directory.

    `state` is the training state after the last finished step: the initial or restored
    state, then the argument of `record_state`. Leaving the `with` block waits for all
    writes; after an interruption or an error it first saves `state`. `data_position` is
    the number of prompts or examples used by finished steps.
    """

    def __init__(
        self,
        config: TrainConfig | SftConfig,
        path: Path,
        screen: Screen,
        model: OpenModel,
        data: Data,
        *,
        steps: int,
        profile: int = 0,
    ):
        """Load the newest state, or the model to start from; then open the files.

        Nothing is written before everything has been read. `profile` steps are traced
        into RUN/profile.

        Raises:
            InputError: the run began with other settings or other data, the weights do
                not fit, or the directory cannot be written.
        """
        if jax.process_count() != distributed.process_count():
            raise InputError(
                f"JAX sees {jax.process_count()} processes that are not connected: "
                "pass --processes auto on every host"
            )
        self.config, self.path, self.screen = config, path, screen
        self.model, self.data, self.steps = model, data, steps
        self.models = make_trained_models(config, model.config, model.mesh, steps)
        self._rates = {"actor/lr": jax.jit(self.models.policy.rate)}
        if self.models.token_reward:
            self._rates["token_reward/lr"] = jax.jit(self.models.token_reward.rate)
        newest, progress = resume.read_progress(path)
        self._first, self.data_position = newest or 0, progress.taken
        self._finished = self._first
        is_resumed, log = newest is not None, screen.log
        self._changes = resume.compare_settings(path, config, is_resumed, log)
        resume.compare_progress(path, self._first, progress, data, self._rates, log)
        loaded = self._restore() if is_resumed else self._load()
        self._prepare()
        try:
            self.state = loaded if is_resumed else self._initialize(loaded)
            del loaded
            self._checkpoints = checkpoints.Checkpoints(path, keep=config.saving.keep)
            self._writer = BackgroundWriter()
            self._metrics = self._trackers = None
            if distributed.is_first():
                self._metrics = MetricsLog(path, self._first)
                self._trackers = Trackers(config, path, self._first)
            self._profile = Profile(path / "profile", profile, screen)
        except BaseException as error:
            self._record_end(error)
            raise
        self._step_started = time.perf_counter()
        self._step_seconds: list[float] = []
        if self._first < steps:
            log(f"step {self._first} compiles its programs, or loads compiled ones")
        else:  # exit code 0: a launcher that repeats failed commands is done
            log(
                f"{path}: already finished at step {self._first}; raise steps "
                f"({steps}) or choose another --run"
            )

    def _restore(self) -> TrainState:
        count = f"{parameter_count(self.model.config):,} parameters"
        self.screen.log(f"resuming {self.path} after {self._first} step(s) ({count})")
        with self.screen.phase("restore"):
            target = self.models.abstract(self.model.mesh)
            return checkpoints.restore(self.path, self._first, target)

    def _load(self) -> Params:
        source, mesh = self.model.source, self.model.mesh
        count = f"{parameter_count(source.config):,} parameters"
        total = len(hf.tensors(source.config)) if source.files == source.path else None
        with self.screen.phase("load", total=total) as advance:
            params = source.load(mesh, on_tensor=lambda name: advance())
        self.screen.log(f"{source.path}: {count} on {mesh.size} device(s)")
        return params

    def _prepare(self) -> None:
        """Create the directory, or remove files of steps that will be run again."""
        text = json.dumps(configuration.as_json(self.config), indent=2) + "\n"
        path = self.path / "config.json"
        if distributed.is_first():
            resume.record_progress(self.path)
            write_text(path, text)
            if (chat := self.model.chat).prints_date:
                write_text(self.path / "model" / DATE_FILE, f"{chat.date}\n")
            record_start(self.path, self._first, self._changes)
            for line in resume.discard_after(self.path, self._first):
                self.screen.log(line)
        distributed.barrier(f"{path} was written")
        if not path.exists():
            raise InputError(
                f"{path}: written by process 0 but not found by this one; put --run on "
                "a file system that all processes share"
            )

    def _initialize(self, params: Params) -> TrainState:
        """Save the model files and the reference policy; return the state at step 0."""
        if distributed.is_first():
            copy_files(self.model.source, self.path / "model")
            if self.config.chat_template:
                template = self.model.chat.tokenizer.chat_template
                write_text(self.path / "model" / "chat_template.jinja", template)
        reference = self.path / "reference"
        if not reference.is_dir():
            cast_all = jax.jit(cast, static_argnums=1)
            with defer_interrupts():
                checkpoints.save_params(reference, cast_all(params, self.model.dtype))
        return self.models.initializer(self.model.mesh)(params)

    def load_reference(self) -> Params:
        """Return the initial policy in the compute dtype."""
        shardings = sharding.param_shardings(self.model.config, self.model.mesh)
        shapes = abstract(self.model.config, self.model.dtype)
        return checkpoints.load_params(
            self.path / "reference", sharding.with_shardings(shapes, shardings)
        )

    def record_state(self, state: TrainState) -> None:
        """Set the state after a step, which is saved if a later step fails."""
        self.state = state
        self.data_position += self.data.per_step

    def write_trajectories(
        self, step: int, groups: Sequence[Group], pieces: Callable
    ) -> None:
        """Write the trajectories of a step in the background, in process 0."""
        if distributed.is_first():
            write = functools.partial(
                write_trajectories, self.path, step, groups, pieces
            )
            self._writer.submit(write)
        if self._trackers:
            self._trackers.log_samples(step, groups)

    def finish_step(
        self,
        metrics: Mapping[str, float],
        line: str,
        totals: Mapping[str, PhaseTotals],
        *,
        tokens: int,
        excluded_seconds: float = 0.0,
    ) -> None:
        """Record a step: metrics, a line on the screen, a checkpoint if one is due.

        `tokens` are all tokens of the step; throughput is per second and device.
        `totals` holds the tokens and FLOPs of each phase. `excluded_seconds` (for
        evaluation) are subtracted from the step time.
        """
        now, step, mesh = time.perf_counter(), int(self.state.step), self.model.mesh
        self._finished = step
        seconds = now - self._step_started - excluded_seconds
        self._step_started = now
        self._step_seconds.append(seconds)
        timed = {
            "perf/time_per_step": seconds,
            "perf/throughput": tokens / seconds / mesh.size,
            "perf/total_num_tokens": float(tokens),
        }
        timed |= compilations.take() | self.screen.take_timings()
        rates = efficiency.metrics(
            totals,
            {phase: timed[f"timing_s/{phase}"] for phase in totals},
            devices=mesh.size,
            peak=efficiency.PEAKS.get(mesh.devices.flat[0].device_kind),
        )
        for record in filter(None, (self._metrics, self._trackers)):
            record.write(step - 1, dict(metrics) | timed | rates)
        usual = statistics.median(self._step_seconds[-10:])
        remaining = time_text(usual * (self.steps - step))
        remaining = f"  about {remaining} left" if step < self.steps else ""
        self.screen.log(f"{line}  {seconds:.1f} s{remaining}")
        if step % self.config.saving.every == 0 or step == self.steps:
            with self.screen.phase("save"):
                self._save()
        self._profile.step_done(step, last=step == self.steps)

    def _save(self) -> None:
        """Save state and progress in the background.

        Waits for pending trajectory files first, because a resumed run does not rewrite
        them. An error of such a write is raised by the next `submit` or on closing, not
        here: no step is lost, and all processes save together.
        """
        self._writer.wait()
        step = int(self.state.step)
        rates = {name: float(rate(step)) for name, rate in self._rates.items()}
        data = self.data
        progress = Progress(self.data_position, data.rows, data.order, rates)
        self._checkpoints.save(self.state, progress)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind, error, trace) -> None:
        ignoring = contextlib.nullcontext()
        if error and kind is not KeyboardInterrupt:
            # An interrupt must not replace the original error.
            ignoring = ignoring_interrupts("closing the run")
        with defer_interrupts(), ignoring, contextlib.ExitStack() as closing:
            closing.push(lambda _, inner, __: self._record_end(error or inner))
            records = filter(None, (self._metrics, self._trackers))
            for part in (self._profile, *records, self._checkpoints):
                closing.callback(part.close)
            closing.callback(self._close_writer, error)
            if kind is KeyboardInterrupt:
                self.screen.log(f"stopped after {self._finished} step(s); saving")
                distributed.stop_all("saving the run")
                self._save()
            elif error and not isinstance(error, Diverged):
                self._save_after(error)

    def _record_end(self, error: BaseException | None) -> None:
        if not distributed.is_first():
            return
        outcome, reason = "finished", ""
        if isinstance(error, KeyboardInterrupt):
            outcome = "stopped"
        elif error:
            outcome, reason = "failed", summarize(error)
        with contextlib.suppress(OSError):  # such as a full disk: `error` matters more
            record_end(self.path, self._finished, outcome, reason)

    def _close_writer(self, error: BaseException | None) -> None:
        """Close the writer; raise its error, or log it if `error` is already set."""
        try:
            self._writer.close()
        except Exception as failure:
            if error is None:
                raise
            self.screen.log(summarize(failure))

    def _save_after(self, error: BaseException) -> None:
        """Save the last finished step.

        Nothing here may mask the original error: neither a failed save, nor a timeout
        because other processes are blocked in a collective.
        """
        log = self.screen.log if distributed.is_first() else distributed.warn
        try:
            step = int(self.state.step)  # raises where a failed update consumed it
            if step == self._first:
                return  # no new step to save
            distributed.report(error)
            reason = summarize(error)
            distributed.stop_all(
                f"saving the run after {reason}", distributed.STOP_LIMIT
            )
            self._save()
            self._checkpoints.wait()
            self._finished = step
            log(f"{reason}; saved after {step} step(s)")
        except Exception as failure:
            log(f"not saved: {summarize(failure)}")


def write_trajectories(
    run: Path, step: int, groups: Sequence[Group], pieces: Callable
) -> None:
    """Write all trajectories of a step as JSON lines, completely or not at all."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    lines = (
        orjson.dumps(trajectory.as_json(step, pieces), option=options)
        for group in groups
        for trajectory in group
    )
    path = run / "trajectories" / f"step_{step:06d}.jsonl"
    write_bytes(path, b"".join(lines))
    for file in interrupted_path(run, step, 0).parent.glob(f"step_{step:06d}.*"):
        file.unlink()


def interrupted_path(run: Path, step: int, process: int) -> Path:
    """Return the file for a process's completions of an interrupted step.

    It exists until the step is finished.
    """
    suffix = f".process_{process}" if process else ""
    return run / "interrupted" / f"step_{step:06d}{suffix}.jsonl"
