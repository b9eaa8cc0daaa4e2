"""Next-token loss without the [B,T,V] logits: summed over chunks of tokens, recomputed in the backward pass.

B batch, T length, C chunk, D embed, V vocab.
"""

import jax
import jax.numpy as jnp

from specjax import sharding
from specjax.models import Decoder
from specjax.models.moe import load_balancing_loss

CHUNK_ELEMENTS = 2**25  # float32 logits alive at once (128 MiB); a batch with fewer is one chunk


def token_sums(
    model: Decoder, batch: dict[str, jax.Array], dropout_key: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Sums over a batch's loss tokens; dividing them is left to the caller, so that batches add up exactly.

    Args:
      model: a decoder.
      batch: tokens, targets, loss_mask, positions, segment_ids, each [B,T].
      dropout_key: for LoRA's dropout; None: none.

    Returns:
      float32 scalars: `nll`, the summed -log p(target) in nats; `correct`, targets of highest probability; `count`,
      loss tokens; `router`, the routers' balancing loss times `count` (0 for a dense model), so that the sums of
      micro-batches weigh it as they weigh their tokens.
    """
    hidden, stats = model.hidden_and_stats(batch["tokens"], batch["positions"], batch["segment_ids"], dropout_key)
    rows, length = batch["targets"].shape
    batch_axis, vocab_axis = _axes(rows, length, model.config.vocab_size)
    head = _head(model, vocab_axis)

    def chunk(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = sharding.constrain(hidden, batch_axis, "length", None)
        logits = sharding.constrain(model.unembed(hidden, table=head), batch_axis, "length", vocab_axis)
        # The target's logit by a masked sum, not a gather: it stays inside a sharded vocabulary.
        hit = targets[:, :, None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None]
        target_logits = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - target_logits
        correct = target_logits >= jnp.max(logits, axis=-1)
        return jnp.sum(nll * mask), jnp.sum(correct * mask)

    mesh, context = jax.sharding.get_abstract_mesh(), sharding.parts("length", length)
    devices = 1 if mesh.empty else mesh.size
    size = _chunk_length(rows, length // context, context * model.config.vocab_size, devices)
    mask = batch["loss_mask"].astype(jnp.float32)
    if size * context == length:
        nll, correct = chunk(hidden, batch["targets"], mask)
    else:
        # Chunks are cut along the length, within each device's part of it: no axis loses its sharding.
        def add(sums: tuple[jax.Array, jax.Array], part: list[jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
            nll, correct = jax.checkpoint(chunk, prevent_cse=False)(*part)
            return (sums[0] + nll, sums[1] + correct), None

        zero = jnp.zeros((), jnp.float32)
        (nll, correct), _ = jax.lax.scan(
            add, (zero, zero), [sharding.cut(x, size, context) for x in (hidden, batch["targets"], mask)]
        )
    count = jnp.sum(mask)
    router = jnp.zeros((), jnp.float32) if stats is None else load_balancing_loss(stats) * count
    return {"nll": nll, "correct": correct, "count": count, "router": router}


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


def _head(model: Decoder, vocab_axis: str) -> jax.Array | None:
    """The output layer's table [V,D] in the compute dtype, split by its vocabulary alone; None where that cannot be.

    It is moved there once a step, before the chunks.
    """
    mesh = jax.sharding.get_abstract_mesh()
    table = model.output_table()
    if mesh.empty or table is None or table.shape[0] % sharding.ways(mesh, sharding.RULES[vocab_axis]):
        return None
    return sharding.constrain(table.astype(model.dtype), vocab_axis, None)


def _chunk_length(rows: int, length: int, vocab_size: int, devices: int = 1) -> int:
    """The largest divisor of the length whose logits on each device stay within CHUNK_ELEMENTS (or 1).

    >>> _chunk_length(8, 1024, 128_000), _chunk_length(8, 1024, 128_000, devices=8)
    (32, 256)
    """
    most = max(1, CHUNK_ELEMENTS * devices // (rows * vocab_size))
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)
