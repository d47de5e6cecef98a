"""Attention kernels against the XLA form, and attention split over devices against
attention on one. Kernels run in Pallas's interpreter here."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import ALONE

from oreal_jax import sharding
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
    """Queries, keys, values; segments of uneven lengths, the last one padding."""
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


def agree(ours, expected):
    for found, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)


def on(monkeypatch, prepare, shape, kv_heads=GROUPS, size=SIZE):
    """`sharding.per_part` with a kernel of our choice, in the interpreter."""
    monkeypatch.setattr(flash, "prepare_for", lambda *_: prepare)
    sizes = [max(1, size) for size in (shape.fsdp, shape.context, shape.tensor)]
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(shape, config(kv_heads, size), devices)
    return sharding.per_part(mesh, rows="rows")


interpreted = {
    "tpu": functools.partial(flash.on_tpu, interpret=True),
    "gpu": functools.partial(flash.on_gpu, interpret=True),
}


@pytest.mark.parametrize(("kernel", "size"), [("tpu", 128), ("tpu", 64), ("gpu", 128)])
def test_a_kernel_attends_as_xla_does(kernel, size, monkeypatch):
    shape = sharding.MeshShape(fsdp=1)
    attend = on(monkeypatch, interpreted[kernel], shape, size=size)
    arrays = packed(size=size)
    agree(
        value_and_gradients(attend, *arrays),
        value_and_gradients(attend_packed, *arrays),
    )


@pytest.mark.parametrize(
    ("kernel", "shape", "kv_heads"),
    [
        (flash.plain, sharding.MeshShape(fsdp=2, context=2, tensor=2), 2),
        (flash.plain, sharding.MeshShape(fsdp=1, context=1, tensor=4), 2),
        (flash.on_cpu, sharding.MeshShape(fsdp=1, context=2), 2),
        (interpreted["tpu"], sharding.MeshShape(fsdp=1, context=4), 2),
        (interpreted["tpu"], sharding.MeshShape(fsdp=1, context=2, tensor=2), 1),
    ],
    ids=["everything", "more devices than heads", "cpu", "splash", "splash tensor"],
)
def test_attention_split_over_devices_is_that_of_one(
    kernel, shape, kv_heads, monkeypatch
):
    attend = on(monkeypatch, kernel, shape, kv_heads)
    arrays = packed(kv_heads=kv_heads)
    agree(
        value_and_gradients(attend, *arrays),
        value_and_gradients(attend_packed, *arrays),
    )


def maxima(jaxpr) -> int:
    """How often scores are reduced to their maximum: in attention's forward pass alone,
    kernels included. What has neither result nor effect is never run."""
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
    [sharding.MeshShape(fsdp=1), sharding.MeshShape(fsdp=2, tensor=2)],
    ids=["one device", "four"],
)
@pytest.mark.parametrize("kernel", ["plain", "cpu", *interpreted])
def test_a_kept_output_of_attention_is_not_computed_again(
    kernel, shape, remat, passes, monkeypatch
):
    """By every kernel; kept are its output and its log-sum-exp, one a query and head,
    and nothing that the layer's own input gives."""
    kernels = interpreted | {"plain": flash.plain, "cpu": flash.on_cpu}
    attend = on(monkeypatch, kernels[kernel], shape)
    *arrays, segments = packed()

    def layer(query, key, value):
        return jnp.sum(jnp.sin(attend(jnp.sin(query), key, value, segments)))

    def checkpointed(remat):
        return Execution(remat=remat).remembering(layer)

    def kept(remat):
        pulling = lambda *arrays: jax.vjp(checkpointed(remat), *arrays)[1]
        sizes = jax.tree.leaves(jax.eval_shape(pulling, *arrays))
        return sum(size.size for size in sizes)

    both = jax.value_and_grad(checkpointed(remat), (0, 1, 2))
    once = maxima(jax.make_jaxpr(layer)(*arrays).jaxpr)
    assert once > 0
    assert maxima(jax.make_jaxpr(both)(*arrays).jaxpr) == passes * once
    output = arrays[0].size + arrays[0].size // SIZE
    assert kept(remat) - kept("everything") == (output if passes == 1 else 0)


@pytest.mark.parametrize(
    ("platform", "length", "context", "chosen"),
    [
        ("tpu", 16_384, 1, flash.on_tpu),
        ("tpu", 16_384, 4, flash.on_tpu),
        ("tpu", 256, 4, flash.plain),  # 64 queries a device: less than a block
        ("gpu", 1024, 1, flash.on_gpu),
        ("gpu", 1024, 2, flash.plain),
        ("gpu", 1000, 1, flash.plain),
        ("cpu", 1024, 1, flash.on_cpu),
    ],
)
def test_a_kernel_is_chosen_where_its_blocks_fit(platform, length, context, chosen):
    assert flash.prepare_for(platform, length, context) is chosen


WITHOUT_KERNELS = """
import sys
sys.modules.update(dict.fromkeys({missing}))  # None: cannot be imported
import jax
from jax.sharding import NamedSharding, PartitionSpec
import oreal_jax.train.loop
from oreal_jax.model import flash, kernels

mesh = jax.make_mesh((1, 1), ("heads", "tokens"))
prepare = flash.prepare_for({platform!r}, 256, 1)
attend, _ = prepare(2, 256, NamedSharding(mesh, PartitionSpec("heads", "tokens")))
x = jax.ShapeDtypeStruct((1, 256, 2, 128), "float32")
ids = jax.ShapeDtypeStruct((1, 256), "int32")
print(jax.eval_shape(attend, x, x, x, ids, ids, 0).shape)

pages = kernels.pages_for({platform!r}, 2, 128, "float32")
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
