"""From a source of rows to `Data`: read, recognise, tokenise, count what is left out, pack."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data.chat import Document, encode, end_of_turn, resolve
from specjax.data.formats import Conversation, Example, Pair, Text, blank, examples, recognise
from specjax.data.loader import Data
from specjax.data.read import Row, read
from specjax.errors import UserError, nearest

Source = str | Path | Sequence[Row | str]

CHUNK = 1024  # rows tokenised at a time


def load(
    source: Source,
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    format: str | Sequence[str] = "auto",
    seed: int = 0,
    packing: bool = True,
    template: str | None = None,
    overlong: str = "drop",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    holdout: tuple[float, str] | None = None,
) -> Data:
    """Reads, tokenises and packs data of any known format.

    Args:
        source: a `.jsonl .json .csv .parquet .txt` file, a folder of them, a `datasets` folder, a hub name, or a list
            of dicts or strings.
        tokenizer: a fast Hugging Face tokenizer.
        length: tokens in a row (T).
        batch_size: rows in a global batch (B).
        format: "auto" (by columns), one of `specjax.data.formats.FORMATS`, or several to choose from.
        seed: of the order of rows and of the held-out split.
        packing: whether several documents share a row.
        template: see `resolve`. Prompt/completion strings go through a template only where one is named.
        overlong: "drop" or "truncate" conversations and pairs over `length`; raw text is cut into pieces, never lost.
        columns: role -> column, where the data calls a role by another name.
        split: of a hub name, a `datasets` folder, or files named after their split.
        holdout: (fraction, "train" or "eval"): one part of a split by each row's content, which neither the rows' order
            nor their repetition changes. None: all rows.

    Raises:
        UserError: anything wrong with the data, the template or these arguments, with file and line where there is one.
    """
    if overlong not in ("drop", "truncate"):
        hint = nearest(overlong, ("drop", "truncate"))
        raise UserError(f"data.overlong is '{overlong}': use drop or truncate.{hint}")
    name = str(source) if isinstance(source, str | Path) else "the data"
    rows = read(source, split)
    if holdout:
        rows = compress(rows, _part((row for _, row in read(source, split)), *holdout, seed=seed, name=name))
    head = list(islice(rows, CHUNK))
    if not head:
        raise UserError(f"{name} is empty: there is no row to learn from.")
    found = list(dict.fromkeys(column for _, row in head for column in row))
    kind, mapping = recognise(found, format, columns)
    if kind in ("messages", "conversations", "instruct") or template:
        template = resolve(tokenizer, template) if kind != "text" else None
    tally = _Tally(length, overlong)
    documents: list[Document] = []
    stream = examples(chain(head, rows), kind, mapping)
    while chunk := list(islice(stream, CHUNK)):
        documents += tally.keep(chunk, tokenizer, template)
    if not documents:
        raise UserError(tally.nothing(name))
    offsets = np.cumsum([0, *(len(document.ids) for document in documents)])
    tokens, trained = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
    end = end_of_turn(documents[0], tokenizer) if template else None
    report: dict[str, Any] = {
        "source": name,
        "format": kind,
        "columns": {role: column for role, column in mapping.items() if column in found},
        "ignored_columns": [column for column in found if column not in mapping.values()],
        "end_of_turn": None if end is None else tokenizer.convert_ids_to_tokens(end),
        "holdout": list(holdout) if holdout else None,
    }
    return Data(
        tokens,
        trained,
        offsets,
        tokenizer=tokenizer,
        length=length,
        batch_size=batch_size,
        seed=seed,
        packing=packing,
        template=template,
        end_of_turn=end,
        report=report | tally.report(),
    )


def text(
    source: Source,
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    packing: bool = True,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    holdout: tuple[float, str] | None = None,
) -> Data:
    """Raw text: every token trains, long documents go on in other rows. Arguments as `load`."""
    return load(
        source,
        tokenizer,
        length=length,
        batch_size=batch_size,
        format="text",
        seed=seed,
        packing=packing,
        columns=columns,
        split=split,
        holdout=holdout,
    )


def instruct(
    source: Source,
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    packing: bool = True,
    template: str | None = None,
    overlong: str = "drop",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    holdout: tuple[float, str] | None = None,
) -> Data:
    """Pairs: instruction/response|output[/input] through the chat template, or prompt/completion joined as they are.

    The response trains, with its end-of-turn token. Arguments as `load`.
    """
    return load(
        source,
        tokenizer,
        length=length,
        batch_size=batch_size,
        format=("prompt", "instruct"),
        seed=seed,
        packing=packing,
        template=template,
        overlong=overlong,
        columns=columns,
        split=split,
        holdout=holdout,
    )


def chat(
    source: Source,
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    packing: bool = True,
    template: str | None = None,
    overlong: str = "drop",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    holdout: tuple[float, str] | None = None,
) -> Data:
    """Conversations: `messages`, or ShareGPT's `conversations`; every assistant turn trains. Arguments as `load`."""
    return load(
        source,
        tokenizer,
        length=length,
        batch_size=batch_size,
        format=("messages", "conversations"),
        seed=seed,
        packing=packing,
        template=template,
        overlong=overlong,
        columns=columns,
        split=split,
        holdout=holdout,
    )


