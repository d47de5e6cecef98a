"""The model applied to one new token per sequence, with weights laid out for it.

Every token reads all weights, so they are stored as they are read: layer by layer (a
layer would be copied out of a stack for every token), in the compute dtype or in int8.
The layers are unrolled here, not scanned.

Letters as in decoder.py; B sequences, R prompts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from oreal_jax.model import functional
from oreal_jax.model.config import ModelConfig
from oreal_jax.model.decoder import Layer
from oreal_jax.model.execution import ONE_DEVICE, Execution
from oreal_jax.model.functional import Params
from oreal_jax.model.head import head_name, logits
from oreal_jax.model.kernels import LayerCache
from oreal_jax.model.operations import rms_norm, rotary_angles

Cache = tuple[LayerCache, ...]  # one per layer
Weights = Any  # parameters whose "layers" are a tuple; leaves may be `Quantized`
Attend = Callable[..., Array]  # (pages, query, table, lengths) as `Pages.attend`


class Quantized(NamedTuple):
    """A weight in int8, symmetric, with one scale per output of its product."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]

    def dense(self, dtype) -> Float[Array, "..."]:
        """Return the weight in `dtype`; fused, only eight bits are read from memory."""
        return self.values.astype(dtype) * self.scale.astype(dtype)


def quantize(weight: Float[Array, "..."], summed_axes: tuple[int, ...]) -> Quantized:
    """Return a weight in int8; its product sums over `summed_axes`."""
    largest = jnp.max(jnp.abs(weight), axis=summed_axes, keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
    values = jnp.round(weight / scale).astype(jnp.int8)
    return Quantized(values, scale.astype(jnp.float32))


def repeat_kv_heads(config: ModelConfig, tensor: int) -> ModelConfig:
    """Return the model with one key-value head for each of `tensor` devices.

    A model whose heads the devices divide is returned as it is.
    """
    if config.kv_heads % tensor == 0:
        return config
    return dataclasses.replace(config, kv_heads=tensor)


def lay_out(
    config: ModelConfig, params: Params, dtype, *, int8: bool = False
) -> Weights:
    """Return parameters in the layout of decoding.

    Key-value heads are repeated to `config.kv_heads`. The weights are in `dtype`, with
    `int8` except for the matrices.
    """
    outer, layers = split_layers(params)
    take = lambda index: jax.tree.map(lambda x: x[index], layers)
    each = (
        lay_out_layer(config, take(index), dtype, int8=int8)
        for index in range(config.layers)
    )
    return lay_out_outer(config, outer, dtype, int8=int8) | {"layers": tuple(each)}


def split_layers(params: Params) -> tuple[Params, Params]:
    """Return the parameters outside of the layers, and those of all layers."""
    outer = dict(params)
    return outer, outer.pop("layers")


def lay_out_outer(
    config: ModelConfig, params: Params, dtype, *, int8: bool = False
) -> Weights:
    """Return the parameters outside of the layers as `lay_out` does."""
    return _convert(split_layers(_axes(config))[0], params, dtype, int8)


def lay_out_layer(
    config: ModelConfig, layer: Params, dtype, *, int8: bool = False
) -> Weights:
    """Return the parameters of one layer as `lay_out` does."""
    names = _axes(config)["layers"]
    repeats = config.kv_heads // layer["attention"]["key"].shape[1]

    def repeat(names, weight):
        if "kv_heads" not in names or repeats == 1:
            return weight
        return jnp.repeat(weight, repeats, axis=names.index("kv_heads"))

    layer = jax.tree.map(repeat, names, layer, is_leaf=functional.is_axis_names)
    return _convert(names, layer, dtype, int8)


def _convert(names: Any, params: Params, dtype, int8: bool) -> Weights:
    def convert(names, weight):
        summed_axes = _summed_axes(names)
        if int8 and summed_axes:
            return quantize(weight, summed_axes)
        return weight.astype(dtype)

    return jax.tree.map(convert, names, params, is_leaf=functional.is_axis_names)


def axes(config: ModelConfig, *, int8: bool = False) -> Any:
    """Return the axis names of every array of `lay_out`."""

    def name_arrays(names):
        summed_axes = _summed_axes(names)
        if not (int8 and summed_axes):
            return names
        scale = (None if i in summed_axes else name for i, name in enumerate(names))
        return Quantized._make([names, tuple(scale)])

    names = jax.tree.map(name_arrays, _axes(config), is_leaf=functional.is_axis_names)
    return names | {"layers": (names["layers"],) * config.layers}


def prefill(
    config: ModelConfig,
    weights: Weights,
    tokens: Int[Array, "R S"],
    lengths: Int[Array, "R"],
    cache: Cache,
    table: Int[Array, "R M"],
    execution: Execution = ONE_DEVICE,
) -> Cache:
    """Return the cache with the keys and values of prompts in the pages of `table`.

    Prompts of `lengths` tokens are padded at their ends.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    cosine, sine = rotary_angles(config, positions)
    x, new_cache = _embed(weights, tokens), []
    for layer, pages in zip(weights["layers"], cache, strict=True):
        x, pages = _prefill_layer(
            config, execution, layer, x, cosine, sine, segments, table, pages
        )
        new_cache.append(pages)
    return tuple(new_cache)


# Jitted, so that one layer is traced and lowered for all.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill_layer(
    config, execution, weights, x, cosine, sine, segments, table, pages: LayerCache
):
    layer = _bind_layer(config, weights, x.dtype)
    x, key, value = layer.forward(x, cosine, sine, segments, execution)
    return x, pages.write_prompts(table, key, value)


def decode(
    config: ModelConfig,
    weights: Weights,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    cache: Cache,
    table: Int[Array, "B M"],
    attend: Attend = lambda pages, *inputs: pages.attend(*inputs),
) -> tuple[Float[Array, "B V"], Cache]:
    """Return the logits after one new token per sequence, and the new cache."""
    order = jnp.argsort(-positions)  # the longest first (see `Pages.attend`)
    tokens, positions, table = tokens[order], positions[order], table[order]
    cosine, sine = rotary_angles(config, positions[:, None])
    x, new_cache = _embed(weights, tokens[:, None]), []
    for layer, pages in zip(weights["layers"], cache, strict=True):
        x, pages = _decode_layer(
            config, attend, layer, x, cosine, sine, positions, table, pages
        )
        new_cache.append(pages)
    x = x[jnp.argsort(order)]  # the logits are many times larger
    x = rms_norm(x, weights["final_norm"], config.norm_epsilon)
    head = head_name(config)
    scores = logits(config, {head: _dense(weights[head], x.dtype)}, x)
    return scores[:, 0], tuple(new_cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_layer(
    config, attend: Attend, weights, x, cosine, sine, positions, table, pages
):
    layer = _bind_layer(config, weights, x.dtype)
    read = lambda pages, query: attend(pages, query, table, positions + 1)
    return layer.decode(x, cosine, sine, positions, table, pages, read)


def _bind_layer(config: ModelConfig, weights: Weights, dtype) -> Layer:
    return nnx.merge(_layer_structure(config), nnx.State(_dense(weights, dtype)))


@functools.lru_cache
def _layer_structure(config: ModelConfig):
    layer = nnx.eval_shape(lambda: Layer(config, rngs=nnx.Rngs(0)))
    return nnx.split(layer)[0]


def _dense(weights: Weights, dtype) -> Weights:
    is_quantized = lambda x: isinstance(x, Quantized)
    dense = lambda x: x.dense(dtype) if is_quantized(x) else x
    return jax.tree.map(dense, weights, is_leaf=is_quantized)


def _embed(weights: Weights, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    rows = jax.tree.map(lambda x: x[tokens], weights["embedding"])
    return _dense(rows, weights["final_norm"].dtype)


def _axes(config: ModelConfig) -> Any:
    """Return the axis names of every weight, for one layer without "layers"."""
    names = functional.axes(config)
    drop_first = lambda axes: axes[1:]
    layer = jax.tree.map(drop_first, names["layers"], is_leaf=functional.is_axis_names)
    return names | {"layers": layer}


def _summed_axes(axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the axes that the product of a matrix sums over; none for vectors.

    A product maps from the residual stream or to it. The embedding counts as the head,
    which maps from it.
    """
    if "embed" not in axes or len(axes) == 1:
        return ()
    if axes[-1] == "embed" and axes[0] != "vocab":
        return tuple(range(len(axes) - 1))
    return (axes.index("embed"),)
