"""The engine: what it draws, what it returns, and on what it does not depend."""

import dataclasses
import functools
import itertools
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from oreal_jax import metrics, model, model_parallel, program_cache, sharding
from oreal_jax.checkpoints import hf
from oreal_jax.errors import Diverged, Failure, InputError
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig
from oreal_jax.plan.collectives import collective_bytes
from oreal_jax.sampling import (
    Engine,
    Request,
    Sampling,
    sampled_from,
    token_table,
)
from oreal_jax.sampling.programs import Size

CONFIG = ModelConfig(
    vocab=64,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=32,
    max_length=256,
)
STOP = 3
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
}
PIECES = [bytes([97 + t % 5, 97 + t // 13]) for t in range(64)]  # two letters a token
STOP_STRINGS = ["cab", "dd"]


@pytest.fixture(scope="module")
def params():
    drawn = model.init(CONFIG, jax.random.key(0))
    # Larger weights: a distribution that is far from flat.
    return jax.tree.map(lambda w: w * 8 if w.ndim > 1 else w, drawn)


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(0)
    lengths = [5, 17, 1, 30, 9]
    return [draw.integers(0, 64, n).tolist() for n in lengths]


def mesh_of(shape=None):
    if shape is None:
        devices = jax.devices()[:1]
        return make_mesh(MeshShape(), CONFIG, devices)
    return make_mesh(shape, CONFIG)


def make_engine(mesh=None, rows=64, **options) -> Engine:
    return Engine(CONFIG, mesh or mesh_of(), [STOP], rows=rows, **options)


def make_requests(
    prompts, *, keys=None, first_sample=0, seed=1, **options
) -> list[Request]:
    """Requests for 90 tokens with a nucleus of 0.9, unless `options` override them."""
    sampling = Sampling(**({"max_tokens": 90, "top_p": 0.9} | options))
    return [
        Request(prompt, sampling, key, first_sample, seed)
        for prompt, key in zip(prompts, keys or range(len(prompts)), strict=True)
    ]


def weights_for(engine: Engine, params):
    placed = jax.device_put(params, sharding.param_shardings(CONFIG, engine.mesh))
    return engine.weights(placed)


ENGINE_OPTIONS = (
    "mesh",
    "rows",
    "stop_table",
    "cache_tokens",
    "weights",
    "cache",
    "tensor",
)
CALL_OPTIONS = ("step", "renormalise")


def draw(params, prompts, samples=3, **options):
    """Completions of `prompts`, with options of the engine, the call and `Sampling`."""
    pop = lambda names: {name: options.pop(name) for name in names if name in options}
    engine, call = make_engine(**pop(ENGINE_OPTIONS)), pop(CALL_OPTIONS)
    requests = make_requests(prompts, **options)
    return engine.sample(weights_for(engine, params), requests, samples, **call)


def tokens_of(drawn):
    return [[completion.tokens for completion in group] for group in drawn]


@pytest.fixture(scope="module")
def drawn(params, prompts):
    return draw(params, prompts)


def test_a_completion_ends_with_its_stop_token_or_at_the_limit(drawn):
    reasons = set()
    for completion in (c for group in drawn for c in group):
        reasons.add(completion.finish_reason)
        assert STOP not in completion.tokens[:-1]
        if completion.finish_reason == "stop":
            assert completion.tokens[-1] == STOP
        else:
            assert len(completion.tokens) == 90 and completion.tokens[-1] != STOP
        assert len(completion.log_probs) == len(completion.tokens)
    assert reasons == {"stop", "length"}


def test_log_probs_are_those_of_the_full_forward_pass(params, prompts, drawn):
    for prompt, group in zip(prompts, drawn, strict=True):
        for completion in group:
            sequence = [*prompt, *completion.tokens]
            tokens = jnp.asarray(sequence)[None]
            positions = jnp.arange(len(sequence))[None]
            ones = jnp.ones_like(tokens)
            states = model.hidden(CONFIG, params, tokens, positions, ones)
            start, end = len(prompt) - 1, len(sequence) - 1
            expected, _ = model.log_probs(
                CONFIG, params, states[:, start:end], tokens[:, start + 1 :]
            )
            np.testing.assert_allclose(
                completion.log_probs, expected[0], rtol=1e-4, atol=1e-4
            )
        break  # one compilation per length; one group tells


@pytest.mark.parametrize(
    "shape",
    [MeshShape(fsdp=4, tensor=2), MeshShape(data=4, tensor=2)],
    ids=str,
)
def test_devices_do_not_change_a_completion(params, prompts, drawn, shape):
    again = draw(params, prompts, mesh=mesh_of(shape))
    assert tokens_of(again) == tokens_of(drawn)


def test_logits_are_exchanged_by_slot_and_never_gathered():
    mesh = mesh_of(MeshShape(fsdp=2, tensor=4))
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
    of_a_token = collective_bytes(text)
    assert of_a_token["all-to-all"] == slots * CONFIG.vocab * 4 / 4  # a quarter each
    assert of_a_token.get("all-gather", 0) < slots * 16 * 4


def test_unneeded_steps_are_skipped_on_every_mesh():
    """Conditionals stay conditionals in a program of several engines."""
    branches = []
    for shape in (None, MeshShape(data=2, tensor=4)):
        engine = make_engine(mesh=mesh_of(shape))
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


def test_slots_that_the_devices_do_not_divide_are_chosen_by_all():
    def double(logits, factor, state):
        return factor * logits[:, 0] * state

    one = model_parallel.shard_over_slots(double, mesh_of(MeshShape(fsdp=2, tensor=4)))
    for slots in (3, 4):
        logits, state = jnp.arange(2.0 * slots).reshape(slots, 2), jnp.arange(slots)
        result = jax.jit(one)(logits, 2, state)
        np.testing.assert_array_equal(result, double(logits, 2, state))


def test_an_engine_may_have_other_devices_than_a_row_of_the_mesh(
    params, prompts, drawn
):
    mesh = mesh_of(MeshShape(fsdp=4, context=2))
    engine = make_engine(mesh=mesh, tensor=2)
    assert (engine.mesh.shape["data"], engine.mesh.shape["tensor"]) == (4, 2)
    again = draw(params, prompts, mesh=mesh, tensor=2)
    assert tokens_of(again) == tokens_of(drawn)
    with pytest.raises(InputError, match="engine of 3 devices: a process has 8"):
        make_engine(mesh=mesh, tensor=3)


def test_batch_size_order_and_neighbours_do_not_change_a_completion(
    params, prompts, drawn
):
    order = [3, 0, 4]
    again = draw(params, [prompts[i] for i in order], keys=order, rows=4)
    assert tokens_of(again) == [tokens_of(drawn)[i] for i in order]


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_slots_do_not_change_a_completion(params, prompts, drawn, rows):
    assert tokens_of(draw(params, prompts, rows=rows)) == tokens_of(drawn)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache": "float8", **PENALTIES},
        {"stop_strings": True, "renormalise": True},
        {"mesh": MeshShape(data=2, tensor=4)},
    ],
    ids=lambda how: next(iter(how), "plain"),
)
def test_a_cache_that_is_too_small_for_all_rows_changes_nothing(params, prompts, how):
    """Rows that find no page are swapped out and go on later as if nothing had been,
    with all that their next tokens depend on, and no token is drawn twice."""
    options = dict(how)
    renormalise = options.pop("renormalise", False)
    mesh = mesh_of(options.pop("mesh", None))
    engine_options = {"cache": options.pop("cache", "full")}
    if options.pop("stop_strings", False):
        engine_options["stop_table"] = token_table(["cabdd"], lambda: PIECES, 64)
    roomy = make_engine(**engine_options)
    tight = make_engine(mesh=mesh, rows=8, cache_tokens=256, **engine_options)
    requests = make_requests(prompts, **options)
    results = [
        engine.sample(weights_for(engine, params), requests, 3, renormalise=renormalise)
        for engine in (roomy, tight)
    ]
    assert tokens_of(results[0]) == tokens_of(results[1])
    for one, other in zip(*map(itertools.chain.from_iterable, results), strict=True):
        assert one.finish_reason == other.finish_reason
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        close(one.log_probs, other.log_probs)
        if renormalise:
            close(one.sampled_log_probs, other.sampled_log_probs)
    assert roomy.statistics.swapped_rows == 0 < tight.statistics.swapped_rows
    tokens = sum(len(c.tokens) for group in results[0] for c in group)
    assert tight.statistics.new_tokens == tokens


def test_all_that_a_row_has_goes_into_another_slot_and_nothing_else_changes():
    mesh = mesh_of(MeshShape(data=2, tensor=4))
    programs = make_engine(mesh=mesh, cache="float8").programs
    shapes = programs.abstract(Size(4, 8, 4, 64, 2))  # of each of two engines
    number = np.random.default_rng(0)
    draw = lambda x: number.integers(0, 2 if x.dtype == bool else 100, x.shape)
    one, other = (
        jax.tree.map(lambda x: draw(x).astype(x.dtype), shapes) for _ in range(2)
    )
    put = lambda state: jax.device_put(
        state, jax.tree.map(lambda x: x.sharding, shapes)
    )
    lies = sharding.make_sharding(programs.mesh, "rows")
    array = lambda *engines: jax.device_put(np.array(engines, np.int32), lies)
    row = programs.swap_out(put(one), array([2], [1]), array([3, 5], [1, 2]))
    # Into the first engine alone; page 0 is nobody's.
    found = programs.swap_in(put(other), row, array([0], [-1]), array([7, 1], [0, 0]))
    found = jax.tree.map(np.array, found)

    def check(found, one, other, here, there, first=0):
        expected = other.copy()
        expected[0, here] = one[0, there]
        np.testing.assert_array_equal(found[:, first:], expected[:, first:])

    def compare(*states, **moved):
        jax.tree.map(functools.partial(check, **moved), *states)

    states = found, one, other
    compare(*(s._replace(cache=()) for s in states), here=[0], there=[2])
    compare(*(s.cache for s in states), here=[7, 1], there=[3, 5], first=1)


def test_a_completion_that_can_never_fit_the_cache_is_refused(params, prompts):
    with pytest.raises(InputError, match="max_tokens=90 does not fit cache_tokens=128"):
        draw(params, prompts, cache_tokens=128)


def test_finished_completions_are_reported_one_by_one(params, prompts, drawn):
    reported = {}
    engine = make_engine(rows=4)
    engine.sample(
        engine.weights(params),
        make_requests(prompts),
        3,
        on_finished=lambda n, k, completion: reported.setdefault((n, k), completion),
    )
    assert sorted(reported) == [(n, k) for n in range(len(prompts)) for k in range(3)]
    for (n, k), completion in reported.items():
        assert completion.tokens == drawn[n][k].tokens


def test_statistics_count_every_prompt_once_and_every_token(params, prompts):
    engine = make_engine(rows=4)
    drawn = engine.sample(engine.weights(params), make_requests(prompts), 3)
    statistics = engine.statistics
    assert statistics.prompt_tokens == sum(len(prompt) - 1 for prompt in prompts)
    assert statistics.new_tokens == sum(len(c.tokens) for group in drawn for c in group)
    assert 0.8 < statistics.occupancy <= 1 and statistics.swapped_rows == 0
    assert statistics.metrics()["perf/decode_throughput"] > 0


def test_samples_seeds_steps_and_copies_of_a_prompt_differ(params, prompts, drawn):
    first = tokens_of(drawn)[0]
    assert len({tuple(tokens) for tokens in first}) == 3
    others = [
        draw(params, prompts[:1], seed=2),
        draw(params, prompts[:1], step=1),
        draw(params, prompts[:1], first_sample=3),
    ]
    for other in others:
        assert tokens_of(other)[0] != first


def test_a_copys_samples_continue_the_first_ones(params, prompts):
    six = draw(params, prompts[:1], samples=6)
    copy = draw(params, prompts[:1], first_sample=3)
    assert tokens_of(copy)[0] == tokens_of(six)[0][3:]


def test_no_samples_are_no_completions(params, prompts):
    assert draw(params, prompts, samples=0) == [[]] * len(prompts)


@pytest.mark.parametrize("prompt", [[], [1] * 200])
def test_a_prompt_that_cannot_be_completed_is_refused(params, prompt):
    with pytest.raises(InputError, match=f"prompt of {len(prompt)} tokens.*256"):
        draw(params, [prompt])


def test_progress_counts_every_token_and_row_once(params, prompts, drawn):
    seen = np.zeros(2, int)
    engine = make_engine(rows=8)

    def count(tokens: int, finished: int) -> None:
        seen[:] += tokens, finished

    again = engine.sample(
        engine.weights(params), make_requests(prompts), 3, on_progress=count
    )
    total = sum(len(c.tokens) for group in again for c in group)
    assert seen.tolist() == [total, 15]


@pytest.mark.parametrize("penalty", [1.0, pytest.param(1.3, marks=pytest.mark.slow)])
def test_greedy_equals_transformers_on_64_prompts(tmp_path, penalty):
    theirs = families.write("qwen2.5-untied", tmp_path)
    config = hf.read_config(tmp_path)
    mesh = make_mesh(MeshShape(), config, jax.devices()[:1])
    sampling = Sampling(max_tokens=20, temperature=0.0, repetition_penalty=penalty)
    engine = Engine(config, mesh, [2], rows=16)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 96, 1 + n % 13).tolist() for n in range(64)]
    requests = [Request(prompt, sampling, i) for i, prompt in enumerate(prompts)]
    ours = engine.sample(engine.weights(hf.load(tmp_path)), requests, 1)
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=20,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=2,
                pad_token_id=0,
            )[0, len(prompt) :]
        assert completion.tokens == expected.tolist()


