"""Plans against programs of known size and measured times.

One small plan is compiled by the TPU's own compiler.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oreal_jax import efficiency, trajectory
from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.cli import main
from oreal_jax.data.packing import fill_rows
from oreal_jax.errors import InputError
from oreal_jax.losses import Grpo
from oreal_jax.plan import Plan, compiler, load_shape, make_plan
from oreal_jax.plan.bounds import (
    Phase,
    completion_lengths,
    decoding_bound,
    estimate_decoding,
    phases,
)
from oreal_jax.plan.collectives import collective_bytes
from oreal_jax.plan.findings import Compiled
from oreal_jax.plan.gpus import SHARE_VARIABLES, gpu_memory
from oreal_jax.plan.planner import investigate
from oreal_jax.plan.programs import device_bytes, layout, programs, selected_lengths
from oreal_jax.plan.show import conclusion
from oreal_jax.sampling.simulation import Round, simulate

WAYS = 4


def compiled_text(work, *specs, shape=(64, 64)) -> str:
    mesh = Mesh(np.array(jax.devices()[:WAYS]), ("x",))
    arguments = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for spec in specs
    ]
    replicated = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(work, out_shardings=replicated).lower(*arguments).compile()
    return program.as_text() or ""


def test_an_all_gather_counts_with_the_size_of_its_result():
    text = compiled_text(lambda x: x + 1, ("x",))
    assert collective_bytes(text) == {"all-gather": 64 * 64 * 4}


def test_an_all_reduce_counts_with_the_size_of_its_result():
    text = compiled_text(lambda x: jnp.sum(x, axis=0), ("x",))
    assert collective_bytes(text) == {"all-reduce": 64 * 4}


def test_collectives_in_a_loop_count_once_per_iteration():
    def work(x, count):
        step = lambda i, total: total + jnp.sum(x * (i + total[0]), axis=0)
        return jax.lax.fori_loop(0, count, step, jnp.zeros(64))

    once = 64 * 4
    text = compiled_text(lambda x: work(x, 5), ("x",))
    assert collective_bytes(text) == {"all-reduce": 5 * once}
    text = compiled_text(lambda x: work(x, jnp.int32(x[0, 0])), ("x",))
    total = collective_bytes(text, repeats=7)["all-reduce"]
    assert 7 * once <= total < 8 * once  # the limit itself is reduced too, once


UNROLLED = """
%body (carried: (f32[8], /*index=1*/u32[])) -> (f32[8], u32[]) {
  %carried = (f32[8]{0}, /*index=1*/u32[]{:T(128)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%carried), index=0
  %counter = u32[]{:T(128)} get-tuple-element(%carried), index=1
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2), metadata={
"kernel_metadata":"{}"
}
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


def test_an_unrolled_loop_has_fewer_iterations():
    assert collective_bytes(UNROLLED, repeats=99) == {"collective-permute": 16 * 8 * 4}


ASYNCHRONOUS = """
%begin (x: f32[8]) -> f32[64] {
  %x = f32[8]{0} parameter(0)
  ROOT %gathered = f32[64]{0} all-gather(%x), channel_id=7, dimensions={0}
}

%overlap (x.1: f32[8], y: f32[8,8], z: f32[8,8]) -> f32[8,8] {
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
  %b = f32[8,8]{1,0} fusion(%start, %a, %a), kind=kOutput, calls=%overlap
  ROOT %other = f32[64]{0} all-gather(%start), channel_id=8, dimensions={0}
}
"""


def test_an_asynchronous_collective_counts_once():
    assert collective_bytes(ASYNCHRONOUS) == {"all-gather": 2 * 64 * 4}


def config(**changes):
    """Return a small run of a model that TPU kernels take."""
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


PAIRS = [(128, 128)] * 8  # (prompt, completion) tokens that a step of `config` selects


def test_a_layout_holds_both_models_and_their_optimizers():
    run = layout(config(), SHAPE, jax.devices()[:4], jax.devices()[:4], PAIRS)
    weights = efficiency.layer_weights(SHAPE) + 2 * efficiency.head_weights(SHAPE)
    token_reward = weights - efficiency.head_weights(SHAPE)
    held = run.held
    expected = (weights + token_reward) * 4 / 4
    assert held["parameters"] == pytest.approx(expected, rel=0.02)
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.001)
    assert device_bytes(run.reference) == held["reference"]


