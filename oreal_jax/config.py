"""What a run is: frozen dataclasses, made in a Python file, changed by dotted settings.

A config file defines `config`, a `TrainConfig` or an `SftConfig`. Variants are made
with `dataclasses.replace`. The command line may set plain values (`--set a.b=v`);
functions and losses are set in a config file.
"""

import ast
import dataclasses
import functools
import importlib.util
import sys
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from oreal_jax import losses, rollout
from oreal_jax.data.order import PUBLISHED_BANDS, Bands
from oreal_jax.errors import InputError
from oreal_jax.losses import PolicyLoss
from oreal_jax.model import Remat
from oreal_jax.sampling import Sampling
from oreal_jax.sharding import MeshShape
from oreal_jax.train.state import Optimizer


def _at_least(least: int, **fields: int) -> None:
    for name, value in fields.items():
        if value < least:
            raise InputError(f"config: {name}={value} must be at least {least}")


def _seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise InputError(f"config: seed={seed} must be from 0 to {2**31 - 1}")


def _deterministic(sampling: Sampling) -> str | None:
    """The field that leaves a sampler one token to choose, None without."""
    alone = {"temperature": 0, "top_k": 1, "min_p": 1}
    fields = (name for name, value in alone.items() if getattr(sampling, name) == value)
    return next(fields, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """A micro-batch: `rows` packed rows of `row_length` tokens on each data shard."""

    rows: int = 1
    row_length: int = 16_384

    def __post_init__(self):
        _at_least(1, rows=self.rows, row_length=self.row_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Processes that judge answers by rule, and the language model asked after it.

    `workers` take `deadline` seconds an answer. `judge_hosts` are addresses of
    OpenAI-compatible APIs (".../v1") that serve `judge_model`; none: the rule alone
    judges. Each gets `judge_concurrency` requests at a time, of `judge_timeout` seconds
    and `judge_tries` tries. Where all hosts are lost the run waits ("pause") or goes
    on by rule ("rule"). Undecided completions count as incorrect or are dropped: out of
    the advantages of their prompt and never learned from.
    """

    workers: int = 8
    deadline: float = 5.0
    judge_hosts: tuple[str, ...] = ()
    judge_model: str = ""
    judge_concurrency: int = 16
    judge_timeout: float = 60.0
    judge_tries: int = 3
    judge_lost: Literal["pause", "rule"] = "pause"
    undecided: Literal["incorrect", "drop"] = "incorrect"

    def __post_init__(self):
        _at_least(
            1,
            workers=self.workers,
            judge_concurrency=self.judge_concurrency,
            judge_tries=self.judge_tries,
        )
        for name in ("deadline", "judge_timeout"):
            if getattr(self, name) <= 0:
                raise InputError(
                    f"verification: {name}={getattr(self, name)} must be above 0"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoint every `every` steps and at the end; the newest `keep` stay."""

    every: int = 10
    keep: int = 2

    def __post_init__(self):
        _at_least(1, every=self.every, keep=self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures the policy on the sets `data` (files, or presets in `folder`) before
    training, every `every` steps and at the end, and keeps the best in RUN/best: that
    of the highest mean over the sets. One sample a problem is drawn greedily, more of
    `samples` as in training. No data: no evaluation.
    """

    data: tuple[str, ...] = ()
    folder: str = "data"
    every: int = 10
    samples: int = 1

    def __post_init__(self):
        _at_least(1, every=self.every, samples=self.samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """An OREAL run. Defaults are the published 7B settings.

    model: a Hugging Face directory or a run directory. prompts: a jsonl or parquet
    file of `question, gold_answer, pass_rate` rows, or a Hugging Face data set name.
    `system_prompt` and `chat_template` (a Jinja file) replace the checkpoint's own.
    Each of `steps` steps draws `samples_per_prompt` completions of `prompts_per_step`
    prompts; `loss.advantage` judges them within their prompt, `keep` chooses those to
    learn from. `log_probs` "full" trains on the probabilities of the whole vocabulary,
    as released; "sampled" on those of the policy that acted, tempered and renormalised
    over the tokens that `sampling` keeps (a KL to the reference model compares full
    ones in both cases).
    `token_reward` None trains no token reward model. `stop_words` are added to the
    model's own stop tokens, `stop_strings` end a completion wherever its text has one.
    An engine is `decode_tensor` devices (0: as many as the mesh's tensor axis) with
    room for `cache_tokens` tokens (0: for the longest in each row); together they
    decode `decode_rows` completions at a time. `decode_weights` "int8" and
    `decode_cache` "float8" halve what a token reads there.
    A step whose mean difference between sampler's and trainer's token probabilities is
    above `max_disagreement` ends the run. `remat` says what the backward pass computes
    again instead of keeping it (model/execution.py). `compute` "auto" is bfloat16, on
    CPU float32. `gradient_sums` "bfloat16" sums the gradients of the layers' matrices
    over the devices with half the bytes, and less exactly (docs/pods.md); it needs
    `compute` bfloat16.
    """

    model: str
    prompts: str
    system_prompt: str | None = None
    chat_template: str | None = None
    stop_words: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 90
    prompts_per_step: int = 64
    samples_per_prompt: int = 16
    difficulty: Bands = PUBLISHED_BANDS
    sampling: Sampling = Sampling(max_tokens=14_000, top_p=0.9)
    max_prompt_tokens: int = 2_384
    decode_rows: int = 256
    cache_tokens: int = 0
    decode_tensor: int = 0
    decode_weights: Literal["full", "int8"] = "full"
    decode_cache: Literal["full", "float8"] = "full"
    max_disagreement: float = 0.1
    verification: Verification = Verification()
    keep: rollout.Keep = rollout.one_pair
    loss: PolicyLoss = losses.Oreal()
    log_probs: Literal["full", "sampled"] = "full"
    policy: Optimizer = Optimizer(learning_rate=5e-7, final_learning_rate=1e-7)
    token_reward: Optimizer | None = Optimizer(
        learning_rate=2e-6, final_learning_rate=4e-7
    )
    freeze_steps: int = 10
    packing: Packing = Packing()
    mesh: MeshShape = MeshShape()
    remat: Remat = "everything"
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_sums: Literal["float32", "bfloat16"] = "float32"
    saving: Saving = Saving()
    evaluation: Evaluation = Evaluation()
    tensorboard: bool = False

    def __post_init__(self):
        """Checks what no single field can know.

        Raises:
            InputError: a number out of range, or two that do not go together.
        """
        _at_least(
            1,
            steps=self.steps,
            prompts_per_step=self.prompts_per_step,
            max_prompt_tokens=self.max_prompt_tokens,
            decode_rows=self.decode_rows,
        )
        _at_least(2, samples_per_prompt=self.samples_per_prompt)
        _seed(self.seed)
        _at_least(
            0,
            freeze_steps=self.freeze_steps,
            cache_tokens=self.cache_tokens,
            decode_tensor=self.decode_tensor,
        )
        longest = self.max_prompt_tokens + self.sampling.max_tokens
        if longest > self.packing.row_length:
            raise InputError(
                f"max_prompt_tokens={self.max_prompt_tokens} + sampling.max_tokens="
                f"{self.sampling.max_tokens} must not exceed packing.row_length="
                f"{self.packing.row_length}"
            )
        if field := _deterministic(self.sampling):
            raise InputError(
                f"sampling.{field}={getattr(self.sampling, field)}: all samples of a "
                "prompt are the same, so their advantages are 0 and nothing is learned"
            )
        if self.log_probs == "sampled" and self.sampling.penalises:
            raise InputError(
                "log_probs='sampled' with a penalty in sampling: the trainer does not "
                "know what a penalised token would have been drawn from"
            )
        if self.max_disagreement <= 0:
            raise InputError(
                f"config: max_disagreement={self.max_disagreement} must be above 0"
            )
        if self.freeze_steps and not self.token_reward:
            raise InputError(
                f"freeze_steps={self.freeze_steps} without token_reward: nothing "
                "would learn in those steps"
            )
        if self.freeze_steps >= self.steps:
            raise InputError(
                f"freeze_steps={self.freeze_steps} must be below steps={self.steps}: "
                "the policy would never be trained"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning, or RFT where the solutions are a model's own correct
    ones.

    examples: a jsonl or parquet file of `question, solution` rows. `system_prompt` and
    `chat_template` (a Jinja file) replace the checkpoint's own. Each step takes
    `examples_per_step` of them; `steps` 0 means `epochs` passes over the file. `remat`,
    `compute` and `gradient_sums` as in `TrainConfig`.
    """

    model: str
    examples: str
    system_prompt: str | None = None
    chat_template: str | None = None
    seed: int = 0
    steps: int = 0
    epochs: int = 1
    examples_per_step: int = 64
    loss: PolicyLoss = losses.BestOfNCloning()
    policy: Optimizer = Optimizer(learning_rate=1e-5, final_learning_rate=1e-6)
    packing: Packing = Packing()
    mesh: MeshShape = MeshShape()
    remat: Remat = "everything"
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_sums: Literal["float32", "bfloat16"] = "float32"
    saving: Saving = Saving(every=100)
    tensorboard: bool = False

    def __post_init__(self):
        """Raises InputError where a number is out of range."""
        _at_least(1, epochs=self.epochs, examples_per_step=self.examples_per_step)
        _at_least(0, steps=self.steps)
        _seed(self.seed)


def load(path: Path, kind: type, settings: Sequence[str] = ()) -> Any:
    """The `config` of a config file, with `a.b=value` settings applied.

    The file's folder is importable from it, so that configs can build on each other.

    Raises:
        InputError: no such file, no `config` of this kind in it, or a wrong setting.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses in the file look their module up
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{_place(path, error)}: {type(error).__name__}: {error}"
        ) from None
    config = getattr(module, "config", None)
    if not isinstance(config, kind):
        found = type(config).__name__ if config is not None else "nothing"
        raise InputError(f"{path}: `config` must be a {kind.__name__}, found {found}")
    _check_types(config, str(path))
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected name=value")
        _set(changes, config, key.split("."), text, key)
    return _changed(config, changes)


def _check_types(config: Any, where: str) -> None:
    """Raises InputError where a plain field has a value of another type; `where` is the
    file, and the field that `config` is the value of."""
    try:
        hints = typing.get_type_hints(type(config))
    except NameError:  # of a class whose hints are for type checkers alone
        hints = {}
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints.get(field.name)
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{where}: {field.name}")
        elif _is_checkable(hint) and not _fits(value, hint):
            raise InputError(
                f"{where}: {field.name}={value!r}, expected {_wanted(hint)}"
            )


def _is_checkable(hint: Any) -> bool:
    """Whether `_fits` knows a type: plain ones, and other configs."""
    inner = [part for part in typing.get_args(hint) if part is not ...]
    if typing.get_origin(hint) is Literal:
        return True
    if typing.get_origin(hint) in (types.UnionType, typing.Union, tuple):
        return all(map(_is_checkable, inner))
    plain = hint in (int, float, str, bool, type(None))
    return plain or dataclasses.is_dataclass(hint)


def _wanted(hint: Any) -> str:
    """A type for people."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return getattr(hint, "__name__", None) or str(hint)


def _place(path: Path, error: Exception) -> str:
    """The line of a config file that an error comes from."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """`config` with all changes made at once: what must fit together is checked when
    all of it is there."""
    values = {
        name: _changed(getattr(config, name), value)
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **values)


def _set(
    changes: dict[str, Any], config: Any, names: list[str], text: str, key: str
) -> None:
    """Adds to `changes` that the field of `config` at the path `names` is to be what
    `text` spells."""
    name, *rest = names
    known = {field.name for field in dataclasses.fields(config)}
    if name not in known:
        raise InputError(
            f"--set {key}: {type(config).__name__} has no field {name!r}; "
            f"it has {', '.join(sorted(known))}"
        )
    value = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(value):
            raise InputError(f"--set {key}: {name}={value!r} has no fields")
        inner = changes.get(name)
        changes[name] = inner = inner if isinstance(inner, dict) else {}
        _set(inner, value, rest, text, key)
        return
    hint = typing.get_type_hints(type(config))[name]
    try:
        new = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        new = text
    if _fits(text, hint) and not _fits(new, hint):
        new = text  # a string that looks like a number
    if not _fits(new, hint):
        raise InputError(
            f"--set {key}={text}: {name} must be {_wanted(hint)}"
            + ("" if _settable(hint) else ", which only a config file can give")
        )
    changes[name] = float(new) if hint is float else new


def _settable(hint: Any) -> bool:
    examples = (None, True, 1, 1.0, "x", ())
    written = any(_fits(example, hint) for example in examples)
    return written or typing.get_origin(hint) is Literal


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the type that a field declares."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        inner = typing.get_args(hint)
        each = (
            [inner[0]] * len(value)
            if inner[-1] is ... and isinstance(value, tuple)
            else list(inner)
        )
        return (
            isinstance(value, tuple)
            and len(value) == len(each)
            and all(_fits(v, h) for v, h in zip(value, each, strict=True))
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (str, bool, type(None)) and isinstance(value, hint)


def as_json(config: Any) -> Any:
    """A config as plain JSON values; functions and classes by their dotted names."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {
            f.name: as_json(getattr(config, f.name)) for f in dataclasses.fields(config)
        }
        return {"class": f"{type(config).__module__}.{type(config).__name__}"} | fields
    if isinstance(config, tuple | list):
        return [as_json(item) for item in config]
    if isinstance(config, functools.partial):
        given = {str(i): value for i, value in enumerate(config.args)} | config.keywords
        values = {name: as_json(value) for name, value in given.items()}
        return {"class": "functools.partial", "of": as_json(config.func)} | values
    if callable(config):
        named = config if hasattr(config, "__qualname__") else type(config)
        return f"{named.__module__}.{named.__qualname__}"
    return config
