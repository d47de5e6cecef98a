"""What a plan says, against programs whose answer is known; and one small plan by the
TPU's own compiler."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oreal_jax import efficiency, rollout, sharding
from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.cli import main
from oreal_jax.data.packing import fill_rows
from oreal_jax.losses import Grpo
from oreal_jax.plan import Plan, compiler, plan, roofline
from oreal_jax.plan.collectives import moved
from oreal_jax.plan.decoding import decoding, lengths_of
from oreal_jax.plan.estimate import FRACTIONS, estimated
from oreal_jax.plan.findings import Compiled
from oreal_jax.plan.programs import layout, learned, on_device, programs
from oreal_jax.plan.show import why
from oreal_jax.sampling.simulation import simulate

WAYS = 4


def compiled_text(work, *specs, shape=(64, 64)) -> str:
    mesh = Mesh(np.array(jax.devices()[:WAYS]), ("x",))
    arguments = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for spec in specs
    ]
    whole = NamedSharding(mesh, PartitionSpec())
    return (
        jax.jit(work, out_shardings=whole).lower(*arguments).compile().as_text() or ""
    )


def test_a_gathered_array_counts_with_its_whole_size():
    text = compiled_text(lambda x: x + 1, ("x",))
    assert moved(text) == {"all-gather": 64 * 64 * 4}


def test_a_reduced_array_counts_with_its_size():
    text = compiled_text(lambda x: jnp.sum(x, axis=0), ("x",))
    assert moved(text) == {"all-reduce": 64 * 4}


def test_a_loop_counts_as_often_as_it_runs():
    def work(x, count):
        step = lambda i, total: total + jnp.sum(x * (i + total[0]), axis=0)
        return jax.lax.fori_loop(0, count, step, jnp.zeros(64))

    once = 64 * 4
    text = compiled_text(lambda x: work(x, 5), ("x",))
    assert moved(text) == {"all-reduce": 5 * once}
    text = compiled_text(lambda x: work(x, jnp.int32(x[0, 0])), ("x",))
    found = moved(text, repeats=7)
    assert found["all-reduce"] >= 7 * once  # the limit itself is reduced too, once
    assert found["all-reduce"] < 8 * once


UNROLLED = """
%body (carried: (f32[8], /*index=1*/u32[])) -> (f32[8], u32[]) {
  %carried = (f32[8]{0}, /*index=1*/u32[]{:T(128)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%carried), index=0
  %counter = u32[]{:T(128)} get-tuple-element(%carried), index=1
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2)
  %there = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %back = f32[8]{0} collective-permute(%there), source_target_pairs={{0,1},{1,0}}
  %more = u32[]{:T(128)} add(%counter, %two), metadata={op_name="one"}
  ROOT %tuple.1 = (f32[8]{0}, u32[]{:T(128)}) tuple(%back, /*index=1*/%more)
}

%condition (carried.1: (f32[8], u32[])) -> pred[] {
  %carried.1 = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%carried.1), index=1
  %limit = u32[]{:T(128)} constant(16)
  ROOT %less = pred[]{:T(512)} compare(%counter.1, %limit), direction=LT
}

ENTRY %main (start: (f32[8], u32[])) -> (f32[8], u32[]) {
  %start = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  ROOT %loop = (f32[8]{0}, u32[]) while(%start), condition=%condition, body=%body
}
"""


def test_an_unrolled_loop_counts_in_its_larger_steps():
    assert moved(UNROLLED, repeats=99) == {"collective-permute": 16 * 8 * 4}


ASYNCHRONOUS = """
%begin (x: f32[8]) -> f32[64] {
  %x = f32[8]{0} parameter(0)
  ROOT %gathered = f32[64]{0} all-gather(%x), channel_id=7, dimensions={0}
}

%go_on (x.1: f32[8], y: f32[8,8], z: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8]{0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %z = f32[8,8]{1,0} parameter(2)
  %gathered.1 = f32[64]{0} all-gather(%x.1), channel_id=7, dimensions={0}
  ROOT %product = f32[8,8]{1,0} convolution(%y, %z), dim_labels=bf_io->bf
}

