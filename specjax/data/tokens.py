"""From a source to a corpus: its rows become tokens in one reading, and these are kept on disk.

What a row's tokens are depends on the source's contents, the tokenizer, the template and this package's own code, and
on nothing else: neither on the length of a training row, nor on what is held out. So the cache goes by these.
"""

import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data import cache as disk
from specjax.data.chat import Document, documents, resolve
from specjax.data.corpus import Corpus
from specjax.data.example import Conversation, Example, Pair, Preference, Text, blank
from specjax.data.formats import examples, recognise
from specjax.data.identity import Contents, code, of_tokens, side
from specjax.data.read import Opened, Row, opened
from specjax.data.turns import check_stop
from specjax.errors import UserError, argument, nearest

Source = str | Path | Sequence[Row | str]
Progress = Callable[[int, int | None], None]  # called with the rows done, and with how many there are, if that is known

TURNS = ("exact", "whole")
CHUNK = 1024  # rows, at most, and
CHUNK_CHARACTERS = 1 << 20  # characters, about, that are tokenised at a time: a tokenizer takes 200 bytes for each


def tokenise(
    source: Source,
    tokenizer: Any,
    *,
    format: str | Sequence[str] = "auto",
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    own_columns: bool = False,
    turns: str = "exact",
    split: str = "train",
    seed: int = 0,
    holdout: bool = False,
    cache: str | Path | bool = True,
    progress: Progress | None = None,
) -> Corpus:
    """Reads and tokenises all rows of a source, or finds them in the cache.

    Args:
      source: as all others but the following, see `specjax.data.load`.
      tokenizer: a fast Hugging Face tokenizer.
      format: "auto" or a name.
      template: see `resolve`.
      columns: role -> column.
      own_columns: whether data that has none of `columns` may be recognised by its own instead.
      turns: "exact" or "whole".
      split: of a hub name or a folder.
      seed: of the order of rows and of the held-out split.
      holdout: whether parts will be held out.
      cache: a folder; True: the default one; False: nothing is kept.
      progress: called now and then.

    Raises:
      UserError: anything wrong with the data, the template or these arguments, with file and line where there is one.
    """
    name = str(source) if isinstance(source, str | Path) else "the data"
    reading = opened(source, split)
    folder = disk.folder_of(cache)
    contents = Contents(reading) if folder else None
    if turns not in TURNS:
        raise UserError(f"{argument('turns')} is '{turns}': use exact or whole.{nearest(turns, TURNS)}")
    how = {"format": format, "columns": dict(columns or {}), "own_columns": own_columns, "split": split, "turns": turns}
    key = of_tokens(contents.digest, tokenizer, template, how) if contents and contents.digest else None
    grows = folder if contents and key else None
    maker = _Maker(name, reading, tokenizer, template, seed if holdout else None, how, progress, grows)
    if folder and contents and key:
        parts = disk.digest(str(contents.digest), split, str(seed), code())
        paths = folder / f"{key}.tokens", folder / f"{parts}.sides"
        with disk.turn(paths[0]):
            kept = disk.find(paths[0])
            sides = disk.find(paths[1]) if holdout else None
            fresh = []
            if kept is None:
                kept = maker.tokens(contents.total)
                fresh.append((paths[0], kept))
            if holdout and sides is None:
                sides = maker.sides()
                fresh.append((paths[1], sides))
            if not contents.changed():  # else the rows need not be those whose digest was taken
                for path, made in fresh:
                    if disk.keep(path, made) and made is kept:
                        # The file's own pages, which other processes share, in place of those that were made.
                        kept = disk.find(path, fresh=True) or kept
    else:
        kept = maker.tokens(reading.total)
        sides = maker.sides() if holdout else None
    facts, arrays = kept.facts, kept.arrays
    return Corpus(
        name=name,
        format=facts["format"],
        columns=facts["columns"],
        found=facts["found"],
        tokenizer=tokenizer,
        template=_template(facts["format"], tokenizer, template),
        tokens=arrays["tokens"],
        trained=arrays["trained"],
        offsets=arrays["offsets"],
        rows=arrays["rows"],
        count=facts["count"],
        empty=facts["empty"],
        seed=seed,
        sides=sides.arrays["sides"] if sides else None,
    )


