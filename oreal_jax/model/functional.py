"""The decoder as pure functions of its parameters, a nested dict of arrays.

Flax declares the weights (decoder.py). Here the module is split into its structure,
which follows from the config, and its arrays, which the rest of the project holds.

Letters: B rows, S tokens, D embed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oreal_jax.model.config import ModelConfig
from oreal_jax.model.decoder import Decoder, Layer
from oreal_jax.model.execution import ONE_DEVICE, Execution
from oreal_jax.model.operations import rms_norm, rotary_angles

Params = Any  # nested dict of arrays


@functools.lru_cache
def _declare(config: ModelConfig):
    """Return the structure of the decoder, and its weights as shapes."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def bind(config: ModelConfig, params: Params) -> Decoder:
    """Return the decoder with these weights."""
    return nnx.merge(_declare(config)[0], nnx.State(params))


def init(config: ModelConfig, key: Array) -> Params:
    """Return random float32 parameters."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(key))))


def abstract(config: ModelConfig, dtype=jnp.float32) -> Params:
    """Return the parameters as `ShapeDtypeStruct`s, which take no memory."""
    shapes = nnx.to_pure_dict(_declare(config)[1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def axes(config: ModelConfig) -> Params:
    """Return the logical axis names of every weight; stacked layers begin "layers"."""

    def name_axes(variable):
        names = variable.get_metadata("axes")
        return ("layers",) * (len(variable.shape) - len(names)) + names

    is_variable = lambda x: isinstance(x, nnx.Variable)
    tree = jax.tree.map(name_axes, _declare(config)[1], is_leaf=is_variable)
    return nnx.to_pure_dict(tree)


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))


def cast(params: Params, dtype) -> Params:
    """Return the parameters in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def is_axis_names(x) -> bool:
    """Return whether `x` names the axes of one array: a leaf of a tree of names."""
    return isinstance(x, tuple) and all(isinstance(name, str | None) for name in x)


def token_reward_params(params: Params) -> Params:
    """Return a token reward model: the body of a policy, and a head of zeros.

    The score of every token is then 0, whether or not the policy's embedding is tied.
    """
    body = {name: value for name, value in params.items() if name != "head"}
    return body | {"score": jnp.zeros_like(params["final_norm"])}


def hidden(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    execution: Execution = ONE_DEVICE,
) -> Float[Array, "B S D"]:
    """Return the final hidden states of packed rows.

    A token attends to itself and to earlier tokens of its own segment. The layers are
    applied by a scan over a rematerialised layer, so neither compile time nor
    activation memory grows with depth.
    """
    decoder = bind(config, params)
    cosine, sine = rotary_angles(config, positions)

    @execution.rematerialise
    def layer(x, weights: Layer):
        # Inside the scan: jax 0.10.2 confuses the scanned weights if the gradients of
        # some are accumulated in references and those of others are not.
        if execution.gradient_sums:
            weights = weights.cast_matrices(execution.gradient_sums)
        return weights.forward(x, cosine, sine, segments, execution)[0], None

    embedding = decoder.embedding[...]
    dtype = execution.dtype or embedding.dtype
    x = execution.constrain(embedding[tokens].astype(dtype))
    x, _ = jax.lax.scan(layer, x, decoder.layers)
    return rms_norm(x, decoder.final_norm[...], config.norm_epsilon)
