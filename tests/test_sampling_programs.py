"""Programs of the engine: what is compiled, exchanged between devices and skipped."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import (
    CONFIG,
    MIXED,
    make_engine,
    make_requests,
    make_tiny_mesh,
    put_weights,
    tokens_of,
)

from oreal_jax import metrics, model, model_parallel, program_cache, sharding
from oreal_jax.mesh import MeshShape
from oreal_jax.model import decoding, float8
from oreal_jax.plan.collectives import collective_bytes
from oreal_jax.sampling.programs import Size
from oreal_jax.sampling.runner import PAGE, prompt_width


def test_other_parameters_compile_nothing(params, prompts):
    with program_cache.disabled():
        check_nothing_is_compiled(params, prompts)


def check_nothing_is_compiled(params, prompts):
    engine = make_engine(rows=16)
    weights = put_weights(engine, params)
    compiled = lambda: metrics.compilations.take()["perf/compilations"]
    complete = lambda **options: engine.sample(
        weights, make_requests(prompts, **options), 2, **call
    )
    call: dict[str, Any] = {}
    complete()
    complete(max_tokens=1)  # all finish at once
    compiled()
    for options in MIXED:
        complete(**options)  # some with fewer tokens than the first call
    call["renormalise"] = True
    complete(seed=2)
    assert compiled() == 0
    again = make_engine(rows=16)  # an equal engine shares the programs
    again.sample(weights, make_requests(prompts), 2)
    assert compiled() == 0


def test_prompts_within_a_page_are_padded_by_at_most_seven_tokens():
    assert {prompt_width(n) - n for n in range(1, PAGE + 1)} == {*range(8)}


@pytest.mark.parametrize("how", [{}, {"weights": "int8", "cache": "float8"}])
def test_weights_are_laid_out_by_one_program_for_all_layers(params, how):
    mesh = make_tiny_mesh(MeshShape(fsdp=2, tensor=4))  # repeats key-value heads
    programs = make_engine(mesh=mesh, **how).programs
    config, in_eight_bits = programs.config, bool(how)
    folded = float8.fold_scales(config, params) if in_eight_bits else params
    expected = decoding.lay_out(config, folded, jnp.float32, int8=in_eight_bits)
    layer: Any = programs.reshard_layer
    layer.clear_cache()  # equal engines share it
    jax.tree.map(np.testing.assert_array_equal, programs.weights(params), expected)
    assert layer._cache_size() == 1


def test_engines_shrink_only_if_that_saves_time(params, prompts, monkeypatch):
    engine = make_engine(rows=32)
    programs, weights = engine.programs, put_weights(engine, params)
    compiled_decode, slots = programs.compiled_decode, []

    def record(size, *arguments):
        slots.append(size.slots)
        return compiled_decode(size, *arguments)

    def complete(compile_seconds: float):
        slots.clear()
        programs.compile_seconds = compile_seconds
        return tokens_of(engine.sample(weights, make_requests(prompts), 7))

    monkeypatch.setattr(programs, "_compiled", {})
    monkeypatch.setattr(programs, "compiled_decode", record)
    expected = complete(1e6)
    assert set(slots) == {32}  # compiling takes longer than it saves
    assert complete(0) == expected
    assert set(slots) == {32, 8}
    assert complete(1e6) == expected
    assert set(slots) == {32, 8}  # the program is already compiled


def test_sizes_in_a_resumable_run_depend_on_requests_alone(params, prompts):
    """An earlier, longer call and the clock change nothing."""
    engine = make_engine(rows=32, longest=(40, 150))
    programs, weights = engine.programs, put_weights(engine, params)
    compiled_decode, sizes = programs.compiled_decode, []

    def record(size, *arguments):
        sizes.append(size)
        return compiled_decode(size, *arguments)

    def complete(**options) -> list:
        sizes.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(programs, "compiled_decode", record)
            engine.sample(weights, make_requests(prompts, **options), 7)
        return list(sizes)

    first = complete(max_tokens=120)
    assert {size.slots for size in first} == {32, 8}  # many steps are saved
    complete(max_tokens=150, seed=3)
    programs.compile_seconds = 1e6
    assert complete(max_tokens=120) == first
    assert {size.slots for size in complete(max_tokens=4)} == {32}  # few steps
    assert complete(max_tokens=4)[0] == first[0]


def test_logits_are_exchanged_by_slot_and_never_gathered():
    mesh = make_tiny_mesh(MeshShape(fsdp=2, tensor=4))
    engine, slots = make_engine(mesh=mesh), 16
    programs = engine.programs
    weights = jax.eval_shape(programs.reshard, model.abstract(CONFIG))
    array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
        (2, *shape), dtype, sharding=sharding.make_sharding(programs.mesh, "rows")
    )
    arguments = (
        sharding.with_shardings(weights, programs.own),
        programs.abstract(Size(slots, 32, 8, 64, 16)),
        array(slots, 8),
        array(slots, dtype=bool),
    )
    text = programs.decode.lower(*arguments, 1, 0, engine.stops).compile().as_text()
    assert text
    moved = collective_bytes(text)  # per token
    assert moved["all-to-all"] == slots * CONFIG.vocab * 4 / 4  # a quarter each
    assert moved.get("all-gather", 0) < slots * 16 * 4


def test_unneeded_stages_are_skipped_on_every_mesh():
    """Conditionals stay conditionals in a program of several engines."""
    branches = []
    for shape in (None, MeshShape(data=2, tensor=4)):
        engine = make_engine(mesh=make_tiny_mesh(shape))
        programs, engines = engine.programs, sharding.count_row_shards(engine.mesh)
        weights = jax.eval_shape(programs.reshard, model.abstract(CONFIG))
        array = lambda *shape, dtype=jnp.int32, engines=engines: jax.ShapeDtypeStruct(
            (engines, *shape), dtype
        )
        state = programs.abstract(Size(16, 32, 8, 64, 16))
        slots = array(16, 8), array(16, dtype=bool)
        lowered = programs.decode.lower(weights, state, *slots, 1, 0, engine.stops)
        branches.append(lowered.as_text().count("stablehlo.case"))
    assert branches[0] == branches[1] > 0


def test_slots_that_devices_do_not_divide_are_computed_by_all():
    def double(logits, factor, state):
        return factor * logits[:, 0] * state

    one = model_parallel.shard_over_slots(
        double, make_tiny_mesh(MeshShape(fsdp=2, tensor=4))
    )
    for slots in (3, 4):
        logits, state = jnp.arange(2.0 * slots).reshape(slots, 2), jnp.arange(slots)
        result = jax.jit(one)(logits, 2, state)
        np.testing.assert_array_equal(result, double(logits, 2, state))
