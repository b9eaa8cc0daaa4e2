"""Several sources in one run, each with its share: the domain's rows, and general ones against forgetting.

Each source keeps its packed rows and its own endless sequence of them. Which source the next row is of is arithmetic on
the row's place, so the batch of a step stays a pure function of (data, seed, step), and a share is kept to within one
row from the first row on.
"""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from specjax.data.batches import Batch, Batches
from specjax.data.loader import Data
from specjax.errors import UserError, argument, nearest

SHARES = ("tokens", "rows")
SOURCE = "source"  # column of a batch: at each token the number of its source, from 1; 0 at padding
_ONE = 1 << 32


def mix(parts: Sequence[tuple[Data, float]], *, shares: str = "tokens", names: Sequence[str] = ()) -> "Mixture":
    """Batches of several data sets, each with its share.

    Replay against forgetting is `sj.data.mix([(mine, 0.8), (general, 0.2)])`.

    Args:
      parts: (data, share): shares are any positive numbers, of which the sum is the whole. Of all, `length` and
        `batch_size` are the same.
      shares: of what: "tokens" (not padding), or "rows" of the batches.
      names: of the sources, in metrics and reports; default "source1" and so on.

    Raises:
      UserError: a share that is not positive, another `shares`, data that cannot be in one batch.
    """
    if shares not in SHARES:
        raise UserError(f"{argument('shares')} is '{shares}': use one of {', '.join(SHARES)}.{nearest(shares, SHARES)}")
    if not parts or not all(share > 0 for _, share in parts):
        raise UserError(f"a mixture is pairs of data and a share above 0, not {[share for _, share in parts]}.")
    for what in ("length", "batch_size", "together"):
        values = [getattr(data, what) for data, _ in parts]
        if len(set(values)) > 1:
            said = "pairs of answers and other rows" if what == "together" else f"{what} {values}"
            raise UserError(f"the sources of a mixture have {said}: they share a batch, so make them alike.")
    names = list(names) or [f"source{number}" for number in range(1, len(parts) + 1)]
    whole = sum(share for _, share in parts)
    return Mixture([data for data, _ in parts], [share / whole for _, share in parts], shares, names)


