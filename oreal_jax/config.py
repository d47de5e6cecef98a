"""The settings of a run, as frozen dataclasses.

A config file is Python and defines `config`, a `TrainConfig` or an `SftConfig`; see
`config_loading.py`.
"""

import dataclasses
import functools
from typing import Any, Literal

from oreal_jax import losses, trajectory
from oreal_jax.data.order import PUBLISHED_BANDS, Bands
from oreal_jax.errors import InputError
from oreal_jax.losses import PolicyLoss
from oreal_jax.mesh import MeshShape
from oreal_jax.model import Remat
from oreal_jax.optimizer import Optimizer
from oreal_jax.sampling import Sampling


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """A micro-batch: `rows` packed rows of `row_length` tokens on each data shard."""

    rows: int = 1
    row_length: int = 16_384

    def __post_init__(self):
        _check_min(1, self, "rows", "row_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Processes that verify answers by rule, and an optional language model as judge.

    Each of `workers` processes has `deadline` seconds for an answer. `judge_hosts` are
    OpenAI-compatible APIs (".../v1") that serve `judge_model`. Each host receives
    `judge_concurrency` requests at once, with `judge_timeout` seconds and `judge_tries`
    tries. When all hosts have failed, the run waits ("pause") or continues without
    judge ("rule"). `undecided` completions count as incorrect or are dropped from the
    advantages and from training.
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
        _check_min(1, self, "workers", "judge_concurrency", "judge_tries")
        _check_positive(self, "deadline", "judge_timeout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """A checkpoint every `every` steps and at the end; the newest `keep` are kept."""

    every: int = 10
    keep: int = 2

    def __post_init__(self):
        _check_min(1, self, "every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluations of the policy before training, every `every` steps and at the end.

    `data` are the sets (files, or presets in `folder`); none: no evaluation. The policy
    with the highest mean over the sets is kept in RUN/best. One sample per problem is
    greedy; several are sampled as in training.
    """

    data: tuple[str, ...] = ()
    folder: str = "data"
    every: int = 10
    samples: int = 1

    def __post_init__(self):
        _check_min(1, self, "every", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """An OREAL run. Defaults are the published 7B settings.

    model, prompts: a Hugging Face or run directory; a jsonl or parquet file of
    `question, gold_answer, pass_rate` rows, or the name of a Hugging Face data set.
    system_prompt, chat_template (a Jinja file): replace the checkpoint's own.
    stop_words, stop_strings: further stop tokens; strings that end a completion.
    prompts_per_step, samples_per_prompt: prompts of a step and completions of each.
    `loss.advantage` compares those of one prompt, `keep` selects what to train on.
    freeze_steps: first steps, which do not train the policy.
    cache_tokens, decode_tensor, decode_rows: an engine is `decode_tensor` devices (0:
    the mesh's tensor axis) with a cache of `cache_tokens` tokens (0: the maximum length
    in every row); all engines together decode `decode_rows` completions at once.
    decode_weights, decode_cache: "int8" and "float8" halve the bytes read per token.
    max_disagreement: a larger mean difference of token probabilities between sampler
    and trainer ends the run.
    log_probs: "full" trains on the probabilities of the whole vocabulary, as released;
    "sampled" on those of the sampler, after temperature and truncation by `sampling` (a
    KL to the reference model compares full ones in both cases).
    token_reward: None trains no token reward model.
    remat: what the backward pass recomputes instead of storing (model/execution.py).
    compute: "auto" is bfloat16, float32 on CPU.
    gradient_sums: "bfloat16" halves the bytes of gradient sums over the devices, with
    less precision (docs/pods.md); needs `compute` bfloat16.
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
    keep: trajectory.Keep = trajectory.one_pair
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
        """Check ranges, and fields that depend on each other.

        Raises:
            InputError: names the fields and their values.
        """
        _check_min(
            1, self, "steps", "prompts_per_step", "max_prompt_tokens", "decode_rows"
        )
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

    examples: a jsonl or parquet file of `question, solution` rows. Each step takes
    `examples_per_step`; `steps` 0 means `epochs` passes over the file. Other fields as
    in `TrainConfig`.
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
