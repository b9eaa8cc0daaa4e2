"""The experts of a mixture: a linear map per expert, and their gated MLPs over tokens sorted by expert.

D embed, E experts, k experts a token, F mlp, M rows (of a token for an expert), L layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from specjax.models.adapter import AdaptableMap
from specjax.models.grouped import grouped_matmul
from specjax.models.layers import activate, kernel_init, parameter
from specjax.models.quantised import Quantised
from specjax.models.stack import Call


class ExpertLinear(AdaptableMap):
    """y = x W_e^T (+ the updates in use, of expert e): one linear map per expert, W [(L,) E, out, in]."""

    def __init__(
        self,
        num_experts: int,
        in_size: int,
        out_size: int,
        in_axis: str,
        out_axis: str,
        *,
        layers: int | None,
        rngs: nnx.Rngs | None,
        stddev: float = 0.02,
    ):
        super().__init__()
        shape, axes = (num_experts, out_size, in_size), ("expert", out_axis, in_axis)
        init = kernel_init(stddev, 1, 1 + int(layers is not None))
        self.kernel: nnx.Param | Quantised = parameter(init, shape, axes, layers, rngs)
        self.in_dims = 1

    def __call__(self, x: Float[Array, "M in"], sizes: Int32[Array, " E *G"]) -> Float[Array, "M out"]:
        """Rows of expert 0, then of expert 1, ..., in x's dtype; `sizes` counts them.

        Where the rows of an expert are sorted by their groups of adapters, `sizes` is [E,G].
        """
        y = grouped_matmul(x, self.kernel[...].astype(x.dtype), sizes if sizes.ndim == 1 else jnp.sum(sizes, axis=1))
        for update in self.active_updates():  # not `update` itself: its groups are parts of `sizes`, not of the rows
            y += update.variant.apply(update.factors, update.scale, update.dropout, Call(x, sizes=sizes))
        return y


class Experts(nnx.Module):
    """E gated MLPs, down(activation(gate(x)) * up(x)) each."""

    def __init__(
        self,
        *,
        embed_dim: int,
        mlp_dim: int,
        num_experts: int,
        activation: str,
        layers: int | None,
        rngs: nnx.Rngs | None,
        out_stddev: float,
    ):
        def linear(in_size: int, out_size: int, in_axis: str, out_axis: str, stddev: float) -> ExpertLinear:
            return ExpertLinear(
                num_experts, in_size, out_size, in_axis, out_axis, layers=layers, rngs=rngs, stddev=stddev
            )

        self.gate_proj = linear(embed_dim, mlp_dim, "embed", "mlp", 0.02)
        self.up_proj = linear(embed_dim, mlp_dim, "embed", "mlp", 0.02)
        self.down_proj = linear(mlp_dim, embed_dim, "mlp", "embed", out_stddev)
        self.activation = activation

    @property
    def count(self) -> int:
        """E, of those that are here."""
        return int(self.down_proj.kernel.shape[0])

    @property
    def quantised(self) -> bool:
        """Whether the weights are stored in few bits."""
        return isinstance(self.down_proj.kernel, Quantised)

    @property
    def groups(self) -> int | None:
        """Into how many groups adapters divide the rows; None: one answers all of them, or none."""
        maps = (self.gate_proj, self.up_proj, self.down_proj)
        return next((update.groups for linear in maps for update in linear.active_updates()), None)

    def __call__(
        self,
        x: Float[Array, "N D"],
        chosen: Int32[Array, "N k"],
        weights: Float[Array, "N k"],
        first: Int32[Array, ""] | int = 0,
        group: Int32[Array, " N"] | None = None,
    ) -> Float[Array, "N D"]:
        """The weighted sum of each token's experts.

        Args:
          x: the tokens.
          chosen: the experts of each token; those outside of first..first+E-1 add nothing.
          weights: of the experts.
          first: the number of this module's first expert (a device may hold some of them only).
          group: each token's group of adapters, where there are `groups`.

        Returns:
          In x's dtype, summed in float32.
        """
        num_experts = self.count
        local = chosen.reshape(-1) - first
        local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)  # the others sort to the end
        shape: tuple[int, ...] = (num_experts,)
        if group is not None:  # sorted by it within an expert
            shape = (num_experts, self.groups or 1)
            local = local * shape[1] + jnp.repeat(group, chosen.shape[1])
        order = jnp.argsort(local, stable=True)
        place = jnp.argsort(order)
        sizes = jnp.sum(local[:, None] == jnp.arange(math.prod(shape))[None], axis=0, dtype=jnp.int32).reshape(shape)
        rows = _permute(jnp.repeat(x, chosen.shape[1], axis=0), order, place)
        y = _permute(self.mlps(rows, sizes), place, order).reshape(*chosen.shape, -1)
        return jnp.sum(y.astype(jnp.float32) * weights[..., None].astype(jnp.float32), axis=1).astype(x.dtype)

    def mlps(self, rows: Float[Array, "M D"], sizes: Int32[Array, " E *G"]) -> Float[Array, "M D"]:
        """Of rows sorted by expert, each expert's own; see `ExpertLinear`."""
        hidden = activate(self.gate_proj(rows, sizes), self.activation) * self.up_proj(rows, sizes)
        return self.down_proj(hidden, sizes)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order]; its transpose is the inverse's gather, where JAX, which knows of no inverse, would scatter."""
    return x[order]


def _permute_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x[order], inverse


def _permute_backward(inverse: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
    nothing = np.zeros(inverse.shape, jax.dtypes.float0)
    return dy[inverse], nothing, nothing


_permute.defvjp(_permute_forward, _permute_backward)