@jax.jit
def logits_of(params, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    states = model.hidden(CONFIG, params, tokens, positions, jnp.ones_like(tokens))
    return model.logits(CONFIG, params, states)


def test_penalties_follow_what_each_row_has_drawn(params, prompts):
    """Token by token against the full forward pass: slots are used again and again, so
    what one row has seen must not reach the next."""
    how: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 12}
    drawn = draw(params, prompts, 1, rows=2, **how, **PENALTIES)
    for prompt, (completion,) in zip(prompts, drawn, strict=True):
        sequence = list(prompt)
        for token in completion.tokens:
            padded = sequence + [0] * (48 - len(sequence))
            logits = logits_of(params, jnp.asarray([padded]))[0, len(sequence) - 1]
            in_prompt = np.isin(np.arange(64), prompt)
            counts = np.bincount(sequence[len(prompt) :], minlength=64)
            factor = np.where(logits > 0, 1 / 1.4, 1.4)
            logits = np.where(in_prompt | (counts > 0), logits * factor, logits)
            logits = logits - 0.3 * (counts > 0) - 0.2 * counts
            assert token == logits.argmax()
            sequence.append(token)


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 12},
    {"top_p": 1.0, "temperature": 0.7, "seed": 5},
    {"top_p": 0.3, "max_tokens": 40},
    {"top_k": 4, "min_p": 0.1, **PENALTIES},
    {"top_p": 0.7, "logit_bias": ((7, 1.5), (STOP, float("-inf")))},
]


