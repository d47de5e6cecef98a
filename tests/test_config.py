"""Configs: the published recipe, settings from the command line, your own loss."""

import contextlib
import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from oreal_jax import config as configuration
from oreal_jax import config_loading, distributed, losses, trajectory
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.console import Screen
from oreal_jax.data import Prompt
from oreal_jax.data.order import PUBLISHED_BANDS
from oreal_jax.errors import InputError
from oreal_jax.losses import Oreal, ThresholdWeights
from oreal_jax.sampling import Completion
from oreal_jax.train import setup
from oreal_jax.verify import Verdict

CONFIGS = Path(__file__).parents[1] / "configs"


def loaded(name: str, *settings: str) -> TrainConfig:
    return config_loading.load(CONFIGS / f"{name}.py", TrainConfig, settings)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_is_recorded_as_json(path):
    kind = SftConfig if "sft" in path.stem else TrainConfig
    config = config_loading.load(path, kind)
    recorded = json.loads(json.dumps(configuration.as_json(config)))
    assert recorded["seed"] == config.seed
    home = "my_loss" if path.stem == "my_loss" else "oreal_jax.losses"
    assert recorded["loss"]["class"].startswith(home)


def test_the_7b_recipe_is_the_published_one():
    config = loaded("oreal_7b")
    assert config.prompts_per_step * config.samples_per_prompt == 1024
    assert config.samples_per_prompt == 16
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 0.9, 0)
    assert sampling.max_tokens == 14_000
    assert sampling.max_tokens + config.max_prompt_tokens == 16_384
    assert (config.steps, config.freeze_steps) == (90, 10)
    policy, reward = config.policy, config.token_reward
    assert reward is not None
    assert (policy.learning_rate, policy.final_learning_rate) == (5e-7, 1e-7)
    assert (reward.learning_rate, reward.final_learning_rate) == (2e-6, 4e-7)
    for optimizer in (policy, reward):
        assert (optimizer.warmup_steps, optimizer.weight_decay) == (10, 0.01)
        assert (optimizer.clip_norm, optimizer.beta1, optimizer.beta2) == (
            1,
            0.9,
            0.999,
        )
    assert config.loss == Oreal(
        positive_weight=1.0,
        negative_weight=0.5,
        kl_weight=0.01,
        clone_times_advantage=True,
        weight_correct=ThresholdWeights(threshold=0.5),
        weight_incorrect=ThresholdWeights(threshold=0.5),
        kl=losses.terms.kl_k3,
    )
    assert config.loss.advantage is losses.rloo
    assert config.log_probs == "full"
    assert config.keep is trajectory.select_pair
    assert config.difficulty == PUBLISHED_BANDS