ENTRY %main (start: f32[8], a: f32[8,8]) -> f32[8,8] {
  %start = f32[8]{0} parameter(0)
  %a = f32[8,8]{1,0} parameter(1)
  %begun = f32[64]{0} fusion(%start), kind=kCustom, calls=%begin
  %b = f32[8,8]{1,0} fusion(%start, %a, %a), kind=kOutput, calls=%go_on
  ROOT %other = f32[64]{0} all-gather(%start), channel_id=8, dimensions={0}
}
"""


def test_a_collective_behind_other_work_counts_once():
    assert moved(ASYNCHRONOUS) == {"all-gather": 2 * 64 * 4}


def config(**changes):
    """A small run of a model that TPU kernels take."""
    from oreal_7b import config

    return dataclasses.replace(
        config,
        prompts_per_step=4,
        samples_per_prompt=4,
        decode_rows=16,
        decode_tensor=1,
        cache_tokens=0,
        max_prompt_tokens=128,
        sampling=dataclasses.replace(config.sampling, max_tokens=128),
        packing=dataclasses.replace(config.packing, row_length=256),
        **changes,
    )


SHAPE = efficiency.ModelConfig(
    vocab=512, embed=256, layers=2, heads=2, kv_heads=2, head_dim=128, mlp=512
)


PAIR = [(128, 128)] * 8  # what a step of `config` learns from


def test_a_layout_is_made_of_what_the_run_would_hold():
    run = layout(config(), SHAPE, jax.devices()[:4], jax.devices()[:4], PAIR)
    numbers = efficiency.layer_weights(SHAPE) + 2 * efficiency.head_weights(SHAPE)
    held = run.bytes
    policy, reward = numbers, numbers - efficiency.head_weights(SHAPE)
    assert held["parameters"] == pytest.approx((policy + reward) * 4 / 4, rel=0.02)
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.001)
    assert on_device(run.reference) == held["reference"]


@pytest.mark.parametrize("cache_tokens", [0, 512])
def test_every_program_of_a_run_is_planned_and_lowers(cache_tokens):
    small = dataclasses.replace(config(), cache_tokens=cache_tokens)
    run = layout(small, SHAPE, jax.devices()[:4], jax.devices()[:4], PAIR)
    names = []
    for program in programs(small, SHAPE, run):
        program.lower()
        names.append(program.name)
    assert names[0] == "start" and names[-2:] == [
        "train step",
        "train step, policy frozen",
    ]
    swaps = {"swap-out", "swap-in"} if cache_tokens else set()
    assert {name.split()[0] for name in names[1:-2]} == swaps | {
        "reshard",
        "prefill",
        "admission",
        "decode",
        "collection",
        "reference",
    }


def test_a_phase_takes_as_long_as_its_slowest_part():
    phase = roofline.Phase.of(flops=1e12, products=2.0, memory=3.0, links=1.0)
    assert (phase.seconds, phase.limit) == (3.0, "memory")


@pytest.fixture
def model_file(tmp_path):
    """A directory with the config.json of a small model."""
    from oreal_jax.checkpoints.families import to_hugging_face

    (tmp_path / "config.json").write_text(json.dumps(to_hugging_face(SHAPE, "float32")))
    return tmp_path


CONFIG_FILE = """
import dataclasses
import test_plan
config = dataclasses.replace(test_plan.config(), model={model!r})
"""


@pytest.fixture
def config_file(tmp_path, model_file):
    path = tmp_path / "small.py"
    path.write_text(CONFIG_FILE.format(model=str(model_file)))
    return path


@pytest.fixture
def tpu_compiler():
    """Skips the test without the TPU's compiler, which `.ci/run` installs."""
    pytest.importorskip("libtpu", reason="pip install 'oreal-jax[plan]'")


