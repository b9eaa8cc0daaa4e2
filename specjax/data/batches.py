"""Fixed-shape batches, and their micro-batches, as a pure function of (data, seed, step).

What packed rows (`loader.Data`) and mixtures of them (`mix.Mixture`) have in common: an endless sequence of rows, which
the batches go through. There is no iterator state: the batch of step 1000 can be asked for first, or a few of its rows,
and is the same.
"""

import abc
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from specjax.errors import UserError

Batch = dict[str, Int32[np.ndarray, "b T"] | Float32[np.ndarray, "b T"]]
MicroBatches = dict[str, Int32[np.ndarray, "k b T"] | Float32[np.ndarray, "k b T"]]

# The columns that every batch has, and their dtypes.
COLUMNS = {
    "tokens": "int32",
    "targets": "int32",
    "loss_mask": "float32",
    "positions": "int32",
    "segment_ids": "int32",
}


class Batches(abc.ABC):
    """`batch_size` rows of `length` tokens per step, of an endless sequence that runs through `num_rows` rows.

    Attributes:
      length, batch_size, num_rows: see `loader.Data`.
      sources: the names of what is mixed; empty where there is one source.
    """

    length: int
    batch_size: int
    num_rows: int
    sources: Sequence[str] = ()
    _sizes: Int64[np.ndarray, " num_rows"]  # tokens per row

    @abc.abstractmethod
    def steps(self, epochs: float) -> int:
        """Steps that make so many passes over the rows, to the nearest, at least 1."""

    @abc.abstractmethod
    def course(self, steps: int) -> dict[str, Any]:
        """What so many steps see, JSON-able: `steps`, and `passes` over the rows."""

    @abc.abstractmethod
    def _row(self, index: int) -> int:
        """Element `index` of the endless sequence."""

    @abc.abstractmethod
    def _assemble(self, rows: Int64[np.ndarray, " rows"], height: int | None = None) -> Batch:
        """A batch of these rows, and of empty ones below them up to `height`."""

    def batch(self, step: int, rows: Int64[np.ndarray, " b"] | None = None) -> Batch:
        """The global batch of `step`, or those of its rows."""
        numbers = self.row_ids(step)
        return self._assemble(numbers if rows is None else numbers[rows])

    def micro_batches(self, step: int, count: int, rows: Int64[np.ndarray, " b"] | None = None) -> MicroBatches:
        """The global batch of `step` in `count` micro-batches, or some rows of each.

        Micro-batch i takes every `count`-th row of the batch, from row i on: a device, which has neighbouring rows of
        the batch, so has its rows of each micro-batch without an exchange.

        Args:
          step: which batch.
          count: of micro-batches; it divides `batch_size`.
          rows: of one micro-batch, 0 to batch_size // count - 1; default all.
        """
        if self.batch_size % count:
            raise UserError(f"a batch of {self.batch_size} rows does not divide into {count} micro-batches.")
        chosen = np.arange(self.batch_size // count) if rows is None else rows
        batch = self.batch(step, (np.arange(count)[:, None] + count * chosen).ravel())
        return {name: values.reshape(count, len(chosen), self.length) for name, values in batch.items()}

    def row_ids(self, step: int) -> Int64[np.ndarray, " {self.batch_size}"]:
        """The numbers of the rows of the global batch of `step`."""
        return np.array([self._row(step * self.batch_size + i) for i in range(self.batch_size)], np.int64)

    def tokens_in(self, step: int) -> int:
        """Tokens, not padding, of the global batch of `step`."""
        return int(self._sizes[self.row_ids(step)].sum())

    def once(self, rows: Int64[np.ndarray, " b"] | None = None) -> Iterator[Batch]:
        """Every row exactly once, in their numbers' order, `batch_size` at a time, the last ones empty to fill it up.

        Args:
          rows: those of each batch to give, in ascending order; default all.
        """
        chosen = np.arange(self.batch_size) if rows is None else rows
        for start in range(0, self.num_rows, self.batch_size):
            wanted = start + chosen
            yield self._assemble(wanted[wanted < self.num_rows], len(chosen))


def shuffled(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " {count}"]:
    """A permutation of `range(count)` that depends on nothing but (count, seed, epoch).

    Ranks the rows by splitmix64 of a counter: plain integer arithmetic, so unlike `numpy.random`'s generators it is
    the same for every NumPy, for ever.

    >>> sorted(shuffled(5, seed=0, epoch=0).tolist()), shuffled(5, 0, 0).tolist() == shuffled(5, 0, 1).tolist()
    ([0, 1, 2, 3, 4], False)
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
