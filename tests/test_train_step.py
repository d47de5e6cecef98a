"""One update: the same whatever the packing, the micro-batches and the mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oreal_jax import losses, model
from oreal_jax.data.packing import Example, fill_rows, pack
from oreal_jax.errors import InputError
from oreal_jax.losses import Oreal
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig
from oreal_jax.optimizer import Optimizer
from oreal_jax.sampling import Sampling, sampling_distribution
from oreal_jax.train.scoring import make_reference_scorer, put_batch
from oreal_jax.train.step import make_train_step
from oreal_jax.train_state import TrainedModels

CONFIG = ModelConfig(
    vocab=64, embed=16, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=32, qkv_bias=True
)
POLICY = Optimizer(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=0)
SCORES = dataclasses.replace(POLICY, learning_rate=2e-2)
OREAL = Oreal()
ONE = MeshShape(fsdp=1)


def examples(count: int = 12) -> list[Example]:
    draw = np.random.default_rng(0)
    tokens = lambda low, high: draw.integers(0, 64, draw.integers(low, high)).tolist()
    return [
        Example(tokens(2, 6), tokens(1, 9), i % 2 == 0, 0.8 if i % 2 == 0 else -0.5)
        for i in range(count)
    ]


@functools.cache  # tests with equal arguments share a run
def run(
    shape=ONE,
    *,
    rows=1,
    row_length=64,
    steps=1,
    batch=examples,
    loss=OREAL,
    scores: Optimizer | None = SCORES,
    freeze_steps=0,
    remat: model.Remat = "everything",
    policy=POLICY,
    distribution: model.Distribution = model.full_softmax,
):
    """State, metrics and scores after some steps on the same batch."""
    devices = jax.devices()[: 1 if shape == ONE else 8]
    mesh = make_mesh(shape, CONFIG, devices)
    models = TrainedModels.create(CONFIG, policy, scores, 10, mesh)
    params = model.init(CONFIG, jax.random.key(0))
    state = models.initializer(mesh)(params)
    if state.token_reward:  # a head that has learned something: no token weighs zero
        head = jax.random.normal(jax.random.key(1), (16,))
        state.token_reward.params["score"] = jax.device_put(
            head, state.token_reward.params["score"].sharding
        )
    packed, slots = pack(batch(), rows=rows, row_length=row_length)
    packed = put_batch(packed, mesh)
    packed = make_reference_scorer(CONFIG, mesh, jnp.float32)(params, packed)
    update = make_train_step(
        models,
        loss,
        mesh,
        freeze_steps=freeze_steps,
        remat=remat,
        distribution=distribution,
    )
    state, metrics, outputs = update(state, packed)
    for _ in range(steps - 1):
        state, metrics, outputs = update(state, packed)
    return state, metrics, outputs, slots


def moments(state) -> Any:
    """Adam's part of an optimizer state."""
    return next(part for part in state.optimizer if hasattr(part, "mu"))


def gradients(state):
    """Both models' gradients: Adam's first moment after one step is a tenth of them.

    (Weights would not do: Adam moves a weight whose gradient is rounding noise as far
    as any other.)
    """
    players = (state.policy, state.token_reward)
    return [10 * m for p in players for m in jax.tree.leaves(moments(p).mu)]


def assert_same_step(one, other):
    (state, metrics, *_), (state_, metrics_, *_) = one, other
    for a, b in zip(gradients(state), gradients(state_), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-9)
    for name, value in metrics_.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def whole():
    """All examples in one row of one micro-batch on one device."""
    return run(row_length=256)


def test_the_step_is_compiled_once():
    mesh = make_mesh(ONE, CONFIG, jax.devices()[:1])
    models = TrainedModels.create(CONFIG, POLICY, POLICY, 10, mesh)
    state = models.initializer(mesh)(model.init(CONFIG, jax.random.key(0)))
    packed = put_batch(pack(examples(), rows=1, row_length=256)[0], mesh)
    update = make_train_step(models, Oreal(), mesh)
    for _ in range(3):
        state, *_ = update(state, packed)
    assert update.program._cache_size() == 1


@pytest.mark.parametrize(
    ("rows", "row_length", "microbatches"), [(12, 16, 1), (2, 32, 2), (1, 24, 4)]
)
def test_packing_and_microbatches_do_not_change_the_update(
    whole, rows, row_length, microbatches
):
    packed, _ = pack(examples(), rows=rows, row_length=row_length)
    assert int(packed.filled) == microbatches
    assert_same_step(run(rows=rows, row_length=row_length), whole)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(MeshShape(fsdp=8), marks=pytest.mark.slow),
        pytest.param(MeshShape(fsdp=4, tensor=2), marks=pytest.mark.slow),
        MeshShape(data=2, fsdp=2, tensor=2),
        MeshShape(fsdp=2, context=2, tensor=2),
    ],
    ids=str,
)
def test_the_mesh_does_not_change_the_update(whole, shape):
    assert_same_step(run(shape, rows=8, row_length=16), whole)