@pytest.mark.parametrize("cache_tokens", [0, 512])
def test_every_program_is_planned_and_its_float32_products_are_exact(cache_tokens):
    small = dataclasses.replace(config(), cache_tokens=cache_tokens)
    run = layout(small, SHAPE, jax.devices()[:4], jax.devices()[:4], PAIRS)
    names = []
    for program in programs(small, SHAPE, run):
        text = program.function.lower(*program.arguments).as_text()
        products = re.findall(r"stablehlo.dot_general .*", text)
        # By default, TPUs round the factors of a product to bfloat16.
        assert all("HIGHEST" in product for product in products), program.name
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


@pytest.fixture
def model_file(tmp_path):
    """Return a directory with the config.json of a small model."""
    from oreal_jax.checkpoints.families import to_hugging_face

    (tmp_path / "config.json").write_text(json.dumps(to_hugging_face(SHAPE)))
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
def test_a_small_plan_fits_and_a_large_one_names_its_largest_array(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "v5e:2x2", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["kind"] == "TPU v5 lite" and plan["devices"] == 4
    assert plan["memory"] == pytest.approx(15.75 * 2**30)
    step = next(p for p in plan["programs"] if p["name"] == "train step")
    state = plan["held"]["parameters"] + plan["held"]["optimizer"]
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
    plan = json.loads(captured.out)
    assert not plan["fits"] and plan["seconds"] is None and not plan["phases"]
    assert "cache" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5x:2x2"], "--topology v5x:2x2"),
        (["--topology", "v5e:2x2", "--set", "mesh.tensor=3"], "tensor=3"),
        (["--topology", "v5e:2x2", "--set", "decode_tensor=8"], "engine of 8 devices"),
    ],
)
@pytest.mark.usefixtures("tpu_compiler")
def test_an_invalid_topology_is_rejected(config_file, arguments, message, capsys):
    assert main(["plan", str(config_file), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v5e", "v5e:16", "b300:4", "v5p:2x2x"])
def test_a_malformed_topology_is_answered_with_examples(config_file, topology, capsys):
    assert main(["plan", str(config_file), "--topology", topology]) == 2
    errors = capsys.readouterr().err
    assert f"--topology {topology}: unknown; expected for example v4:2x2x4" in errors


def test_a_mean_of_zero_tokens_is_rejected(config_file, capsys):
    arguments = ["--topology", "v5e:2x2", "--mean-tokens", "0"]
    assert main(["plan", str(config_file), *arguments]) == 2
    assert "--mean-tokens 0" in capsys.readouterr().err


def test_a_model_that_is_not_on_disk_is_planned_as_published():
    assert load_shape(config()).embed == 3584
    unknown = dataclasses.replace(config(), model="nobody/knows")
    with pytest.raises(InputError, match="nobody/knows"):
        load_shape(unknown)


def test_a_plan_for_gpus_counts_the_arrays_of_the_run(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "h100:4", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    bfloat16 = config(compute="bfloat16")
    run = layout(bfloat16, SHAPE, jax.devices()[:4], jax.devices()[:4], PAIRS)
    assert plan["held"] == run.held and plan["sampling"] == run.sampling
    assert plan["fits"] is None  # temporary memory is not known
    assert {program["temporary"] for program in plan["programs"]} == {None}
    step = next(p for p in plan["programs"] if p["name"] == "train step")
    assert step["peak"] > run.held["parameters"] + run.held["optimizer"]
    offloaded = ["--set", "policy.offload=True", "--set", "token_reward.offload=True"]
    assert main([*arguments, *offloaded]) == 0
    optimizer = json.loads(capsys.readouterr().out)["held"]["optimizer"]
    assert optimizer < 100  # step counts; moments are in host memory
    assert main(arguments[:-1]) == 0
    assert "whether the run fits is open" in capsys.readouterr().out


def test_a_run_whose_arrays_exceed_gpus_does_not_fit(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "h100:4"]
    for setting in ("prompts_per_step=1024", "decode_rows=1048576"):
        arguments += ["--set", setting]
    arguments += ["--set", "samples_per_prompt=1024"]
    assert main(arguments) == 1
    assert "does not fit with 10% to spare" in capsys.readouterr().err


def test_the_larger_cache_that_a_plan_proposes_lets_all_slots_run(config_file, capsys):
    def planned(cache_tokens: int) -> dict:
        arguments = ["plan", str(config_file), "--topology", "h100:1", "--json"]
        assert main([*arguments, "--set", f"cache_tokens={cache_tokens}"]) == 0
        return json.loads(capsys.readouterr().out)

    small = planned(512)
    larger = small["larger_cache"]
    assert small["decoding"]["rows"] < larger["rows"] <= small["slots"]
    assert small["decoding"]["swapped"] > 0 == larger["swapped"]
    assert larger["seconds"] < small["phases"]["decode"]["seconds"]
    assert larger["cache_tokens"] > 512
    again = planned(larger["cache_tokens"])
    assert again["larger_cache"] is None and again["fits"] is None
    assert again["decoding"]["rows"] == larger["rows"]
    assert again["phases"]["decode"]["seconds"] == larger["seconds"]


def seven_billion(**changes):
    """Return the published recipe on eight H100s and its selected sequences."""
    import oreal_7b

    config = dataclasses.replace(oreal_7b.config, **changes)
    selected = selected_lengths(config, completion_lengths(config, 7000))
    return (
        selected,
        investigate(config, PUBLISHED[config.model], "h100:8", selected),
    )


def test_all_completions_that_a_step_may_select_are_counted():
    """1,024 completions fill 57 micro-batches; a pair of each prompt, an eighth.

    Sequences of 7,000 tokens and their prompts, in micro-batches of eight rows.
    """
    selected, everything = seven_billion(keep=trajectory.select_all)
    assert len(selected) == 1024
    rows = fill_rows([sum(lengths) for lengths in selected], 16_384)
    assert everything.micros == -(-len(rows) // 8) >= 57
    pairs, one_pair = seven_billion()
    assert len(pairs) == 128 and 8 <= one_pair.micros <= 9
    step = lambda findings: findings.programs[-1].arguments
    assert step(everything) > step(one_pair)  # the batch itself
    small = config(keep=trajectory.select_all)
    selected = selected_lengths(small, completion_lengths(small, 64))
    devices = jax.devices()[:4]
    run = layout(small, SHAPE, devices, devices, selected)
    rows = fill_rows([sum(lengths) for lengths in selected], 256)
    assert len(selected) == 16 and run.micros == -(-len(rows) // 4)


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, 0.75),
        ({"XLA_CLIENT_MEM_FRACTION": ".9"}, 0.9),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
    ],
)
def test_a_gpu_has_the_memory_that_jax_allocates(variables, share, monkeypatch):
    for name in SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert gpu_memory("h100:4") == pytest.approx(share * 80e9)


@pytest.mark.parametrize("value", ["most", "0", "-1", "1.5", "nan"])
def test_an_invalid_share_of_memory_is_rejected(
    value, config_file, monkeypatch, capsys
):
    monkeypatch.setenv(SHARE_VARIABLES[0], value)
    assert main(["plan", str(config_file), "--topology", "h100:4"]) == 2
    assert f"{SHARE_VARIABLES[0]}={value}" in capsys.readouterr().err


def test_a_proposed_cache_fits_with_the_7b_state():
    import oreal_7b

    small = dict(prompts_per_step=16, cache_tokens=65_536)
    recipe = dataclasses.replace(oreal_7b.config, **small)
    proposed = make_plan(recipe, "h100:8", 7000).larger_cache
    assert proposed
    larger = dataclasses.replace(recipe, cache_tokens=proposed.cache_tokens)
    findings = investigate(larger, PUBLISHED[recipe.model], "h100:8", PAIRS)
    peak = max(p.peak for p in findings.programs if p.phase != "update_actor")
    assert 0.9 * 0.75 * 80e9 * (1 - 1e-3) <= peak <= 0.9 * 0.75 * 80e9


def test_decoding_reads_all_weights_in_every_step_of_the_longest_completion():
    """Restated step by step: an engine of 8 slots, which are never fewer."""
    small = dataclasses.replace(config(), decode_rows=8)
    findings = investigate(small, SHAPE, "h100:1", PAIRS)
    lengths = np.array([[3, 100], [128, 65], [1, 7], [64, 90]])
    cache = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim
    weights = efficiency.layer_weights(SHAPE) + efficiency.head_weights(SHAPE)
    seconds = 0.0
    for step in range(lengths.max()):
        live = np.sum(lengths > step)
        seconds += 2 * (weights + cache * live * (128 + step)) / 3350e9
    estimate = estimate_decoding(small, SHAPE, findings, lengths, 100_000)
    assert estimate.steps == 128 and estimate.swapped == 0
    assert estimate.rows == pytest.approx(lengths.sum() / 128)
    assert estimate.phase.seconds == pytest.approx(seconds)
    assert estimate.phase.seconds == estimate.phase.memory


def test_rounds_add_up_to_the_work_of_decoding():
    lengths = np.random.default_rng(0).integers(1, 900, (24, 6))
    simulated = simulate(lengths, engines=2, slots=64, prompt=50, longest=900)
    rounds = simulated.rounds
    work = efficiency.decode((50, int(size)) for size in lengths.flat)
    total = lambda each: sum(r.steps * each(r).sum() for r in rounds)
    assert total(lambda r: r.running) == pytest.approx(work.tokens)
    assert total(lambda r: r.cached) == pytest.approx(work.pairs)
    assert sum(r.steps for r in rounds) == simulated.steps
    slots = [r.slots for r in rounds]
    assert slots == sorted(slots, reverse=True) and {*slots} == {64, 16}
    assert all((r.running <= r.slots).all() for r in rounds)


def test_the_bound_of_a_plan_exceeds_a_measured_throughput():
    """NeMo-RL 0.4 measured 1,562 tokens/s per GPU, with prompts.

    docs/about/performance-summary.md there: GRPO of Llama 3.1 8B on 16 H100, 64 prompts
    x 32 samples of 1,060 tokens on average and 4,096 at most, no tensor parallelism in
    generation, activation checkpointing (97.7 s per step: prompts have 132 tokens).
    """
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
        keep=trajectory.select_all,
        loss=Grpo(),
        token_reward=None,
        freeze_steps=0,
    )
    plan = make_plan(config, "h100:16", 1060)
    assert plan.fits is not False
    assert plan.tokens == pytest.approx(measured * 97.7 * 16, rel=0.01)
    assert measured < plan.tokens_per_second < 4 * measured


QWEN_7B = PUBLISHED["Qwen/Qwen2.5-7B"]


@pytest.mark.parametrize(
    ("rows", "context", "milliseconds"),
    [(64, 1984 + 64, 7.94), (1, 1984 + 64, 4.62), (256, 500 + 64, 11.69)],
)
def test_a_decoding_step_on_an_h200_takes_up_to_three_bounds(
    rows, context, milliseconds
):
    """Measured with commit ba428a3 and jax 0.11.2.

    Qwen2.5-7B's shape in bfloat16, 128 tokens for prompts of 1,984 (256 rows: 500).
    """
    findings = investigate(config(), SHAPE, "h200:1", PAIRS)._replace(slots=rows)
    cached = np.array([rows * context])
    step = Round(steps=1, slots=rows, running=np.array([rows]), cached=cached)
    bound = decoding_bound(config(), QWEN_7B, findings, [step])
    assert bound.limit == "memory"
    assert 1.5 < milliseconds / 1000 / bound.seconds < 3


def test_a_train_step_on_an_h200_takes_up_to_three_bounds():
    """Measured with commit ba428a3 and jax 0.11.2: 0.935 s.

    Eight layers of Qwen2.5-7B, without a token reward model, on one sequence of 1,024 +
    15,360 tokens; the backward pass computes everything again.
    """
    shape = dataclasses.replace(QWEN_7B, layers=8)
    recipe = config(token_reward=None, freeze_steps=0)
    packing = dataclasses.replace(recipe.packing, row_length=16_384)
    recipe = dataclasses.replace(recipe, packing=packing, loss=Grpo())
    selected = [(1024, 15_360)]
    findings = investigate(recipe, shape, "h200:1", selected)
    none = Phase(0.0, 0.0, 0.0, 0.0, 0.0)
    bound = phases(recipe, shape, findings, selected, none)["update_actor"]
    assert findings.micros == 1 and bound.limit == "products"
    assert 2 < 0.935 / bound.seconds < 3


def test_keeping_activations_saves_flops_of_the_backward_pass():
    def flops(remat):
        changed = config(remat=remat)
        findings = investigate(changed, SHAPE, "h100:4", PAIRS)
        none = Phase(0.0, 0.0, 0.0, 0.0, 0.0)
        return phases(changed, SHAPE, findings, PAIRS, none)["update_actor"].flops

    everything, but_attention, elementwise = map(
        flops, ("everything", "but_attention", "elementwise")
    )
    assert everything > but_attention > elementwise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean-tokens", "129"], "--mean-tokens 129 exceeds sampling.max_tokens=128"),
        (["--set", "cache_tokens=300"], "does not fit cache_tokens=300"),
        (["--set", "decode_tensor=3"], "an engine of 3 devices"),
    ],
)
def test_an_invalid_plan_for_gpus_is_rejected(config_file, arguments, message, capsys):
    assert main(["plan", str(config_file), "--topology", "h100:4", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["h100", "h100:0", "h100:x", "h100:12"])
def test_an_invalid_number_of_gpus_is_rejected(config_file, topology, capsys):
    assert main(["plan", str(config_file), "--topology", topology]) == 2
    assert "h100:8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("phase", "temporary", "largest"),
    [
        ("update_actor", 90, "activations and other temporaries"),
        ("update_actor", 20, "optimizer"),
        ("decode", 20, "cache"),
    ],
)
def test_the_largest_array_of_a_run_that_does_not_fit_is_named(
    phase, temporary, largest
):
    program = Compiled(
        "one", phase, 0, 0, temporary, 40, 200, {}, seconds=0.0, error="too big"
    )
    findings = investigate(config(), SHAPE, "h100:4", PAIRS)._replace(
        memory=100,
        held={"parameters": 10, "optimizer": 30},
        sampling={"weights": 5, "cache": 50},
        programs=[program],
    )
    plan = Plan(topology="h100:4", mean_tokens=1, tokens=1, findings=findings)
    assert plan.fits is False and plan.largest.name == "one"
    assert f"largest: {largest}," in conclusion(plan)


def test_a_missing_compiler_is_named_with_its_package(config_file, monkeypatch, capsys):
    monkeypatch.setattr(compiler.util, "find_spec", lambda name: None)
    assert main(["plan", str(config_file), "--topology", "v5e:2x2"]) == 2
    assert "pip install 'oreal-jax[plan]'" in capsys.readouterr().err
