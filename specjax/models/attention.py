"""Causal grouped-query attention: one entry point for every family.

B batch, T query length, S key length, K kv heads, G query heads per kv head, H head_dim, L layers.
"""

import jax
import jax.numpy as jnp

Cache = tuple[jax.Array, jax.Array]  # of all layers: keys [L,B,K,H,S], values [L,B,K,S,H]

QUERY_CHUNK = 1024  # above this many queries, scores are made a chunk of queries at a time: memory linear in length


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    cached: bool = False,
) -> jax.Array:
    """softmax(scale * q k^T) v over the keys of the same segment that are not later and inside the window.

    Args:
      q: [B,T,N,H]; query head n reads kv head n // (N/K), without repeating k or v.
      k: [B,S,K,H]; `cached`: [B,K,H,S], a cache's layout.
      v: [B,S,K,H]; `cached`: [B,K,S,H].
      q_positions: int32 [B,T], restarting at each segment.
      k_positions: int32 [B,S].
      q_segments: int32 [B,T]; 0 is padding.
      k_segments: int32 [B,S].
      scale: of the scores, mostly 1/sqrt(H).
      window: a key is seen if q_position - k_position < window (Mistral's sliding window); None: all.
      softcap: c of c * tanh(scores / c) before the mask (Gemma 2, arXiv:2408.00118); None: none.
      cached: k and v are one layer's part of a cache.

    Returns:
      [B,T,N,H] in q's dtype. Scores and softmax are float32. A padding query reads padding keys and stays finite.
    """
    k_axes, v_axes = ("BKHS", "BKSH") if cached else ("BSKH", "BSKH")
    kv_heads = k.shape[k_axes.index("K")]
    if cached:  # in this layout XLA's CPU backend knows no product of bfloat16 that accumulates in float32
        q_dtype, k = jnp.float32, k.astype(jnp.float32)
    else:
        q_dtype = q.dtype

    def block(q: jax.Array, q_positions: jax.Array, q_segments: jax.Array) -> jax.Array:
        batch, length, heads, dim = q.shape
        grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim).astype(q_dtype)
        scores = jnp.einsum(f"BTKGH,{k_axes}->BKGTS", grouped, k, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            scores = jnp.tanh(scores / softcap) * softcap
        distance = q_positions[:, :, None] - k_positions[:, None, :]
        seen = (distance >= 0) & (q_segments[:, :, None] == k_segments[:, None, :])
        if window is not None:
            seen &= distance < window
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum(f"BKGTS,{v_axes}->BTKGH", weights, v).reshape(q.shape)

    size = _chunk(q.shape[1])
    if size == q.shape[1]:
        return block(q, q_positions, q_segments)

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    # Recomputed in the backward pass: keeping each chunk's scores would bring the quadratic memory back.
    out = jax.lax.map(lambda xs: jax.checkpoint(block)(*xs), (chunks(q), chunks(q_positions), chunks(q_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def store(cache: Cache, k: jax.Array, v: jax.Array, layer: jax.Array | int, slot: jax.Array | int) -> Cache:
    """The cache with k and v, each [B,T,K,H], in that layer's slots slot..slot+T-1.

    The layout [L,B,K,H,S] of the keys and [L,B,K,S,H] of the values is what the two products of a decoding step read
    without transposing; XLA's CPU backend takes ten times as long for [L,B,S,K,H].
    """
    keys, values = cache
    k = jnp.transpose(k, (0, 2, 3, 1))[None].astype(keys.dtype)
    v = jnp.transpose(v, (0, 2, 1, 3))[None].astype(values.dtype)
    return (
        jax.lax.dynamic_update_slice(keys, k, (layer, 0, 0, 0, slot)),
        jax.lax.dynamic_update_slice(values, v, (layer, 0, 0, slot, 0)),
    )


def _chunk(length: int) -> int:
    """The largest divisor of a length that is at most QUERY_CHUNK; the length itself where that would be tiny.

    >>> _chunk(512), _chunk(4096), _chunk(1536), _chunk(2003)
    (512, 1024, 768, 2003)
    """
    size = next(size for size in range(min(length, QUERY_CHUNK), 0, -1) if length % size == 0)
    return size if size >= QUERY_CHUNK // 8 else length