@pytest.mark.usefixtures("tpu_compiler")
def test_a_small_plan_fits_and_a_large_one_names_its_culprit(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "v5e:2x2", "--json"]
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and said["kind"] == "TPU v5 lite" and said["devices"] == 4
    assert said["memory"] == pytest.approx(15.75 * 2**30)
    step = next(p for p in said["programs"] if p["name"] == "train step")
    state = said["held"]["parameters"] + said["held"]["optimizer"]
    assert step["arguments"] == pytest.approx(state, rel=0.2)
    assert sum(step["moved"].values()) > 0
    for setting in (
        "prompts_per_step=1024",
        "samples_per_prompt=256",
        "decode_rows=262144",
    ):
        arguments += ["--set", setting]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert not said["fits"] and said["seconds"] is None and not said["phases"]
    assert "cache" in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5x:2x2"], "--topology v5x:2x2"),
        (["--topology", "v5e:2x2", "--set", "mesh.tensor=3"], "tensor=3"),
        (["--topology", "v5e:2x2", "--set", "decode_tensor=8"], "engine of 8 devices"),
    ],
)
@pytest.mark.usefixtures("tpu_compiler")
def test_a_plan_that_cannot_be_made_says_why(config_file, arguments, said, capsys):
    assert main(["plan", str(config_file), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_mean_of_zero_tokens_is_rejected(config_file, capsys):
    arguments = ["--topology", "v5e:2x2", "--mean-tokens", "0"]
    assert main(["plan", str(config_file), *arguments]) == 2
    assert "--mean-tokens 0" in capsys.readouterr().err


def test_a_model_that_is_not_here_is_planned_as_published(capsys):
    from oreal_jax.plan import shape_of

    assert shape_of(config()).embed == 3584
    unknown = dataclasses.replace(config(), model="nobody/knows")
    with pytest.raises(sharding.InputError, match="nobody/knows"):
        shape_of(unknown)


def test_a_plan_for_gpus_counts_the_state_that_a_layout_has(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "h100:4", "--json"]
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    run = layout(config(), SHAPE, jax.devices()[:4], jax.devices()[:4], PAIR)
    for name in ("parameters", "optimizer"):
        assert said["held"][name] == pytest.approx(run.bytes[name], rel=0.01)
    cache = run.engine.programs.abstract(run.size).cache
    # bfloat16 there, float32 here; some pages are kept in reserve
    assert said["sampling"]["cache"] == pytest.approx(on_device(cache) / 2, rel=0.3)
    offloaded = ["--set", "policy.offload=True", "--set", "token_reward.offload=True"]
    main([*arguments, *offloaded])
    assert json.loads(capsys.readouterr().out)["held"]["optimizer"] == 0


def test_the_larger_cache_that_a_plan_proposes_lets_all_slots_run(config_file, capsys):
    def planned(cache_tokens: int) -> dict:
        asked = ["plan", str(config_file), "--topology", "h100:1", "--json"]
        assert main([*asked, "--set", f"cache_tokens={cache_tokens}"]) == 0
        return json.loads(capsys.readouterr().out)

    small = planned(512)
    larger = small["larger_cache"]
    assert small["decoding"]["rows"] < larger["rows"] <= small["slots"]
    assert small["decoding"]["swapped"] > 0 == larger["swapped"]
    assert larger["seconds"] < small["phases"]["decode"]["seconds"]
    assert larger["cache_tokens"] > 512
    again = planned(larger["cache_tokens"])
    assert again["larger_cache"] is None and again["fits"]
    assert again["decoding"]["rows"] == larger["rows"]
    assert again["phases"]["decode"]["seconds"] == larger["seconds"]


def seven_billion(**changes):
    """The published recipe on eight H100s, and what its steps learn from."""
    import oreal_7b

    config = dataclasses.replace(oreal_7b.config, **changes)
    sequences = learned(config, lengths_of(config, 7000))
    return (
        config,
        sequences,
        estimated(config, PUBLISHED[config.model], "h100:8", sequences),
    )


def test_all_completions_that_a_step_may_keep_are_counted():
    """1,024 completions of 7,000 tokens with their prompts fill 57 micro-batches of
    eight rows; a pair of each prompt an eighth of that."""
    _, sequences, everything = seven_billion(keep=rollout.everything)
    assert len(sequences) == 1024
    rows = fill_rows([sum(pair) for pair in sequences], 16_384)
    assert everything.micros == -(-len(rows) // 8) >= 57
    _, pairs, one_pair = seven_billion()
    assert len(pairs) == 128 and 8 <= one_pair.micros <= 9
    peak = lambda found: found.programs[-1].peak
    assert peak(everything) > peak(one_pair)  # the batch itself
    small = config(keep=rollout.everything)
    found = learned(small, lengths_of(small, 64))
    devices = jax.devices()[:4]
    run = layout(small, SHAPE, devices, devices, found)
    rows = fill_rows([sum(pair) for pair in found], 256)
    assert len(found) == 16 and run.micros == -(-len(rows) // 4)


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, 0.75),
        ({"XLA_CLIENT_MEM_FRACTION": ".9"}, 0.9),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 0.75),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, 1.0),
    ],
)
def test_a_plan_for_gpus_has_the_memory_that_jax_allocates(
    variables, share, monkeypatch
):
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = estimated(config(), SHAPE, "h100:4", PAIR)
    assert found.memory == pytest.approx(share * 80e9)


