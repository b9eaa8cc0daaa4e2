"""Causal grouped-query attention: one entry point for every family.

B batch, T query length, S key length, K kv heads, G query heads per kv head, H head_dim.
"""

import jax
import jax.numpy as jnp

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
    window: int | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys of the same segment that are not later and inside the window.

    Args:
      q: [B,T,N,H]; query head n reads kv head n // (N/K), without repeating k or v.
      k: [B,S,K,H].
      v: [B,S,K,H].
      q_positions: int32 [B,T], restarting at each segment.
      k_positions: int32 [B,S].
      q_segments: int32 [B,T]; 0 is padding.
      k_segments: int32 [B,S].
      window: a key is seen if q_position - k_position < window (Mistral's sliding window); None: all.

    Returns:
      [B,T,N,H] in q's dtype. Scores and softmax are float32. A padding query reads padding keys and stays finite.
    """

    def block(q: jax.Array, q_positions: jax.Array, q_segments: jax.Array) -> jax.Array:
        batch, length, heads, dim = q.shape
        grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
        distance = q_positions[:, :, None] - k_positions[:, None, :]
        seen = (distance >= 0) & (q_segments[:, :, None] == k_segments[:, None, :])
        if window is not None:
            seen &= distance < window
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape)

    size = _chunk(q.shape[1])
    if size == q.shape[1]:
        return block(q, q_positions, q_segments)

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    # Recomputed in the backward pass: keeping each chunk's scores would bring the quadratic memory back.
    out = jax.lax.map(lambda xs: jax.checkpoint(block)(*xs), (chunks(q), chunks(q_positions), chunks(q_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _chunk(length: int) -> int:
    """The largest divisor of a length that is at most QUERY_CHUNK; the length itself where that would be tiny.

    >>> _chunk(512), _chunk(4096), _chunk(1536), _chunk(2003)
    (512, 1024, 768, 2003)
    """
    size = next(size for size in range(min(length, QUERY_CHUNK), 0, -1) if length % size == 0)
    return size if size >= QUERY_CHUNK // 8 else length
