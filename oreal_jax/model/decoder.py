"""One decoder for Qwen2, Qwen3 and Llama: the weights and the forward pass.

Every weight names its logical axes beside its shape; `sharding.py` says what the axes
mean on a mesh. The layers are one stacked module, applied by a scan whose body is
rematerialised, so neither compile time nor activation memory grows with depth.

Activations have the compute dtype; a weight is cast to it where it is used. The
gradient of a weight is summed, over tokens and over devices, in the weight's own dtype:
float32 for the master weights, whatever is computed in. (Cast first, a weight of
bfloat16 would have a gradient whose sum stops growing after 256 equal terms.)

Letters: B rows, S tokens, D embed, H heads, G key-value heads, K head size, F mlp,
V vocabulary, M pages a row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oreal_jax.model.cache import Cached
from oreal_jax.model.config import ModelConfig
from oreal_jax.model.execution import INPUT, Execution, named

INITIAL_SCALE = 0.02


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A normal-initialised weight."""
    value = INITIAL_SCALE * jax.random.normal(rngs.params(), shape)
    return nnx.Param(value, axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A weight that starts at `value` everywhere."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


@jax.custom_vjp
def rms_norm(
    x: Float[Array, "*batch D"],
    gain: Float[Array, "D"],
    epsilon: Float[Array, ""] | float,
) -> Float[Array, "*batch D"]:
    """Root-mean-square normalisation, in float32 (arXiv:1910.07467).

    Its gradient keeps x alone, and its sums are products: XLA on CPU takes twenty times
    as long for what JAX would write.
    """
    normed = _normed(x, epsilon)[0]
    gain = jnp.expand_dims(gain.astype(x.dtype), range(x.ndim - 1))
    return normed.astype(x.dtype) * gain


def _normed(x, epsilon):
    """x by its root mean square, and 1 by that, in float32."""
    y = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return y * scale, scale


def _rms_norm(x, gain, epsilon):
    return rms_norm(x, gain, epsilon), (x, gain, epsilon)


def _of_rms_norm(kept, slope):
    x, gain, epsilon = kept
    normed, scale = _normed(x, epsilon)
    slope = slope.astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision="highest")
    of_gain = product("...d,...d->d", slope, normed)
    slope = slope * jnp.expand_dims(gain.astype(jnp.float32), range(x.ndim - 1))
    along = product("...d,...d->...", slope, normed)[..., None] / x.shape[-1]
    of_x = scale * (slope - along * normed)
    return of_x.astype(x.dtype), of_gain.astype(gain.dtype), None


rms_norm.defvjp(_rms_norm, _of_rms_norm)


