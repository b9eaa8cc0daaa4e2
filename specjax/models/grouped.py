"""Grouped matrix product: rows sorted by group, one matrix a group (Gale et al. 2022, MegaBlocks, arXiv:2211.15841).

On TPU it is XLA's own `ragged_dot`. Elsewhere `ragged_dot` is lowered to a product of every row with every group's
matrix, [E,M,K] in memory and E times the work (jax 0.10); there the rows are taken in blocks that lie within one
group, as many as there are, each multiplied by its group's matrix alone.

E groups, M rows, K inputs, N outputs, S rows a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Float, Int32

MAX_BLOCK = 512  # rows; larger blocks gain nothing and overlap their neighbours more


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M K"], kernel: Float[Array, "E N K"], sizes: Int32[Array, " E"]
) -> Float[Array, "M N"]:
    """y[m] = kernel[group of row m] @ x[m].

    Args:
      x: rows of group 0, then of group 1, ...
      kernel: in x's dtype.
      sizes: rows of each group; their sum may be below M.

    Returns:
      In x's dtype, accumulated in float32; rows beyond the last group are zero.
    """
    return _rows(x, kernel, sizes, transposed=False)


def _forward(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _rows(x, kernel, sizes, transposed=False), (x, kernel, sizes)


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array) -> tuple[Any, ...]:
    x, kernel, sizes = saved
    # Where the kernel is frozen its gradient is dead code, which XLA removes.
    return _rows(dy, kernel, sizes, transposed=True), _kernels(dy, x, sizes), np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def grouped_matmul_in_out(
    x: Float[Array, "M K"], kernel: Float[Array, "E K N"], sizes: Int32[Array, " E"]
) -> Float[Array, "M N"]:
    """`grouped_matmul` by matrices [in, out]: y[m] = x[m] @ kernel[group of row m]."""
    return _rows(x, kernel, sizes, transposed=True)


def _forward_in_out(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _rows(x, kernel, sizes, transposed=True), (x, kernel, sizes)


def _backward_in_out(saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array) -> tuple[Any, ...]:
    x, kernel, sizes = saved
    return _rows(dy, kernel, sizes, transposed=False), _kernels(x, dy, sizes), np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul_in_out.defvjp(_forward_in_out, _backward_in_out)


def _rows(x: jax.Array, kernel: jax.Array, sizes: jax.Array, *, transposed: bool) -> jax.Array:
    """[M,K] -> [M,N]; transposed: [M,N] -> [M,K], by the transposed matrices."""
    contracted = 1 if transposed else 2
    return _on_platform(_rows_ragged, _rows_in_blocks, contracted, x, kernel, sizes)


def _kernels(dy: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of the kernel: [M,N], [M,K] -> [E,N,K], accumulated in float32, in x's dtype."""
    return _on_platform(_kernels_ragged, _kernels_in_blocks, 0, dy, x, sizes)


def _on_platform(ragged: Callable[..., Any], in_blocks: Callable[..., Any], option: int, *arrays: jax.Array) -> Any:
    return jax.lax.platform_dependent(
        *arrays, tpu=lambda *arrays: ragged(option, *arrays), default=lambda *arrays: in_blocks(option, *arrays)
    )


def _rows_ragged(contracted: int, x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    numbers = RaggedDotDimensionNumbers((((1,), (contracted,)), ((), ())), [0], [0])
    y = jax.lax.ragged_dot_general(x, kernel, sizes, numbers, preferred_element_type=jnp.float32)
    beyond = jnp.arange(x.shape[0]) >= jnp.sum(sizes)
    return jnp.where(beyond[:, None], 0.0, y).astype(x.dtype)


def _kernels_ragged(_: int, dy: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
    numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(dy, x, sizes, numbers, preferred_element_type=jnp.float32).astype(x.dtype)


def _rows_in_blocks(contracted: int, x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    rows, outputs = x.shape[0], kernel.shape[3 - contracted]
    size, count, block = _blocks(sizes, rows)

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        group, start, inside = block(i)
        matrix = jax.lax.dynamic_index_in_dim(kernel, group, keepdims=False)
        part = jax.lax.dot_general(
            jax.lax.dynamic_slice_in_dim(x, start, size),
            matrix,
            (((1,), (contracted - 1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        kept = jax.lax.dynamic_slice_in_dim(y, start, size)
        part = jnp.where(inside[:, None], part.astype(y.dtype), kept)
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=0)

    return jax.lax.fori_loop(0, count, add, _zeros((rows, outputs), x.dtype, x, kernel, sizes))


def _kernels_in_blocks(_: int, dy: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
    size, count, block = _blocks(sizes, x.shape[0])

    def add(i: jax.Array, kernel: jax.Array) -> jax.Array:
        group, start, inside = block(i)
        part = jax.lax.dot_general(
            jnp.where(inside[:, None], jax.lax.dynamic_slice_in_dim(dy, start, size), jnp.zeros((), dy.dtype)),
            jax.lax.dynamic_slice_in_dim(x, start, size),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return kernel.at[group].add(part, mode="promise_in_bounds")

    shape = (sizes.shape[0], dy.shape[1], x.shape[1])
    return jax.lax.fori_loop(0, count, add, _zeros(shape, jnp.float32, dy, x, sizes)).astype(x.dtype)


def _blocks(sizes: jax.Array, rows: int) -> tuple[int, jax.Array, Callable[[jax.Array], Any]]:
    """Cuts each group into blocks.

    Returns:
      S, the number of blocks, and i -> (its group, its first row, bool [S]: which of its S rows are its own). A block
      that would end beyond the last row begins earlier.
    """
    mean = -(-rows // min(rows, sizes.shape[0]))
    size = min(rows, MAX_BLOCK, 1 << (mean - 1).bit_length())
    counts = -(-sizes // size)
    ends, block_ends = jnp.cumsum(sizes), jnp.cumsum(counts)

    def block(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = jnp.sum(block_ends <= i)
        nth = i - (block_ends[group] - counts[group])
        first = ends[group] - sizes[group] + nth * size
        start = jnp.minimum(first, rows - size)
        row = start + jnp.arange(size)
        return group, start, (row >= first) & (row < ends[group])

    return size, block_ends[-1], block


def _zeros(shape: tuple[int, ...], dtype: Any, *like: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh axes that any of `like` varies over, as a loop's carry must inside `shard_map`."""
    nothing = sum((jnp.sum(array[:0]).astype(dtype) for array in like), jnp.zeros((), dtype))
    return jnp.broadcast_to(nothing, shape)
