"""Facts about the user's data, from the same tokens that training would see."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from specjax import build
from specjax.advise import rules
from specjax.config import copied
from specjax.config.checks import sources
from specjax.data import Corpus, Data
from specjax.errors import UserError

KINDS = {"text": "raw text", "instruct": "pairs", "prompt": "pairs", "preference": "preference pairs"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """Counts of a source.

    Attributes:
      kind: the format, in words.
      rows: the number of rows.
      distinct: the number of different rows.
      blank: rows with nothing to learn, such as pairs without an answer.
      empty: empty answers in other rows.
      sizes: int64, tokens of each example: a document, or both of a preference pair.
      tokens: the tokens of all examples.
      loss_tokens: those of them that train.
      corpus: the tokenised rows.
    """

    kind: str
    rows: int
    distinct: int
    blank: int
    empty: int
    sizes: np.ndarray
    tokens: int
    loss_tokens: int
    corpus: Corpus

    @property
    def text(self) -> bool:
        """Whether it is raw text, which is cut into pieces, so that nothing is too long for a row."""
        return self.corpus.format == "text"

    @property
    def preference(self) -> bool:
        """Whether each example is two answers."""
        return self.corpus.format == "preference"

    def over(self, length: int) -> tuple[int, int]:
        """The number of examples longer than a row, and their tokens; none for raw text, which loses nothing."""
        long = self.sizes[self.sizes > length] if not self.text else self.sizes[:0]
        return len(long), int(long.sum())


def facts(config: ConfigDict, tokenizer: Any) -> Facts:
    """Reads the training rows of a config as `specjax data` does, including those that will be held out."""
    probe = copied(config, "data")
    # Rows are told apart by what decides which of them are held out, which is made where some are.
    probe.data.eval, probe.data.eval_fraction = ConfigDict(), rules.MOST_HELD_OUT
    [corpus] = build.corpora_of(probe, tokenizer).values()
    together = 2 if corpus.format == "preference" else 1
    sizes = np.diff(corpus.offsets).reshape(-1, together).sum(1)
    if not len(sizes):
        [(source, _)] = sources(config).values()
        raise UserError(f"none of the {corpus.count} rows of {source} has anything to learn from.")
    trained = int(corpus.trained.sum()) - int(corpus.trained[corpus.offsets[:-1]].sum())  # a first token is no target
    assert corpus.sides is not None
    return Facts(
        KINDS.get(corpus.format, "chats"),
        corpus.count,
        len(np.unique(corpus.sides)),
        corpus.count - len(np.unique(corpus.rows)),
        corpus.empty,
        sizes,
        int(sizes.sum()),
        trained,
        corpus,
    )


def leaked(found: Facts, held: Data) -> int:
    """How many documents of an evaluation set also train, token for token."""
    corpus, tokens = found.corpus, held.tokens
    trains = {corpus.tokens[a:b].tobytes() for a, b in itertools.pairwise(corpus.offsets.tolist())}
    return sum(tokens[a:b].tobytes() in trains for a, b in itertools.pairwise(held.offsets.tolist()))


def lines(found: Facts, length: int) -> list[tuple[str, str]]:
    """(what, how much) lines about the data, for rows of a given length in tokens."""
    median, most = (int(np.percentile(found.sizes, q, method="higher")) for q in (50, 95))
    long, lost = found.over(length)
    share, cut = percent(found.loss_tokens / found.tokens), percent(long / len(found.sizes))
    columns = " ".join(
        f"{role}={column}" for role, column in found.corpus.columns.items() if column in found.corpus.found
    )
    over = f"{long:,} of {len(found.sizes):,} examples ({cut}), {lost:,} tokens"
    if found.text:
        over = (
            f"{int((found.sizes > length).sum()):,} of {len(found.sizes):,}, cut into pieces of which nothing is lost"
        )
    return [
        ("kind", f"{found.kind} ({found.corpus.format}: {columns})"),
        ("rows", f"{found.rows:,}, of which {found.rows - found.distinct:,} say what another says"),
        ("empty", f"{found.blank:,} rows, in which nothing trains, and {found.empty:,} answers of other rows"),
        ("tokens", f"{found.tokens:,}, of which {found.loss_tokens:,} train ({share})"),
        ("an example has", f"{median:,} tokens (median), {most:,} (95 %), {int(found.sizes.max()):,} (longest)"),
        (f"over {length:,}", over),
    ]


def percent(share: float) -> str:
    """A share, formatted for people.

    >>> percent(0.416)
    '41.6 %'
    """
    return f"{100 * share:.1f} %"
