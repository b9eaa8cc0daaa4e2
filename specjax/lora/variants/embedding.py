"""LoRA of the embedding: a token's row gets s B A[:, token], in PEFT's semantics.

The output layer that is tied to it keeps the base's table. R rank, V vocab, D embed.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from specjax.lora.variants.lora import Draw, LoRA, Map, Values
from specjax.models.layers import Axes, Embed
from specjax.models.stack import Arrays, Call

_ALMOST = 1 - 2**-24  # of a uniform number in +-1, whose normal one is finite


class EmbeddingLoRA(LoRA):
    """A [R,V], zero at first, and B [D,R], normal of spread 1; without dropout."""

    name: ClassVar[str] = "embedding"
    map_class: ClassVar[type] = Embed

    def arrays(self, linear: Map, rank: int) -> dict[str, tuple[tuple[int, ...], Axes]]:
        """A lies over the mesh like the table's rows."""
        assert isinstance(linear, Embed)
        vocab, dim = linear.embedding.shape
        return {"a": ((rank, vocab), ("lora_rank", "vocab")), "b": ((dim, rank), (None, "lora_rank"))}

    def drawn(self, linear: Map, rank: int) -> int:
        """As many as B has."""
        return math.prod(self.arrays(linear, rank)["b"][0])

    def init(self, linear: Map, ranks: tuple[int, ...], draw: Draw) -> Values:
        """As PEFT initialises them."""
        arrays = self.arrays(linear, max(ranks))
        uniform: Any = draw(arrays["b"][0], 1.0)
        normal = math.sqrt(2) * jax.scipy.special.erfinv(jnp.clip(uniform, -_ALMOST, _ALMOST))
        xp: Any = np if isinstance(uniform, np.ndarray) else jnp
        return {"a": xp.zeros(arrays["a"][0], np.float32), "b": xp.asarray(normal, np.float32)}

    def apply(self, factors: Arrays, scale: Any, dropout: Any, call: Call) -> Float32[Array, "B T D"]:
        """The update of the tokens `call.x`, int32 [B,T]."""
        low = jnp.take(factors["a"].T, call.x, axis=0)
        return jnp.tensordot(low, factors["b"], ((-1,), (-1,))) * scale

    def shared(self, factors: Arrays) -> None:
        """None: no other map has its input."""
        return None

    def merge(self, kernel: Float[Array, "V D"], factors: Arrays, scale: Any, in_dims: int) -> Float32[Array, "V D"]:
        """The table with s (B A)^T."""
        product = jnp.tensordot(factors["a"], factors["b"], ((0,), (1,)), precision="highest")
        return kernel.astype(jnp.float32) + product * scale

    def tensors(self, in_dims: int) -> tuple[tuple[str, str, str], ...]:
        """PEFT's, which are parameters and have no `.weight`."""
        return ("a", "lora_embedding_A", "table"), ("b", "lora_embedding_B", "table")
