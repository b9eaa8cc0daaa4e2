"""Matrix products of a decoder, and how exactly float32 ones are multiplied.

B batch, T length, R rank.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from specjax import sharding


def exact_float32(dtype: Any) -> AbstractContextManager[Any]:
    """Within it, float32 computations multiply float32: a GPU would round factors to 10 bits (TF32), a TPU to 8.

    So it is in PyTorch. `jax_default_matmul_precision`, where it is set, is left as it is.
    """
    rounds = sharding.platform() != "cpu" and jnp.dtype(dtype) == jnp.float32
    if rounds and jax.default_matmul_precision.value is None:
        return jax.default_matmul_precision("highest")
    return nullcontext()


def contract(
    x: Float[Array, "..."], kernel: Float[Array, "..."], in_dims: int, out_dtype: Any = None
) -> Float[Array, "..."]:
    """[..., *in] and [*out, *in] -> [..., *out], over `in_dims` axes, in x's dtype; the result in `out_dtype`."""
    axes, lead = tuple(range(-in_dims, 0)), x.shape[: x.ndim - in_dims]

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if sharding.undivided():
            # One axis of tokens: of more, XLA:CPU transposes a copy of the output's gradient to make the kernel's.
            x = x.reshape(-1, *x.shape[x.ndim - in_dims :])
        y = jnp.tensordot(x, kernel.astype(x.dtype), (axes, axes), preferred_element_type=out_dtype)
        return y.reshape(*lead, *y.shape[y.ndim - kernel.ndim + in_dims :])

    # For the backward pass x itself is kept, once for all maps that share it, and neither its reshaping nor a cast.
    return jax.checkpoint(product, prevent_cse=False)(x, kernel)


@jax.custom_vjp
def expand(low: Float[Array, "B ... R"], b: Float[Array, "*out R"]) -> Float[Array, "B ..."]:
    """`contract` of [B,T,R] (in decoding [B,R]), whose gradient of b transposes the small side alone."""
    return contract(low, b, 1)


def _expand_forward(low: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    return contract(low, b, 1), (low, b)


def _expand_backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = kept
    out = tuple(range(-(b.ndim - 1), 0))
    dlow = jnp.tensordot(dy, b.astype(dy.dtype), (out, tuple(range(b.ndim - 1))))
    # [R,*out], then transposed: XLA would turn it into a product that transposes the many tokens' dy instead.
    db = jax.lax.optimization_barrier(jnp.tensordot(low, dy, ((0, 1), (0, 1))))
    return dlow, jnp.moveaxis(db, 0, -1).astype(b.dtype)


expand.defvjp(_expand_forward, _expand_backward)
