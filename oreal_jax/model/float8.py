"""Keys and values in eight bits: e4m3, whose maximum is 448.

The scales are folded into the weights, so kernels read the cache as it is and no page
has a scale of its own. They follow from the weights, not from the text, so a completion
still depends on its request alone.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from oreal_jax.model.config import ModelConfig

LIMIT = 256  # of bounds; rounding may exceed a bound, up to 448


def fold_scales(config: ModelConfig, params: Any) -> Any:
    """Return an equal model whose keys and values fit into e4m3 for every text.

    Each channel of keys and values is divided by a power of two, and that of queries
    and of the output projection's input is multiplied by it. No score and no output
    changes, not even by rounding (int8 weights round the output projection elsewhere).
    The power brings a bound on the channel below `LIMIT`:

    * a normalised input has a norm of at most sqrt(D), so its product with column w is
      at most sqrt(D) |gain * w|; a bias adds to that;
    * a normalised head (Qwen3) has a norm of at most sqrt(K);
    * rotation mixes the two channels of a plane: at most the root of both squares.

    Bounds are loose, by about sqrt(D) for most texts, which costs little: e4m3 has the
    same relative precision from 2^-6 to 448.
    """
    layers = params["layers"]
    attention = layers["attention"]
    repeats = config.heads // attention["key"].shape[2]
    repeat = lambda x: jnp.repeat(x, repeats, 1)  # for the query heads
    gain = layers["attention_norm"].astype(jnp.float32)

    def bound(name: str) -> Float[Array, "L G K"]:
        columns = gain[..., None, None] * attention[name]
        size = config.embed**0.5 * jnp.linalg.norm(columns, axis=1)
        return size + jnp.abs(attention[f"{name}_bias"]) if config.qkv_bias else size

    value = _scale(bound("value"))
    factors = {
        "value": 1 / value[:, None],
        "value_bias": 1 / value,
        "output": repeat(value)[..., None],
    }
    if config.qk_norm:
        normed = config.head_dim**0.5 * jnp.abs(attention["key_norm"])
        key = _scale(_rotate_bound(config, normed))
        factors |= {"key_norm": 1 / key, "query_norm": key}
    else:
        key = _scale(_rotate_bound(config, bound("key")))
        factors |= {
            "key": 1 / key[:, None],
            "key_bias": 1 / key,
            "query": repeat(key)[:, None],
            "query_bias": repeat(key),
        }
    scaled = {name: x * factors.get(name, 1) for name, x in attention.items()}
    return params | {"layers": layers | {"attention": scaled}}


def saturating_cast(x: Float[Array, "*shape"], dtype) -> Float[Array, "*shape"]:
    """Return `x` in `dtype`, clipped to the range of an eight-bit type.

    Otherwise e4m3 would be NaN beyond 464. NaN stays NaN.
    """
    if jnp.dtype(dtype).itemsize == 1:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def _rotate_bound(
    config: ModelConfig, bound: Float[Array, "*_ K"]
) -> Float[Array, "*_ K"]:
    """Return bounds after rotation, the same for both channels of a plane."""
    _, factor = config.rope.frequencies(config.head_dim)
    plane = factor * jnp.hypot(*jnp.split(bound, 2, axis=-1))
    return jnp.concatenate([plane, plane], axis=-1)


def _scale(bound: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the power of two that brings a bound to at most `LIMIT`; 1 for 0."""
    bound = bound.astype(jnp.float32)
    _, exponent = jnp.frexp(bound / LIMIT)
    return jnp.ldexp(jnp.ones_like(bound), jnp.clip(exponent, -64, 64))
