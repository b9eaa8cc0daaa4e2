"""What an adapter adds to a module: low-rank factors beside a linear map, and copies of parameters in their place.

R rank, L layers. A stacked module's arrays have a leading layer axis here too; its methods see one layer's slice.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.models.products import contract, expand


class PerLayer(nnx.Variable):
    """A constant of an adapter that differs by layer, float32 [L]: part of the state, because layers are scanned."""


class LoRA(nnx.Module):
    """Low-rank update y += scale * B A dropout(x) (Hu et al. 2021, arXiv:2106.09685), in PEFT's semantics.

    `a` is [(L,) R, *in_dims] and `b` [(L,) *out_dims, R], both float32 whatever the compute dtype; a layer of a smaller
    rank has zeros behind it, which stay zero in training (A = 0 gives dB = 0, and B = 0 gives dA = 0). With `magnitude`
    [(L,) *out_dims] it is DoRA (Liu et al. 2024, arXiv:2402.09353), whose weight norm has no gradient.

    Attributes:
      ranks: the true rank of each layer (one number for a map that is not stacked); 0: the layer is left alone.
      alphas: likewise.
      scale: a number, or a PerLayer array where layers differ; 0 where the rank is 0.
    """

    def __init__(
        self,
        a: nnx.LoRAParam,
        b: nnx.LoRAParam,
        magnitude: nnx.LoRAParam | None = None,
        *,
        ranks: tuple[int, ...],
        alphas: tuple[float, ...],
        scale: float | PerLayer,
        dropout: float,
        rslora: bool,
    ):
        self.a, self.b, self.magnitude = a, b, magnitude
        self.ranks, self.alphas, self.scale = ranks, alphas, scale
        self.dropout, self.rslora = dropout, rslora

    def __call__(
        self,
        x: jax.Array,
        in_dims: int,
        dropout_key: jax.Array | None,
        y: jax.Array | None = None,
        kernel: jax.Array | None = None,
        low: jax.Array | None = None,
    ) -> jax.Array:
        """[B,T,*in_dims] -> what is added to y, [B,T,*out_dims]; dropout only where a key is given.

        Args:
          x: the map's input.
          in_dims: how many axes it contracts.
          dropout_key: None: no dropout.
          y: W x, for DoRA alone.
          kernel: W, for DoRA alone.
          low: A x, where it was made together with that of other maps.
        """
        scale = self.scale[...] if isinstance(self.scale, PerLayer) else self.scale
        dropped = False
        if dropout_key is not None and self.dropout > 0:
            dropped = True
            keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), jnp.zeros_like(x))
        low = contract(x, self.a[...], in_dims) if low is None else low  # scaled here, where it is small
        update = expand(low * jnp.asarray(scale, low.dtype), self.b[...])
        if self.magnitude is None:
            return update
        assert y is not None and kernel is not None
        plain = contract(x, kernel, in_dims, y.dtype) if dropped else y  # PEFT drops x before W too
        norm = update_norm(kernel, self.a[...], self.b[...], scale, in_dims, x.dtype)
        factor = self.magnitude[...] / jax.lax.stop_gradient(norm)
        if isinstance(self.scale, PerLayer):  # the magnitude of a layer that is left alone means nothing
            factor = jnp.where(scale != 0, factor, 1.0)
        factor = factor.reshape((1,) * (y.ndim - factor.ndim) + factor.shape)
        return ((factor - 1) * plain.astype(jnp.float32) + factor * update.astype(jnp.float32)).astype(y.dtype)


class Own(nnx.Module):
    """An adapter's own copies of a module's parameters, used in their place (PEFT's `modules_to_save` and `bias`).

    They are float32 `nnx.LoRAParam`, attributes named like the parameters they stand for.

    Attributes:
      layers: the layers whose copies are used, of a stacked module.
      tied: of a tied embedding: the copy is the output's table too.
    """

    def __init__(self, values: dict[str, nnx.LoRAParam], layers: tuple[bool, ...], mask: PerLayer | None, tied: bool):
        for name, value in values.items():
            setattr(self, name, value)
        self.parameters, self.layers, self.mask, self.tied = tuple(values), layers, mask, tied


class Adaptable(nnx.Module):
    """A module whose parameters an adapter may replace by its own.

    `own` maps an adapter's name to its copies; `active` names the adapter in use, None is the base alone.
    """

    def __init__(self) -> None:
        self.own = nnx.Dict()
        self.active: str | None = None

    def used(self, name: str, base: str = "") -> jax.Array:
        """The parameter `name` that is in use: the active adapter's copy, else the base's (called `base` there)."""
        value: jax.Array = getattr(self, base or name)[...]
        own = self.own[self.active] if self.active is not None and self.active in self.own else None
        if own is None or name not in own.parameters:
            return value
        copy: jax.Array = getattr(own, name)[...]
        return copy if own.mask is None else jnp.where(own.mask[...] != 0, copy, value.astype(copy.dtype))


def update_norm(
    kernel: jax.Array, a: jax.Array, b: jax.Array, scale: Any, in_dims: int, dtype: Any = jnp.float32
) -> jax.Array:
    """||W + s B A|| over the inputs, float32 [*out], of W [*out, *in], without making B A.

    By ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2, where <W, B A> sums B * (W A^T) and ||B A||^2 sums B * (B A A^T), both
    over R: no array of the kernel's size. Products take `dtype` and accumulate in float32.
    """
    axes = tuple(range(-in_dims, 0))
    squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=axes)

    def product(left: jax.Array, right: jax.Array, axes: Any) -> jax.Array:
        found = jnp.tensordot(left.astype(dtype), right.astype(dtype), axes, preferred_element_type=jnp.float32)
        return found.astype(jnp.float32)

    cross = jnp.sum(b * product(kernel, a, (axes, axes)), axis=-1)
    gram = product(a, a, (axes, axes))
    quadratic = jnp.sum(b * jnp.tensordot(b, gram, 1), axis=-1)
    return jnp.sqrt(jnp.maximum(squares + 2 * scale * cross + scale * scale * quadratic, 0))