@pytest.mark.parametrize(
    "remat",
    [
        "but_attention",
        "elementwise",
        pytest.param("nothing", marks=pytest.mark.slow),
        pytest.param("offloaded", marks=pytest.mark.slow),
    ],
)
def test_rematerialisation_does_not_change_the_update(whole, remat):
    assert_same_step(run(remat=remat), whole)


def test_rematerialisation_trades_memory_for_computation():
    config = dataclasses.replace(CONFIG, layers=8)
    params = model.init(config, jax.random.key(0))
    tokens = jnp.zeros((1, 512), jnp.int32)

    def cost(remat):
        execution = dataclasses.replace(model.ONE_DEVICE, remat=remat)
        states = lambda params: model.hidden(
            config, params, tokens, tokens, tokens, execution
        )
        work = jax.jit(jax.grad(lambda params: jnp.sum(states(params) ** 2)))
        made = work.lower(params).compile()
        memory, counted = made.memory_analysis(), made.cost_analysis()
        assert memory and counted
        return memory.temp_size_in_bytes, counted["flops"]

    everything, elementwise, nothing = map(
        cost, ("everything", "elementwise", "nothing")
    )
    assert everything[0] < elementwise[0] < nothing[0]
    assert everything[1] > elementwise[1] >= nothing[1]


def test_gradients_are_summed_layer_by_layer():
    """Only one layer's gradient is in memory, apart from the sums of both models."""
    config = dataclasses.replace(CONFIG, layers=16, embed=64, mlp=256)
    mesh = make_mesh(ONE, config, jax.devices()[:1])
    models = TrainedModels.create(config, POLICY, SCORES, 10, mesh)
    state = jax.eval_shape(models.initializer(mesh), model.abstract(config))
    packed, _ = pack(examples(2), rows=1, row_length=16)
    update = make_train_step(models, OREAL, mesh)
    memory = update.program.lower(state, packed, False).compile().memory_analysis()
    params = (state.policy.params, state.token_reward.params)
    sums = sum(4 * x.size for x in jax.tree.leaves(params))
    # The optimizers add 0.5; the gradients of a micro-batch would add 0.5 more.
    assert memory and memory.temp_size_in_bytes < 1.75 * sums


def test_the_order_of_examples_does_not_change_the_update(whole):
    reversed_examples = lambda: examples()[::-1]
    assert_same_step(run(row_length=256, batch=reversed_examples), whole)


def test_scores_return_in_the_row_of_their_example(whole):
    _, _, scores, rows = run(rows=2, row_length=32)
    _, _, expected, other_rows = whole
    for example, row, other in zip(examples(), rows, other_rows, strict=True):
        size = len(example.completion)
        np.testing.assert_allclose(
            scores.log_probs[row][:size], expected.log_probs[other][:size], rtol=1e-4
        )


def test_moments_are_sharded_like_their_parameters():
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2), CONFIG)
    models = TrainedModels.create(CONFIG, POLICY, SCORES, 10, mesh)
    state = models.initializer(mesh)(model.init(CONFIG, jax.random.key(0)))
    for trained in (state.policy, state.token_reward):
        assert trained
        for moment in moments(trained)[1:]:
            same = lambda m, p: m.sharding == p.sharding
            assert jax.tree.all(jax.tree.map(same, moment, trained.params))
    query = state.policy.params["layers"]["attention"]["query"]
    assert query.addressable_shards[0].data.size == query.size // 8


def test_kl_to_the_initial_policy_is_zero_at_the_start():
    _, metrics, _, _ = run()
    assert abs(metrics["actor/kl_loss"]) < 1e-9


def test_a_policy_equal_to_its_reference_has_no_kl_for_any_sampler():
    even = lambda: [example._replace(advantage=0.0) for example in examples()]
    nucleus = Sampling(max_tokens=9, top_p=0.7, temperature=0.8)
    how = {"batch": even, "loss": losses.Reinforce(kl_weight=1.0), "scores": None}
    _, metrics, scores, _ = run(**how, distribution=sampling_distribution(nucleus))
    assert abs(metrics["actor/kl_loss"]) < 1e-9
    assert metrics["actor/grad_norm"] < 1e-5
    _, _, expected, _ = run(**how)
    assert expected.full_log_probs is None and scores.full_log_probs is not None
    full = expected.log_probs
    np.testing.assert_allclose(scores.full_log_probs, full, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(scores.log_probs - full)).max() > 0.1


def test_frozen_steps_update_the_token_reward_model_only():
    start, _, _, _ = run(freeze_steps=1)
    before = model.init(CONFIG, jax.random.key(0))
    same = lambda a, b: bool((np.asarray(a) == np.asarray(b)).all())
    assert jax.tree.all(jax.tree.map(same, start.policy.params, before))
    assert not any(np.any(m) for m in jax.tree.leaves(moments(start.policy).mu))
    assert start.token_reward
    assert np.any(start.token_reward.params["embedding"] != before["embedding"])
    moved, _, _, _ = run(steps=2, freeze_steps=1)
    assert np.any(moved.policy.params["embedding"] != before["embedding"])