def rotate(
    x: Float[Array, "B S H K"],
    cosine: Float[Array, "B S K"],
    sine: Float[Array, "B S K"],
) -> Float[Array, "B S H K"]:
    """Turns each plane (i, i + K/2) by its angle (arXiv:2104.09864)."""
    y = x.astype(jnp.float32)
    first, second = jnp.split(y, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (y * cosine[:, :, None] + turned * sine[:, :, None]).astype(x.dtype)


def angles(config: ModelConfig, positions: Int[Array, "B S"]):
    """Cosine and sine of every plane at every position, [B, S, K]."""
    frequencies, factor = config.rope.frequencies(config.head_dim)
    angle = positions[..., None] * jnp.asarray(frequencies * 2)[None, None]
    return factor * jnp.cos(angle), factor * jnp.sin(angle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(
    spec: str, x: Float[Array, "..."], weight: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`einsum(spec, x, weight)` in the dtype of x.

    The left factor of the weight's gradient is the one with fewer numbers: XLA on CPU
    copies that factor transposed.
    """
    return jnp.einsum(spec, x, weight.astype(x.dtype))


def _multiply(spec, x, weight):
    return multiply(spec, x, weight), (x, weight)


def _of_multiply(spec, kept, slope):
    x, weight = kept
    inputs, out = spec.split("->")
    of_x, of_weight = inputs.split(",")
    (a, left), (b, right) = sorted([(out, slope), (of_x, x)], key=lambda f: f[1].size)
    if x.dtype == weight.dtype:
        # In two steps: einsum would order the factors by the axes of its result.
        axes = "".join(c for c in a + b if c in of_weight)
        gradient = jnp.einsum(f"{a},{b}->{axes}", left, right)
        gradient = jnp.einsum(f"{axes}->{of_weight}", gradient)
    else:  # XLA on CPU has no such product with a transposed result
        gradient = jnp.einsum(
            f"{a},{b}->{of_weight}", left, right, preferred_element_type=weight.dtype
        )
    of_x = jnp.einsum(f"{out},{of_weight}->{of_x}", slope, weight.astype(slope.dtype))
    return of_x, gradient


multiply.defvjp(_multiply, _of_multiply)


@jax.custom_vjp
def shift(
    x: Float[Array, "B S H K"], bias: Float[Array, "H K"]
) -> Float[Array, "B S H K"]:
    """x plus a bias, in the dtype of x."""
    return x + bias.astype(x.dtype)[None, None]


def _shift(x, bias):
    return shift(x, bias), bias


def _of_shift(bias, slope):
    return slope, jnp.sum(slope, axis=(0, 1), dtype=bias.dtype)


shift.defvjp(_shift, _of_shift)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, H, G, K = config.embed, config.heads, config.kv_heads, config.head_dim
        self.query = weight(rngs, (D, H, K), ("embed", "heads", "head_dim"))
        self.key = weight(rngs, (D, G, K), ("embed", "kv_heads", "head_dim"))
        self.value = weight(rngs, (D, G, K), ("embed", "kv_heads", "head_dim"))
        self.output = weight(rngs, (H, K, D), ("heads", "head_dim", "embed"))
        if config.qkv_bias:
            self.query_bias = constant(0.0, (H, K), ("heads", "head_dim"))
            self.key_bias = constant(0.0, (G, K), ("kv_heads", "head_dim"))
            self.value_bias = constant(0.0, (G, K), ("kv_heads", "head_dim"))
        if config.qk_norm:
            self.query_norm = constant(1.0, (K,), ("head_dim",))
            self.key_norm = constant(1.0, (K,), ("head_dim",))

    def project(self, x: Float[Array, "B S D"], cosine, sine):
        """Queries, keys and values of `x`, positions applied."""
        query: Any = multiply("bsd,dhk->bshk", x, self.query[...])
        key: Any = multiply("bsd,dgk->bsgk", x, self.key[...])
        value = multiply("bsd,dgk->bsgk", x, self.value[...])
        if self.config.qkv_bias:
            query = shift(query, self.query_bias[...])
            key = shift(key, self.key_bias[...])
            value = shift(value, self.value_bias[...])
        if self.config.qk_norm:
            query = rms_norm(query, self.query_norm[...], self.config.norm_epsilon)
            key = rms_norm(key, self.key_norm[...], self.config.norm_epsilon)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        return named(query, "query"), named(key, "key"), named(value, "value")

    def merge(self, attended: Float[Array, "B S H K"]) -> Float[Array, "B S D"]:
        """Brings the heads back to the residual stream."""
        return multiply("bshk,hkd->bsd", attended, self.output[...])


class Mlp(nnx.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.embed, config.mlp
        self.gate = weight(rngs, (D, F), ("embed", "mlp"))
        self.up = weight(rngs, (D, F), ("embed", "mlp"))
        self.down = weight(rngs, (F, D), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """down(silu(gate(x)) * up(x))."""
        gate = named(multiply("bsd,df->bsf", x, self.gate[...]), "gate")
        up = named(multiply("bsd,df->bsf", x, self.up[...]), "up")
        return multiply("bsf,fd->bsd", jax.nn.silu(gate) * up, self.down[...])


class Layer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.epsilon = config.norm_epsilon
        self.attention_norm = constant(1.0, (config.embed,), ("embed",))
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = constant(1.0, (config.embed,), ("embed",))
        self.mlp = Mlp(config, rngs=rngs)

    def packed(self, x, cosine, sine, segments, execution: Execution):
        """The layer on whole rows: every token sees its own segment's past. Also the
        keys and values that it saw, [B, S, G, K]."""
        x = named(x, INPUT)
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], self.epsilon)
            query, key, value = self.attention.project(normed, cosine, sine)
            attended = execution.attend(query, key, value, segments)
            x = execution.place(x + named(self.attention.merge(attended), "merged"))
        with jax.named_scope("mlp"):
            x = x + self.mlp(rms_norm(x, self.mlp_norm[...], self.epsilon))
        return execution.place(x), key, value

    def decode(self, x, cosine, sine, positions, table, pages: Cached, attend):
        """The layer on one new token a row: writes it to its page, reads the row's."""
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], self.epsilon)
            query, key, value = self.attention.project(normed, cosine, sine)
            pages = pages.write(table, positions, key[:, 0], value[:, 0])
            x = x + self.attention.merge(attend(pages, query[:, 0])[:, None])
        with jax.named_scope("mlp"):
            return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.epsilon)), pages


class Decoder(nnx.Module):
    """Embedding, layers, final norm and the head that `config.head` asks for."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab, config.embed
        self.embedding = weight(rngs, (V, D), ("vocab", "embed"))
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = jax.vmap(lambda key: Layer(config, rngs=nnx.Rngs(key)))(keys)
        self.final_norm = constant(1.0, (D,), ("embed",))
        if config.head == "score":
            self.score = constant(0.0, (D,), ("embed",))
        elif not config.tied:
            self.head = weight(rngs, (D, V), ("embed", "vocab"))

    def packed(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        execution: Execution,
    ) -> Float[Array, "B S D"]:
        """Final hidden states of packed rows."""
        cosine, sine = angles(self.config, positions)

        @execution.remembering
        def layer(x, weights: Layer):
            return weights.packed(x, cosine, sine, segments, execution)[0], None

        embedding = self.embedding[...]
        dtype = execution.dtype or embedding.dtype
        x = execution.place(embedding[tokens].astype(dtype))
        x, _ = jax.lax.scan(layer, x, self.layers)
        return rms_norm(x, self.final_norm[...], self.config.norm_epsilon)
