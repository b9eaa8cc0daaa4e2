"""Loss, perplexity and token accuracy on a data set, weighted by tokens."""

import math
from typing import Any

from jax.sharding import Mesh

from specjax import sharding
from specjax.train.step import Params


def evaluate(
    eval_step: Any, trainable: Params, frozen: Params, data: Any, mesh: Mesh | None, *, batches: int = 0
) -> dict[str, float]:
    """Runs an evaluation step over a data set.

    Args:
      eval_step: compiled `step.make_eval_step`.
      trainable: parameters that train.
      frozen: the others.
      data: a `specjax.data.Data`; every row once.
      mesh: where the batches go.
      batches: at most this many; 0: all.

    Returns:
      `loss` (nats a token), `perplexity`, `accuracy`, `tokens` (loss tokens seen).
    """
    sums = []
    held = sharding.held_rows(mesh, data.batch_size)
    for number, batch in enumerate(data.once(held)):
        if batches and number == batches:
            break
        sums.append(eval_step(trainable, frozen, sharding.put_batch(batch, mesh, data.batch_size)))
    # Read after the last is under way: the device never waits for the host.
    total = {name: sum(float(part[name]) for part in sums) for name in ("nll", "correct", "count")}
    loss = total["nll"] / max(total["count"], 1.0)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": total["correct"] / max(total["count"], 1.0),
        "tokens": int(total["count"]),
    }
