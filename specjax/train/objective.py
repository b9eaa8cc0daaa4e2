"""What is minimised: an objective is a value, which a training step and an evaluation are given.

It names the batch's columns that it reads, and makes of a batch named pairs (sum, denominator), so that micro-batches,
devices and evaluation batches add up exactly and are divided once. The pair `loss` is minimised.

`next_token` is the objective unless another is given. Its loss is a sum, so the gradient of a chunk's hidden states is
known as soon as its logits are: the forward pass makes it there (Hsu et al. 2024, Liger Kernel, arXiv:2410.10989), and
no logits are made a second time. Other objectives are written from `logprobs.token_logprobs`.

B batch, T length, C chunk, D embed, V vocab, G groups of rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32, Shaped

from specjax.errors import UserError
from specjax.models import Decoder
from specjax.models.products import exact_float32
from specjax.train import chunks
from specjax.train.chunks import Layout

Batch = dict[str, Array]
Sums = dict[str, tuple[Float32[Array, " G"], Float32[Array, " G"]]]  # name -> (sum, denominator)

SOURCE = "source"  # column of a mixture's batches (`specjax.data.mix`): each token's source, from 1
TOKENS = ("tokens", "targets", "loss_mask", "positions", "segment_ids")


def _nothing_more(means: Mapping[str, float]) -> dict[str, float]:
    return {}


def _as_given(objective: "Objective", model: Decoder, trainable: Any, sets: Mapping[str, Any], rows: int) -> Any:
    return objective, dict(sets)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run minimises.

    Attributes:
      name: what it is called.
      columns: the batch's columns that it reads.
      sums: (model, batch, key) -> name -> (sum, denominator), float32 [G]: `by_group` makes them of [B,T] or [B]
        arrays. `loss` is minimised; the others are reported beside it. A denominator depends on no parameter. `key` is
        of LoRA's dropout, None in an evaluation.
      counts: what the denominator of `loss` counts, such as "tokens": logged as `loss_<counts>`, and by an evaluation
        as `<counts>`.
      derived: the means of an evaluation -> further numbers of it.
      prepare: (objective, model, trainable filter, data sets by name, rows) -> (objective, data sets), called once
        before training: what needs the model as it was then. `rows` fit a device's memory at once.
    """

    name: str
    columns: tuple[str, ...]
    sums: Callable[[Decoder, Batch, jax.Array | None], Sums]
    counts: str = "tokens"
    derived: Callable[[Mapping[str, float]], dict[str, float]] = _nothing_more
    prepare: Callable[..., tuple["Objective", dict[str, Any]]] = _as_given

    def __call__(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The sums of one batch.

        Raises:
          UserError: they have no `loss`, or are no pairs of float32 [G].
        """
        sums = self.sums(model, batch, key)
        if "loss" not in sums:
            raise UserError(f"objective {self.name} gives {', '.join(sums) or 'nothing'}: it must give `loss` too.")
        groups = jnp.shape(sums["loss"][0])
        for name, pair in sums.items():
            given = [(jnp.shape(one), getattr(one, "dtype", None)) for one in pair]
            if len(groups) != 1 or given != [(groups, jnp.float32)] * 2:
                raise UserError(
                    f"objective {self.name}: {name} is {given}: give a sum and a denominator, float32 [G] each, as "
                    "specjax.by_group makes them."
                )
        return sums


def by_group(model: Decoder, values: Shaped[Array, "B ..."]) -> Float32[Array, " {model.groups}"]:
    """Sums within each group of rows: float32 [G]. An ordinary run is one group."""
    grouped = values.astype(jnp.float32).reshape(model.groups, -1, *values.shape[1:])
    return jnp.sum(grouped, axis=tuple(range(1, grouped.ndim)))


def with_router(model: Decoder, loss: Float32[Array, " G"], router: Float32[Array, " G"]) -> Float32[Array, " G"]:
    """The loss with a mixture of experts' balancing part in its gradient and not in its value."""
    coefficient = model.config.router_aux_coef
    return loss + coefficient * (router - jax.lax.stop_gradient(router)) if coefficient else loss


def _next_token(model: Decoder, batch: Batch, key: jax.Array | None = None, *, sources: Sequence[str] = ()) -> Sums:
    hidden, stats = chunks.hidden_of(model, batch, key)
    layout = chunks.layout_of(model, *batch["targets"].shape)._replace(by_row=bool(sources))
    mask = batch["loss_mask"].astype(jnp.float32)
    table = chunks.table_of(model, layout)
    if table is None:  # an adapter's factors lie over the output layer: its logits are made again in the backward pass
        scored = lambda hidden, *rest: _score(layout, chunks.adapted_logits(model, layout, hidden), *rest)  # noqa: E731
        again = jax.checkpoint(scored, prevent_cse=False)
        (nll, correct, *rows), _ = chunks.over_chunks(
            layout, lambda *part: (again(*part), None), hidden, batch["targets"], mask
        )
    else:
        with exact_float32(model.dtype):
            nll, correct, *rows = _summed(layout, table, hidden, batch["targets"], mask)
    count = by_group(model, mask)
    sums = {"loss": (nll, count), "accuracy": (correct, count)}
    for number, name in enumerate(sources, 1):
        here = (jnp.max(batch[SOURCE], axis=1) == number).astype(jnp.float32)
        its = by_group(model, here * jnp.sum(mask, axis=1))
        sums |= {f"loss/{name}": (by_group(model, here * rows[0]), its), f"share/{name}": (its, count)}
    if stats is not None:
        # Weighed by the loss tokens, so that the sums of micro-batches weigh it as they weigh their tokens.
        router = chunks.router_loss(stats) * count
        sums |= {"loss": (with_router(model, nll, router), count), "router_loss": (router, count)}
    return sums


def _perplexity(means: Mapping[str, float]) -> dict[str, float]:
    return {"perplexity": math.exp(min(means["loss"], 700.0))}


#: Cross-entropy of the next token, in nats per loss token; `accuracy` is the share of targets of highest probability,
#: `router_loss` a mixture of experts' balancing loss, which trains times `router_aux_coef` and is no part of `loss`.
next_token = Objective("next_token", TOKENS, _next_token, derived=_perplexity)


def by_source(objective: Objective, sources: Sequence[str]) -> Objective:
    """`next_token` over a mixture: with the loss of each source, and its share of the loss tokens, beside the whole.

    Other objectives, and data of one source (no `sources`), are left as they are.
    """
    if not sources or objective.sums is not _next_token:
        return objective
    sums = functools.partial(_next_token, sources=tuple(sources))
    return dataclasses.replace(objective, columns=(*objective.columns, SOURCE), sums=sums)


def _score(
    layout: Layout, logits: Float32[Array, "B C V"], targets: Int32[Array, "B C"], mask: Float32[Array, "B C"]
) -> tuple[Float32[Array, " ..."], ...]:
    """The summed nats, how many targets are the likeliest, and where the layout says so each row's nats, [B]."""
    target_logits = chunks.target_logit(logits, targets)
    nll = jax.nn.logsumexp(logits, axis=-1) - target_logits
    correct = (target_logits >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    split = (layout.groups, -1, mask.shape[1])
    sums = tuple(jnp.sum((x * mask).reshape(split), axis=(1, 2)) for x in (nll, correct))
    return (*sums, jnp.sum(nll * mask, axis=1)) if layout.by_row else sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    layout: Layout,
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    targets: Int32[Array, "B T"],
    mask: Float32[Array, "B T"],
) -> tuple[Float32[Array, " ..."], ...]:
    """`_score` of all tokens; table and hidden states in the compute dtype."""

    def chunk(hidden: jax.Array, *rest: jax.Array) -> tuple[Any, None]:
        return _score(layout, chunks.finished(layout, chunks.logits_of(layout, table, hidden)), *rest), None

    return chunks.over_chunks(layout, chunk, hidden, targets, mask)[0]


def _summed_forward(layout: Layout, table: Any, hidden: Any, targets: Any, mask: Any) -> tuple[Any, Any]:
    """The sums, and the gradients of the nats by the hidden states and, where it trains, by the table."""
    weights: jax.Array = table.value

    def chunk(hidden: jax.Array, *rest: jax.Array) -> tuple[Any, jax.Array]:
        score = lambda logits: _score(layout, chunks.finished(layout, logits), *rest)  # noqa: E731
        sums: tuple[jax.Array, ...]
        sums, pull = jax.vjp(score, chunks.logits_of(layout, weights, hidden))
        (dlogits,) = pull((jnp.ones_like(sums[0]), *map(jnp.zeros_like, sums[1:])))
        dlogits = dlogits.astype(hidden.dtype)  # as in torch, where float32 logits are cast from the compute dtype's
        dhidden = chunks.hidden_gradient(layout, weights, dlogits)
        if table.perturbed:
            sums = (*sums, chunks.table_gradient(layout, dlogits, hidden))
        return sums, dhidden

    sums, dhidden = chunks.over_chunks(layout, chunk, hidden.value, targets.value, mask.value)
    scores = 3 if layout.by_row else 2
    return sums[:scores], (dhidden, *sums[scores:])


def _summed_backward(layout: Layout, kept: Any, given: Any) -> tuple[Any, ...]:
    dhidden, *dtable = kept
    dnll = given[0]
    if isinstance(dnll, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    if layout.groups == 1:
        by = lambda x: (x.astype(jnp.float32) * dnll[0]).astype(dhidden.dtype)  # noqa: E731
        return by(dtable[0]) if dtable else None, by(dhidden), None, None
    if dtable:
        raise ValueError("the output layer's table is all groups': it cannot train with several groups of rows.")
    rows = jnp.repeat(dnll, dhidden.shape[0] // layout.groups)[:, None, None]
    return None, (dhidden.astype(jnp.float32) * rows).astype(dhidden.dtype), None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