def test_requests_of_one_call_may_differ_in_everything(params, prompts):
    """Each is completed as if it were alone."""
    alone = [
        draw(params, [prompt], keys=[i], **options)[0]
        for i, (prompt, options) in enumerate(zip(prompts, MIXED, strict=True))
    ]
    engine = make_engine(rows=8)
    mixed = [
        *itertools.chain.from_iterable(
            make_requests([prompt], keys=[i], **options)
            for i, (prompt, options) in enumerate(zip(prompts, MIXED, strict=True))
        )
    ]
    together = engine.sample(weights_for(engine, params), mixed, 3)
    assert tokens_of(together) == tokens_of(alone)
    for one, other in zip(
        *map(itertools.chain.from_iterable, (together, alone)), strict=True
    ):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_other_parameters_compile_nothing(params, prompts):
    with program_cache.disabled():
        check_nothing_is_compiled(params, prompts)


def check_nothing_is_compiled(params, prompts):
    engine = make_engine(rows=16)
    weights = weights_for(engine, params)
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


def test_an_engine_shrinks_for_its_last_rows_only_if_that_saves_time(
    params, prompts, monkeypatch
):
    engine = make_engine(rows=32)
    programs, weights = engine.programs, weights_for(engine, params)
    decoder, slots = programs.decoder, []

    def record(size, *arguments):
        slots.append(size.slots)
        return decoder(size, *arguments)

    def complete(compile_seconds: float):
        slots.clear()
        programs.compile_seconds = compile_seconds
        return tokens_of(engine.sample(weights, make_requests(prompts), 7))

    monkeypatch.setattr(programs, "_decoders", {})
    monkeypatch.setattr(programs, "decoder", record)
    expected = complete(1e6)
    assert set(slots) == {32}  # compiling takes longer than it saves
    assert complete(0) == expected
    assert set(slots) == {32, 8}
    assert complete(1e6) == expected
    assert set(slots) == {32, 8}  # the program is already compiled


