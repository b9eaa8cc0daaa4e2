"""Prompts into a cache in one pass, then one compiled step per token.

Prompts are padded on the left, so that all rows of a batch write the same cache slot. `prefill` reads the prompts but
for their last tokens; then each turn of the loop in `decode` takes every row's last token and makes the next. What may
differ from call to call is an argument; a bucket of sizes compiles once.

B batch, P prompt length without the last token, N new tokens, P + N cache length, D embed, V vocab, E tokens that end a
text.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from specjax import sharding
from specjax.generation.sampling import penalise, sample
from specjax.models.attention import Caches


class Rows(NamedTuple):
    """A batch of prompts."""

    tokens: Any  # int32 [B,P+1], padded on the left
    lengths: Any  # int32 [B], 0 for a row that fills the batch up
    indices: Any  # int32 [B], each row's stream of random numbers
    limits: Any  # int32 [B], how many tokens it may get
    made: Any  # int32 [B], how many of the prompt's tokens were generated before: that far into its stream


class Choice(NamedTuple):
    """What may change without compiling again: scalars, but for the tokens that end a row, int32 [E]."""

    stop: Any
    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any


class Progress(NamedTuple):
    """A batch between two calls of `decode`."""

    step: Any  # int32, tokens made
    token: Any  # int32 [B], the last one, not yet in the cache
    done: Any  # bool [B]
    out: Any  # int32 [B,N], -1 after a row's end
    cache: Any
    seen: Any  # bool [B,V], the tokens of prompt and text; None without a repetition penalty


def _places(rows: Rows, length: int) -> tuple[Int32[Array, "B S"], Int32[Array, "B S"]]:
    """Positions and segments of the tokens that the slots hold or will hold; negative: padding.

    A slot not yet written is later than every query, so the causal mask hides it.
    """
    positions = jnp.arange(length, dtype=jnp.int32)[None] - (rows.tokens.shape[1] - rows.lengths)[:, None]
    return positions, (positions >= 0).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graph", "new", "penalised"))
def prefill(state: Any, rows: Rows, *, graph: Any, new: int, penalised: bool) -> Progress:
    """The prompts in a cache with room for `new` tokens; `graph` and `state` are the model."""
    model = nnx.merge(graph, state)
    batch, last = rows.tokens.shape[0], rows.tokens.shape[1] - 1
    positions, segments = _places(rows, last + new)
    cache = _placed_cache(model.empty_cache(batch, last + new))
    # A text is as long as its last token says, which the first step reads: longrope must know it now.
    given = (cache, positions, segments, 0, rows.lengths)
    _, cache = model.extend(rows.tokens[:, :last], positions[:, :last], *given)
    seen = None
    if penalised:
        nothing = jnp.zeros((batch, model.config.vocab_size), bool)
        seen = nothing.at[jnp.arange(batch)[:, None], rows.tokens].max(segments[:, : last + 1] > 0)
    out = jnp.full((batch, new), -1, jnp.int32)
    return _placed(Progress(jnp.int32(0), rows.tokens[:, last], rows.lengths == 0, out, cache, seen))


@functools.partial(jax.jit, static_argnames=("graph", "greedy", "few"), donate_argnames="progress")
def decode(
    state: Any,
    layers: Sequence[Any] | None,
    head: Float[Array, "D V"] | None,
    progress: Progress,
    rows: Rows,
    choice: Choice,
    until: Any,
    *,
    graph: Any,
    greedy: bool,
    few: int,
) -> Progress:
    """Makes tokens until `until` of them are made or every row has ended.

    Args:
      state: the model's arrays.
      layers: None or each layer's arrays, see `Decoder.extend`.
      head: None or the output layer's table, see `Decoder.unembed`.
      progress: of `prefill` or an earlier call; it is used up.
      rows: the prompts, as many rows as `progress` has.
      choice: see `Choice`.
      until: int32.
      graph: the rest of the model.
      greedy: take the likeliest token.
      few: see `sample`.
    """
    model = nnx.merge(graph, state)
    last, (batch, new) = rows.tokens.shape[1] - 1, progress.out.shape
    positions, segments = _places(rows, last + new)
    stop, seed, *how, penalty = choice
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows.indices)

    def unfinished(p: Progress) -> Array:
        return (p.step < until) & ~p.done.all()

    def turn(p: Progress) -> Progress:
        where = jax.lax.dynamic_slice_in_dim(positions, last + p.step, 1, axis=1)
        given = (p.cache, positions, segments, last + p.step)
        hidden, cache = model.extend(p.token[:, None], where, *given, layers=layers)
        logits, seen = model.unembed(hidden[:, 0], head), p.seen
        if seen is not None:
            logits = penalise(logits, seen, penalty)
        if greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token = sample(logits, jax.vmap(jax.random.fold_in)(keys, rows.made + p.step), *how, few=few)
        if seen is not None:
            seen = seen.at[jnp.arange(batch), token].set(True)
        ended = p.done | (token[:, None] == stop[None]).any(axis=1)
        out = p.out.at[:, p.step].set(jnp.where(ended, -1, token))
        return Progress(p.step + 1, token, ended | (p.step + 1 >= rows.limits), out, cache, seen)

    return _placed(jax.lax.while_loop(unfinished, turn, progress))


def _placed(p: Progress) -> Progress:
    """On a mesh: the cache split as the model is, the rest on every device, where each process reads all rows."""
    rest = jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), p._replace(cache=None))
    return rest._replace(cache=_placed_cache(p.cache))


def _placed_cache(caches: Caches) -> Caches:
    rows = ("layers", "batch")

    def one(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        if keys.ndim == 4:  # a delta network's last inputs, and its states
            kept = sharding.constrain(keys, *rows, None, "heads")
            return kept, sharding.constrain(values, *rows, "heads", "head_dim", "head_dim")
        kept = sharding.constrain(keys, *rows, "kv_heads", "head_dim", "cache_length")
        return kept, sharding.constrain(values, *rows, "kv_heads", "cache_length", "head_dim")

    return tuple(one(*cache) for cache in caches)


@functools.partial(jax.jit, static_argnames="dtype")
def transposed(table: Float[Array, "V D"], dtype: Any) -> Float[Array, "D V"]:
    """The table in `dtype`, transposed."""
    return table.T.astype(dtype)
