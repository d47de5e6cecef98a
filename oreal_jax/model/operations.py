"""Operations of a layer, most of them with a gradient of their own.

There are two reasons for one: the gradient of a weight is summed in the weight's own
dtype, or XLA on CPU takes many times as long for the gradient that JAX derives.

Letters: B rows, S tokens, D embed, H heads, K head size.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oreal_jax.model.config import ModelConfig


@jax.custom_vjp
def rms_norm(
    x: Float[Array, "*batch D"],
    gain: Float[Array, "D"],
    epsilon: Float[Array, ""] | float,
) -> Float[Array, "*batch D"]:
    """Normalise by the root mean square, in float32 (arXiv:1910.07467).

    The gradient stores x alone, and its sums are products: XLA on CPU takes twenty
    times as long for the gradient that JAX derives.
    """
    normed = _normalise(x, epsilon)[0]
    gain = jnp.expand_dims(gain.astype(x.dtype), range(x.ndim - 1))
    return normed.astype(x.dtype) * gain


def _normalise(x, epsilon):
    """Return x divided by its root mean square, and the divisor's inverse: float32."""
    y = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return y * scale, scale


def _rms_norm_forward(x, gain, epsilon):
    return rms_norm(x, gain, epsilon), (x, gain, epsilon)


def _rms_norm_backward(residuals, grad):
    x, gain, epsilon = residuals
    normed, scale = _normalise(x, epsilon)
    grad = grad.astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision="highest")
    grad_gain = product("...d,...d->d", grad, normed)
    grad = grad * jnp.expand_dims(gain.astype(jnp.float32), range(x.ndim - 1))
    radial = product("...d,...d->...", grad, normed)[..., None] / x.shape[-1]
    grad_x = scale * (grad - radial * normed)
    return grad_x.astype(x.dtype), grad_gain.astype(gain.dtype), None


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(
    spec: str, x: Float[Array, "..."], weight: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Return `einsum(spec, x, weight)` in the dtype of x.

    The gradient of the weight has the dtype of the weight. Its left factor is the one
    with fewer elements, because XLA on CPU transposes a copy of that factor.
    """
    return jnp.einsum(spec, x, weight.astype(x.dtype))


def _multiply_forward(spec, x, weight):
    return multiply(spec, x, weight), (x, weight)


def _multiply_backward(spec, residuals, grad):
    x, weight = residuals
    inputs, out_axes = spec.split("->")
    x_axes, weight_axes = inputs.split(",")
    factors = sorted([(out_axes, grad), (x_axes, x)], key=lambda factor: factor[1].size)
    (left_axes, left), (right_axes, right) = factors
    if x.dtype == weight.dtype:
        # In two steps: einsum would order the factors by the axes of its result.
        axes = "".join(c for c in left_axes + right_axes if c in weight_axes)
        grad_weight = jnp.einsum(f"{left_axes},{right_axes}->{axes}", left, right)
        grad_weight = jnp.einsum(f"{axes}->{weight_axes}", grad_weight)
    else:  # XLA on CPU has no such product with a transposed result
        grad_weight = jnp.einsum(
            f"{left_axes},{right_axes}->{weight_axes}",
            left,
            right,
            preferred_element_type=weight.dtype,
        )
    grad_x = jnp.einsum(
        f"{out_axes},{weight_axes}->{x_axes}", grad, weight.astype(grad.dtype)
    )
    return grad_x, grad_weight


multiply.defvjp(_multiply_forward, _multiply_backward)


@jax.custom_vjp
def add_bias(
    x: Float[Array, "B S H K"], bias: Float[Array, "H K"]
) -> Float[Array, "B S H K"]:
    """Return x plus a bias, in the dtype of x."""
    return x + bias.astype(x.dtype)[None, None]


def _add_bias_forward(x, bias):
    return add_bias(x, bias), bias


def _add_bias_backward(bias, grad):
    return grad, jnp.sum(grad, axis=(0, 1), dtype=bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def rotary_angles(
    config: ModelConfig, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
    """Return cosine and sine of the angle of every channel at every position."""
    frequencies, factor = config.rope.frequencies(config.head_dim)
    angle = positions[..., None] * jnp.asarray(frequencies * 2)[None, None]
    return factor * jnp.cos(angle), factor * jnp.sin(angle)


def rotate(
    x: Float[Array, "B S H K"],
    cosine: Float[Array, "B S K"],
    sine: Float[Array, "B S K"],
) -> Float[Array, "B S H K"]:
    """Rotate each plane of channels (i, i + K/2) by its angle (arXiv:2104.09864)."""
    y = x.astype(jnp.float32)
    first, second = jnp.split(y, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (y * cosine[:, :, None] + rotated * sine[:, :, None]).astype(x.dtype)