def test_an_engine_of_a_resumable_run_depends_on_its_requests_alone(params, prompts):
    """Neither what is compiled nor the clock chooses its programs: the same sizes with
    and without an earlier, longer call."""
    engine = make_engine(rows=32, longest=(40, 150))
    programs, weights = engine.programs, weights_for(engine, params)
    decoder, sizes = programs.decoder, []

    def record(size, *arguments):
        sizes.append(size)
        return decoder(size, *arguments)

    def complete(**options) -> list:
        sizes.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(programs, "decoder", record)
            engine.sample(weights, make_requests(prompts, **options), 7)
        return list(sizes)

    first = complete(max_tokens=120)
    assert {size.slots for size in first} == {32, 8}  # many steps are saved
    complete(max_tokens=150, seed=3)
    programs.compile_seconds = 1e6
    assert complete(max_tokens=120) == first
    assert {size.slots for size in complete(max_tokens=4)} == {32}  # few steps
    assert complete(max_tokens=4)[0] == first[0]


def test_penalties_do_not_depend_on_slots(params, prompts):
    few, many = (draw(params, prompts, rows=rows, **PENALTIES) for rows in (2, 64))
    assert tokens_of(few) == tokens_of(many)


def test_a_banned_token_is_never_drawn(params, prompts, drawn):
    usual = {t for group in drawn for c in group for t in c.tokens}
    banned = max(usual - {STOP})
    again = draw(params, prompts, logit_bias=((banned, -1e9),))
    assert banned not in {t for group in again for c in group for t in c.tokens}
    without = draw(params, prompts, logit_bias=((banned, 0.0),))
    assert tokens_of(without) == tokens_of(drawn)


