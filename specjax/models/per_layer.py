"""Per-layer embeddings (Gemma 4's E2B and E4B): P features of each token for every layer, which adds a map of them.

B batch, T length, D embed, V vocab, P features, L layers (of a segment; of all in `PerLayerInputs`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from specjax.models.config import ModelConfig
from specjax.models.layers import Keys, Linear, RMSNorm, activate, parameter


class PerLayerInputs(nnx.Module):
    """The features of all layers: an embedding of the token, and a normed map of its usual one.

    Attributes:
      table: [V, L P], no module that an adapter touches.
      projection: kernel [L, P, D].
      norm: scale [P].
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None):
        assert config.per_layer
        (vocab, features), layers = config.per_layer, config.num_layers
        normal = nnx.initializers.normal(0.02)
        self.table = parameter(normal, (vocab, layers * features), ("vocab", "embed"), None, rngs)
        self.projection = Linear((config.embed_dim,), (layers, features), ("embed",), (None, None), rngs=rngs)
        self.norm = RMSNorm((features,), (None,), config.norm_eps, style=config.norm_style, rngs=rngs)

    def __call__(
        self, tokens: Int32[Array, "B T"], x: Float[Array, "B T D"], key: jax.Array | None
    ) -> Float[Array, "L B T P"]:
        """Of tokens and their scaled embeddings, in x's dtype; `key`: of the projection's dropout."""
        layers, features, width = self.projection.kernel.shape
        found = jnp.take(self.table[...], tokens, axis=0).astype(x.dtype) * jnp.asarray(features**0.5, x.dtype)
        made = self.norm(self.projection(x, key) * jnp.asarray(width**-0.5, x.dtype))
        both = (made + found.reshape(*tokens.shape, layers, features)) * jnp.asarray(2.0**-0.5, x.dtype)
        return jnp.moveaxis(both, 2, 0)


class PerLayer(nnx.Module):
    """What a layer adds of its features: norm(up(act(gate(x)) * features))."""

    def __init__(self, config: ModelConfig, *, layers: int | None, rngs: nnx.Rngs | None):
        assert config.per_layer
        d, p = config.embed_dim, config.per_layer[1]
        given: dict[str, Any] = {"layers": layers, "rngs": rngs}
        self.gate = Linear((d,), (p,), ("embed",), (None,), **given)
        self.projection = Linear((p,), (d,), (None,), ("embed",), **given)
        self.norm = RMSNorm((d,), ("embed",), config.norm_eps, style=config.norm_style, **given)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "B T D"], features: Float[Array, "B T P"], keys: Keys = (None,) * 2
    ) -> Float[Array, "B T D"]:
        """To be added to x; `keys`: of the two maps' dropout."""
        return self.norm(self.projection(activate(self.gate(x, keys[0]), self.activation) * features, keys[1]))
