"""The model room: a decoder as pure functions of a nested dict of parameters.

The only room that knows Flax. Outside, a model is its `ModelConfig` and its `Params`:
`init` or `abstract` make the tree, `axes` names the axes of every weight, `hidden` runs
the layers, `log_probs`, `logits` and `token_scores` are the heads. `decoding` is the
same model one token at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oreal_jax.model.config import ModelConfig, Rope
from oreal_jax.model.decoder import Decoder
from oreal_jax.model.execution import ALONE, Execution, Remat, exact
from oreal_jax.model.head import Distribution, full, log_probs, logits

__all__ = [
    "ALONE",
    "Distribution",
    "Execution",
    "ModelConfig",
    "Params",
    "Remat",
    "Rope",
    "abstract",
    "axes",
    "cast",
    "cast_matrices",
    "exact",
    "full",
    "hidden",
    "init",
    "log_probs",
    "logits",
    "parameter_count",
    "token_reward_params",
    "token_scores",
]

Params = Any  # nested dict of arrays


@functools.lru_cache
def _declared(config: ModelConfig):
    """The decoder without its numbers: structure, and weights as shapes."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def _bound(config: ModelConfig, params: Params) -> Decoder:
    return nnx.merge(_declared(config)[0], nnx.State(params))


def init(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(key))))


def abstract(config: ModelConfig, dtype=jnp.float32) -> Params:
    """The parameter tree as `ShapeDtypeStruct`s: no memory, any size."""
    shapes = nnx.to_pure_dict(_declared(config)[1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def axes(config: ModelConfig) -> Params:
    """The logical axis names of every weight; stacked layers get "layers" in front."""

    def named(variable):
        names = variable.get_metadata("axes")
        return ("layers",) * (len(variable.shape) - len(names)) + names

    is_variable = lambda x: isinstance(x, nnx.Variable)
    tree = jax.tree.map(named, _declared(config)[1], is_leaf=is_variable)
    return nnx.to_pure_dict(tree)


def parameter_count(config: ModelConfig) -> int:
    """How many numbers the model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))


def cast(params: Params, dtype) -> Params:
    """The same tree in the compute dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def cast_matrices(config: ModelConfig, params: Params, dtype) -> Params:
    """The same tree with the matrices of the layers in another dtype."""

    def kept(names, weight):
        is_matrix = "layers" in names and "embed" in names and len(names) > 2
        return weight.astype(dtype) if is_matrix else weight

    is_names = lambda x: isinstance(x, tuple)
    return jax.tree.map(kept, axes(config), params, is_leaf=is_names)


def token_reward_params(params: Params) -> Params:
    """A token reward model that starts from a policy: its body, and a zero head.

    Every token then scores 0, whether or not the policy's embeddings are tied.
    """
    body = {name: value for name, value in params.items() if name != "head"}
    return body | {"score": jnp.zeros_like(params["final_norm"])}


def hidden(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    execution: Execution = ALONE,
) -> Float[Array, "B S D"]:
    """Final hidden states of packed rows; a token sees its own segment's past only."""
    return _bound(config, params).packed(tokens, positions, segments, execution)


def token_scores(params: Params, states: Float[Array, "B C D"]) -> Float[Array, "B C"]:
    """One raw score per hidden state (the token reward model's head), in float32."""
    states, score = (x.astype(jnp.float32) for x in (states, params["score"]))
    return jnp.einsum("bcd,d->bc", states, score, precision="highest")