def test_tokens_that_the_model_does_not_have_are_refused(params):
    with pytest.raises(InputError, match="logit_bias: no token 64, the model has 64"):
        draw(params, [[1]], logit_bias=((64, 1.0),))
    with pytest.raises(InputError, match="bans all 64 tokens of the vocabulary"):
        draw(params, [[1]], logit_bias=tuple((t, -np.inf) for t in range(64)))
    for token in (70, -1):
        with pytest.raises(
            InputError, match=f"stop tokens: no token {token}, the model"
        ):
            Engine(CONFIG, mesh_of(), [STOP, token])
    with pytest.raises(InputError, match="prompt: no token 64, the model has 64"):
        draw(params, [[1, 64]])
    with pytest.raises(InputError, match="no token -1"):
        Sampling(max_tokens=1, logit_bias=((-1, 1.0),))


@pytest.mark.parametrize("option", [{}, {"weights": "int8"}, {"cache": "float8"}])
def test_a_weight_that_is_not_finite_is_named(params, option):
    attention = params["layers"]["attention"]
    key = attention["key"].at[1, 2, 0, 3].set(jnp.nan)
    broken = params["layers"] | {"attention": attention | {"key": key}}
    named = "1 weight arrays are not finite; the first is layers/1/attention/key"
    with pytest.raises(Diverged, match=named):
        draw(params | {"layers": broken}, [[1, 2]], 1, max_tokens=5, **option)


def test_a_completion_ends_at_a_token_without_a_probability(params, monkeypatch):
    """It is not decoded to its limit before the error is raised."""
    check = "oreal_jax.sampling.engine._has_probabilities"
    monkeypatch.setattr(check, lambda completion: True)
    broken = params | {"final_norm": params["final_norm"] * jnp.nan}
    ((completion,),) = draw(broken, [[1, 2]], 1, max_tokens=5)
    assert len(completion.tokens) == 1 and not np.isfinite(completion.log_probs[0])


