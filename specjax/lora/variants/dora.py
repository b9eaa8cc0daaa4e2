"""DoRA: each output of W + s B A scaled to a magnitude that trains (Liu et al. 2024, arXiv:2402.09353).

As in PEFT the weights' norm has no gradient. R rank, L layers.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32

from specjax.lora.variants.lora import Draw, LoRA, Map, Values, dropped
from specjax.models.layers import Axes
from specjax.models.products import contract
from specjax.models.stack import Arrays, Call


class DoRA(LoRA):
    """LoRA with a magnitude [(L,) *out] beside its factors, which starts as the weights' norm."""

    name: ClassVar[str] = "dora"
    settings: ClassVar[dict[str, Any]] = {"use_dora": True}
    shares: ClassVar[bool] = False  # the norm of its weights would be taken for every row, from the whole kernel

    def arrays(self, linear: Map, rank: int) -> dict[str, tuple[tuple[int, ...], Axes]]:
        """Also the magnitude, [(L,) *out]."""
        factors = super().arrays(linear, rank)
        shape, axes = factors["b"]
        return factors | {"magnitude": (shape[:-1], axes[:-1])}

    def init(self, linear: Map, ranks: tuple[int, ...], draw: Draw) -> Values:
        """Also ||W|| over the inputs."""
        return super().init(linear, ranks, draw) | {"magnitude": _norms(linear)}

    def apply(self, factors: Arrays, scale: Any, dropout: Any, call: Call) -> Float[Array, "..."]:
        """What turns W x into m/||W + s B A|| (W x + s B A dropout(x)); nothing where the scale is 0."""
        assert call.y is not None and call.kernel is not None
        x, y = dropped(call, dropout), call.y
        update = super().apply(factors, scale, 0.0, call._replace(x=x))
        plain = contract(x, call.kernel, call.in_dims, y.dtype) if x is not call.x else y  # PEFT drops it there too
        norm = update_norm(call.kernel, factors["a"], factors["b"], scale, call.in_dims, x.dtype)
        factor = factors["magnitude"] / jax.lax.stop_gradient(norm)
        if isinstance(scale, jax.Array):  # the magnitude of a layer that is left alone means nothing
            factor = jnp.where(scale != 0, factor, 1.0)
        factor = factor.reshape((1,) * (y.ndim - factor.ndim) + factor.shape)
        return ((factor - 1) * plain.astype(jnp.float32) + factor * update.astype(jnp.float32)).astype(y.dtype)

    def merge(
        self, kernel: Float[Array, "*shape"], factors: Arrays, scale: Any, in_dims: int
    ) -> Float32[Array, "*shape"]:
        """m/||W + s B A|| (W + s B A) of one layer, [*out, *in]; W where the scale is 0."""
        merged = super().merge(kernel, factors, scale, in_dims)
        norm = jnp.sqrt(jnp.sum(jnp.square(merged), axis=tuple(range(-in_dims, 0))))
        factor = jnp.where(scale != 0, factors["magnitude"] / norm, 1.0)
        return merged * factor.reshape(factor.shape + (1,) * in_dims)

    def tensors(self, in_dims: int) -> tuple[tuple[str, str, str], ...]:
        """Also the magnitude's."""
        return *super().tensors(in_dims), ("magnitude", "lora_magnitude_vector", "flat")


def _norms(linear: Map) -> jax.Array:
    """||W|| over the inputs, float32 [(L,) *out], layer by layer."""
    graph, state = nnx.split(linear)
    axes = tuple(range(-linear.in_dims, 0))
    stacked = linear.kernel.get_metadata("axes")[0] == "layers"

    def norm(state: Any) -> jax.Array:
        kernel = nnx.merge(graph, state).kernel[...]
        return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=axes))

    norms: jax.Array = jax.jit(lambda state: jax.lax.map(norm, state) if stacked else norm(state))(state)
    return norms


def update_norm(
    kernel: Float[Array, "..."],
    a: Float[Array, " R *inputs"],
    b: Float[Array, "*out R"],
    scale: Any,
    in_dims: int,
    dtype: Any = jnp.float32,
) -> Float32[Array, "*out"]:
    """||W + s B A|| over the inputs, of W [*out, *in], without making B A.

    By ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2, where <W, B A> sums B * (W A^T) and ||B A||^2 sums B * (B A A^T), both
    over R: no array of the kernel's size. Products take `dtype` and accumulate in float32.
    """
    axes = tuple(range(-in_dims, 0))
    squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=axes)

    def product(left: jax.Array, right: jax.Array, axes: Any) -> jax.Array:
        value = jnp.tensordot(left.astype(dtype), right.astype(dtype), axes, preferred_element_type=jnp.float32)
        return value.astype(jnp.float32)

    cross = jnp.sum(b * product(kernel, a, (axes, axes)), axis=-1)
    gram = product(a, a, (axes, axes))
    quadratic = jnp.sum(b * jnp.tensordot(b, gram, 1), axis=-1)
    return jnp.sqrt(jnp.maximum(squares + 2 * scale * cross + scale * scale * quadratic, 0))
