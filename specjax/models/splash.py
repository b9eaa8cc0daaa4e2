"""Attention by the splash kernel (TPU): memory linear in the length, blocks that the mask hides are not computed.

The kernel is JAX's own, jax.experimental.pallas.ops.tpu.splash_attention, run on each device by `shard_map`: rows over
the batch's mesh axes, heads over `tensor`, queries over `context`, whose devices all hold the keys and values (with
grouped queries they are small). Off a TPU it runs in Pallas' interpreter, for tests.

B batch, T queries, S keys, N heads, K kv heads, H head_dim.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int32

from specjax import sharding

LANES = 128  # blocks are multiples of it
MOST = 512  # of a block: larger ones do not fit the memory of a core beside the backward pass's


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B T"],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Float[Array, " N"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v over the keys of the same segment that are not later and inside the window.

    Args:
      q: query head n reads kv head n // (N/K).
      k: of the same tokens: which are later is told by their places in the row, not by positions, and so is
        the distance of a window. In a row of documents one after another both are the same.
      v: of the same tokens.
      q_segments: 0 is padding.
      k_segments: of the keys.
      scale: of the scores.
      window: a key is seen if it is less than so many places before the query; None: all.
      softcap: c of c * tanh(scores / c); None: none.
      sinks: of each head, the score of a key that every query sees and whose value is nothing; None: none.
      interpret: run it on any platform, slowly.

    Returns:
      In q's dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, length = q.shape[:2]
    spare = -length % (LANES * _ways(mesh, "length"))
    if spare:  # padding is a segment of its own, behind everything
        q, k, v = (jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0))) for x in (q, k, v))
        q_segments, k_segments = (jnp.pad(x, ((0, 0), (0, spare))) for x in (q_segments, k_segments))
    batch, heads = (_dividing(mesh, axis, size) for axis, size in (("batch", rows), ("kv_heads", k.shape[2])))
    context = sharding.RULES["length"][0]
    ways = _ways(mesh, "length")
    local_heads = q.shape[2] // (1 if heads is None else sharding.ways(mesh, heads))
    kernel = _kernel(local_heads, length + spare, ways, window, softcap, interpret)

    def local(
        kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, q_seg: jax.Array, k_seg: jax.Array, *sinks: Any
    ) -> jax.Array:
        first = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
        run = functools.partial(kernel, sinks=sinks[0]) if sinks else kernel
        out = jax.vmap(run)(*first, kernel_lib.SegmentIds(q_seg, k_seg))
        return out.swapaxes(1, 2).astype(q.dtype)

    more = () if sinks is None else (sinks.astype(jnp.float32),)
    if mesh.empty or mesh.size == 1:
        return local(kernel, q, k, v, q_segments, k_segments, *more)[:, :length]
    seq = context if ways > 1 else None
    queries, keys = PartitionSpec(batch, seq, heads, None), PartitionSpec(batch, None, heads, None)
    of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, seq)))
    specs: tuple[Any, ...] = (of_kernel, queries, keys, keys, PartitionSpec(batch, seq), PartitionSpec(batch, None))
    specs += (PartitionSpec(heads),) * len(more)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return sharded(kernel, q, k, v, q_segments, k_segments, *more)[:, :length]


def _kernel(heads: int, length: int, shards: int, window: int | None, softcap: float | None, interpret: bool) -> Any:
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block, keys = _block(length // shards), _block(length)
    sizes = kernel_lib.BlockSizes(
        block_q=block,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=block,
        block_kv_dq=keys,
    )
    return kernel_lib.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def _block(length: int) -> int:
    """The largest multiple of LANES up to MOST that divides a multiple of LANES.

    >>> _block(2048), _block(640), _block(384)
    (512, 128, 384)
    """
    return max(size for size in range(LANES, min(length, MOST) + 1, LANES) if length % size == 0)


def _ways(mesh: Any, axis: str) -> int:
    return 1 if mesh.empty else sharding.ways(mesh, sharding.RULES[axis])


def _dividing(mesh: Any, axis: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes that split an axis of this size, as many of its rule as divide it."""
    names: tuple[str, ...] = ()
    for name in () if mesh.empty else sharding.RULES[axis]:
        if size % math.prod(mesh.shape[n] for n in (*names, name)) == 0:
            names = (*names, name)
    return names or None
