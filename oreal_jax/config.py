"""The settings of a run, as frozen dataclasses.

A config file is Python and defines `config`, a `TrainConfig` or an `SftConfig`; see
`config_loading.py`. The text below a field documents it; docs/configuration.md is made
of these texts.
"""

import dataclasses
import functools
import sys
from typing import Any, Literal

from oreal_jax import losses, trajectory
from oreal_jax.data.order import PUBLISHED_BANDS, Bands
from oreal_jax.errors import InputError
from oreal_jax.losses import PolicyLoss
from oreal_jax.mesh import MeshShape
from oreal_jax.model import Remat
from oreal_jax.optimizer import Optimizer
from oreal_jax.sampling import Sampling
from oreal_jax.verify import Verifier, by_rule
from oreal_jax.verify.pool import check_verifiers

Tracker = Literal["tensorboard", "wandb", "trackio"]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_min(minimum: int, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value >= minimum, f"config: {name}={value} must be at least {minimum}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value > 0, f"config: {name}={value} must be above 0")


def _check_seed(seed: int) -> None:
    message = f"config: seed={seed} must be from 0 to {2**31 - 1}"
    _check(0 <= seed < 2**31, message)


def _read_tensorboard(config: Any, tensorboard: bool | None) -> None:
    """Add "tensorboard" to the trackers of a config that still has the old field."""
    if tensorboard and "tensorboard" not in config.trackers:
        trackers = (*config.trackers, "tensorboard")
        object.__setattr__(config, "trackers", trackers)  # the config is frozen
        message = f"oreal: tensorboard=True is deprecated; use {trackers=}"
        print(message, file=sys.stderr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """The size of a micro-batch."""

    rows: int = 1
    """Packed rows per data shard."""
    row_length: int = 16_384
    """Tokens per row; completions with their prompts are packed into it."""

    def __post_init__(self):
        _check_min(1, self, "rows", "row_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Processes that verify answers by rule, and an optional LLM judge."""

    workers: int = 8
    """Processes."""
    deadline: float = 5.0
    """Seconds for an answer; a later one is undecided."""
    verifiers: tuple[Verifier, ...] = (by_rule,)
    """In order; the first verdict that is not undecided counts. Your own: functions of
    the completion and the row of its prompt (docs/verification.md)."""
    judge_hosts: tuple[str, ...] = ()
    """OpenAI-compatible APIs (".../v1") that serve `judge_model`; none: no judge."""
    judge_model: str = ""
    """The model to request."""
    judge_concurrency: int = 16
    """Requests in flight per host."""
    judge_max_tokens: int = 1024
    """Tokens of a reply, thinking included."""
    judge_timeout: float = 60.0
    """Seconds for a complete reply."""
    judge_tries: int = 3
    """Attempts per answer."""
    judge_lost: Literal["pause", "rule"] = "pause"
    """When no host replies: wait for one, or continue by rule alone."""
    undecided: Literal["incorrect", "drop"] = "incorrect"
    """Undecided completions: incorrect, or left out of advantages and training."""

    def __post_init__(self):
        check_verifiers(self.verifiers)
        names = "workers", "judge_concurrency", "judge_tries", "judge_max_tokens"
        _check_min(1, self, *names)
        _check_positive(self, "deadline", "judge_timeout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoints; the last step always makes one."""

    every: int = 10
    """Steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints to keep."""

    def __post_init__(self):
        _check_min(1, self, "every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluations of the policy before training, at intervals, and at the end.

    The policy with the highest mean over the sets is kept in RUN/best.
    """

    data: tuple[str, ...] = ()
    """Sets: files, data sets, or names such as "math500"; none: no evaluation."""
    folder: str = "data"
    """Where files of known sets are looked for before they are downloaded."""
    every: int = 10
    """Steps between two evaluations."""
    samples: int = 1
    """Completions per problem: 1 is greedy, more are sampled as in training."""

    def __post_init__(self):
        _check_min(1, self, "every", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """An OREAL run; defaults are the published 7B settings."""

    model: str
    """A Hugging Face directory or a run directory."""
    prompts: str
    """A jsonl or parquet file, a built data set, or a data set on the hub."""
    question: str = "question"
    """Field of the prompt file that holds the question."""
    answer: str = "gold_answer"
    """Field of the prompt file that holds the gold answer."""
    system_prompt: str | None = None
    """System message; None: that of the chat template."""
    chat_template: str | None = None
    """A Jinja file that replaces the checkpoint's chat template."""
    template_vars: tuple[tuple[str, bool | int | float | str], ...] = ()
    """Template variables as (name, value) pairs: (("enable_thinking", False),)."""
    stop_words: tuple[str, ...] = ()
    """Further tokens that end a completion."""
    stop_strings: tuple[str, ...] = ()
    """Strings that end a completion."""
    seed: int = 0
    """Seed of all random numbers."""
    steps: int = 90
    """Training steps."""
    prompts_per_step: int = 64
    """Prompts per step."""
    samples_per_prompt: int = 16
    """Completions per prompt (K): the group that advantages are computed over."""
    difficulty: Bands = PUBLISHED_BANDS
    """(low, high, repeats): uses of a prompt by pass rate; outside all bands, none."""
    sampling: Sampling = Sampling(max_tokens=14_000, top_p=0.9)
    """How completions are sampled."""
    max_prompt_tokens: int = 2_384
    """Longer prompts are left out."""
    decode_rows: int = 256
    """Completions decoded at the same time, by all engines together."""
    cache_tokens: int = 0
    """Tokens of cache per engine; 0: the maximum length in every slot."""
    decode_tensor: int = 0
    """Devices per engine; 0: the `tensor` axis of the mesh."""
    decode_weights: Literal["full", "int8"] = "full"
    """Weights while decoding; "int8" halves the bytes read per token."""
    decode_cache: Literal["full", "float8"] = "full"
    """Keys and values while decoding; "float8" halves the bytes read per token."""
    max_disagreement: float = 0.1
    """Mean difference of token probabilities between sampler and trainer that ends
    the run."""
    verification: Verification = Verification()
    """How answers are verified."""
    keep: trajectory.Selector = trajectory.select_pair
    """Selects the completions of a group to train on; `select_all`: all."""
    loss: PolicyLoss = losses.Oreal()
    """Loss of the policy; its `advantage` is computed over a group."""
    log_probs: Literal["full", "sampled"] = "full"
    """Distribution that is trained: "full", as released, over the whole vocabulary;
    "sampled": the sampler's, after temperature and truncation. A KL to the reference
    compares full ones in both cases."""
    policy: Optimizer = Optimizer(learning_rate=5e-7, final_learning_rate=1e-7)
    """Optimizer of the policy."""
    token_reward: Optimizer | None = Optimizer(
        learning_rate=2e-6, final_learning_rate=4e-7
    )
    """Optimizer of the token reward model; None: no such model."""
    freeze_steps: int = 10
    """First steps, which do not train the policy."""
    packing: Packing = Packing()
    """Size of a micro-batch."""
    mesh: MeshShape = MeshShape()
    """How devices split the work."""
    remat: Remat = "everything"
    """What the backward pass computes again instead of storing it."""
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of activations; "auto": bfloat16, on CPU float32."""
    gradient_sums: Literal["float32", "bfloat16"] = "float32"
    """Type of gradient sums over devices; "bfloat16" halves their bytes with less
    precision, and needs `compute` bfloat16."""
    saving: Saving = Saving()
    """Checkpoints."""
    evaluation: Evaluation = Evaluation()
    """Evaluations during training."""
    trackers: tuple[Tracker, ...] = ()
    """Where metrics are recorded in addition to metrics.jsonl (docs/metrics.md)."""
    sample_table_every: int = 10
    """Interval, in steps, at which trackers record a table of completions."""
    tensorboard: dataclasses.InitVar[bool | None] = None
    """Former name of `trackers=("tensorboard",)`."""

    def __post_init__(self, tensorboard: bool | None):
        """Check ranges, and fields that depend on each other.

        Raises:
            InputError: names the fields and their values.
        """
        _read_tensorboard(self, tensorboard)
        positive = "steps", "prompts_per_step", "max_prompt_tokens", "decode_rows"
        _check_min(1, self, *positive, "sample_table_every")
        _check_min(2, self, "samples_per_prompt")
        _check_min(0, self, "freeze_steps", "cache_tokens", "decode_tensor")
        _check_positive(self, "max_disagreement")
        _check_seed(self.seed)
        sampling, row_length = self.sampling, self.packing.row_length
        _check(
            self.max_prompt_tokens + sampling.max_tokens <= row_length,
            f"max_prompt_tokens={self.max_prompt_tokens} + sampling.max_tokens="
            f"{sampling.max_tokens} must not exceed packing.row_length={row_length}",
        )
        for name, value in {"temperature": 0, "top_k": 1, "min_p": 1}.items():
            _check(
                getattr(sampling, name) != value,
                f"sampling.{name}={getattr(sampling, name)}: all samples of a prompt "
                "are the same, so their advantages are 0 and nothing is learned",
            )
        _check(
            self.log_probs == "full" or not sampling.penalises,
            "log_probs='sampled' with a penalty in sampling: the trainer does not know "
            "the distribution that a penalised token was sampled from",
        )
        _check(
            not self.freeze_steps or bool(self.token_reward),
            f"freeze_steps={self.freeze_steps} without token_reward: nothing would "
            "learn in those steps",
        )
        _check(
            self.freeze_steps < self.steps,
            f"freeze_steps={self.freeze_steps} must be below steps={self.steps}: the "
            "policy would never be trained",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning, or RFT on a model's own correct solutions.

    Fields without text are those of `TrainConfig`.
    """

    model: str
    examples: str
    """A jsonl or parquet file with `question` and `solution`."""
    system_prompt: str | None = None
    chat_template: str | None = None
    template_vars: tuple[tuple[str, bool | int | float | str], ...] = ()
    seed: int = 0
    steps: int = 0
    """Training steps; 0: `epochs` passes over the file."""
    epochs: int = 1
    """Passes over the file, where `steps` is 0."""
    examples_per_step: int = 64
    """Examples per step."""
    loss: PolicyLoss = losses.BestOfNCloning()
    """Loss; one that needs samples or a reference model is rejected."""
    policy: Optimizer = Optimizer(learning_rate=1e-5, final_learning_rate=1e-6)
    """Optimizer of the model."""
    packing: Packing = Packing()
    mesh: MeshShape = MeshShape()
    remat: Remat = "everything"
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_sums: Literal["float32", "bfloat16"] = "float32"
    saving: Saving = Saving(every=100)
    trackers: tuple[Tracker, ...] = ()
    tensorboard: dataclasses.InitVar[bool | None] = None

    def __post_init__(self, tensorboard: bool | None):
        _read_tensorboard(self, tensorboard)
        _check_min(1, self, "epochs", "examples_per_step")
        _check_min(0, self, "steps")
        _check_seed(self.seed)


def as_json(config: Any) -> Any:
    """Return a config as JSON values; functions and classes as dotted names."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        name = f"{type(config).__module__}.{type(config).__name__}"
    elif isinstance(config, functools.partial):
        values = {"of": config.func, **{str(i): x for i, x in enumerate(config.args)}}
        values, name = values | config.keywords, "functools.partial"
    elif isinstance(config, tuple | list):
        return [as_json(item) for item in config]
    elif callable(config):
        function = config if hasattr(config, "__qualname__") else type(config)
        return f"{function.__module__}.{function.__qualname__}"
    else:
        return config
    return {"class": name} | {key: as_json(value) for key, value in values.items()}
