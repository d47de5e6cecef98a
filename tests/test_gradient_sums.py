"""Gradients are summed over tokens and devices in float32, also for bfloat16 models."""

import dataclasses
import re
from pathlib import Path

import gradient_error
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradient_error import Step, make_batch, relative_errors

from oreal_jax.config import TrainConfig
from oreal_jax.config_loading import load
from oreal_jax.errors import InputError
from oreal_jax.mesh import MeshShape
from oreal_jax.model.operations import add_bias
from oreal_jax.train.programs import make_run_mesh

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
TOKENS = 16_384
SMALL = dataclasses.replace(
    gradient_error.CONFIG, vocab=64, embed=32, heads=2, kv_heads=1, head_dim=16, mlp=64
)
ONE, EIGHT = MeshShape(fsdp=1), MeshShape(fsdp=8)


def test_the_gradient_of_a_bias_counts_every_token():
    x = jnp.ones((8, TOKENS // 8, 2, 4), jnp.bfloat16)
    total = lambda bias: jnp.sum(add_bias(x, bias).astype(jnp.float32))
    gradient = jax.grad(total)(jnp.zeros((2, 4)))
    np.testing.assert_array_equal(gradient, np.full((2, 4), TOKENS))


def test_gradients_in_bfloat16_are_close_to_float32():
    batch = make_batch(SMALL, 8, 512)
    expected = Step(SMALL, ONE, dtype=jnp.float32).gradients(batch)
    ours = Step(SMALL, ONE, dtype=jnp.bfloat16).gradients(batch)
    errors = relative_errors(ours, expected)
    # Fewer tokens average less of the rounding than in the slow test below, whose limit
    # is 0.02: at most 0.0214 with jax 0.12. Sums in bfloat16 are off by 0.1 and more.
    assert max(errors.values()) < 0.03, errors


@pytest.mark.slow
def test_gradients_of_65536_tokens_are_within_two_percent():
    """64 x 1,024 tokens, all cloned; sums in bfloat16 were off by 64%."""
    config = gradient_error.CONFIG
    batch = make_batch(config, 64, 1024)
    expected = Step(config, ONE, dtype=jnp.float32).gradients(batch)
    for shape in (ONE, EIGHT):
        ours = Step(config, shape, dtype=jnp.bfloat16).gradients(batch)
        errors = relative_errors(ours, expected)
        assert max(errors.values()) <= 0.02, errors


def reductions(step: Step, folder) -> set[tuple[str, str]]:
    """Kinds and dtypes of the partitioned program's sums over devices."""
    options: dict[str, str | bool] = {
        "xla_dump_to": str(folder),
        "xla_dump_hlo_pass_re": "spmd.*",
    }
    step.lower(make_batch(step.config, 8, 64)).compile(compiler_options=options)
    # Before the compiler of the CPU turns bfloat16 into float32.
    texts = sorted(folder.glob("*jit_step*after*spmd-part*"))
    found = re.findall(
        r"= \(?(\w+)\[[^=]* (all-reduce|reduce-scatter)\((.*)", texts[-1].read_text()
    )
    return {(kind, dtype) for dtype, kind, rest in found if not is_trivial(rest)}


def is_trivial(operation: str) -> bool:
    """Return whether a reduction is along axes of one device, and so no sum."""
    if "replica_groups={{0}," in operation:
        return True
    # As jax 0.12 prints it: replica_groups=mesh['fsdp'=8,'context'=1] {'context'}
    groups = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", operation)
    if not groups:
        return False
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
    return all(sizes[axis] == "1" for axis in re.findall(r"'(\w+)'", groups[2]))


@pytest.fixture
def without_cache():
    """Compiles programs even if they are cached."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.usefixtures("without_cache")
def test_gradients_are_reduced_over_devices_in_the_requested_dtype(tmp_path):
    full = Step(SMALL, EIGHT, dtype=jnp.bfloat16)
    assert {dtype for _, dtype in reductions(full, tmp_path / "full")} == {"f32"}
    half = Step(SMALL, EIGHT, dtype=jnp.bfloat16, gradient_sums=jnp.bfloat16)
    assert "bf16" in {dtype for _, dtype in reductions(half, tmp_path / "half")}


def test_gradient_sums_in_bfloat16_require_compute_in_bfloat16():
    config = load(TINY, TrainConfig, ["gradient_sums=bfloat16"])
    with pytest.raises(
        InputError, match="gradient_sums='bfloat16' with compute='auto'"
    ):
        make_run_mesh(config, SMALL)


@pytest.mark.parametrize(
    ("dtype", "exact"), [(jnp.float32, True), (jnp.bfloat16, False)], ids=str
)
def test_float32_products_are_exact_on_every_device(dtype, exact):
    """By default, TPUs round the factors of a product to bfloat16."""
    step = Step(SMALL, ONE, dtype=dtype)
    text = step.lower(make_batch(SMALL, 8, 64)).as_text()
    products = re.findall(r"stablehlo.dot_general .*", text)
    rounded = [p for p in products if "HIGHEST" not in p]
    assert len(products) > 20
    if exact:
        assert not rounded
    else:  # products of float32 alone, as in norms, are exact all the same
        inputs = [re.findall(r"x(f32|bf16)>", p.split(" : ")[-1])[:2] for p in rounded]
        assert ["f32", "f32"] not in inputs
