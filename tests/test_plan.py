"""What a plan says, against programs whose answer is known; and one small plan by the
TPU's own compiler."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oreal_jax import efficiency, sharding
from oreal_jax.cli import main
from oreal_jax.plan import Plan, compiler, roofline
from oreal_jax.plan.collectives import moved
from oreal_jax.plan.estimate import estimated
from oreal_jax.plan.findings import Compiled
from oreal_jax.plan.programs import layout, on_device, programs
from oreal_jax.plan.show import why

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


def test_a_layout_is_made_of_what_the_run_would_hold():
    run = layout(config(), SHAPE, jax.devices()[:4], jax.devices()[:4], 64)
    numbers = efficiency.layer_weights(SHAPE) + 2 * efficiency.head_weights(SHAPE)
    held = run.bytes
    policy, reward = numbers, numbers - efficiency.head_weights(SHAPE)
    assert held["parameters"] == pytest.approx((policy + reward) * 4 / 4, rel=0.02)
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.001)
    assert on_device(run.reference) == held["reference"]


@pytest.mark.parametrize("cache_tokens", [0, 512])
def test_every_program_of_a_run_is_planned_and_lowers(cache_tokens):
    small = dataclasses.replace(config(), cache_tokens=cache_tokens)
    run = layout(small, SHAPE, jax.devices()[:4], jax.devices()[:4], 64)
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
    phase = roofline.Phase(flops=1e12, products=2.0, memory=3.0, links=1.0)
    assert (phase.seconds, phase.limit) == (3.0, "memory")


@pytest.fixture
def model_file(tmp_path):
    """A directory with the config.json of a small model."""
    from oreal_jax.model.families import to_hugging_face

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
    assert not json.loads(captured.out)["fits"]
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
    with pytest.raises(sharding.BadInput, match="nobody/knows"):
        shape_of(unknown)


def test_a_plan_for_gpus_counts_the_state_that_a_layout_has(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "h100:4", "--json"]
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    run = layout(config(), SHAPE, jax.devices()[:4], jax.devices()[:4], 64)
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
    assert small["rows"] < larger["rows"] == small["slots"]
    assert larger["seconds"] < small["phases"]["decode"]["seconds"]
    assert larger["cache_tokens"] > 512
    again = planned(larger["cache_tokens"])
    assert again["larger_cache"] is None and again["rows"] == larger["rows"]
    assert again["phases"]["decode"]["seconds"] == larger["seconds"]


@pytest.mark.parametrize("topology", ["h100", "h100:0", "h100:x"])
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
    made = Plan(topology="h100:4", mean_tokens=1, rows=1, found=found, phases={})
    assert not made.fits and made.largest.name == "one"
    assert f"largest: {culprit}," in why(made)


def test_a_plan_without_the_compiler_says_what_to_install(
    config_file, monkeypatch, capsys
):
    monkeypatch.setattr(compiler.util, "find_spec", lambda name: None)
    assert main(["plan", str(config_file), "--topology", "v5e:2x2"]) == 2
    assert "pip install 'oreal-jax[plan]'" in capsys.readouterr().err
