"""A batch of prompts before and between the compiled calls: the model split for them, its rows, sizes rounded up.

B batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from specjax.generation import decoding
from specjax.lora.bank import bear
from specjax.models import Decoder


class Setup(NamedTuple):
    """A model split for `decoding`, and what is asked of it."""

    graph: Any
    state: Any
    layers: Any
    head: Any
    choice: decoding.Choice

    @classmethod
    def of(cls, model: Decoder, size: int, choice: decoding.Choice) -> "Setup":
        """Of batches of `size` rows."""
        graph, state = nnx.split(model)
        return cls(graph, state, unstacked(_stacks(model, state)), _head(model, size), choice)

    def bearing(self, model: Decoder, slots: np.ndarray) -> "Setup":
        """The same for a batch whose rows bear the adapters of these slots, int32 [B]."""
        bear(model, slots)
        graph, state = nnx.split(model)
        return self._replace(graph=graph, state=state, layers=unstacked(_stacks(model, state)))


def texts_of(
    setup: Setup, rows: decoding.Rows, new: int, look: Callable[[int, list[int]], bool] | None, every: int
) -> list[list[int]]:
    """The new ids of each row, up to its end, its limit, or (asked `every` so many tokens) where `look` says enough."""
    graph, state, layers, head, choice = setup
    greedy, until = bool(choice.temperature == 0), 0
    progress = decoding.prefill(state, rows, graph=graph, new=new, penalised=bool(choice.repetition_penalty != 1))
    few = 0 if greedy or not choice.top_k else bucket(int(choice.top_k), 64)
    while True:
        until = new if look is None else min(until + every, new)
        static = {"graph": graph, "greedy": greedy, "few": few}
        progress = decoding.decode(state, layers, head, progress, rows, choice, np.int32(until), **static)
        done, found = np.array(progress.done), [row[row >= 0].tolist() for row in np.array(progress.out)]
        if look is None or until == new or done.all():
            return found
        done |= [not over and look(row, found[row]) for row, over in enumerate(done)]
        progress = progress._replace(done=jax.device_put(done, progress.done.sharding))


def rows_of(
    texts: Sequence[Sequence[int]], size: int, indices: Sequence[int], limits: Sequence[int], made: Sequence[int]
) -> decoding.Rows:
    """A batch of `size` rows, the last of them empty where there are fewer texts."""
    tokens = np.zeros((size, bucket(max(map(len, texts)) - 1, 32) + 1), np.int32)
    rows = decoding.Rows(tokens, *np.zeros((4, size), np.int32))
    for row, text in enumerate(texts):
        tokens[row, -len(text) :], rows.lengths[row] = text, len(text)
        rows.indices[row], rows.limits[row], rows.made[row] = indices[row], limits[row], made[row]
    return rows


def _stacks(model: Decoder, state: Any) -> list[Any]:
    return [state["layers"][segment] for segment in range(len(model.config.segments))]


def unstacked(segments: Sequence[Any]) -> list[list[Any]] | None:
    """The stacked parameters of each segment layer by layer, views of the same memory; None but on a single CPU device.

    A scan hands its body slices. XLA's CPU backend copies each slice before it multiplies, which doubles the time of a
    decoding step; other backends read them in place.
    """
    first = jax.tree.leaves(segments)[0]
    if not _on_cpu(first) or len(first.devices()) > 1:
        return None
    found = []
    for stack in segments:
        views = jax.tree.map(np.asarray, stack)
        count = len(jax.tree.leaves(views)[0])
        found.append([jax.tree.map(lambda x, i=i: jax.device_put(x[i]), views) for i in range(count)])
    return found


def _on_cpu(array: jax.Array) -> bool:
    return next(iter(array.devices())).platform == "cpu"


def _head(model: Decoder, rows: int) -> jax.Array | None:
    """The output layer's table transposed, where that pays: XLA's CPU backend would do it at every step.

    Not for one row, which it multiplies by the table as it lies; nor under an adapter's factors, which want the table.
    """
    table = model.output_table()
    return decoding.transposed(table, model.dtype) if rows > 1 and table is not None and _on_cpu(table) else None


def bucket(size: int, least: int = 1) -> int:
    """The next power of two.

    >>> bucket(33), bucket(32), bucket(3, 16)
    (64, 32, 16)
    """
    return max(least, 1 << max(0, size - 1).bit_length())
