"""Which documents are kept, what becomes of those over the length, and the count of all that is left out."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from specjax.data.chat import Document, encode
from specjax.data.formats import Conversation, Example, Pair, Text, blank

OVERLONG = ("drop", "truncate", "keep_end", "split")


class Tally:
    """Tokenises, and keeps count of what is left out and why.

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

    def keep(self, chunk: list[Example], tokenizer: Any, template: str | None) -> Iterator[Document]:
        """The documents of a chunk that have something to learn from and fit."""
        self.rows += len(chunk)
        if template:
            chunk = [_as_chat(example) if isinstance(example, Pair) else example for example in chunk]
        full = [example for example in chunk if not blank(example)]
        self.dropped["nothing to learn"][0] += len(chunk) - len(full)
        for kind, group in groupby(full, type):
            for document in encode(list(group), tokenizer, template):
                yield from self.fit(document, whole=kind is not Text)

    def fit(self, document: Document, whole: bool) -> list[Document]:
        """The document, cut to the length where it must be; none, counted, where it is left out."""
        size = len(document.ids)
        if not document.trained[1:].any():  # the first token is nobody's target
            return self._drop("no trained token", size)
        if size <= self.length:
            return [document]
        if not whole:
            self.split_texts += 1
            return [document]
        self.shortest = min(self.shortest or size, size)
        if self.overlong == "drop":
            return self._drop("over length", size)
        if self.overlong == "split":
            return self._split(document)
        last = int(np.flatnonzero(document.trained)[-1]) + 1  # what follows the last answer is of no use to it
        stop = self.length if self.overlong == "truncate" else last
        kept = Document(*(array[max(0, stop - self.length) : stop] for array in document))
        if not kept.trained[1:].any():
            return self._drop("answer beyond length", size)
        self.cut[0] += 1
        self.cut[1] += size - len(kept.ids)
        return [kept]

    def _split(self, document: Document) -> list[Document]:
        """Pieces of at most `length` tokens, each beginning with the one before's last, so that no target is lost."""
        size = len(document.ids)
        pieces = [
            Document(*(array[at : at + self.length] for array in document))
            for at in range(0, size - 1, self.length - 1)
        ]
        kept = [piece for piece in pieces if piece.trained[1:].any()]
        self.split[0] += 1
        self.split[1] += len(kept)
        self.split[2] += sum(len(piece.ids) for piece in pieces if not piece.trained[1:].any())
        return kept

    def _drop(self, reason: str, size: int) -> list[Document]:
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
                f"{self.shortest}): raise data.length, or set data.overlong to truncate, keep_end or split."
            )
        counts = ", ".join(f"{why}: {n}" for why, n in reasons.items())
        return f"none of the {self.rows} rows of {name} has anything to learn from ({counts})."


def _as_chat(pair: Pair) -> Conversation:
    turns = (("user", pair.prompt), ("assistant", pair.completion))
    return Conversation(pair.where, [{"role": role, "content": content} for role, content in turns])