@pytest.mark.parametrize("value", ["most", "0", "-1", "1.5", "nan"])
def test_a_share_of_memory_that_is_none_is_rejected(
    value, config_file, monkeypatch, capsys
):
    monkeypatch.setenv(FRACTIONS[0], value)
    asked = ["plan", str(config_file), "--topology", "h100:4"]
    assert main(asked) == 2
    assert f"{FRACTIONS[0]}={value}" in capsys.readouterr().err
    monkeypatch.setenv(FRACTIONS[1], ".5")
    assert main(asked) == 2
    assert f"{FRACTIONS[0]} and {FRACTIONS[1]}" in capsys.readouterr().err


def test_a_cache_that_a_plan_proposes_fits_beside_the_7b_state():
    import oreal_7b

    small = dict(prompts_per_step=16, cache_tokens=65_536)
    recipe = dataclasses.replace(oreal_7b.config, **small)
    proposed = plan(recipe, "h100:8", 7000).larger_cache
    assert proposed
    larger = dataclasses.replace(recipe, cache_tokens=proposed.cache_tokens)
    found = estimated(larger, PUBLISHED[recipe.model], "h100:8", PAIR)
    assert found.programs[0].peak == pytest.approx(0.9 * 0.75 * 80e9, rel=1e-3)
    assert found.programs[0].peak <= 0.9 * 0.75 * 80e9


def test_decoding_reads_all_weights_in_every_step_of_the_longest_completion():
    """Restated step by step: an engine of 8 slots, which are never fewer."""
    small = dataclasses.replace(config(), decode_rows=8)
    found = estimated(small, SHAPE, "h100:1", PAIR)
    lengths = np.array([[3, 100], [128, 65], [1, 7], [64, 90]])
    cache = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim
    weights = efficiency.layer_weights(SHAPE) + efficiency.head_weights(SHAPE)
    seconds = 0.0
    for step in range(lengths.max()):
        live = np.sum(lengths > step)
        seconds += 2 * (weights + cache * live * (128 + step)) / 3350e9
    found = decoding(small, SHAPE, found, lengths, 100_000)
    assert found.steps == 128 and found.swapped == 0
    assert found.rows == pytest.approx(lengths.sum() / 128)
    assert found.phase.seconds == found.phase.memory == pytest.approx(seconds)


def test_rounds_add_up_to_the_work_of_decoding():
    lengths = np.random.default_rng(0).integers(1, 900, (24, 6))
    simulated = simulate(lengths, shards=2, slots=64, prompt=50, longest=900)
    rounds = simulated.rounds
    work = efficiency.decode((50, int(size)) for size in lengths.flat)
    total = lambda each: sum(r.steps * each(r).sum() for r in rounds)
    assert total(lambda r: r.rows) == pytest.approx(work.tokens)
    assert total(lambda r: r.cached) == pytest.approx(work.pairs)
    assert sum(r.steps for r in rounds) == simulated.steps
    slots = [r.slots for r in rounds]
    assert slots == sorted(slots, reverse=True) and {*slots} == {64, 16}
    assert all((r.rows <= r.slots).all() for r in rounds)


