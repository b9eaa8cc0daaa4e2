"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): of two answers, the chosen one more likely.

A row of a batch holds pairs side by side: document 2i+1 is the chosen answer of pair i behind its prompt, document 2i+2
the rejected one (see `specjax.data.preference`).

The reference is the model as it was before training. Where an adapter alone trains that adds nothing yet, that is the
same model with the adapter off, asked in each step. Elsewhere its log-probabilities are computed once, before the first
step, and kept beside the tokens.

B batch, T length, P pairs per row, G groups of rows.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from specjax import sharding
from specjax.errors import UserError, argument, nearest
from specjax.models import Decoder
from specjax.models.adapter import without_adapters
from specjax.train.logprobs import token_logprobs
from specjax.train.objective import TOKENS, Batch, Objective, Sums, by_group, with_router

REFERENCE = "reference_logprobs"

# Of log-ratios of chosen and rejected (summed over tokens), their tokens, beta and label smoothing; TRL's names.
LOSSES: dict[str, Callable[..., jax.Array]] = {
    "sigmoid": lambda c, r, nc, nr, beta, e: -jax.nn.log_sigmoid(beta * (c - r)),
    "sigmoid_norm": lambda c, r, nc, nr, beta, e: -jax.nn.log_sigmoid(beta * (c / nc - r / nr)),
    "hinge": lambda c, r, nc, nr, beta, e: jax.nn.relu(1 - beta * (c - r)),
    "ipo": lambda c, r, nc, nr, beta, e: jnp.square(c / nc - r / nr - 1 / (2 * beta)),
    "robust": lambda c, r, nc, nr, beta, e: (
        (e * jax.nn.log_sigmoid(-beta * (c - r)) - (1 - e) * jax.nn.log_sigmoid(beta * (c - r))) / (1 - 2 * e)
    ),
}


def dpo(*, beta: float = 0.1, loss: str = "sigmoid", label_smoothing: float = 0.0) -> Objective:
    """The objective of `trl.DPOTrainer`, in nats per pair.

    Its pairs are `loss`, `rewards/chosen`, `rewards/rejected` (beta times an answer's log-ratio to the reference),
    `rewards/margins`, `rewards/accuracies`, `logps/chosen` and `logps/rejected`.

    Args:
      beta: how far the model may leave the reference: the larger, the less.
      loss: "sigmoid"; "sigmoid_norm" and "ipo" (arXiv:2310.12036), which divide by each answer's tokens; "hinge"
        (arXiv:2305.10425); "robust" (arXiv:2403.00409).
      label_smoothing: of "robust", the share of pairs whose label is wrong: 0 to 0.5.

    Raises:
      UserError: beta is not above 0, there is no such loss, or the smoothing is out of range or another loss's.
    """
    if loss not in LOSSES:
        raise UserError(f"{argument('loss')} {loss!r}: choose one of {', '.join(LOSSES)}.{nearest(loss, LOSSES)}")
    if not beta > 0:
        raise UserError(f"{argument('beta')} {beta}: it must be above 0.")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss != "robust"):
        raise UserError(
            f"{argument('label_smoothing')} {label_smoothing}: it is of loss 'robust', and from 0 to below 0.5."
        )
    of_pair = functools.partial(LOSSES[loss], beta=beta, e=label_smoothing)
    return Objective("dpo", TOKENS, functools.partial(_sums, of_pair, beta), counts="pairs", prepare=_prepare)


def _sums(of_pair: Any, beta: float, model: Decoder, batch: Batch, key: jax.Array | None) -> Sums:
    scores, mask = token_logprobs(model, batch, key), batch["loss_mask"]
    reference = batch[REFERENCE] if REFERENCE in batch else token_logprobs(without_adapters(model), batch).logprobs
    sides = functools.partial(_sides, batch["segment_ids"], model.documents)
    present = (sides(jnp.ones_like(mask))[0] > 0).astype(jnp.float32)
    tokens = tuple(jnp.maximum(count, 1.0) for count in sides(mask))
    logps = sides(scores.logprobs * mask)
    ratios = sides((scores.logprobs - jax.lax.stop_gradient(reference)) * mask)
    chosen, rejected = (beta * ratio for ratio in ratios)
    count = by_group(model, present)
    numbers = {
        "loss": of_pair(*ratios, *tokens),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    sums = {name: (by_group(model, value * present), count) for name, value in numbers.items()}
    return sums | {"loss": (with_router(model, sums["loss"][0], scores.router * count), count)}


def _sides(segments: jax.Array, documents: int | None, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B,T] summed over each pair's chosen and rejected document: [B,P] twice."""
    pairs = ((documents or segments.shape[1]) + 1) // 2

    def side(first: int) -> jax.Array:
        number = jnp.arange(first, 2 * pairs + first, 2, dtype=segments.dtype)[None, :, None]
        return jnp.sum(jnp.where(segments[:, None] == number, values[:, None], 0.0), axis=-1)

    return side(1), side(2)


def _prepare(
    objective: Objective, model: Decoder, trainable: Any, sets: Mapping[str, Any], rows: int
) -> tuple[Objective, dict[str, Any]]:
    """With the reference's log-probabilities as a column of the data, where the adapter's being off is not it."""
    for name, data in sets.items():
        if getattr(data, "together", 1) != 2:
            raise UserError(
                f"{argument('objective')} dpo wants pairs of answers, which {name or 'the data'} does not have: give "
                "rows {prompt, chosen, rejected}, see specjax.data.preference."
            )
    base_trains = jax.tree.leaves(nnx.state(model, nnx.All(trainable, nnx.Not(nnx.LoRAParam))))
    if not base_trains and not _adds(model):
        return objective, dict(sets)
    return reading_reference(objective), {name: _with_reference(model, data, rows) for name, data in sets.items()}


def reading_reference(objective: Objective) -> Objective:
    """The objective with the reference's log-probabilities among its columns."""
    return dataclasses.replace(objective, columns=(*objective.columns, REFERENCE))


def _adds(model: Decoder) -> bool:
    """Whether an adapter's B, [..., R], is not all zero."""
    leaves = [leaf for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]
    return any(jnp.any(leaf[...] != 0) for leaf in leaves if leaf.get_metadata("axes")[-1] == "lora_rank")


def _with_reference(model: Decoder, data: Any, rows: int) -> Any:
    """The data with the model's log-probability of each target beside it, `rows` of a global batch at a time."""
    graph, state = nnx.split(model)
    mesh = sharding.mesh_of(jax.tree.leaves(state)[0])
    part, found = copy.copy(data), []
    part.batch_size = min(rows, data.batch_size)

    @jax.jit
    def logprobs(state: Any, batch: Batch) -> jax.Array:
        merged = nnx.merge(graph, state)
        merged.documents = data.most_documents
        return token_logprobs(merged, batch).logprobs

    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        for batch in part.once(sharding.held_rows(mesh, part.batch_size)):
            scored = logprobs(state, sharding.put_batch(batch, mesh, part.batch_size))
            whole = multihost_utils.process_allgather(scored, tiled=True) if jax.process_count() > 1 else scored
            found.append(np.asarray(whole))
    return data.with_column(REFERENCE, data.per_token(np.concatenate(found)[: data.num_rows]))