def test_decoding_that_overflows_does_not_blame_the_weights(params):
    large = params | {"final_norm": params["final_norm"] * 1e38}
    large["head"] = large["head"] * 10.0
    with pytest.raises(Failure, match="are finite: decoding in float32, weights='full"):
        draw(large, [[1, 2]], 1, max_tokens=5)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(
    params, prompts, drawn
):
    """Strings straddle tokens."""
    spell = lambda tokens: b"".join(PIECES[t] for t in tokens).decode()
    table = token_table(STOP_STRINGS, lambda: PIECES, 64)
    again = draw(params, prompts, stop_table=table, rows=4)
    ended = 0
    for before, after in zip(drawn, again, strict=True):
        for whole, short in zip(before, after, strict=True):
            assert whole.tokens[: len(short.tokens)] == short.tokens
            found = [s in spell(short.tokens) for s in STOP_STRINGS]
            assert not any(s in spell(short.tokens[:-1]) for s in STOP_STRINGS)
            if any(found):
                ended += 1
                assert short.finish_reason == "stop"
            else:
                assert short.tokens == whole.tokens
    assert ended > 3


@pytest.mark.parametrize("option", [{"weights": "int8"}, {"cache": "float8"}])
def test_eight_bits_change_little_and_depend_on_nothing_else(params, prompts, option):
    small = draw(params, prompts, max_tokens=5, **option)
    assert tokens_of(
        draw(params, prompts, max_tokens=5, rows=4, **option)
    ) == tokens_of(small)
    full = draw(params, prompts, max_tokens=1)
    first = lambda drawn: np.array([c.log_probs[0] for g in drawn for c in g])
    tokens = lambda drawn: np.array([c.tokens[0] for g in drawn for c in g])
    same = tokens(small) == tokens(full)
    difference = np.abs(first(small) - first(full))[same]
    assert same.mean() > 0.6 and 0 < difference.max() < 0.5


def test_the_size_of_keys_and_values_does_not_change_a_float8_completion(
    params, prompts
):
    """The same model with keys and values of thousands, queries and the output
    projection as much smaller; e4m3 ends at 448."""
    attention = dict(params["layers"]["attention"])
    for name, factor in [("key", 12), ("query", -12), ("value", 12), ("output", -12)]:
        attention[name] = attention[name] * 2.0**factor
    large = params | {"layers": params["layers"] | {"attention": attention}}
    how = {"max_tokens": 5, "cache": "float8"}
    one, other = (draw(weights, prompts, **how) for weights in (params, large))
    for a, b in zip(*map(itertools.chain.from_iterable, (one, other)), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_array_equal(a.log_probs, b.log_probs)


def test_more_tensor_devices_than_key_value_heads_change_nothing(
    params, prompts, drawn
):
    shape = MeshShape(fsdp=2, tensor=4)  # the model has two such heads
    assert tokens_of(draw(params, prompts, mesh=mesh_of(shape))) == tokens_of(drawn)


def test_the_trainer_computes_the_sampled_log_probs_of_a_completion(params, prompts):
    sampling = Sampling(max_tokens=20, temperature=0.8, top_p=0.7)
    how = dataclasses.asdict(sampling)
    ((completion,),) = draw(params, prompts[:1], 1, seed=3, renormalise=True, **how)
    tokens = jnp.asarray([[*prompts[0], *completion.tokens]])
    positions = jnp.arange(tokens.shape[1])[None]
    states = model.hidden(CONFIG, params, tokens, positions, jnp.ones_like(tokens))
    start = len(prompts[0])
    log_probs, entropy = model.log_probs(
        CONFIG,
        params,
        states[:, start - 1 : -1],
        tokens[:, start:],
        sampled_from(sampling),
    )
    assert completion.sampled_log_probs is not None
    np.testing.assert_allclose(
        completion.sampled_log_probs, log_probs[0], rtol=1e-3, atol=1e-4
    )
    assert draw(params, prompts[:1], 1, **how)[0][0].sampled_log_probs is None
    assert jnp.all(entropy >= 0) and jnp.all(entropy < jnp.log(CONFIG.vocab))
