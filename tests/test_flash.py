"""Attention kernels against XLA's, and attention on several devices against one.

Kernels run in Pallas's interpreter.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import ALONE

from oreal_jax import model_parallel
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig, flash
from oreal_jax.model.attention import attend_packed
from oreal_jax.model.execution import Execution

HEADS, GROUPS, SIZE, LENGTH = 4, 2, 128, 512


def config(kv_heads=GROUPS, size=SIZE) -> ModelConfig:
    return ModelConfig(
        vocab=64,
        embed=64,
        layers=1,
        heads=HEADS,
        kv_heads=kv_heads,
        head_dim=size,
        mlp=8,
    )


def packed(rows=2, kv_heads=GROUPS, size=SIZE):
    """Return queries, keys, values, and segments, of which the last is padding."""
    key = jax.random.key(0)
    draw = lambda n, heads: jax.random.normal(
        jax.random.fold_in(key, n), (rows, LENGTH, heads, size)
    )
    ends = np.array([[100, 101, 300, 470], [256, 300, 301, 512]][:rows])
    segments = (np.arange(LENGTH)[None, :, None] >= ends[:, None]).sum(-1)
    return (draw(0, HEADS), draw(1, kv_heads), draw(2, kv_heads), jnp.asarray(segments))


def value_and_gradients(attend, query, key, value, segments):
    """Attention, and the gradients of an uneven sum of it."""

    def total(query, key, value):
        attended = attend(query, key, value, segments)
        weights = jnp.cos(jnp.arange(attended.size)).reshape(attended.shape)
        return jnp.sum(attended * weights), attended

    gradients, attended = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(
        query, key, value
    )
    return attended, *gradients


def assert_close(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def sharded_attention(monkeypatch, prepare, shape, kv_heads=GROUPS, size=SIZE):
    """`shard_attention` with the kernel that `prepare` makes."""
    monkeypatch.setattr(flash, "choose_kernel", lambda *_: prepare)
    sizes = [max(1, size) for size in (shape.fsdp, shape.context, shape.tensor)]
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(shape, config(kv_heads, size), devices)
    return model_parallel.shard_attention(mesh, rows="rows")


interpreted = {
    "tpu": functools.partial(flash.prepare_splash, interpret=True),
    "gpu": functools.partial(flash.prepare_triton, interpret=True),
}


@pytest.mark.parametrize(("kernel", "size"), [("tpu", 128), ("tpu", 64), ("gpu", 128)])
def test_a_kernel_attends_like_xla(kernel, size, monkeypatch):
    shape = MeshShape(fsdp=1)
    attend = sharded_attention(monkeypatch, interpreted[kernel], shape, size=size)
    arrays = packed(size=size)
    assert_close(
        value_and_gradients(attend, *arrays),
        value_and_gradients(attend_packed, *arrays),
    )


@pytest.mark.parametrize(
    ("kernel", "shape", "kv_heads"),
    [
        (flash.prepare_xla, MeshShape(fsdp=2, context=2, tensor=2), 2),
        (flash.prepare_xla, MeshShape(fsdp=1, context=1, tensor=4), 2),
        (flash.prepare_xla_cpu, MeshShape(fsdp=1, context=2), 2),
        (interpreted["tpu"], MeshShape(fsdp=1, context=4), 2),
        (interpreted["tpu"], MeshShape(fsdp=1, context=2, tensor=2), 1),
    ],
    ids=["everything", "more devices than heads", "cpu", "splash", "splash tensor"],
)
def test_attention_on_several_devices_equals_that_on_one(
    kernel, shape, kv_heads, monkeypatch
):
    attend = sharded_attention(monkeypatch, kernel, shape, kv_heads)
    arrays = packed(kv_heads=kv_heads)
    assert_close(
        value_and_gradients(attend, *arrays),
        value_and_gradients(attend_packed, *arrays),
    )


def maxima(jaxpr) -> int:
    """Count the maxima of scores, which only attention's forward pass computes.

    Equations with neither result nor effect are never run and do not count.
    """
    count = 0
    for equation in jaxpr.eqns:
        if not equation.outvars and not equation.effects:
            continue
        count += equation.primitive.name == "reduce_max"
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            count += maxima(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize(
    ("remat", "passes"),
    [("everything", 2), ("but_attention", 1), ("elementwise", 1)],
)
@pytest.mark.parametrize(
    "shape",
    [MeshShape(fsdp=1), MeshShape(fsdp=2, tensor=2)],
    ids=["one device", "four"],
)
@pytest.mark.parametrize("kernel", ["plain", "cpu", *interpreted])
def test_a_stored_output_of_attention_is_not_computed_again(
    kernel, shape, remat, passes, monkeypatch
):
    """Stored are the output and the log-sum-exp, one per query and head.

    Nothing is stored that follows from the layer's input.
    """
    kernels = interpreted | {"plain": flash.prepare_xla, "cpu": flash.prepare_xla_cpu}
    attend = sharded_attention(monkeypatch, kernels[kernel], shape)
    *arrays, segments = packed()

    def layer(query, key, value):
        return jnp.sum(jnp.sin(attend(jnp.sin(query), key, value, segments)))

    def checkpointed(remat):
        return Execution(remat=remat).rematerialise(layer)

    def stored(remat):
        pull_back = lambda *arrays: jax.vjp(checkpointed(remat), *arrays)[1]
        sizes = jax.tree.leaves(jax.eval_shape(pull_back, *arrays))
        return sum(size.size for size in sizes)

    both = jax.value_and_grad(checkpointed(remat), (0, 1, 2))
    once = maxima(jax.make_jaxpr(layer)(*arrays).jaxpr)
    assert once > 0
    assert maxima(jax.make_jaxpr(both)(*arrays).jaxpr) == passes * once
    output = arrays[0].size + arrays[0].size // SIZE
    assert stored(remat) - stored("everything") == (output if passes == 1 else 0)


@pytest.mark.parametrize(
    ("platform", "length", "context", "chosen"),
    [
        ("tpu", 16_384, 1, flash.prepare_splash),
        ("tpu", 16_384, 4, flash.prepare_splash),
        ("tpu", 256, 4, flash.prepare_xla),  # 64 queries a device: less than a block
        ("gpu", 1024, 1, flash.prepare_triton),
        ("gpu", 1024, 2, flash.prepare_xla),
        ("gpu", 1000, 1, flash.prepare_xla),
        ("cpu", 1024, 1, flash.prepare_xla_cpu),
    ],
)
def test_a_kernel_is_chosen_if_its_blocks_fit(platform, length, context, chosen):
    assert flash.choose_kernel(platform, length, context) is chosen


WITHOUT_KERNELS = """
import sys
sys.modules.update(dict.fromkeys({missing}))  # None: cannot be imported
import jax
from jax.sharding import NamedSharding, PartitionSpec
import oreal_jax.train.loop
from oreal_jax.model import flash, kernels