def test_the_bound_of_a_plan_lies_above_a_measured_step():
    """NeMo-RL 0.4 (docs/about/performance-summary.md there): GRPO of Llama 3.1 8B on
    16 H100, 64 prompts x 32 samples of 1,060 tokens on average and 4,096 at most, no
    tensor parallelism in generation, activation checkpointing: 1,562 tokens/s a GPU,
    with prompts (97.7 s a step: they have 132 tokens)."""
    import oreal_7b

    measured, sampling = 1562, oreal_7b.config.sampling
    config = dataclasses.replace(
        oreal_7b.config,
        model="meta-llama/Llama-3.1-8B-Instruct",
        samples_per_prompt=32,
        max_prompt_tokens=132,
        sampling=dataclasses.replace(sampling, max_tokens=3964, top_p=1.0),
        packing=dataclasses.replace(oreal_7b.config.packing, row_length=4096),
        decode_rows=2048,
        decode_tensor=1,
        cache_tokens=200_000,
        keep=rollout.everything,
        loss=Grpo(),
        token_reward=None,
        freeze_steps=0,
    )
    planned = plan(config, "h100:16", 1060)
    assert planned.fits
    assert planned.tokens == pytest.approx(measured * 97.7 * 16, rel=0.01)
    assert measured < planned.tokens_per_second < 4 * measured


def test_what_is_kept_for_the_backward_pass_trades_memory_for_products():
    def cost(remat):
        changed = config(remat=remat)
        found = estimated(changed, SHAPE, "h100:4", PAIR)
        none = roofline.Phase.of(0.0, 0.0, 0.0, 0.0)
        phases = roofline.phases(changed, SHAPE, found, PAIR, none)
        return phases["update_actor"].flops, found.programs[-1].temporary

    costs = map(cost, ("everything", "but_attention", "elementwise"))
    flops, memory = zip(*costs, strict=True)
    assert flops[0] > flops[1] > flops[2]
    assert memory[0] < memory[1] < memory[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mean-tokens", "129"], "--mean-tokens 129 exceeds sampling.max_tokens=128"),
        (["--set", "cache_tokens=300"], "cache_tokens=300 has no room for"),
        (["--set", "decode_tensor=3"], "engine of 3 devices (decode_tensor=3)"),
    ],
)
def test_a_plan_for_gpus_that_cannot_be_made_says_why(
    config_file, arguments, said, capsys
):
    assert main(["plan", str(config_file), "--topology", "h100:4", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["h100", "h100:0", "h100:x", "h100:12"])
def test_gpus_without_a_number_are_refused(config_file, topology, capsys):
    assert main(["plan", str(config_file), "--topology", topology]) == 2
    assert "h100:8" in capsys.readouterr().err


def test_links_of_gpus_carry_every_micro_batch():
    few = [(128, 128)] * 4
    once = estimated(config(), SHAPE, "h100:4", few)
    thrice = estimated(config(), SHAPE, "h100:4", few * 3)
    assert (once.micros, thrice.micros) == (1, 3)
    for phase in ("ref", "update_actor"):
        assert thrice.moved[phase] == 3 * once.moved[phase] > 0


@pytest.mark.parametrize(
    ("phase", "temporary", "culprit"),
    [
        ("update_actor", 90, "activations and other temporaries"),
        ("update_actor", 20, "optimizer"),
        ("decode", 20, "cache"),
    ],
)
def test_what_does_not_fit_is_put_down_to_its_largest_part(phase, temporary, culprit):
    found = estimated(config(), SHAPE, "h100:4", [(128, 128)])._replace(
        memory=100,
        held={"parameters": 10, "optimizer": 30},
        sampling={"weights": 5, "cache": 50},
        programs=[Compiled("one", phase, 0, 0, temporary, 40, 200, {}, 0.0, "too big")],
    )
    made = Plan(topology="h100:4", mean_tokens=1, tokens=1, found=found)
    assert not made.fits and made.largest.name == "one"
    assert f"largest: {culprit}," in why(made)


def test_a_plan_without_the_compiler_says_what_to_install(
    config_file, monkeypatch, capsys
):
    monkeypatch.setattr(compiler.util, "find_spec", lambda name: None)
    assert main(["plan", str(config_file), "--topology", "v5e:2x2"]) == 2
    assert "pip install 'oreal-jax[plan]'" in capsys.readouterr().err
