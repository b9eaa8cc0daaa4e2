"""Log-probabilities of the targets, token by token: what objectives other than `next_token` are written from.

The logits are made a chunk of tokens at a time, and again in the backward pass: neither pass holds those of all tokens.

B batch, T length, C chunk, D embed, V vocab.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32, Shaped

from specjax.models import Decoder
from specjax.models.products import exact_float32
from specjax.train import chunks
from specjax.train.chunks import Layout


class TokenScores(NamedTuple):
    """What the model says of each target.

    Attributes:
      logprobs: log p(target) in nats. Of tokens that the loss does not count it is that of whatever target stands
        there: multiply by `loss_mask`.
      logsumexp: the logarithm of the sum of the exponentials of all logits; has a gradient too.
      correct: 1 where the target is the likeliest token, else 0.
      router: a mixture of experts' balancing loss over the batch; 0 for a dense model.
    """

    logprobs: Float32[Array, "B T"]
    logsumexp: Float32[Array, "B T"]
    correct: Float32[Array, "B T"]
    router: Float32[Array, ""]


def token_logprobs(model: Decoder, batch: dict[str, Shaped[Array, "B T"]], key: Array | None = None) -> TokenScores:
    """Scores the targets of a batch, differentiably.

    The vocabulary may be split over the mesh; a soft cap and a divisor of the logits are the model's. Gradients flow
    into whatever trains: the hidden states' and, where it does, the output table's.

    Args:
      model: a decoder; call this inside a compiled function.
      batch: tokens, targets, positions, segment_ids, each [B,T].
      key: of LoRA's dropout; None: no dropout.
    """
    hidden, stats = chunks.hidden_of(model, batch, key)
    layout = chunks.layout_of(model, *batch["targets"].shape)
    table = chunks.table_of(model, layout)
    if table is None:  # an adapter's factors lie over the output layer
        scored = lambda hidden, targets: _score(chunks.adapted_logits(model, layout, hidden), targets)  # noqa: E731
        again = jax.checkpoint(scored, prevent_cse=False)
        _, scores = chunks.over_chunks(layout, lambda *part: ((), again(*part)), hidden, batch["targets"])
    else:
        with exact_float32(model.dtype):
            scores = _scores(layout, table, hidden, batch["targets"])
    logprobs, logsumexp, correct = scores
    return TokenScores(logprobs, logsumexp, correct, chunks.router_loss(stats))


def _score(
    logits: Float32[Array, "B C V"], targets: Int32[Array, "B C"]
) -> tuple[Float32[Array, "B C"], Float32[Array, "B C"], Float32[Array, "B C"]]:
    """`TokenScores`' first three."""
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    target_logits = chunks.target_logit(logits, targets)
    correct = (target_logits >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return target_logits - logsumexp, logsumexp, correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    layout: Layout, table: Float[Array, "V D"], hidden: Float[Array, "B T D"], targets: Int32[Array, "B T"]
) -> tuple[Float32[Array, "B T"], ...]:
    """`_score` of all tokens; table and hidden states in the compute dtype."""

    def chunk(hidden: jax.Array, targets: jax.Array) -> tuple[tuple[()], Any]:
        return (), _score(chunks.finished(layout, chunks.logits_of(layout, table, hidden)), targets)

    return chunks.over_chunks(layout, chunk, hidden, targets)[1]


def _scores_forward(layout: Layout, table: Any, hidden: Any, targets: Any) -> tuple[Any, Any]:
    trains = ((),) if table.perturbed else ()  # told by the structure: what is kept for the backward pass are arrays
    given = (table.value, hidden.value, targets.value)
    return _scores(layout, *given), (*given, trains)


def _scores_backward(layout: Layout, kept: Any, given: Any) -> tuple[Any, ...]:
    table, hidden, targets, trains = kept
    zero = jax.custom_derivatives.SymbolicZero
    dlogprobs, dlogsumexp = (jnp.zeros(x.shape, x.dtype) if isinstance(x, zero) else x for x in given[:2])

    def chunk(hidden: jax.Array, targets: jax.Array, *by: jax.Array) -> tuple[Any, jax.Array]:
        score = lambda logits: _score(chunks.finished(layout, logits), targets)[:2]  # noqa: E731
        _, pull = jax.vjp(score, chunks.logits_of(layout, table, hidden))
        dlogits = pull(by)[0].astype(hidden.dtype)  # as torch's backward pass has it
        sums = (chunks.table_gradient(layout, dlogits, hidden),) if trains else ()
        return sums, chunks.hidden_gradient(layout, table, dlogits)

    dtable, dhidden = chunks.over_chunks(layout, chunk, hidden, targets, dlogprobs, dlogsumexp)
    return dtable[0].astype(table.dtype) if dtable else None, dhidden, None


_scores.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)