mesh = jax.make_mesh((1, 1), ("heads", "tokens"))
prepare = flash.choose_kernel({platform!r}, 256, 1)
attend, _ = prepare(2, 256, NamedSharding(mesh, PartitionSpec("heads", "tokens")))
x = jax.ShapeDtypeStruct((1, 256, 2, 128), "float32")
ids = jax.ShapeDtypeStruct((1, 256), "int32")
print(jax.eval_shape(attend, x, x, x, ids, ids, 0).shape)

pages = kernels.choose_pages({platform!r}, 2, 128, "float32")
print(jax.eval_shape(
    lambda: pages.empty(8, 16, 2, 128, "float32").attend(
        jax.numpy.zeros((4, 2, 128)),
        jax.numpy.zeros((4, 2), "int32"),
        jax.numpy.ones(4, "int32"),
    )
).shape)
"""


@pytest.mark.parametrize(
    ("platform", "missing"),
    [
        ("cpu", ["jax.experimental.pallas"]),
        (
            "tpu",
            [
                "jax.experimental.pallas.triton",
                "jax.experimental.pallas.ops.gpu.attention",
            ],
        ),
    ],
)
def test_kernels_of_other_devices_need_not_exist(platform, missing):
    program = WITHOUT_KERNELS.format(platform=platform, missing=missing)
    done = subprocess.run(
        [sys.executable, "-c", program], env=ALONE, capture_output=True, text=True
    )
    assert done.stdout == "(1, 256, 2, 128)\n(4, 2, 128)\n", done.stderr