class _Maker:
    """Makes a source's tokens, and what tells the sides of its rows, in one reading."""

    def __init__(
        self,
        name: str,
        reading: Opened,
        tokenizer: Any,
        template: str | None,
        seed: int | None,
        how: Mapping[str, Any],
        progress: Progress | None,
        folder: Path | None,
    ):
        self.folder = folder
        self.name, self.reading, self.tokenizer, self.template = name, reading, tokenizer, template
        self.seed, self.how, self.progress = seed, how, progress
        self._sides: array[int] | None = None

    def tokens(self, total: int | None) -> disk.Kept:
        """The arrays `tokens, trained, offsets, rows` of a `Corpus`; facts: `format, columns, found, count, empty`."""
        self._sides = array("Q")
        rows = self._rows()
        head = list(islice(rows, CHUNK))
        if not head:
            raise UserError(f"{self.name} is empty: there is no row to learn from.")
        found = list(dict.fromkeys(column for _, row in head for column in row))
        how = self.how
        kind, columns = recognise(found, how["format"], how["columns"], own_columns=how["own_columns"])
        template = _template(kind, self.tokenizer, self.template)
        if template is not None and self.tokenizer.is_fast:
            check_stop(self.tokenizer, template)
        sizes, numbers = array("q", [0]), array("q")
        count, empty = 0, 0
        with disk.Spool(self.folder, {"tokens": "int32", "trained": "bool"}) as grown:
            for chunk in _chunks(examples(chain(head, rows), kind, columns, chat=template is not None)):
                made: list[Document] = []
                for number, document in _documents(chunk, self.tokenizer, template, how["turns"] == "exact"):
                    made.append(document)
                    sizes.append(len(document.ids))
                    numbers.append(count + number)
                if made:
                    grown.add("tokens", np.concatenate([document.ids for document in made]))
                    grown.add("trained", np.concatenate([document.trained for document in made]))
                count += len(chunk)
                empty += sum(one.empty() for one in chunk if isinstance(one, Conversation) and not blank(one))
                if self.progress:
                    self.progress(count, total)
            arrays = grown.arrays() | {
                "offsets": np.cumsum(np.frombuffer(sizes, np.int64)),
                "rows": np.frombuffer(numbers, np.int64),
            }
        return disk.Kept(arrays, {"format": kind, "columns": columns, "found": found, "count": count, "empty": empty})

    def sides(self) -> disk.Kept:
        """The array `sides` of a `Corpus`; a reading of its own where there was none."""
        if self._sides is None:
            self._sides = array("Q")
            for _ in self._rows():
                pass
        return disk.Kept({"sides": np.frombuffer(self._sides, np.uint64)}, {})

    def _rows(self) -> Iterator[tuple[str, Row]]:
        for where, row in self.reading.rows():
            if self.seed is not None and self._sides is not None:
                self._sides.append(side(row, self.seed))
            yield where, row


def _template(format: str, tokenizer: Any, template: str | None) -> str | None:
    """The text of the template that rows of a format go through, None where they may go through none."""
    if format in ("messages", "conversations", "instruct") or template:
        return resolve(tokenizer, template) if format != "text" else None
    return None


def _chunks(stream: Iterator[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    characters = 0
    for example in stream:
        chunk.append(example)
        characters += _characters(example)
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(example: Example) -> int:
    match example:
        case Text(_, text):
            return len(text)
        case Pair(_, prompt, completion):
            return len(prompt) + len(completion)
        case Conversation():
            return sum(len(turn["content"]) for turn in example.messages)
        case Preference(_, chosen, rejected):
            return _characters(chosen) + _characters(rejected)


def _check_text(example: Example) -> None:
    """Raises `UserError` where an example has half of a character, as the escapes of JSON can write it."""
    half = re.search("[\ud800-\udfff]", "".join(_texts(example)))
    if half:
        where = example.where
        raise UserError(
            f"{where} has half of a character, \\u{ord(half[0]):04x} without its other half: mend the text."
        )


def _texts(value: Any) -> Iterator[str]:
    """The strings in nested values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for part in pair for text in _texts(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _texts(part))


def _documents(
    chunk: list[Example], tokenizer: Any, template: str | None, exact: bool
) -> Iterator[tuple[int, Document]]:
    """The documents of a chunk's rows, each with the number of its row, of those from which there is to learn."""
    full = [(number, example) for number, example in enumerate(chunk) if not blank(example)]
    try:
        made = documents([example for _, example in full], tokenizer, template, exact=exact)
    except (TypeError, UnicodeEncodeError):  # of a tokenizer, for what is no text
        for _, example in full:
            _check_text(example)
        raise
    for (number, _), some in zip(full, made, strict=True):
        yield from ((number, document) for document in some)
