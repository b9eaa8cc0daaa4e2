"""Which documents are kept, what becomes of those over the length, and the count of all that is left out."""

from collections import defaultdict
from typing import Any

import numpy as np

from specjax.data.cache import release
from specjax.errors import argument

OVERLONG = ("drop", "truncate", "keep_end", "split")

Slice = tuple[int, int]  # [start, stop)


class Tally:
    """Keeps count of what is left out and why.

    Args:
      length: tokens in a row.
      overlong: what becomes of conversations and pairs over it, one of `OVERLONG` (see `specjax.data.load`).
    """

    def __init__(self, length: int, overlong: str):
        self.length, self.overlong = length, overlong
        self.rows, self.shortest = 0, 0
        self.dropped: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # reason -> rows, tokens
        self.cut = [0, 0]  # rows, tokens lost
        self.split = [0, 0, 0]  # rows, documents made of them, tokens of the pieces in which nothing trains
        self.split_texts = 0

    def fit(self, trained: np.ndarray, offsets: np.ndarray, chosen: np.ndarray, whole: bool) -> np.ndarray:
        """What is kept of each chosen document, in order: [start, stop) of the flat arrays, int64 [K, 2].

        Args:
          trained: bool [N], whether each token is a target that counts.
          offsets: int64 [D+1], where documents begin and end.
          chosen: int64 [C], which documents, in ascending order.
          whole: whether a document over the length needs a decision; else packing cuts it.
        """
        starts, stops = offsets[:-1][chosen], offsets[1:][chosen]
        learnable = _learnable(trained, offsets)[chosen]
        long = stops - starts > self.length
        if not whole:
            self.split_texts += int((learnable & long).sum())
            long &= False
        unusual = np.flatnonzero(~learnable | long)
        kept = np.stack([starts, stops], 1)
        if not len(unusual):
            return kept
        pieces: list[np.ndarray] = []
        last = 0
        for at in unusual.tolist():
            start, stop = int(starts[at]), int(stops[at])
            made = self.fit_one(trained[start:stop])
            pieces += [kept[last:at], np.array(made, np.int64).reshape(-1, 2) + start]
            last = at + 1
        return np.concatenate([*pieces, kept[last:]])

    def fit_one(self, trained: np.ndarray) -> list[Slice]:
        """What is kept of a document in which nothing trains, or which is over the length: [start, stop) of it."""
        size = len(trained)
        if not trained[1:].any():  # the first token is nobody's target
            return self._drop("no trained token", size)
        self.shortest = min(self.shortest or size, size)
        if self.overlong == "drop":
            return self._drop("over length", size)
        if self.overlong == "split":
            return self._split(trained)
        last = int(np.flatnonzero(trained)[-1]) + 1  # what follows the last answer is of no use to it
        stop = self.length if self.overlong == "truncate" else last
        start = max(0, stop - self.length)
        if not trained[start + 1 : stop].any():
            return self._drop("answer beyond length", size)
        self.cut[0] += 1
        self.cut[1] += size - (stop - start)
        return [(start, stop)]

    def fit_pairs(self, trained: np.ndarray, offsets: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """As `fit`, of documents in pairs: both are kept where in both something trains and both fit a row together."""
        spans = np.stack([offsets[:-1][chosen], offsets[1:][chosen]], 1).reshape(-1, 2, 2)
        sizes = (spans[:, :, 1] - spans[:, :, 0]).sum(1)
        learnable = _learnable(trained, offsets)[chosen].reshape(-1, 2).all(1)
        long = learnable & (sizes > self.length)
        for reason, out in (("no trained token", ~learnable), ("over length", long)):
            self.dropped[reason][0] += int(out.sum())
            self.dropped[reason][1] += int(sizes[out].sum())
        self.shortest = int(sizes[long].min(initial=sizes.max(initial=0)))
        return spans[learnable & ~long].reshape(-1, 2)

    def _split(self, trained: np.ndarray) -> list[Slice]:
        """Pieces of at most `length` tokens, each beginning with the one before's last, so that no target is lost."""
        size = len(trained)
        pieces = [(at, min(at + self.length, size)) for at in range(0, size - 1, self.length - 1)]
        kept = [(start, stop) for start, stop in pieces if trained[start + 1 : stop].any()]
        self.split[0] += 1
        self.split[1] += len(kept)
        self.split[2] += sum(stop - start for start, stop in pieces) - sum(stop - start for start, stop in kept)
        return kept

    def _drop(self, reason: str, size: int) -> list[Slice]:
        self.dropped[reason][0] += 1
        self.dropped[reason][1] += size
        return []

    def report(self) -> dict[str, Any]:
        """The counts, JSON-able."""
        return {
            "rows": self.rows,
            "overlong": self.overlong,
            "dropped": {why: {"rows": n, "tokens": t} for why, (n, t) in self.dropped.items() if n},
            "truncated": {"rows": self.cut[0], "tokens": self.cut[1]},
            "split": dict(zip(("rows", "documents", "tokens_left_out"), self.split, strict=True)),
            "split_documents": self.split_texts,
        }

    def nothing(self, name: str) -> str:
        """The sentence for data of which nothing is left."""
        reasons = {why: n for why, (n, _) in self.dropped.items() if n}
        if set(reasons) == {"over length"}:
            return (
                f"all {self.rows} rows of {name} are over the length of {self.length} tokens (the shortest has "
                f"{self.shortest}): raise {argument('length')}, or set "
                f"{argument('overlong')} to truncate, keep_end or split."
            )
        counts = ", ".join(f"{why}: {n}" for why, n in reasons.items())
        return f"none of the {self.rows} rows of {name} has anything to learn from ({counts})."


def _learnable(trained: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether a target counts in each document, bool [D]; its first token is nobody's target."""
    learnable = np.zeros(len(offsets) - 1, bool)
    several = np.flatnonzero(np.diff(offsets) > 1)
    if len(several):
        bounds = np.stack([offsets[several] + 1, offsets[several + 1]], 1).ravel()
        # Of [start + 1, stop) and of what lies between two of these; a sum would make an integer of every token.
        learnable[several] = np.logical_or.reduceat(trained[: bounds[-1]], bounds[:-1])[::2]
    release(trained)
    return learnable
