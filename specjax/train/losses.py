"""Next-token loss without the [B,T,V] logits: summed over chunks of tokens, each with its gradient at once.

The loss is a sum, so that the gradient of a chunk's hidden states is known as soon as its logits are: the forward pass
makes it there (Hsu et al. 2024, Liger Kernel, arXiv:2410.10989), and no logits are made a second time.

B batch, T length, C chunk, D embed, V vocab.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax import sharding
from specjax.models import Decoder
from specjax.models.moe import load_balancing_loss
from specjax.models.products import contract, exact_float32

CHUNK_ELEMENTS = 2**25  # float32 logits alive at once (128 MiB); a batch with fewer is one chunk
GPU_CHUNK_ELEMENTS = 2**28  # there (1 GiB): smaller products leave a GPU idle


def token_sums(
    model: Decoder,
    batch: dict[str, jax.Array],
    dropout_key: jax.Array | None = None,
    documents: int | None = None,
) -> dict[str, jax.Array]:
    """Sums over a batch's loss tokens; dividing them is left to the caller, so that batches add up exactly.

    Args:
      model: a decoder.
      batch: tokens, targets, loss_mask, positions, segment_ids, each [B,T].
      dropout_key: for LoRA's dropout; None: none.
      documents: at most so many in a row, where that is known.

    Returns:
      float32 scalars: `nll`, the summed -log p(target) in nats; `correct`, targets of highest probability; `count`,
      loss tokens; `router`, the routers' balancing loss times `count` (0 for a dense model), so that the sums of
      micro-batches weigh it as they weigh their tokens.
    """
    where = (batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden, stats = model.hidden_and_stats(*where, dropout_key, documents)
    rows, length = batch["targets"].shape
    how = _how(model, rows, length)
    mask = batch["loss_mask"].astype(jnp.float32)
    table = model.output_table()
    if table is None:  # an adapter's factors lie over the output layer: its logits are made again in the backward pass
        logits = lambda hidden: sharding.constrain(model.unembed(hidden), how.batch, "length", how.vocab)  # noqa: E731
        again = jax.checkpoint(lambda *part: _score(logits(part[0]), *part[1:]), prevent_cse=False)
        (nll, correct), _ = _over_chunks(how, lambda *part: (again(*part), None), hidden, batch["targets"], mask)
    else:
        mesh = jax.sharding.get_abstract_mesh()
        table = table.astype(model.dtype)
        if not mesh.empty and table.shape[0] % sharding.ways(mesh, sharding.RULES[how.vocab]) == 0:
            table = sharding.constrain(table, how.vocab, None)  # moved there once a step, before the chunks
        with exact_float32(model.dtype):
            nll, correct = _sums(how, table, hidden, batch["targets"], mask)
    count = jnp.sum(mask)
    router = jnp.zeros((), jnp.float32) if stats is None else load_balancing_loss(stats) * count
    return {"nll": nll, "correct": correct, "count": count, "router": router}


class _How(NamedTuple):
    """How the loss of a batch is computed.

    Attributes:
      batch: the rows' logical axis.
      vocab: the vocabulary's.
      size: of a chunk, on each part of the length.
      parts: that the mesh cuts the length into.
      divisor: of the logits.
      softcap: of the logits, or None.
    """

    batch: str
    vocab: str
    size: int
    parts: int
    divisor: float
    softcap: float | None


def _how(model: Decoder, rows: int, length: int) -> _How:
    mesh, c = jax.sharding.get_abstract_mesh(), model.config
    parts, devices = sharding.parts("length", length), 1 if mesh.empty else mesh.size
    size = _chunk_length(rows, length // parts, parts * c.vocab_size, devices, sharding.platform() == "gpu")
    return _How(*_axes(rows, length, c.vocab_size), size, parts, c.logits_divisor, c.logits_softcap)


def _score(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [B,C,V] -> the summed nats, and how many targets are the likeliest."""
    # The target's logit by a masked sum, not a gather: it stays inside a sharded vocabulary.
    hit = targets[:, :, None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None]
    target_logits = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - target_logits
    correct = target_logits >= jnp.max(logits, axis=-1)
    return jnp.sum(nll * mask), jnp.sum(correct * mask)


