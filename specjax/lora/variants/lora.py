"""LoRA: y += s B A dropout(x) (Hu et al. 2021, arXiv:2106.09685), in PEFT's semantics.

R rank, L layers.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from specjax.models.experts import ExpertLinear
from specjax.models.layers import Axes, Embed, Linear
from specjax.models.products import contract, expand
from specjax.models.stack import Arrays, Call

Values = dict[str, Array | np.ndarray]  # an adapter's arrays before they are placed
Map = Linear | ExpertLinear | Embed
Draw = Callable[[tuple[int, ...], float], Array | np.ndarray]


class LoRA:
    """The plain variant, and what the others change.

    Attributes:
      name: that of its stacks in a map's `updates`.
      map_class: the maps that it goes beside.
      settings: the keys of PEFT's `LoraConfig` that tell it, with their values.
      shares: whether rows of one batch may bear different adapters of it while they are answered.
      frozen: the arrays that do not train.
    """

    name: ClassVar[str] = "lora"
    map_class: ClassVar[type] = Linear
    settings: ClassVar[dict[str, Any]] = {"use_dora": False}
    shares: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ()

    def arrays(self, linear: Map, rank: int) -> dict[str, tuple[tuple[int, ...], Axes]]:
        """Shape and logical axes of each array of one adapter on a map: A [(L,) R, *in] and B [(L,) *out, R].

        Over `fsdp` they are replicated: they are small, and gathering them in every layer costs more than it saves.
        """
        assert not isinstance(linear, Embed)
        lead, shape = leading(linear), linear.kernel.shape
        axes = tuple(None if axis == "embed" else axis for axis in linear.kernel.get_metadata("axes"))
        first, out, inputs = slice(0, lead), slice(lead, -linear.in_dims), slice(-linear.in_dims, None)
        return {
            "a": ((*shape[first], rank, *shape[inputs]), (*axes[first], "lora_rank", *axes[inputs])),
            "b": ((*shape[first], *shape[out], rank), (*axes[first], *axes[out], "lora_rank")),
        }

    def drawn(self, linear: Map, rank: int) -> int:
        """How many random numbers `init` draws at once."""
        return math.prod(self.arrays(linear, rank)["a"][0])

    def init(self, linear: Map, ranks: tuple[int, ...], draw: Draw) -> Values:
        """A uniform in +-1/sqrt(inputs), B zero, as PEFT initialises them; `ranks` is that of each layer.

        Args:
          linear: the map.
          ranks: of its layers; behind the true rank of a layer stand zeros.
          draw: (shape, bound) -> float32 uniform in +-bound, of NumPy where it is known: the factors are then too.
        """
        rank, lead = max(ranks), leading(linear)
        arrays = self.arrays(linear, rank)
        shape = arrays["a"][0]
        # Drawn with the rank last, whatever order the parameter has: a seed keeps its meaning.
        a = draw((*shape[:lead], *shape[lead + 1 :], rank), 1 / math.sqrt(math.prod(shape[lead + 1 :])))
        xp: Any = jnp if isinstance(a, jax.Array) else np
        a = xp.moveaxis(a, -1, lead)
        if min(ranks) < rank:
            true = np.arange(rank)[None] < np.asarray(ranks)[:, None]
            a = a * true.reshape(len(ranks), *(1,) * (lead - 1), rank, *(1,) * (a.ndim - lead - 1))
        return {"a": a, "b": xp.zeros(arrays["b"][0], np.float32)}

    def apply(self, factors: Arrays, scale: Any, dropout: Any, call: Call) -> Float[Array, "..."]:
        """The update s B A dropout(x), in y's shape."""
        x = dropped(call, dropout)
        low = contract(x, factors["a"], call.in_dims) if call.low is None else call.low
        return expand(low * jnp.asarray(scale, low.dtype), factors["b"])  # scaled where it is small

    def shared(self, factors: Arrays) -> Float[Array, " R *inputs"] | None:
        """A, which is multiplied by x together with that of other maps that have the same input."""
        return factors["a"]

    def merge(
        self, kernel: Float[Array, "*shape"], factors: Arrays, scale: Any, in_dims: int
    ) -> Float32[Array, "*shape"]:
        """W + s B A of one layer, [*out, *in]."""
        product = jnp.tensordot(factors["b"], factors["a"], 1, precision="highest")
        return kernel.astype(jnp.float32) + product * scale

    def tensors(self, in_dims: int) -> tuple[tuple[str, str, str], ...]:
        """PEFT's tensors of one layer of a map: (array, the end of the tensor's name, how it lies: `hf.names`)."""
        return ("a", "lora_A.weight", f"kernel/{in_dims}"), ("b", "lora_B.weight", "kernel/1")


def leading(linear: Map) -> int:
    """How many leading axes of a map's kernel count maps: the layers', the experts'."""
    assert not isinstance(linear, Embed)
    return sum(axis in ("layers", "expert") for axis in linear.kernel.get_metadata("axes"))


def dropped(call: Call, dropout: Any) -> Float[Array, "..."]:
    """x, some of its numbers dropped and the rest scaled up."""
    if call.key is None or isinstance(dropout, float) and dropout == 0:
        return call.x
    keep = jax.random.bernoulli(call.key, 1 - dropout, call.x.shape)
    return jnp.where(keep, call.x / (1 - dropout), 0).astype(call.x.dtype)
