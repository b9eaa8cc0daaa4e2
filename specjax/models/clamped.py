"""gpt-oss' mixture of experts: gate and up in one map, a clamped gate, biases, kernels [in, out] as in the files.

D embed, E experts, F mlp, M rows (of a token for an expert), L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from specjax.models.experts import Experts
from specjax.models.grouped import grouped_matmul_in_out
from specjax.models.layers import Axes, parameter
from specjax.models.products import contract


class BiasedRouter(nnx.Module):
    """A token's score of each expert: kernel [(L,) E, D], bias [(L,) E]."""

    def __init__(self, embed_dim: int, num_experts: int, *, layers: int | None, rngs: nnx.Rngs | None):
        normal, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros
        self.kernel = parameter(normal, (num_experts, embed_dim), (None, "embed"), layers, rngs)
        self.bias = parameter(zeros, (num_experts,), (None,), layers, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """The scores, in x's dtype."""
        y = contract(x, self.kernel[...], 1)
        return y + self.bias[...].astype(y.dtype)[None, None]


class BiasedExpertMap(nnx.Module):
    """y = x W_e + b_e of expert e: kernel [(L,) E, in, *out], bias [(L,) E, *out]."""

    def __init__(
        self,
        num_experts: int,
        in_size: int,
        out_shape: tuple[int, ...],
        in_axis: str,
        out_axes: Axes,
        *,
        layers: int | None,
        rngs: nnx.Rngs | None,
        stddev: float = 0.02,
    ):
        normal, zeros = nnx.initializers.normal(stddev), nnx.initializers.zeros
        self.kernel = parameter(
            normal, (num_experts, in_size, *out_shape), ("expert", in_axis, *out_axes), layers, rngs
        )
        self.bias = parameter(zeros, (num_experts, *out_shape), ("expert", *out_axes), layers, rngs)

    def __call__(self, x: Float[Array, "M in"], sizes: Int32[Array, " E"]) -> Float[Array, "M ..."]:
        """[M,in] -> [M,*out] in x's dtype: `sizes` rows of each expert in turn; those beyond them are zero."""
        kernel, bias = (leaf[...].astype(x.dtype) for leaf in (self.kernel, self.bias))
        y = grouped_matmul_in_out(x, kernel.reshape(*kernel.shape[:2], -1), sizes)
        # Of each row its expert's bias: a product, and not a gather, whose transpose is a scatter.
        expert = jnp.sum(jnp.cumsum(sizes)[None] <= jnp.arange(len(x))[:, None], axis=1)
        own = (expert[:, None] == jnp.arange(len(sizes))[None]).astype(x.dtype)
        y += jnp.einsum("ME,EO->MO", own, bias.reshape(len(sizes), -1))
        return y.reshape(len(x), *kernel.shape[2:])


class ClampedExperts(Experts):
    """E MLPs, down((up + 1) * gate * sigmoid(alpha gate)), gate and up clamped: transformers' `GptOssExperts`.

    Attributes:
      gate_up_proj: [(L,) E, D, F, 2], a gate's and an up's output side by side.
      down_proj: [(L,) E, F, D].
      clamp: (alpha, limit): gate <= limit, -limit <= up <= limit.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        mlp_dim: int,
        num_experts: int,
        clamp: tuple[float, float],
        layers: int | None,
        rngs: nnx.Rngs | None,
        out_stddev: float,
    ):
        given: dict[str, Any] = {"layers": layers, "rngs": rngs}
        self.gate_up_proj = BiasedExpertMap(num_experts, embed_dim, (mlp_dim, 2), "embed", ("mlp", None), **given)
        self.down_proj = BiasedExpertMap(
            num_experts, mlp_dim, (embed_dim,), "mlp", ("embed",), stddev=out_stddev, **given
        )
        self.clamp = clamp

    @property
    def groups(self) -> int | None:
        """None: no adapter touches them."""
        return None

    def mlps(self, rows: Float[Array, "M D"], sizes: Int32[Array, " E"]) -> Float[Array, "M D"]:
        """Of rows sorted by expert, each expert's own."""
        alpha, limit = self.clamp
        both = self.gate_up_proj(rows, sizes)
        gate, up = jnp.minimum(both[..., 0], limit), jnp.clip(both[..., 1], -limit, limit)
        return self.down_proj((up + 1) * (gate * jax.nn.sigmoid(gate * alpha)), sizes)
