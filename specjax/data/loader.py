"""Packed rows of one source: tokens lie in one flat array; the packing plan says which slices make up which row."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

from specjax.data.batches import COLUMNS as COLUMNS
from specjax.data.batches import Batch, Batches
from specjax.data.batches import shuffled as shuffled
from specjax.data.cache import release
from specjax.data.pack import Plan, plan, ranges
from specjax.errors import UserError

BLOCK = 1 << 21  # tokens that are looked at at once, where all are


class Data(Batches):
    """Packed rows of tokenised documents.

    The batches go through an endless sequence of rows: all of them, in another order each pass, so that a batch may
    straddle two passes.

    A batch is a dict of [B, T] arrays, those of `COLUMNS`: `tokens`, `targets`, `loss_mask` (1 where the target
    counts), `positions` (from 0 in each piece) and `segment_ids` (1..n along a row; 0 is padding). `targets[t]` is the
    next token of the same document, also where a long one goes on in another row; at its end the mask is 0.
    `with_column` adds a column to these.

        document A B C, document D E          tokens       A B C D E -
        (B, C and E are trained)              targets      B C - E - -
                                              loss_mask    1 1 0 1 0 0
                                              positions    0 1 2 0 1 0
                                              segment_ids  1 1 1 2 2 0

    Attributes:
      length, batch_size, seed: as given.
      num_rows: rows of the plan.
      most_documents: in a row.
      together: documents that always lie side by side in one row: 2 of preference pairs, else 1.
      template: the Jinja text that conversations were rendered with, None for raw text and plain pairs.
      end_of_turn: id of the token that ends the assistant's turns there: generation must stop at it.
      report: counts, JSON-able (see `specjax.data.report`).
      fingerprint: of the tokens, masks and plan; equal data has an equal one. An added column has no part in it.
    """

    def __init__(
        self,
        tokens: Int32[np.ndarray, " N"],
        trained: Bool[np.ndarray, " N"],
        offsets: Int64[np.ndarray, " ends"],
        *,
        starts: Int64[np.ndarray, " documents"] | None = None,
        tokenizer: Any,
        length: int,
        batch_size: int,
        seed: int = 0,
        packing: bool = True,
        together: int = 1,
        template: str | None = None,
        end_of_turn: int | None = None,
        report: dict[str, Any] | None = None,
    ):
        """Plans the rows of documents `tokens[offsets[d]:offsets[d+1]]`; `trained` marks what the loss counts.

        With `starts`, document d is the slice of that size from `starts[d]` on, and the arrays, which then may have
        more between the documents, are not copied. So many documents as `together` says lie side by side in one row,
        see `plan`.
        """
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.tokenizer, self.template, self.end_of_turn = tokenizer, template, end_of_turn
        self.offsets = offsets
        self._tokens, self._trained, self._starts = tokens, trained, offsets[:-1] if starts is None else starts
        self._added: dict[str, np.ndarray] = {}  # column -> a value per token
        self.together = together
        self.plan: Plan = plan(offsets, length, packing, together)
        self.num_rows = len(self.plan.rows) - 1
        self.most_documents = int(np.diff(self.plan.rows).max(initial=1))
        self._sizes = np.diff(np.append(0, np.cumsum(self.plan.sizes))[self.plan.rows])  # tokens per row
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.fingerprint, loss_tokens = self._fingerprint()
        self.report = (report or {}) | self._counts(packing, loss_tokens)

    @property
    def tokens(self) -> Int32[np.ndarray, " N"]:
        """Of all documents, end to end, at `offsets`; a copy where they do not lie so."""
        whole = len(self._tokens) == self.offsets[-1] and np.array_equal(self._starts, self.offsets[:-1])
        return self._tokens if whole else np.concatenate([tokens for tokens, _ in self._blocks()])

    @property
    def loss_mask(self) -> Bool[np.ndarray, " N"]:
        """Whether the loss counts the target of each of `tokens`; a document's last has none. Made at each call."""
        return np.concatenate([mask for _, mask in self._blocks()])

    def steps(self, epochs: float) -> int:
        """Steps that make so many passes over the rows, to the nearest, at least 1."""
        return max(1, round(epochs * self.num_rows / self.batch_size))

    def course(self, steps: int) -> dict[str, Any]:
        """What so many steps see, JSON-able: `steps`, and `passes` over the rows."""
        return {"steps": steps, "passes": round(steps * self.batch_size / self.num_rows, 2)}

    def with_column(self, name: str, values: np.ndarray) -> "Data":
        """This data with one more column [B, T] float32 in every batch, 0 at padding; the arrays are shared.

        Args:
          name: of the column.
          values: [N], the value at each of `tokens`.

        Raises:
          UserError: a column of that name is there already, or there is not one value per token.
        """
        if name in {**COLUMNS, **self._added}:
            raise UserError(f"the data has a column '{name}' already: give the new one another name.")
        if values.shape != (self.offsets[-1],):
            raise UserError(
                f"column '{name}' has the shape {values.shape}, but the data has {self.offsets[-1]} tokens: "
                "give one value per token."
            )
        wider = copy.copy(self)
        wider._added = {**self._added, name: values.astype(np.float32, copy=False)}
        return wider

    def per_token(self, rows: Shaped[np.ndarray, " {self.num_rows} {self.length}"]) -> Shaped[np.ndarray, " N"]:
        """Values that lie as the rows of the plan do as one value per token, for `with_column`."""
        flat = np.zeros(self.offsets[-1], rows.dtype)
        held = np.arange(self.length)[None] < self._sizes[:, None]
        flat[ranges(self.plan.starts, self.plan.sizes)] = rows[held]
        return flat

    def preview(self, which: int | Sequence[int]) -> list[list[list[tuple[str, bool]]]]:
        """The first `which` rows, or those of these numbers: each a list of documents of (text, whether it trains)."""
        rows = []
        for row in range(min(which, self.num_rows)) if isinstance(which, int) else which:
            pieces = slice(*self.plan.rows[row : row + 2])
            bounds = zip(self.plan.starts[pieces].tolist(), self.plan.sizes[pieces].tolist(), strict=True)
            rows.append([self._runs(start, start + size) for start, size in bounds])
        return rows

    def _runs(self, start: int, stop: int) -> list[tuple[str, bool]]:
        document = np.searchsorted(self.offsets, start, side="right") - 1
        at = self._starts[document] + start - self.offsets[document]
        ids, trained = (values[at : at + stop - start] for values in (self._tokens, self._trained))
        ids, trained = ids.tolist(), trained.copy()
        trained[0] &= start > self.offsets[document]  # a document's first token is nobody's target
        cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        # Decoding prefixes, not runs: a run decoded alone would lose its leading space with some tokenizers.
        text = [self.tokenizer.decode(ids[:c], clean_up_tokenization_spaces=False) if c else "" for c in cuts]
        return [
            (text[k + 1][len(text[k]) :], bool(trained[cuts[k]])) for k in range(len(cuts) - 1) if cuts[k + 1] > cuts[k]
        ]

    def _row(self, index: int) -> int:
        """Element `index` of the endless sequence that runs through all rows, in another order each epoch."""
        epoch, place = divmod(index, self.num_rows)
        known, order = self._order  # read and set as one, for a prefetching thread beside this one
        if known != epoch:
            order = shuffled(self.num_rows, self.seed, epoch)
            self._order = (epoch, order)
        return int(order[place])

    def _assemble(self, rows: Int64[np.ndarray, " rows"], height: int | None = None) -> Batch:
        height = height or len(rows)
        counts = self.plan.rows[rows + 1] - self.plan.rows[rows]
        pieces = ranges(self.plan.rows[rows], counts)
        starts, sizes = self.plan.starts[pieces], self.plan.sizes[pieces]
        number = ranges(np.zeros_like(counts), counts)  # of a piece within its row
        before = np.cumsum(sizes) - sizes
        first = np.repeat(before[np.cumsum(counts) - counts], counts)  # tokens before its row
        where = ranges(np.repeat(np.arange(len(rows)), counts) * self.length + before - first, sizes)
        document = np.searchsorted(self.offsets, starts, side="right") - 1
        source = ranges(self._starts[document] + starts - self.offsets[document], sizes)
        after = np.minimum(source + 1, len(self._tokens) - 1)
        target, counts_too = self._tokens[after], self._trained[after]
        ends = np.cumsum(sizes)[self.offsets[document + 1] == starts + sizes] - 1  # a document's last token
        target[ends], counts_too[ends] = 0, False
        columns = {
            "tokens": self._tokens[source],
            "targets": target,
            "loss_mask": counts_too,
            "positions": ranges(np.zeros_like(sizes), sizes),
            "segment_ids": np.repeat(number + 1, sizes),
        } | {name: values[ranges(starts, sizes)] for name, values in self._added.items()}
        batch = {}
        for name, values in columns.items():
            flat = np.zeros(height * self.length, COLUMNS.get(name, "float32"))
            flat[where] = values
            batch[name] = flat.reshape(height, self.length)
        return batch

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and loss mask of all documents, some documents at a time, about `BLOCK` tokens."""
        first, count = 0, len(self.offsets) - 1
        while first < count:
            last = max(first + 1, int(np.searchsorted(self.offsets, self.offsets[first] + BLOCK, side="right")) - 1)
            starts, sizes = self._starts[first:last], np.diff(self.offsets[first : last + 1])
            end_to_end = np.array_equal(starts[1:], (starts + sizes)[:-1])
            source = slice(int(starts[0]), int(starts[-1] + sizes[-1])) if end_to_end else ranges(starts, sizes)
            mask = np.append(self._trained[source][1:], False)
            mask[np.cumsum(sizes) - 1] = False
            yield self._tokens[source], mask
            first = last
            release(self._tokens, self._trained)

    def _fingerprint(self) -> tuple[str, int]:
        """The fingerprint, and how many targets the loss counts."""
        digest = hashlib.blake2b(str(self.length).encode(), digest_size=16)
        for tokens, _ in self._blocks():
            digest.update(np.ascontiguousarray(tokens).data)
        loss_tokens = 0
        for _, mask in self._blocks():
            digest.update(mask.data)
            loss_tokens += int(mask.sum())
        for array in (self.offsets, *self.plan):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest(), loss_tokens

    def _counts(self, packing: bool, loss_tokens: int) -> dict[str, Any]:
        tokens = int(self.offsets[-1])
        return {
            "documents": len(self.offsets) - 1,
            "tokens": tokens,
            "loss_tokens": loss_tokens,
            "length": self.length,
            "packing": packing,
            "pieces": len(self.plan.starts),
            "packed_rows": self.num_rows,
            "packing_efficiency": round(tokens / (self.num_rows * self.length), 4),
            "fingerprint": self.fingerprint,
        }