def test_without_token_rewards_there_is_no_second_model():
    plain = Oreal(
        weight_correct=losses.unweighted,
        weight_incorrect=losses.unweighted,
        kl_weight=0.0,
    )
    state, metrics, _, _ = run(scores=None, loss=plain)
    assert state.token_reward is None
    assert metrics["oreal/omega_correct/mean"] == 1
    assert "token_reward/loss" not in metrics


def test_the_rate_warms_up_and_decays_over_the_steps_of_the_run():
    rate = Optimizer(
        learning_rate=5e-7, final_learning_rate=1e-7, warmup_steps=10
    ).rate(90)
    at = lambda step: float(np.asarray(rate(jnp.asarray(step))))
    assert at(0) == 0
    assert at(5) == pytest.approx(2.5e-7)
    assert at(10) == pytest.approx(5e-7)
    assert at(50) == pytest.approx(3e-7)
    assert at(90) == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 5e-2),
        ("final_learning_rate", 9e-3),
        ("warmup_steps", 5),
        ("weight_decay", 0.5),
        ("clip_norm", 1e-3),
        ("beta1", 0.5),
        ("beta2", 0.5),
    ],
)
def test_every_optimizer_setting_changes_the_update(field, value):
    changed = dataclasses.replace(POLICY, **{field: value})
    mesh = make_mesh(ONE, CONFIG, jax.devices()[:1])
    ends = []
    for optimizer in (POLICY, changed):
        trained = TrainedModels.create(CONFIG, optimizer, None, 10, mesh).policy
        state = trained.initialize({"weight": jnp.ones(3)})
        for step in range(3):
            gradient = {"weight": jnp.asarray([0.1, 0.2 - 0.1 * step, -3.0 * step])}
            state = trained.update(state, gradient, jnp.asarray(step))
        ends.append(np.asarray(state.params["weight"]))
    assert np.abs(ends[0] - ends[1]).max() > 1e-6


def test_an_offloaded_optimizer_gives_equal_updates_and_stays_on_the_host(whole):
    offloaded = dataclasses.replace(POLICY, offload=True)
    step = run(policy=offloaded)
    assert_same_step(step, whole)
    kinds = {
        m.sharding.memory_kind for m in jax.tree.leaves(moments(step[0].policy).mu)
    }
    assert kinds == {"pinned_host"}


def test_a_bfloat16_momentum_is_near_and_half_as_large():
    mesh = make_mesh(ONE, CONFIG, jax.devices()[:1])
    ends = []
    for momentum in ("float32", "bfloat16"):
        optimizer = dataclasses.replace(POLICY, momentum=momentum)
        trained = TrainedModels.create(CONFIG, optimizer, None, 10, mesh).policy
        state = trained.initialize({"weight": jnp.ones(3)})
        for step in range(3):
            gradient = {"weight": jnp.asarray([0.1, 0.2 - 0.1 * step, -3.0 * step])}
            state = trained.update(state, gradient, jnp.asarray(step))
        ends.append(state)
    exact, near = ends
    momentum = moments(near).mu["weight"]
    assert momentum.dtype == jnp.bfloat16
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2)
    close(momentum.astype(jnp.float32), moments(exact).mu["weight"])
    close(near.params["weight"], exact.params["weight"])


def test_rows_are_filled_without_overlap_and_never_overfull():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    rows = fill_rows(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 64 + 1


def test_a_sequence_longer_than_a_row_is_rejected_with_both_numbers():
    with pytest.raises(InputError, match="65 tokens, row_length=64"):
        fill_rows([3, 65], 64)


def test_the_head_has_a_column_for_every_prediction_and_few_shapes():
    columns = {}
    for size in range(257):
        packed, _ = pack([Example([], [1] * size)], rows=1, row_length=256)
        columns[size] = packed.predicts.shape[-1]
    assert all(size <= C < max(size, 1) + 32 for size, C in columns.items())
    assert len(set(columns.values())) == 8


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(fsdp=3), "3 devices, there are 8"),
        (MeshShape(tensor=16), "a multiple of 16 devices"),
        (
            MeshShape(fsdp=1, tensor=8),
            "heads=4 is not divisible by tensor=8",
        ),
        (MeshShape(data=-1, fsdp=-1), "one may be -1"),
        (MeshShape(data=0), "sizes must be positive"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_rejected_with_both_numbers(shape, message):
    with pytest.raises(InputError, match=message):
        make_mesh(shape, CONFIG)


def test_key_value_heads_and_devices_must_divide_one_another():
    config = ModelConfig(
        vocab=64, embed=16, layers=1, heads=12, kv_heads=6, head_dim=8, mlp=32
    )
    with pytest.raises(InputError, match="kv_heads=6 and tensor=4: neither divides"):
        make_mesh(MeshShape(fsdp=2, tensor=4), config)
