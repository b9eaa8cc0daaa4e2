"""Causal grouped-query attention: one entry point for every family and platform.

On a TPU a row of tokens that sees itself goes through the splash kernel (`specjax.models.splash`); everything else is
computed here, a chunk of queries at a time where there are many.

B batch, T query length, S key length, K kv heads, G query heads per kv head, H head_dim, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax import sharding

Cache = tuple[jax.Array, jax.Array]  # of all layers: keys [L,B,K,H,S], values [L,B,K,S,H]

NAME = "attention"  # what a layer's rematerialisation may keep of it
NO_WINDOW = 2**30  # wider than any text: beside layers with a window, those without have this one
SPLASH_FROM = 128  # tokens, a block of the kernel
QUERY_CHUNK = 1024  # above this many queries, scores are made a chunk of queries at a time: memory linear in length


class OneOf(NamedTuple):
    """A window that is known only inside the scan over layers: one of some widths (None: all keys)."""

    widths: tuple[int | None, ...]
    which: jax.Array  # int32 scalar


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
    window: int | OneOf | None = None,
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
    if not cached and q.shape[1] == k.shape[1] >= SPLASH_FROM and _platform() == "tpu":
        return _splash(q, k, v, window, q_segments=q_segments, k_segments=k_segments, scale=scale, softcap=softcap)
    width: Any = window
    if isinstance(window, OneOf):
        width = jnp.array([NO_WINDOW if w is None else w for w in window.widths], jnp.int32)[window.which]
    if not cached:  # queries may be split by length; each device then needs the keys of its rows whole
        k, v = (sharding.constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
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
        if width is not None:
            seen &= distance < width
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum(f"BKGTS,{v_axes}->BTKGH", weights, v).reshape(q.shape)

    length, queries = q.shape[1], (q, q_positions, q_segments)
    if length <= QUERY_CHUNK:
        return block(*queries)
    ways = sharding.parts("length", length)
    size = _chunk(length // ways)
    spare = -(length // ways) % size if ways == 1 else 0
    if spare:
        queries = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2))), queries)
    # Recomputed in the backward pass: keeping each chunk's scores would bring the quadratic memory back.
    chunks = jax.tree.map(lambda x: sharding.cut(x, size, ways), queries)
    out = jax.lax.map(lambda xs: jax.checkpoint(block)(*xs), chunks)
    return sharding.uncut(out, ways)[:, :length]


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


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, window: int | OneOf | None, **given: Any) -> jax.Array:
    from specjax.models import splash  # here, because it takes a quarter of a second that only a TPU's user owes

    if not isinstance(window, OneOf):
        return splash.attend(q, k, v, window=window, **given)
    widths = tuple(dict.fromkeys(window.widths))  # the kernel wants to know it when it is compiled
    which = jnp.array([widths.index(width) for width in window.widths], jnp.int32)[window.which]
    return jax.lax.switch(which, [functools.partial(splash.attend, window=width, **given) for width in widths], q, k, v)


def _platform() -> str:
    """What the program is traced for: the mesh's devices, which need not be here."""
    mesh = jax.sharding.get_abstract_mesh()
    known = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if known is None else str(known.platform)


def _chunk(length: int) -> int:
    """The largest divisor of a length that is at most QUERY_CHUNK; QUERY_CHUNK where that would be tiny.

    >>> _chunk(512), _chunk(4096), _chunk(1536), _chunk(2003)
    (512, 1024, 768, 1024)
    """
    size = next(size for size in range(min(length, QUERY_CHUNK), 0, -1) if length % size == 0)
    return size if size >= QUERY_CHUNK // 8 else QUERY_CHUNK
