"""Keys and values of the tokens seen so far: a pytree that the decoder passes along.

Slot w of a row holds the token at position w, so a row needs no length of its own: a
token at position p reads slots 0..p and nothing else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oreal_jax.model.config import ModelConfig


class Cache(NamedTuple):
    """Keys and values, one slot per position."""

    keys: Float[Array, "L B W G K"]
    values: Float[Array, "L B W G K"]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, window: int, dtype) -> "Cache":
        """A cache of `rows` rows with `window` slots each."""
        shape = (config.layers, rows, window, config.kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(
        self,
        layer: Int[Array, ""],
        positions: Int[Array, "B T"],
        key: Float[Array, "B T G K"],
        value: Float[Array, "B T G K"],
    ) -> "Cache":
        """Stores new keys and values of one layer.

        One token a row (decoding) goes to the row's own position; a block of tokens
        (prefill) starts at slot 0.
        """
        if key.shape[1] == 1:
            rows = jnp.arange(key.shape[0])
            at = (layer, rows, positions[:, 0])
            return Cache(
                self.keys.at[at].set(key[:, 0], mode="drop"),
                self.values.at[at].set(value[:, 0], mode="drop"),
            )
        put = lambda buffer, block: jax.lax.dynamic_update_slice(
            buffer, block[None], (layer, 0, 0, 0, 0)
        )
        return Cache(put(self.keys, key), put(self.values, value))

    def read(self, layer: Int[Array, ""], window: int):
        """The first `window` slots of one layer: keys and values [B, window, G, K]."""
        take = lambda buffer: jax.lax.dynamic_index_in_dim(
            buffer[:, :, :window], layer, keepdims=False
        )
        return take(self.keys), take(self.values)

    def repeat(self, times: int) -> "Cache":
        """Each row `times` times in a row: one prefill serves all samples."""
        return Cache(*(jnp.repeat(buffer, times, axis=1) for buffer in self))

    def widen(self, window: int) -> "Cache":
        """The same contents with room for `window` slots a row."""
        more = window - self.keys.shape[2]
        padding = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
        return Cache(*(jnp.pad(buffer, padding) for buffer in self))