class _Tally:
    """Tokenises, and keeps count of what is left out and why."""

    def __init__(self, length: int, overlong: str):
        self.length, self.overlong = length, overlong
        self.rows, self.shortest = 0, 0
        self.dropped: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # reason -> rows, tokens
        self.truncated, self.split = [0, 0], 0

    def keep(self, chunk: list[Example], tokenizer: Any, template: str | None) -> Iterable[Document]:
        """The documents of a chunk that have something to learn from and fit."""
        self.rows += len(chunk)
        if template:
            chunk = [_as_chat(example) if isinstance(example, Pair) else example for example in chunk]
        full = [example for example in chunk if not blank(example)]
        self.dropped["nothing to learn"][0] += len(chunk) - len(full)
        for kind, group in groupby(full, type):
            for document in encode(list(group), tokenizer, template):
                kept = self._fit(document, whole=kind is not Text)
                if kept is not None:
                    yield kept

    def _fit(self, document: Document, whole: bool) -> Document | None:
        """The document, cut to the length where it must be; None, counted, where it is left out."""
        size, drop = len(document.ids), ""
        if size > self.length and not whole:
            self.split += 1
        elif size > self.length:
            self.shortest = min(self.shortest or size, size)
            document = Document(document.ids[: self.length], document.trained[: self.length])
            drop = "over length" if self.overlong == "drop" else ""
        if not drop and not document.trained[1:].any():  # the first token is nobody's target
            drop = "answer beyond length" if size > len(document.ids) else "no trained token"
        if drop:
            self.dropped[drop][0] += 1
            self.dropped[drop][1] += size
            return None
        if size > len(document.ids):
            self.truncated[0] += 1
            self.truncated[1] += size - len(document.ids)
        return document

    def report(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "dropped": {why: {"rows": n, "tokens": t} for why, (n, t) in self.dropped.items() if n},
            "truncated": {"rows": self.truncated[0], "tokens": self.truncated[1]},
            "split_documents": self.split,
        }

    def nothing(self, name: str) -> str:
        """The sentence for data of which nothing is left."""
        reasons = {why: n for why, (n, _) in self.dropped.items() if n}
        if set(reasons) == {"over length"}:
            return (
                f"all {self.rows} rows of {name} are over the length of {self.length} tokens (the shortest has "
                f"{self.shortest}): raise data.length, or set data.overlong=truncate."
            )
        counts = ", ".join(f"{why}: {n}" for why, n in reasons.items())
        return f"none of the {self.rows} rows of {name} has anything to learn from ({counts})."


def _as_chat(pair: Pair) -> Conversation:
    turns = (("user", pair.prompt), ("assistant", pair.completion))
    return Conversation(pair.where, [{"role": role, "content": content} for role, content in turns])


def _part(rows: Iterable[Row], fraction: float, part: str, *, seed: int, name: str) -> np.ndarray:
    """Which rows belong to the part "train" or "eval", bool [rows].

    The `fraction` of rows whose hash of (seed, content) is smallest are held out, so a row's side depends on what it
    says and not on where it stands; equal rows fall on the same side.
    """
    if part not in ("train", "eval") or not 0 < fraction < 1:
        raise UserError(f"a held-out part is (fraction between 0 and 1, 'train' or 'eval'), not {(fraction, part)}.")
    key = str(seed).encode()
    hashes = np.fromiter(
        (
            int.from_bytes(
                hashlib.blake2b(json.dumps(row, sort_keys=True, default=str).encode(), digest_size=8, key=key).digest(),
                "little",
            )
            for row in rows
        ),
        np.uint64,
    )
    count = max(1, round(fraction * len(hashes)))
    held = hashes <= np.partition(hashes, count - 1)[count - 1] if len(hashes) else np.empty(0, bool)
    if len(held) and held.all():
        raise UserError(f"{name} has too few different rows to hold some out: name an eval set with data.eval.")
    return held if part == "eval" else ~held
