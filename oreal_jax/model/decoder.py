"""One decoder for Qwen2, Qwen3 and Llama: its weights and its layers.

Every weight names its logical axes next to its shape; `sharding.py` maps them to a
mesh. The layers are one stacked module, which `functional.hidden` scans over.

Activations have the compute dtype, to which a weight is cast where it is used. The
gradient of a weight is summed over tokens and devices in the weight's own dtype:
float32 for the master weights, whatever the compute dtype. (If a weight were cast to
bfloat16 first, the sum of its gradient would stop growing after 256 equal terms.)

Letters: B rows, S tokens, D embed, H heads, G key-value heads, K head size, F mlp,
V vocabulary, M pages per sequence.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from oreal_jax.model.config import ModelConfig
from oreal_jax.model.execution import LAYER_INPUT, Execution
from oreal_jax.model.kernels import LayerCache
from oreal_jax.model.operations import add_bias, multiply, rms_norm, rotate

INITIAL_SCALE = 0.02  # standard deviation


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """Return a normally distributed weight."""
    value = INITIAL_SCALE * jax.random.normal(rngs.params(), shape)
    return nnx.Param(value, axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """Return a weight that starts at `value` everywhere."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Attention(nnx.Module):
    """Projections of grouped-query attention with rotary positions."""

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
        """Return rotated queries [B, S, H, K] and keys, and values [B, S, G, K]."""
        query: Any = multiply("bsd,dhk->bshk", x, self.query[...])
        key: Any = multiply("bsd,dgk->bsgk", x, self.key[...])
        value = multiply("bsd,dgk->bsgk", x, self.value[...])
        if self.config.qkv_bias:
            query = add_bias(query, self.query_bias[...])
            key = add_bias(key, self.key_bias[...])
            value = add_bias(value, self.value_bias[...])
        if self.config.qk_norm:
            query = rms_norm(query, self.query_norm[...], self.config.norm_epsilon)
            key = rms_norm(key, self.key_norm[...], self.config.norm_epsilon)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        names = "query", "key", "value"
        return map(checkpoint_name, (query, key, value), names)

    def merge(self, attended: Float[Array, "B S H K"]) -> Float[Array, "B S D"]:
        """Project the heads back to the residual stream."""
        return multiply("bshk,hkd->bsd", attended, self.output[...])


class Mlp(nnx.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.embed, config.mlp
        self.gate = weight(rngs, (D, F), ("embed", "mlp"))
        self.up = weight(rngs, (D, F), ("embed", "mlp"))
        self.down = weight(rngs, (F, D), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Return down(silu(gate(x)) * up(x))."""
        gate = checkpoint_name(multiply("bsd,df->bsf", x, self.gate[...]), "gate")
        up = checkpoint_name(multiply("bsd,df->bsf", x, self.up[...]), "up")
        return multiply("bsf,fd->bsd", jax.nn.silu(gate) * up, self.down[...])


class Layer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.epsilon = config.norm_epsilon
        self.attention_norm = constant(1.0, (config.embed,), ("embed",))
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = constant(1.0, (config.embed,), ("embed",))
        self.mlp = Mlp(config, rngs=rngs)

    def cast_matrices(self, dtype) -> "Layer":
        """Return the layer with its matrices, and so their gradients, in `dtype`."""

        def cast(weight):
            is_matrix = {"embed"} < {*weight.get_metadata("axes")}
            return weight.replace(weight[...].astype(dtype)) if is_matrix else weight

        return jax.tree.map(cast, self, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def forward(self, x, cosine, sine, segments, execution: Execution):
        """Apply the layer to packed rows x [B, S, D]; tokens attend within segments.

        Also return the keys and values, [B, S, G, K] each.
        """
        x = checkpoint_name(x, LAYER_INPUT)
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], self.epsilon)
            query, key, value = self.attention.project(normed, cosine, sine)
            attended = execution.attend(query, key, value, segments)
            merged = checkpoint_name(self.attention.merge(attended), "merged")
            x = execution.constrain(x + merged)
        with jax.named_scope("mlp"):
            x = x + self.mlp(rms_norm(x, self.mlp_norm[...], self.epsilon))
        return execution.constrain(x), key, value

    def decode(self, x, cosine, sine, positions, table, pages: LayerCache, attend):
        """Apply the layer to one new token per sequence, x [B, 1, D].

        `attend(pages, query)` is called with the pages that contain the new token.
        """
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], self.epsilon)
            query, key, value = self.attention.project(normed, cosine, sine)
            pages = pages.write(table, positions, key[:, 0], value[:, 0])
            x = x + self.attention.merge(attend(pages, query[:, 0])[:, None])
        with jax.named_scope("mlp"):
            return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.epsilon)), pages


class Decoder(nnx.Module):
    """Embedding, layers, final norm and the head that `config.head` names."""

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
