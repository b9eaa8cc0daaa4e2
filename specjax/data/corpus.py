"""All rows of a source as tokens, to be parted and packed as often as one likes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specjax.data.chat import Document, end_of_turn
from specjax.data.loader import Data
from specjax.data.tally import OVERLONG, Tally
from specjax.errors import UserError, argument, nearest


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A source's rows as tokens. A row is a document, or none; a preference two, one after the other; a chat several.

    Attributes:
      name: of the source.
      format: one of `specjax.data.formats.FORMATS`.
      columns: role -> column.
      found: the columns of the first rows.
      tokenizer: that made the tokens.
      template: the Jinja text that conversations were rendered with, None for raw text and plain pairs.
      tokens: int32 [N]; these arrays may be the cache's file, mapped into memory, and processes then share them.
      trained: bool [N], whether the loss counts each as a target.
      offsets: int64 [D+1], where documents begin and end.
      rows: int64 [D], the number of each one's row, from 0; a row that is not there has nothing to learn from.
      count: of all rows.
      empty: answers without a word in these, which do not train.
      seed: of the order of rows and of the held-out split.
      sides: uint64 [count], the rows with the smallest are held out; None: nothing can be.
    """

    name: str
    format: str
    columns: Mapping[str, str]
    found: Sequence[str]
    tokenizer: Any
    template: str | None
    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    count: int
    empty: int
    seed: int
    sides: np.ndarray | None

    def pack(
        self,
        *,
        length: int,
        batch_size: int,
        packing: bool = True,
        overlong: str = "drop",
        holdout: tuple[float, str] | None = None,
    ) -> Data:
        """Batches of all rows, or of one part of a split. Arguments and errors as those of `specjax.data.load`."""
        together = 2 if self.format == "preference" else 1
        check_overlong(overlong, self.format)
        tally = Tally(length, overlong)
        part = np.ones(self.count, bool) if holdout is None else self._part(*holdout)
        tally.rows = int(part.sum())
        learnable = np.zeros(self.count, bool)
        learnable[self.rows] = True
        tally.dropped["nothing to learn"][0] = int((part & ~learnable).sum())
        chosen = np.flatnonzero(part[self.rows])
        if together == 2:
            kept = tally.fit_pairs(self.trained, self.offsets, chosen)
        else:
            kept = tally.fit(self.trained, self.offsets, chosen, whole=self.format != "text")
        if not len(kept):
            raise UserError(tally.nothing(self.name))
        first = Document(*(values[slice(*kept[0])] for values in (self.tokens, self.trained)))
        end = end_of_turn(first, self.tokenizer) if self.template else None
        report: dict[str, Any] = {
            "source": self.name,
            "format": self.format,
            "columns": {role: column for role, column in self.columns.items() if column in self.found},
            "ignored_columns": [column for column in self.found if column not in self.columns.values()],
            "end_of_turn": None if end is None else self.tokenizer.convert_ids_to_tokens(end),
            "holdout": list(holdout) if holdout else None,
            "empty_answers": self.empty,
            "branched": self._branched(part) if together == 1 else None,
        }
        return Data(
            self.tokens,
            self.trained,
            np.append(0, np.cumsum(kept[:, 1] - kept[:, 0])),
            starts=kept[:, 0],
            tokenizer=self.tokenizer,
            length=length,
            batch_size=batch_size,
            seed=self.seed,
            packing=packing,
            together=together,
            template=self.template,
            end_of_turn=end,
            report=report | tally.report(),
        )

    def _branched(self, part: np.ndarray) -> dict[str, int]:
        """How many rows of a part became several documents, a conversation's answer each, and how many these are."""
        each = np.bincount(self.rows, minlength=self.count)[part]
        return {"rows": int((each > 1).sum()), "documents": int(each[each > 1].sum())}

    def _part(self, fraction: float, part: str) -> np.ndarray:
        """Which rows belong to the part "train" or "eval", bool [count]; equal rows fall on the same side."""
        if part not in ("train", "eval") or not 0 < fraction < 1:
            raise UserError(
                f"a held-out part is (fraction between 0 and 1, 'train' or 'eval'), not {(fraction, part)}."
            )
        assert self.sides is not None, "tokenise(..., holdout=True) makes a corpus that can be parted"
        last = max(1, round(fraction * self.count)) - 1
        held = self.sides <= np.partition(self.sides, last)[last]
        if held.all():
            raise UserError(
                f"{self.name} has too few different rows to hold some out, {argument('holdout')}: name a set of its "
                "own to evaluate on."
            )
        return held if part == "eval" else ~held


def check_overlong(overlong: str, format: str = "") -> None:
    """Raises `UserError` where `overlong` is no choice, or none of preference pairs."""
    if overlong not in OVERLONG:
        raise UserError(
            f"{argument('overlong')} is '{overlong}': use one of {', '.join(OVERLONG)}.{nearest(overlong, OVERLONG)}"
        )
    if format == "preference" and overlong != "drop":
        raise UserError(
            f"{argument('overlong')} is '{overlong}', but of preference pairs those over the length can only be "
            "dropped: set it to drop."
        )
