"""What an objective is on a data set: its pairs added up over all batches, and divided once."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from specjax import sharding
from specjax.errors import UserError
from specjax.train.objective import Objective, next_token
from specjax.train.step import Params


def evaluate(
    eval_step: Any,
    trainable: Params,
    frozen: Params,
    data: Any,
    mesh: Mesh | None,
    *,
    objective: Objective = next_token,
    batches: int = 0,
) -> dict[str, float]:
    """Runs an evaluation step over a data set.

    Args:
      eval_step: compiled `step.make_eval_step` of the objective.
      trainable: parameters that train.
      frozen: the others.
      data: a `specjax.data.Data`; every row once.
      mesh: where the batches go.
      objective: the step's.
      batches: at most this many; 0: all.

    Returns:
      Each pair of the objective divided, what it derives of them (`next_token`: `perplexity`), and under the name of
      what it counts the loss's denominator (`next_token`: `tokens`).

    Raises:
      UserError: nothing of the data set counts for the loss.
    """
    sums = []
    held = sharding.held_rows(mesh, data.batch_size)
    for number, batch in enumerate(data.once(held)):
        if batches and number == batches:
            break
        read = {name: batch[name] for name in objective.columns}
        sums.append(eval_step(trainable, frozen, sharding.put_batch(read, mesh, data.batch_size)))
    # Read after the last is under way: the device never waits for the host.
    names = sums[0] if sums else ()
    total = {name: [sum(float(part[name][i].sum()) for part in sums) for i in (0, 1)] for name in names}
    if not total["loss"][1]:
        source = getattr(data, "report", {}).get("source", "the data set")
        raise UserError(
            f"{source}: nothing of it counts for the loss, so there is nothing to measure: give one that has."
        )
    means = {name: value / (of or 1.0) for name, (value, of) in total.items()}
    return means | objective.derived(means) | {objective.counts: int(total["loss"][1])}


def most_documents(sets: Mapping[str, Any]) -> int | None:
    """At most how many documents are in a row of any of these data sets; None: not known."""
    known = [rows.most_documents for rows in sets.values() if hasattr(rows, "most_documents")]
    return max(known) if known and len(known) == len(sets) else None