def test_without_token_rewards_everything_is_selected_and_nothing_frozen():
    config = loaded("oreal_7b_without_token_rewards")
    assert config.token_reward is None
    assert config.keep is trajectory.select_all
    assert config.freeze_steps == 0
    assert isinstance(config.loss, Oreal)
    assert (
        config.loss.weight_correct is config.loss.weight_incorrect is losses.unweighted
    )


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("steps=70", lambda c: c.steps == 70),
        ("policy.learning_rate=1", lambda c: c.policy.learning_rate == 1),
        ("policy.learning_rate=3e-6", lambda c: c.policy.learning_rate == 3e-6),
        ("sampling.top_k=5", lambda c: c.sampling.top_k == 5),
        ("loss.kl_weight=0.5", lambda c: c.loss.kl_weight == 0.5),
        (
            "loss.weight_correct.threshold=0.1",
            lambda c: c.loss.weight_correct.threshold == 0.1,
        ),
        ("model=7", lambda c: c.model == "7"),
        ("system_prompt=Be brief.", lambda c: c.system_prompt == "Be brief."),
        ("tensorboard=True", lambda c: c.trackers == ("tensorboard",)),
        ("trackers=wandb", lambda c: c.trackers == ("wandb",)),
        ("compute=float32", lambda c: c.compute == "float32"),
        ("evaluation.data=a.jsonl", lambda c: c.evaluation.data == ("a.jsonl",)),
        ("loss=grpo", lambda c: c.loss == losses.Grpo()),
        ("stop_words=('a','b')", lambda c: c.stop_words == ("a", "b")),
        ("verification.judge_tries=5", lambda c: c.verification.judge_tries == 5),
        ("difficulty=((0.0,0.5,3),)", lambda c: c.difficulty == ((0.0, 0.5, 3),)),
    ],
)
def test_a_setting_reaches_its_field(setting, read):
    assert not read(loaded("oreal_7b"))
    assert read(loaded("oreal_7b", setting))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=7.5", "steps must be int"),
        ("steps=True", "steps must be int"),
        ("compute=float8", "must be one of auto, bfloat16, float32$"),
        ("steps={[]:1}", "steps must be int"),
        ("tensorboard=1", "tensorboard must be bool"),
        ("trackers=mlflow", "trackers must be"),
        ("stop_words=('a',1)", "stop_words"),
        ("keep=select_all", "which only a config file can give"),
        ("token_reward=off", "token_reward must be"),
        ("loss=gpro", "loss must be PolicyLoss of a config file, or one of released"),
        ("steps.more=1", "has no fields"),
        ("loss.threshold=1", "did you mean loss.weight_correct.threshold"),
        (
            "learning_rate=1",
            "'learning_rate'; did you mean policy.learning_rate or "
            "token_reward.learning_rate; it has",
        ),
        ("seed=-1", "seed=-1 must be from 0 to 2147483647"),
        ("seed=2147483648", "seed=2147483648 must be from 0 to 2147483647"),
        (
            "policy.learning_rate=-1",
            "^config: policy.learning_rate=-1.0 must be at least 0",
        ),
        ("sampling.top_p=2", "^config: sampling.top_p=2.0 must be"),
        ("policy.final_learning_rate=-1", "final_learning_rate=-1.0 must be"),
        ("policy.warmup_steps=-1", "warmup_steps=-1 must be at least 0"),
        ("policy.weight_decay=-1", "weight_decay=-1.0 must be at least 0"),
        ("policy.clip_norm=0", "clip_norm=0.0 must be above 0"),
        ("policy.beta1=-1", "beta1=-1.0 must be at least 0 and below 1"),
        ("policy.beta2=1", "beta2=1.0 must be at least 0 and below 1"),
    ],
)
def test_invalid_settings_are_reported(setting, message):
    with pytest.raises(InputError, match=message):
        loaded("oreal_7b", setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("verification.judge_tries=0", "judge_tries=0 must be at least 1"),
        ("verification.judge_timeout=0", "judge_timeout=0.0 must be above 0"),
        ("verification.judge_lost=stop", "judge_lost must be"),
        ("verification.undecided=correct", "undecided must be"),
    ],
)
def test_invalid_judge_settings_are_rejected(setting, message):
    with pytest.raises(InputError, match=message):
        loaded("oreal_7b", setting)


def test_every_judge_setting_reaches_the_judge(monkeypatch, capsys):
    arguments = {}

    def judge(*hosts_and_model, **settings):
        arguments.update(settings, a=hosts_and_model)
        return contextlib.nullcontext()

    monkeypatch.setattr(setup, "Judge", judge)
    fields = ("judge_hosts=('http://a/v1',)", "judge_concurrency=3", "judge_tries=5")
    fields += ("judge_timeout=2.5", "judge_lost=rule", "judge_max_tokens=77")
    settings = [f"verification.{a}" for a in ("judge_model=m", *fields)]
    assert setup.open_judge(loaded("oreal_7b"), Screen()).__enter__() is None
    setup.open_judge(loaded("oreal_7b", *settings), Screen())
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    setup.open_judge(loaded("oreal_7b", *settings), Screen.silent())
    arguments.pop("log")("lost")  # also from processes without a screen
    assert re.search("process 0 of 1 on .*: lost", capsys.readouterr().err)
    assert arguments == {
        "a": (("http://a/v1",), "m"),
        "concurrency": 3,
        "max_tokens": 77,
        "tries": 5,
        "timeout": 2.5,
        "lost": "rule",
    }


def trajectory_with(outcome: str) -> trajectory.Trajectory:
    return trajectory.Trajectory(
        prompt=Prompt("id", "question", "1"),
        group=0,
        sample=0,
        prompt_tokens=[1],
        completion=Completion([2], np.zeros(1), None, "stop"),
        verdict=Verdict(outcome, ""),  # pyright: ignore[reportArgumentType]
    )


