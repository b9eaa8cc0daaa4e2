"""Causal grouped-query attention: one entry point for every family and platform.

On a TPU a row of tokens that sees itself goes through the splash kernel (`specjax.models.splash`), on a GPU through
cuDNN's (`specjax.models.cudnn`); everything else is computed here, a chunk of queries at a time where there are many.
The backward pass makes the scores again from the queries, the keys and each query's log-sum-exp, as flash attention
does (Dao et al. 2022, arXiv:2205.14135): no array of T x S outlives its chunk.

B batch, T query length, S key length, K kv heads, G query heads per kv head, H head_dim, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int32

from specjax import sharding
from specjax.models import cudnn

Cache = tuple[Float[Array, "L B K H S"], Float[Array, "L B K S H"]]  # of layers of one shape: keys, values
Caches = tuple[tuple[jax.Array, jax.Array], ...]  # of all layers: a `Cache` for each shape

NAME = "attention"  # what a layer's rematerialisation may keep of it
NO_WINDOW = 2**30  # wider than any text: beside layers with a window, those without have this one
SPLASH_FROM = 128  # tokens, a block of the kernel
QUERY_CHUNK = 1024  # above this many queries, scores are made a chunk of queries at a time: memory linear in length
PIECES, SMALLEST_PIECE = 4, 64  # of the queries of a row that sees itself, each with the keys up to its end alone


class OneOf(NamedTuple):
    """A window that is known only inside the scan over layers: one of some widths (None: all keys)."""

    widths: tuple[int | None, ...]
    which: Int32[Array, ""]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B _ _ _"],
    v: Float[Array, "B _ _ _"],
    *,
    q_positions: Int32[Array, "B T"],
    k_positions: Int32[Array, "B S"],
    q_segments: Int32[Array, "B T"],
    k_segments: Int32[Array, "B S"],
    scale: float,
    window: int | OneOf | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    cached: bool = False,
    documents: int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v over the keys of the same segment that are not later and inside the window.

    Args:
      q: query head n reads kv head n // (N/K), without repeating k or v.
      k: [B,S,K,H]; `cached`: [B,K,H,S], a cache's layout.
      v: [B,S,K,H]; `cached`: [B,K,S,H].
      q_positions: restarting at each segment.
      k_positions: of the keys.
      q_segments: 0 is padding.
      k_segments: of the keys.
      scale: of the scores, mostly 1/sqrt(H).
      window: a key is seen if q_position - k_position < window (Mistral's sliding window); None: all.
      softcap: c of c * tanh(scores / c) before the mask (Gemma 2, arXiv:2408.00118); None: none.
      sinks: of each head, the score of a key that every query sees and whose value is nothing (gpt-oss); None: none.
      cached: k and v are one layer's part of a cache.
      documents: of a row that sees itself, at most so many segments, numbered from 1 with the padding behind them;
        None: any. cuDNN is quicker where it knows.

    Returns:
      In q's dtype. Scores and softmax are float32. A padding query reads padding keys and stays finite.
      Without a cache and with T = S, a row sees itself, in order: what stands behind a query is not looked at.
    """
    if not cached and q.shape[1] == k.shape[1] >= SPLASH_FROM and sharding.platform() == "tpu":
        from specjax.models import splash  # here, because it takes a quarter of a second that only a TPU's user owes

        given: dict[str, Any] = {"q_segments": q_segments, "k_segments": k_segments, "scale": scale, "softcap": softcap}
        given["sinks"] = sinks
        return _of_width(window, functools.partial(splash.attend, **given), q, k, v)
    if not cached and sinks is None and cudnn.takes(q, k, softcap):
        if isinstance(window, OneOf) and documents != 1:
            documents = None  # packed rows were not seen to run in a branch
        given = {"segments": q_segments, "scale": scale, "documents": documents}
        return _of_width(window, functools.partial(cudnn.attend, **given), q, k, v)
    width: Any = window
    if isinstance(window, OneOf):
        width = jnp.array([NO_WINDOW if w is None else w for w in window.widths], jnp.int32)[window.which]
    seen = _Seen(q_positions, k_positions, q_segments, k_segments, width)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(k.shape[1] if cached else k.shape[2], -1)
    if cached:
        return _from_cache(q, k, v, seen, scale, softcap, sinks)
    # Queries may be split by length; each device then needs the keys of its rows whole.
    k, v = (sharding.constrain(x, "batch", None, "kv_heads", None).swapaxes(1, 2) for x in (k, v))
    grouped = q.reshape(*q.shape[:2], k.shape[1], -1, q.shape[3]).transpose(0, 2, 3, 1, 4)
    if sharding.platform() == "cpu":  # which knows no product of bfloat16 that accumulates in float32 in every layout
        grouped, k, v = (x.astype(jnp.float32) for x in (grouped, k, v))
    return (
        _attention(scale, softcap, grouped, k, v, seen, sinks).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    )


