"""A completion depends on its request alone: not on slots, devices or the cache."""

import functools
import itertools

import jax
import numpy as np
import pytest
from tiny_engine import (
    MIXED,
    PENALTIES,
    PIECES,
    make_engine,
    make_requests,
    make_tiny_mesh,
    put_weights,
    sample,
    tokens_of,
)

from oreal_jax import sharding
from oreal_jax.errors import InputError
from oreal_jax.mesh import MeshShape
from oreal_jax.sampling import make_stop_table
from oreal_jax.sampling.programs import Size


def pairs(groups, others):
    """Return the completions of two calls, side by side."""
    return zip(*map(itertools.chain.from_iterable, (groups, others)), strict=True)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_slots_do_not_change_a_completion(params, prompts, completions, rows):
    assert tokens_of(sample(params, prompts, rows=rows)) == tokens_of(completions)


def test_batch_size_order_and_neighbours_do_not_change_a_completion(
    params, prompts, completions
):
    order = [3, 0, 4]
    again = sample(params, [prompts[i] for i in order], keys=order, rows=4)
    assert tokens_of(again) == [tokens_of(completions)[i] for i in order]


def test_requests_of_one_call_may_differ_in_everything(params, prompts):
    """Each is completed as if it were alone."""
    alone = [
        sample(params, [prompt], keys=[i], **options)[0]
        for i, (prompt, options) in enumerate(zip(prompts, MIXED, strict=True))
    ]
    engine = make_engine(rows=8)
    mixed = [
        *itertools.chain.from_iterable(
            make_requests([prompt], keys=[i], **options)
            for i, (prompt, options) in enumerate(zip(prompts, MIXED, strict=True))
        )
    ]
    together = engine.sample(put_weights(engine, params), mixed, 3)
    assert tokens_of(together) == tokens_of(alone)
    for one, other in pairs(together, alone):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_penalties_do_not_depend_on_slots(params, prompts):
    few, many = (sample(params, prompts, rows=rows, **PENALTIES) for rows in (2, 64))
    assert tokens_of(few) == tokens_of(many)


@pytest.mark.parametrize(
    "shape",
    [MeshShape(fsdp=4, tensor=2), MeshShape(data=4, tensor=2)],
    ids=str,
)
def test_devices_do_not_change_a_completion(params, prompts, completions, shape):
    again = sample(params, prompts, mesh=make_tiny_mesh(shape))
    assert tokens_of(again) == tokens_of(completions)


def test_more_tensor_devices_than_key_value_heads_change_nothing(
    params, prompts, completions
):
    shape = MeshShape(fsdp=2, tensor=4)  # the model has two such heads
    again = sample(params, prompts, mesh=make_tiny_mesh(shape))
    assert tokens_of(again) == tokens_of(completions)


def test_an_engine_may_have_fewer_devices_than_a_row_of_the_mesh(
    params, prompts, completions
):
    mesh = make_tiny_mesh(MeshShape(fsdp=4, context=2))
    engine = make_engine(mesh=mesh, tensor=2)
    assert (engine.mesh.shape["data"], engine.mesh.shape["tensor"]) == (4, 2)
    again = sample(params, prompts, mesh=mesh, tensor=2)
    assert tokens_of(again) == tokens_of(completions)
    with pytest.raises(InputError, match="engine of 3 devices: a process has 8"):
        make_engine(mesh=mesh, tensor=3)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"cache": "float8", **PENALTIES},
        {"stop_strings": True, "renormalise": True},
        {"mesh": MeshShape(data=2, tensor=4)},
    ],
    ids=lambda how: next(iter(how), "plain"),
)
def test_a_cache_that_is_too_small_for_all_slots_changes_nothing(params, prompts, how):
    """Sequences are swapped out with all that their next tokens depend on.

    No token is generated twice.
    """
    options = dict(how)
    renormalise = options.pop("renormalise", False)
    mesh = make_tiny_mesh(options.pop("mesh", None))
    engine_options = {"cache": options.pop("cache", "full")}
    if options.pop("stop_strings", False):
        engine_options["stop_table"] = make_stop_table(["cabdd"], lambda: PIECES, 64)
    roomy = make_engine(**engine_options)
    tight = make_engine(mesh=mesh, rows=8, cache_tokens=256, **engine_options)
    requests = make_requests(prompts, **options)
    results = [
        engine.sample(put_weights(engine, params), requests, 3, renormalise=renormalise)
        for engine in (roomy, tight)
    ]
    assert tokens_of(results[0]) == tokens_of(results[1])
    for one, other in pairs(*results):
        assert one.finish_reason == other.finish_reason
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        close(one.log_probs, other.log_probs)
        if renormalise:
            close(one.sampled_log_probs, other.sampled_log_probs)
    assert roomy.statistics.swap_outs == 0 < tight.statistics.swap_outs
    tokens = sum(len(c.tokens) for group in results[0] for c in group)
    assert tight.statistics.new_tokens == tokens