def test_undecided_completions_do_not_affect_advantages():
    outcomes = [
        ["correct", "undecided", "incorrect", "incorrect"],
        ["undecided", "undecided", "undecided", "correct"],
    ]
    groups = [[trajectory_with(outcome) for outcome in group] for group in outcomes]
    groups = trajectory.with_advantages(groups, losses.rloo, undecided="drop")
    advantages = [[each.advantage for each in group] for group in groups]
    alone = losses.rloo(np.array([[1.0, -1.0, -1.0]]))[0]
    assert advantages[0] == [alone[0], 0, alone[1], alone[2]]
    # One decided completion alone has no baseline.
    assert advantages[1] == [0, 0, 0, 0]


@pytest.mark.parametrize("order", [1, -1])
def test_settings_are_checked_together(order):
    token_reward = ["token_reward=None", "freeze_steps=0"]
    short = ["packing.row_length=1024", "max_prompt_tokens=512"]
    short += ["sampling.max_tokens=256", "sampling.top_k=3", "sampling.max_tokens=512"]
    config = loaded("oreal_7b", *token_reward[::order])
    assert config.token_reward is None and not config.freeze_steps
    config = loaded("oreal_7b", *short[::order])
    assert config.sampling.max_tokens == (512 if order == 1 else 256)  # the last
    assert config.sampling.top_k == 3 and config.packing.row_length == 1024


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("", "steps", 1.5, "steps=1.5, expected int"),
        ("", "log_probs", "full ", "log_probs='full ', expected one of full, sampled"),
        ("", "stop_words", "ab", "stop_words='ab', expected tuple"),
        ("", "remat", "nothin", "remat='nothin', expected one of everything"),
        ("", "token_reward", "no", "token_reward='no', expected"),
        (
            ".verification",
            "undecided",
            "dorp",
            "verification: undecided='dorp', expected one of incorrect, drop",
        ),
    ],
)
def test_types_in_a_config_file_are_checked(tmp_path, part, name, value, message):
    path = tmp_path / "invalid.py"
    path.write_text(  # the tests' own type checks would stop an ordinary call
        "import copy\nfrom oreal_7b import config\nconfig = copy.deepcopy(config)\n"
        f"object.__setattr__(config{part}, {name!r}, {value!r})\n"
    )
    with pytest.raises(InputError, match=f"invalid.py: {message}"):
        config_loading.load(path, TrainConfig)


def first(group, random, count=1):
    return group[:count]


class Keep:
    def __call__(self, group, random):
        return group


def test_functions_with_arguments_are_recorded_with_them():
    recipe = loaded("oreal_7b")
    three = dataclasses.replace(recipe, keep=functools.partial(first, count=3))
    recorded = configuration.as_json(three)["keep"]
    assert recorded.pop("of").endswith("test_config.first")
    assert recorded == {"class": "functools.partial", "count": 3}
    called = dataclasses.replace(recipe, keep=Keep())
    assert configuration.as_json(called)["keep"].endswith("test_config.Keep")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\nx = 1 / 0\n", "line 4: ZeroDivisionError"),
        ("x = (1\n", "line 2: SyntaxError"),
        ("import nothing_like_it\n", "line 2: ModuleNotFoundError"),
    ],
)
def test_errors_in_a_config_file_are_reported_with_their_line(tmp_path, text, message):
    path = tmp_path / "invalid.py"
    path.write_text("from oreal_jax.config import TrainConfig\n" + text)
    with pytest.raises(InputError, match=rf"invalid\.py, {message}"):
        config_loading.load(path, TrainConfig)


def test_a_config_file_without_a_config_is_rejected(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    with pytest.raises(InputError, match="must be a TrainConfig, found nothing"):
        config_loading.load(path, TrainConfig)


def test_fields_of_a_loss_set_by_name_can_be_set(tmp_path):
    config = loaded("oreal_7b", "loss=grpo", "loss.kl_weight=0.5")
    assert config.loss == losses.Grpo(kl_weight=0.5)


def test_an_invalid_value_in_a_config_file_is_reported_with_its_line(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from oreal_jax.config import Saving\n\nSaving(every=0)\n")
    with pytest.raises(InputError, match=f"^{path}, line 3: config: every=0 must be"):
        config_loading.load(path, TrainConfig)
