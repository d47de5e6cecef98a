"""The model one token at a time, in weights laid out for it.

Every token reads all weights, so they are kept as they are read: each layer by itself
(out of a stack it would be copied for every token), in the compute dtype or in int8.
The layers are unrolled here, not scanned.

Letters as in decoder.py; R prompts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from oreal_jax import model
from oreal_jax.model.cache import Cached
from oreal_jax.model.config import ModelConfig
from oreal_jax.model.decoder import Layer, angles, rms_norm
from oreal_jax.model.execution import ALONE, Execution
from oreal_jax.model.head import head_name

Cache = tuple[Cached, ...]  # one a layer
Weights = Any  # a parameter tree whose "layers" are a tuple; leaves may be `Quantized`
Attend = Callable[..., Array]  # (pages, query, table, lengths) as `Cached.attend`
Store = Callable[[tuple[int, ...], Array], Any]  # (axes it is summed over, weight)


class Quantized(NamedTuple):
    """A weight in eight bits, symmetric, with one scale an output of its product."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]

    def dense(self, dtype) -> Float[Array, "..."]:
        """The weight again. A device that can reads eight bits for it and no more."""
        return self.values.astype(dtype) * self.scale.astype(dtype)


def in_dtype(dtype) -> Store:
    """Keeps weights in `dtype`."""
    return lambda summed, weight: weight.astype(dtype)


def in_int8(dtype) -> Store:
    """Keeps matrices in int8 and everything else in `dtype`."""

    def store(summed, weight):
        if not summed:
            return weight.astype(dtype)
        largest = jnp.max(jnp.abs(weight), axis=summed, keepdims=True)
        scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
        values = jnp.round(weight / scale).astype(jnp.int8)
        return Quantized(values, scale.astype(jnp.float32))

    return store


def split_heads(config: ModelConfig, tensor: int) -> ModelConfig:
    """The same model with key-value heads repeated until `tensor` devices have one
    each; as it is where they are enough."""
    if config.kv_heads % tensor == 0:
        return config
    return dataclasses.replace(config, kv_heads=tensor)


def weights(config: ModelConfig, params: model.Params, store: Store) -> Weights:
    """Parameters as decoding reads them; `config` may have repeated heads."""
    given = params["layers"]["attention"]["key"].shape[2]
    repeats = config.kv_heads // given

    def kept(axes, weight):
        if "kv_heads" in axes and repeats > 1:
            weight = jnp.repeat(weight, repeats, axis=axes.index("kv_heads"))
        return store(_summed(axes), weight)

    keep = lambda names, tree: jax.tree.map(kept, names, tree, is_leaf=_is_names)
    names, layers = _axes(config), params["layers"]

    @jax.jit
    def layer(layers, index):
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, axis=0)
        one = jax.tree.map(functools.partial(take, keepdims=False), layers)
        return keep(names["layers"], one)

    tree = keep(names | {"layers": {}}, params | {"layers": {}})
    return tree | {"layers": tuple(layer(layers, i) for i in range(config.layers))}


def axes(config: ModelConfig, store: Store) -> Any:
    """The axis names of every array of `weights`."""

    def named(axes, kept):
        # The scale of a quantized weight has size 1 where the weight was summed over.
        name = lambda x: tuple(
            name if size > 1 else None for name, size in zip(axes, x.shape, strict=True)
        )
        return jax.tree.map(name, kept)

    # All layers are alike.
    one = dataclasses.replace(config, layers=1)
    shapes = jax.eval_shape(
        lambda params: weights(one, params, store), model.abstract(one)
    )
    names = _axes(config)
    names |= {"layers": (names["layers"],)}
    tree = jax.tree.map(named, names, shapes, is_leaf=_is_names)
    return tree | {"layers": tree["layers"] * config.layers}


def prefill(
    config: ModelConfig,
    weights: Weights,
    tokens: Int[Array, "R S"],
    lengths: Int[Array, "R"],
    cache: Cache,
    table: Int[Array, "R M"],
    execution: Execution = ALONE,
) -> Cache:
    """Runs prompts of these lengths, padded at their ends, and keeps their keys and
    values in the pages of `table`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    cosine, sine = angles(config, positions)
    x, filled = _embedded(weights, tokens), []
    for layer, pages in zip(weights["layers"], cache, strict=True):
        x, pages = _prefill_layer(
            config, execution, layer, x, cosine, sine, segments, table, pages
        )
        filled.append(pages)
    return tuple(filled)


# Layers are jitted, so that a program of many layers is traced and lowered for one.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill_layer(
    config, execution, weights, x, cosine, sine, segments, table, pages: Cached
):
    layer = _layer(config, weights, x.dtype)
    x, key, value = layer.packed(x, cosine, sine, segments, execution)
    return x, pages.write_prompts(table, key, value)


def decode(
    config: ModelConfig,
    weights: Weights,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    cache: Cache,
    table: Int[Array, "B M"],
    attend: Attend = lambda pages, *rest: pages.attend(*rest),
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after one new token a row, at its position in its pages. Fastest where
    rows come longest first (see `Pages.attend`)."""
    cosine, sine = angles(config, positions[:, None])
    x, filled = _embedded(weights, tokens[:, None]), []
    for layer, pages in zip(weights["layers"], cache, strict=True):
        x, pages = _decode_layer(
            config, attend, layer, x, cosine, sine, positions, table, pages
        )
        filled.append(pages)
    x = rms_norm(x, weights["final_norm"], config.norm_epsilon)
    head = head_name(config)
    logits = model.logits(config, {head: _dense(weights[head], x.dtype)}, x)
    return logits[:, 0], tuple(filled)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_layer(
    config, attend: Attend, weights, x, cosine, sine, positions, table, pages: Cached
):
    layer = _layer(config, weights, x.dtype)
    read = lambda pages, query: attend(pages, query, table, positions + 1)
    return layer.decode(x, cosine, sine, positions, table, pages, read)


def _layer(config: ModelConfig, weights: Weights, dtype) -> Layer:
    is_quantized = lambda x: isinstance(x, Quantized)
    dense = jax.tree.map(lambda w: _dense(w, dtype), weights, is_leaf=is_quantized)
    return nnx.merge(_layer_structure(config), nnx.State(dense))


@functools.lru_cache
def _layer_structure(config: ModelConfig):
    layer = nnx.eval_shape(lambda: Layer(config, rngs=nnx.Rngs(0)))
    return nnx.split(layer)[0]


def _dense(weight, dtype):
    return weight.dense(dtype) if isinstance(weight, Quantized) else weight


def _embedded(weights: Weights, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    embedding = weights["embedding"]
    rows = jax.tree.map(lambda x: x[tokens], embedding)
    return _dense(rows, weights["final_norm"].dtype)


def _axes(config: ModelConfig) -> Any:
    """The axis names of every weight, those of one layer for all."""
    names = model.axes(config)
    one = jax.tree.map(lambda axes: axes[1:], names["layers"], is_leaf=_is_names)
    return names | {"layers": one}


def _is_names(x) -> bool:
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def _summed(axes: tuple[str, ...]) -> tuple[int, ...]:
    """The axes that a matrix's product sums over; none for norms and biases.

    A product begins in the residual stream or ends there; the embedding is read as the
    head, which begins there.
    """
    if "embed" not in axes or len(axes) == 1:
        return ()
    if axes[-1] == "embed" and axes[0] != "vocab":
        return tuple(range(len(axes) - 1))
    return (axes.index("embed"),)