def test_a_swap_moves_a_slots_whole_state_and_changes_nothing_else():
    mesh = make_tiny_mesh(MeshShape(data=2, tensor=4))
    programs = make_engine(mesh=mesh, cache="float8").programs
    shapes = programs.abstract(Size(4, 8, 4, 64, 2))  # of each of two engines
    generator = np.random.default_rng(0)

    def random(x):
        maximum = 2 if x.dtype == bool else 100
        return generator.integers(0, maximum, x.shape).astype(x.dtype)

    source, target = (jax.tree.map(random, shapes) for _ in range(2))
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    put = lambda state: jax.device_put(state, shardings)
    by_engine = sharding.make_sharding(programs.mesh, "rows")
    array = lambda *engines: jax.device_put(np.array(engines, np.int32), by_engine)
    row = programs.swap_out(put(source), array([2], [1]), array([[3, 5]], [[1, 2]]))
    # Into the first engine alone; page 0 is unused.
    result = programs.swap_in(
        put(target), row, array([0], [-1]), array([[7, 1]], [[0, 0]])
    )

    def check(result, source, target, new, old, first=0):
        expected = target.copy()
        expected[0, new] = source[0, old]
        np.testing.assert_array_equal(result[:, first:], expected[:, first:])

    states = jax.tree.map(np.array, result), source, target
    check_slots = functools.partial(check, new=[0], old=[2])
    jax.tree.map(check_slots, *(state.slots for state in states))
    check_pages = functools.partial(check, new=[7, 1], old=[3, 5], first=1)
    jax.tree.map(check_pages, *(state.cache for state in states))


@pytest.mark.parametrize("option", [{"weights": "int8"}, {"cache": "float8"}])
def test_eight_bits_change_little_and_depend_on_nothing_else(params, prompts, option):
    small = sample(params, prompts, max_tokens=5, **option)
    few = sample(params, prompts, max_tokens=5, rows=4, **option)
    assert tokens_of(few) == tokens_of(small)
    full = sample(params, prompts, max_tokens=1)
    differences = [
        abs(a.log_probs[0] - b.log_probs[0])
        for a, b in pairs(small, full)
        if a.tokens[0] == b.tokens[0]
    ]
    assert len(differences) > 0.6 * 15 and 0 < max(differences) < 0.5


def test_the_size_of_keys_and_values_does_not_change_a_float8_completion(
    params, prompts
):
    """Keys and values of thousands give the same model; e4m3 ends at 448.

    Queries and the output projection are as much smaller.
    """
    attention = dict(params["layers"]["attention"])
    for name, factor in [("key", 12), ("query", -12), ("value", 12), ("output", -12)]:
        attention[name] = attention[name] * 2.0**factor
    large = params | {"layers": params["layers"] | {"attention": attention}}
    how = {"max_tokens": 5, "cache": "float8"}
    one, other = (sample(weights, prompts, **how) for weights in (params, large))
    for a, b in pairs(one, other):
        assert a.tokens == b.tokens
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
