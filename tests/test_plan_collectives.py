"""Collectives are counted in programs of known size."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oreal_jax.plan.collectives import collective_bytes

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