def _over_chunks(how: _How, chunk: Callable[..., Any], *arrays: jax.Array) -> tuple[Any, Any]:
    """Of `chunk`, (hidden, targets, mask) of some tokens -> (sums, other): the sums of all, and the others in order.

    Chunks are cut along the length, within each device's part of it: no axis loses its sharding.
    """
    if how.size * how.parts == arrays[0].shape[1]:
        return chunk(*arrays)

    def add(sums: Any, part: Any) -> tuple[Any, Any]:
        found, other = chunk(*part)
        return jax.tree.map(jnp.add, sums, found), other

    parts = [sharding.cut(x, how.size, how.parts) for x in arrays]
    shapes = jax.eval_shape(lambda part: chunk(*part)[0], [x[0] for x in parts])
    sums, others = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
    return sums, jax.tree.map(lambda x: sharding.uncut(x, how.parts), others)


def _logits(how: _How, table: jax.Array, hidden: jax.Array) -> jax.Array:
    """[V,D] and [B,C,D] -> float32 [B,C,V], before what `_finished` does to them."""
    logits = contract(sharding.constrain(hidden, how.batch, "length", None), table, 1, jnp.float32)
    return sharding.constrain(logits, how.batch, "length", how.vocab)


def _finished(how: _How, logits: jax.Array) -> jax.Array:
    if how.divisor != 1:
        logits = logits / how.divisor
    return logits if how.softcap is None else jnp.tanh(logits / how.softcap) * how.softcap


def _summed_over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """[B,C,V] and [B,C,D] -> float32 [V,D]."""
    if sharding.platform() == "cpu":  # which knows no product of bfloat16 that accumulates in float32 in every layout
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    if sharding.undivided():  # one axis of tokens, as in `contract`
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    tokens = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, y, (tokens, tokens), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    how: _How, table: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_score` of all tokens: [V,D] and [B,T,D] in the compute dtype, [B,T] twice."""

    def chunk(hidden: jax.Array, *rest: jax.Array) -> tuple[Any, None]:
        return _score(_finished(how, _logits(how, table, hidden)), *rest), None

    return _over_chunks(how, chunk, hidden, targets, mask)[0]


def _sums_forward(how: _How, table: Any, hidden: Any, targets: Any, mask: Any) -> tuple[Any, Any]:
    """The sums, and the gradients of the nats by the hidden states and, where it trains, by the table."""
    weights: jax.Array = table.value

    def chunk(hidden: jax.Array, *rest: jax.Array) -> tuple[Any, jax.Array]:
        score = lambda logits: _score(_finished(how, logits), *rest)  # noqa: E731
        sums: tuple[jax.Array, ...]
        sums, pull = jax.vjp(score, _logits(how, weights, hidden))
        (dlogits,) = pull((jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)))
        dlogits = dlogits.astype(hidden.dtype)  # as in torch, where float32 logits are cast from the compute dtype's
        dhidden = contract(dlogits, weights.T, 1)
        if table.perturbed:
            dtable = _summed_over_tokens(dlogits, sharding.constrain(hidden, how.batch, "length", None))
            sums = (*sums, sharding.constrain(dtable, how.vocab, None))
        return sums, sharding.constrain(dhidden, how.batch, "length", None)

    (nll, correct, *dtable), dhidden = _over_chunks(how, chunk, hidden.value, targets.value, mask.value)
    return (nll, correct), (dhidden, *dtable)


def _sums_backward(how: _How, kept: Any, given: Any) -> tuple[Any, ...]:
    dhidden, *dtable = kept
    dnll = given[0]
    if isinstance(dnll, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    by = lambda x, dtype: (x.astype(jnp.float32) * dnll).astype(dtype)  # noqa: E731
    return by(dtable[0], dhidden.dtype) if dtable else None, by(dhidden, dhidden.dtype), None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _axes(rows: int, length: int, vocab_size: int) -> tuple[str, str]:
    """How the logits are split: the vocabulary over `fsdp` too where rows are fewer than words, else the rows.

    Either the rows or the output layer's table is gathered over `fsdp`: the smaller of the two.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return "batch", "vocab"
    gathered = rows * length // sharding.ways(mesh, (*sharding.RULES["loss_batch"], *sharding.RULES["length"]))
    fewer = gathered <= vocab_size // sharding.ways(mesh, sharding.RULES["vocab"])
    return ("loss_batch", "loss_vocab") if fewer else ("batch", "vocab")


def _chunk_length(rows: int, length: int, vocab_size: int, devices: int = 1, gpu: bool = False) -> int:
    """The largest divisor of the length whose logits on each device stay within a chunk's elements (or 1).

    >>> _chunk_length(8, 1024, 128_000), _chunk_length(8, 1024, 128_000, devices=8)
    (32, 256)
    """
    elements = GPU_CHUNK_ELEMENTS if gpu else CHUNK_ELEMENTS
    most = max(1, elements * devices // (rows * vocab_size))
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)