class Mixture(Batches):
    """What `mix` makes; where a run wants `Data`, this will do.

    Attributes:
      parts: a `Data` a source.
      sources: their names.
      length, batch_size, seed, num_rows, most_documents, together, template, end_of_turn, report, fingerprint: as
        `Data` has them, of all sources; rows are numbered through all parts.
    """

    def __init__(self, parts: Sequence[Data], shares: Sequence[float], by: str, names: Sequence[str]):
        """Of `mix`, the shares adding up to 1."""
        self.parts, self.sources, self._shares = list(parts), tuple(names), list(shares)
        first = parts[0]
        self.length, self.batch_size, self.seed, self.together = (
            first.length,
            first.batch_size,
            first.seed,
            first.together,
        )
        self.tokenizer = first.tokenizer
        self.template = next((part.template for part in parts if part.template is not None), None)
        self.end_of_turn = next((part.end_of_turn for part in parts if part.end_of_turn is not None), None)
        self._first = np.cumsum([0, *(part.num_rows for part in parts)])  # number of each part's first row, and of all
        self.num_rows = int(self._first[-1])
        self.most_documents = max(part.most_documents for part in parts)
        self._sizes = np.concatenate([part._sizes for part in parts])
        a_row = [1.0 if by == "rows" else part.report["tokens"] / part.num_rows for part in parts]
        rates = [share / tokens for share, tokens in zip(shares, a_row, strict=True)]
        # Of the rows that are of this source or a later one, so many of 2**32 are of this one. The last has the rest.
        self._chances = [round(rate / sum(rates[k:]) * _ONE) for k, rate in enumerate(rates)]
        told = str([self._chances, [part.fingerprint for part in parts]])
        self.fingerprint = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        self.report = self._counts(by)

    def steps(self, epochs: float) -> int:
        """Steps that make so many passes over the first source, whatever comes with it of the others; at least 1."""
        rows = epochs * self.parts[0].num_rows * _ONE / self._chances[0]
        return max(1, round(rows / self.batch_size))

    def course(self, steps: int) -> dict[str, Any]:
        """`steps`; `passes` over the first source, and `passes_of` each."""
        seen = zip(self.sources, self._seen(steps * self.batch_size), self.parts, strict=True)
        passes = {name: round(rows / part.num_rows, 2) for name, rows, part in seen}
        return {"steps": steps, "passes": passes[self.sources[0]], "passes_of": passes}

    def with_column(self, name: str, values: np.ndarray) -> "Mixture":
        """As `Data.with_column`; the values are those of one source's tokens after another's."""
        counts = [part.report["tokens"] for part in self.parts]
        if name == SOURCE or values.shape != (sum(counts),):
            raise UserError(f"column '{name}' {values.shape}: give another name than {SOURCE}, one value per token.")
        wider = copy.copy(self)
        pieces = np.split(values, np.cumsum(counts)[:-1])
        wider.parts = [part.with_column(name, piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return wider

    def per_token(self, rows: Shaped[np.ndarray, " {self.num_rows} {self.length}"]) -> Shaped[np.ndarray, " N"]:
        """As `Data.per_token`."""
        pieces = np.split(rows, self._first[1:-1])
        return np.concatenate([part.per_token(piece) for part, piece in zip(self.parts, pieces, strict=True)])

    def preview(self, which: int | Sequence[int]) -> list[list[list[tuple[str, bool]]]]:
        """The first `which` rows of each source, or those of these numbers, see `Data.preview`."""
        if isinstance(which, int):
            return [row for part in self.parts for row in part.preview(which)]
        of = np.searchsorted(self._first, which, side="right") - 1
        return [
            self.parts[part].preview([number - int(self._first[part])])[0]
            for part, number in zip(of.tolist(), which, strict=True)
        ]

    def _seen(self, count: int) -> list[int]:
        """How many of the first `count` rows of the sequence are of each source."""
        seen = []
        for chance in self._chances:
            seen.append((count * chance + _ONE // 2) // _ONE)
            count -= seen[-1]
        return seen

    def _row(self, index: int) -> int:
        """Of the first source if that has one row more with it than without; else the others part what is left."""
        for number, chance in enumerate(self._chances):
            before, after = (((index + i) * chance + _ONE // 2) // _ONE for i in (0, 1))
            if after > before:
                return int(self._first[number]) + self.parts[number]._row(before)
            index -= before
        raise AssertionError("the last source has all rows that are left")

    def _assemble(self, rows: Int64[np.ndarray, " rows"], height: int | None = None) -> Batch:
        height = height or len(rows)
        source = np.searchsorted(self._first, rows, side="right") - 1
        batch: dict[str, np.ndarray] = {}
        for number in np.unique(source) if len(rows) else [0]:
            here = np.flatnonzero(source == number)
            found = dict(self.parts[number]._assemble(rows[here] - self._first[number]))
            found[SOURCE] = (found["segment_ids"] > 0).astype(np.float32) * (number + 1)
            for name, values in found.items():
                whole = batch.setdefault(name, np.zeros((height, self.length), values.dtype))
                whole[here] = values
        return batch

    def _counts(self, by: str) -> dict[str, Any]:
        reports = [part.report for part in self.parts]
        total = {key: sum(report[key] for report in reports) for key in ("documents", "tokens", "loss_tokens")}
        shares = zip(self.sources, self._shares, reports, strict=True)
        return total | {
            "length": self.length,
            "packing": reports[0]["packing"],
            "packed_rows": self.num_rows,
            "packing_efficiency": round(total["tokens"] / (self.num_rows * self.length), 4),
            "shares": by,
            "sources": {name: {"share": share} | report for name, share, report in shares},
            "fingerprint": self.fingerprint,
        }