class _Seen(NamedTuple):
    """Which keys a query sees; the arguments of `attend`."""

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array
    k_segments: jax.Array
    width: Any

    def piece(self, at: slice) -> "_Seen":
        """Of some queries, and the keys up to their end."""
        queries = {name: getattr(self, name)[:, at] for name in ("q_positions", "q_segments")}
        keys = {name: getattr(self, name)[:, : at.stop] for name in ("k_positions", "k_segments")}
        return self._replace(**queries, **keys)

    def mask(self) -> jax.Array:
        """Bool [B,1,1,T,S]."""
        distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
        seen = (distance >= 0) & (self.q_segments[:, :, None] == self.k_segments[:, None, :])
        return (seen if self.width is None else seen & (distance < self.width))[:, None, None]


def _scores(q: jax.Array, k: jax.Array, k_axes: str, seen: _Seen, scale: float, softcap: float | None) -> jax.Array:
    """Float32 [B,K,G,T,S]; a key that is not seen has the lowest number."""
    scores = jnp.einsum(f"BKGTH,{k_axes}->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    return jnp.where(seen.mask(), scores, jnp.finfo(jnp.float32).min)


def _from_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: _Seen,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """`attend` for a cache's layout. There XLA:CPU knows no product of bfloat16 that accumulates in float32."""
    grouped = q.reshape(*q.shape[:2], k.shape[1], -1, q.shape[3]).transpose(0, 2, 3, 1, 4).astype(jnp.float32)
    scores = _scores(grouped, k.astype(jnp.float32), "BKHS", seen, scale, softcap)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    else:
        column = jnp.broadcast_to(sinks[None, :, :, None, None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1].astype(v.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, v).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: _Seen,
    sinks: jax.Array | None,
) -> jax.Array:
    """[B,K,G,T,H], [B,K,S,H] twice, sinks float32 [K,G] -> [B,K,G,T,H] in q's dtype."""
    return _forward(scale, softcap, q, k, v, seen, sinks)[0]


def _pieces(q: jax.Array, k: jax.Array) -> list[slice]:
    """Pieces of the queries, each of which sees no key behind its own end: a part of the triangle is never computed."""
    length = q.shape[3]
    count = 1
    if length == k.shape[2] and sharding.parts("length", length) == 1:
        count = max(1, min(PIECES, length // SMALLEST_PIECE))
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]


def _forward(
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: _Seen,
    sinks: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """The output, and what the backward pass needs."""
    pieces = _pieces(q, k)
    if len(pieces) == 1:
        out, lse = _forward_piece(scale, softcap, q, k, v, seen, sinks)
    else:
        found = [
            _forward_piece(
                scale, softcap, q[:, :, :, at], k[:, :, : at.stop], v[:, :, : at.stop], seen.piece(at), sinks
            )
            for at in pieces
        ]
        out, lse = (jnp.concatenate(parts, axis=3) for parts in zip(*found, strict=True))
    out, lse = checkpoint_name(out, NAME), checkpoint_name(lse, NAME)
    return out, (q, k, v, seen, sinks, out, lse)


def _forward_piece(
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: _Seen,
    sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The output, and each query's log-sum-exp, its sink included, float32 [B,K,G,T]."""
    sink = None if sinks is None else sinks[None, :, :, None, None]

    def block(part: Any) -> tuple[jax.Array, jax.Array]:
        (q,), where = part
        scores = _scores(q, k, "BKSH", seen._replace(**where), scale, softcap)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        if sink is not None:
            highest = jnp.maximum(highest, sink)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sink is not None:
            total += jnp.exp(sink - highest)
        out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / total).astype(q.dtype), (highest + jnp.log(total))[..., 0]

    length = q.shape[3]
    if length <= QUERY_CHUNK:
        return block(((q,), {}))
    return _uncut(jax.lax.map(block, _cut(length, (q,), seen)), length)


def _backward(scale: float, softcap: float | None, kept: Any, dout: jax.Array) -> tuple[Any, ...]:
    """The gradients of q, k, v and the sinks."""
    q, k, v, seen, sinks, out, lse = kept
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dsinks = None
    if sinks is not None:  # its value is nothing: it takes weight from what the keys give
        dsinks = -jnp.sum(jnp.exp(sinks[None, :, :, None] - lse) * delta, axis=(0, 3))
    parts, pieces = (q, dout, lse, delta), _pieces(q, k)
    if len(pieces) == 1:
        dq, dk, dv = _backward_piece(scale, softcap, parts, k, v, seen)
    else:
        found = []
        for at in pieces:
            mine = tuple(x[:, :, :, at] for x in parts)
            found.append(_backward_piece(scale, softcap, mine, k[:, :, : at.stop], v[:, :, : at.stop], seen.piece(at)))
        dqs, dks, dvs = zip(*found, strict=True)
        dq, dk, dv = jnp.concatenate(dqs, axis=3), *(functools.reduce(_add_first, x[::-1]) for x in (dks, dvs))
    return dq, dk.swapaxes(2, 3).astype(k.dtype), dv.swapaxes(2, 3).astype(v.dtype), None, dsinks


def _add_first(sums: jax.Array, part: jax.Array) -> jax.Array:
    """[...,S] and [...,P] -> [...,S]: the part added to the first P."""
    first = part.shape[-1]
    return jnp.concatenate([sums[..., :first] + part, sums[..., first:]], axis=-1)


def _backward_piece(
    scale: float, softcap: float | None, parts: tuple[jax.Array, ...], k: jax.Array, v: jax.Array, seen: _Seen
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of some queries, and their share of those of keys and values, float32 [B,K,H,S].

    With the keys last, the scores are the right-hand side of each product: XLA:CPU transposes a left-hand side that is
    contracted over its rows, and the queries are the smaller of the two.
    """

    def product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(axes, x, y.astype(x.dtype), preferred_element_type=jnp.float32)

    def block(part: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        (q, dout, lse, delta), where = part
        mine = seen._replace(**where)
        scores = _scores(q, k, "BKSH", mine, scale, softcap)
        weights = jnp.exp(scores - lse[..., None])
        dv = product("BKGTH,BKGTS->BKHS", dout, weights)
        dweights = jnp.einsum("BKGTH,BKSH->BKGTS", dout, v, preferred_element_type=jnp.float32)
        dscores = weights * (dweights - delta[..., None]) * scale
        if softcap is not None:  # where nothing is seen the weights are 0
            dscores *= 1 - jnp.where(mine.mask(), scores / softcap, 0) ** 2
        dscores = dscores.astype(q.dtype)
        dq = jnp.einsum("BKGTS,BKSH->BKGTH", dscores, k, preferred_element_type=jnp.float32).astype(q.dtype)
        return dq, product("BKGTH,BKGTS->BKHS", q, dscores), dv

    length = parts[0].shape[3]
    if length <= QUERY_CHUNK:
        return block((parts, {}))

    def add(sums: Any, part: Any) -> Any:
        dq, dk, dv = block(part)
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(add, (zeros, zeros), _cut(length, parts, seen))
    return _uncut(dq, length), dk, dv


_attention.defvjp(_forward, _backward)


def _cut(length: int, parts: Any, seen: _Seen) -> tuple[Any, dict[str, jax.Array]]:
    """Chunks of all queries, on a new axis in front: of `parts`, [B,K,G,T,...] each, and of what the queries see."""
    ways = sharding.parts("length", length)
    size = _chunk(length // ways)
    spare = -(length // ways) % size if ways == 1 else 0

    def cut(x: jax.Array, axis: int) -> jax.Array:
        if spare:
            x = jnp.pad(x, [(0, spare if i == axis else 0) for i in range(x.ndim)])
        return sharding.cut(x, size, ways, axis)

    where = {name: cut(getattr(seen, name), 1) for name in ("q_positions", "q_segments")}
    return tuple(cut(x, 3) for x in parts), where


def _uncut(chunks: Any, length: int) -> Any:
    """The inverse of `_cut`, of arrays [C,B,K,G,T,...]."""
    ways = sharding.parts("length", length)
    return jax.tree.map(lambda x: sharding.uncut(x, ways, 3)[:, :, :, :length], chunks)


def store(
    cache: Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: Int32[Array, ""] | int,
    slot: Int32[Array, ""] | int,
) -> Cache:
    """The cache with k and v in that layer's slots slot..slot+T-1.

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


def _of_width(window: int | OneOf | None, kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """A kernel that wants to know its window when it is compiled: one for each width there is, of which one runs."""
    if not isinstance(window, OneOf):
        return kernel(*arrays, window=window)
    widths = tuple(dict.fromkeys(window.widths))
    which = jnp.array([widths.index(width) for width in window.widths], jnp.int32)[window.which]
    return jax.lax.switch(which, [functools.partial(kernel, window=width) for width in widths], *arrays)


def _chunk(length: int) -> int:
    """The largest divisor of a length that is at most QUERY_CHUNK; QUERY_CHUNK where that would be tiny.

    >>> _chunk(512), _chunk(4096), _chunk(1536), _chunk(2003)
    (512, 1024, 768, 1024)
    """
    size = next(size for size in range(min(length, QUERY_CHUNK), 0, -1) if length % size == 0)
    return size if size >= QUERY_CHUNK // 8 else QUERY_CHUNK
