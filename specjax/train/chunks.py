"""The vocabulary's logits, a chunk of tokens at a time: [B,T,V] is in no device's memory whole.

`logprobs` makes numbers per token of them, `objective` the sums of the next-token loss.

B batch, T length, C chunk, D embed, V vocab.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32, Shaped

from specjax import sharding
from specjax.models import Decoder
from specjax.models.moe import Stats, load_balancing_loss
from specjax.models.products import contract

CHUNK_ELEMENTS = 2**25  # float32 logits alive at once (128 MiB); a batch with fewer is one chunk
GPU_CHUNK_ELEMENTS = 2**28  # there (1 GiB): smaller products leave a GPU idle


class Layout(NamedTuple):
    """How the logits of a batch lie on the mesh and in time.

    Attributes:
      batch: the rows' logical axis.
      vocab: the vocabulary's.
      size: of a chunk, on each part of the length.
      parts: that the mesh cuts the length into.
      divisor: of the logits.
      softcap: of the logits, or None.
      groups: G, equal groups of consecutive rows whose sums stay apart.
      by_row: whether the loss of each row is wanted beside the groups' sums.
    """

    batch: str
    vocab: str
    size: int
    parts: int
    divisor: float
    softcap: float | None
    groups: int
    by_row: bool = False


def layout_of(model: Decoder, rows: int, length: int) -> Layout:
    """The layout of a batch of this size, on the mesh in context."""
    mesh, c = jax.sharding.get_abstract_mesh(), model.config
    parts, devices = sharding.parts("length", length), 1 if mesh.empty else mesh.size
    size = _chunk_length(rows, length // parts, parts * c.vocab_size, devices, sharding.platform() == "gpu")
    axes = _axes(rows, length, c.vocab_size)
    return Layout(*axes, size, parts, c.logits_divisor, c.logits_softcap, model.groups)


def hidden_of(model: Decoder, batch: dict[str, Array], key: Array | None) -> tuple[Float[Array, "B T D"], Stats | None]:
    """The last layer's output for a batch, and the routers' sums (None for a dense model)."""
    return model.hidden_and_stats(batch["tokens"], batch["positions"], batch["segment_ids"], key)


def router_loss(stats: Stats | None) -> Float32[Array, ""]:
    """The routers' balancing loss; 0 for a dense model."""
    return jnp.zeros((), jnp.float32) if stats is None else load_balancing_loss(stats)


def table_of(model: Decoder, layout: Layout) -> Float[Array, "V D"] | None:
    """The output layer's weights in the compute dtype, moved to where the chunks want them once per step.

    None where an adapter's factors lie over the output layer.
    """
    table = model.output_table()
    if table is None:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    table = table.astype(model.dtype)
    if not mesh.empty and table.shape[0] % sharding.ways(mesh, sharding.RULES[layout.vocab]) == 0:
        table = sharding.constrain(table, layout.vocab, None)
    return table


def adapted_logits(model: Decoder, layout: Layout, hidden: Float[Array, "B C D"]) -> Float32[Array, "B C V"]:
    """The logits of a model whose output layer wears factors."""
    return sharding.constrain(model.unembed(hidden), layout.batch, "length", layout.vocab)


def over_chunks(layout: Layout, chunk: Callable[..., Any], *arrays: Shaped[Array, "B T ..."]) -> tuple[Any, Any]:
    """Calls `chunk` on the tokens of one chunk after another.

    Chunks are cut along the length, within each device's part of it: no axis loses its sharding.

    Args:
      layout: of the batch.
      chunk: maps slices of the arrays to (sums, values), values [B,C,...] per token.
      arrays: what is cut.

    Returns:
      The sums of all chunks, and the values [B,T,...] in the tokens' order.
    """
    if layout.size * layout.parts == arrays[0].shape[1]:
        return chunk(*arrays)

    def add(sums: Any, part: Any) -> tuple[Any, Any]:
        more, values = chunk(*part)
        return jax.tree.map(jnp.add, sums, more), values

    parts = [sharding.cut(x, layout.size, layout.parts) for x in arrays]
    shapes = jax.eval_shape(lambda part: chunk(*part)[0], [x[0] for x in parts])
    sums, values = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
    return sums, jax.tree.map(lambda x: sharding.uncut(x, layout.parts), values)


def logits_of(layout: Layout, table: Float[Array, "V D"], hidden: Float[Array, "B C D"]) -> Float32[Array, "B C V"]:
    """The logits of a chunk, before what `finished` does to them."""
    logits = contract(sharding.constrain(hidden, layout.batch, "length", None), table, 1, jnp.float32)
    return sharding.constrain(logits, layout.batch, "length", layout.vocab)


def finished(layout: Layout, logits: Float32[Array, "B C V"]) -> Float32[Array, "B C V"]:
    """The model's logits: divided and capped as its config says."""
    if layout.divisor != 1:
        logits = logits / layout.divisor
    return logits if layout.softcap is None else jnp.tanh(logits / layout.softcap) * layout.softcap


def target_logit(logits: Float32[Array, "B C V"], targets: Int32[Array, "B C"]) -> Float32[Array, "B C"]:
    """The targets' logits; a masked sum, not a gather: it stays inside a sharded vocabulary."""
    hit = targets[:, :, None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None]
    return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def hidden_gradient(
    layout: Layout, table: Float[Array, "V D"], dlogits: Float[Array, "B C V"]
) -> Float[Array, "B C D"]:
    """The gradient of a chunk's hidden states, all in the compute dtype."""
    return sharding.constrain(contract(dlogits, table.T, 1), layout.batch, "length", None)


def table_gradient(
    layout: Layout, dlogits: Float[Array, "B C V"], hidden: Float[Array, "B C D"]
) -> Float32[Array, "V D"]:
    """A chunk's part of the gradient of the output layer's weights."""
    dtable = _summed_over_tokens(dlogits, sharding.constrain(hidden, layout.batch, "length", None))
    return sharding.constrain(dtable, layout.vocab, None)


def _summed_over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """[B,C,V] and [B,C,D] -> float32 [V,D]."""
    if sharding.platform() == "cpu":  # which knows no product of bfloat16 that accumulates in float32 in every layout
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    if sharding.undivided():  # one axis of tokens, as in `contract`
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    tokens = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, y, (tokens, tokens), preferred_element_type=jnp.float32)


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
