"""From a source of rows to `Data`: read, recognise, tokenise, count what is left out, pack."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data.chat import Document, end_of_turn, resolve
from specjax.data.formats import examples, recognise
from specjax.data.loader import Data
from specjax.data.read import Row, read
from specjax.data.tally import OVERLONG, Tally
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
    own_columns: bool = False,
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
        overlong: what becomes of conversations and pairs over `length`, each counted in the report: "drop" them;
            "truncate" keeps their start; "keep_end" keeps what lies before the end of the last answer (both as TRL's
            `truncation_mode`); "split" makes several documents of one. Raw text is cut into pieces, never lost.
        columns: role -> column, where the data calls a role by another name.
        own_columns: whether data that has none of `columns` may be recognised by its own instead.
        split: of a hub name, a `datasets` folder, or files named after their split.
        holdout: (fraction, "train" or "eval"): one part of a split by each row's content, which neither the rows' order
            nor their repetition changes. None: all rows.

    Raises:
        UserError: anything wrong with the data, the template or these arguments, with file and line where there is one.
    """
    if overlong not in OVERLONG:
        raise UserError(
            f"data.overlong is '{overlong}': use one of {', '.join(OVERLONG)}.{nearest(overlong, OVERLONG)}"
        )
    name = str(source) if isinstance(source, str | Path) else "the data"
    rows = read(source, split)
    if holdout:
        rows = compress(rows, _part((row for _, row in read(source, split)), *holdout, seed=seed, name=name))
    head = list(islice(rows, CHUNK))
    if not head:
        raise UserError(f"{name} is empty: there is no row to learn from.")
    found = list(dict.fromkeys(column for _, row in head for column in row))
    kind, mapping = recognise(found, format, columns, own_columns=own_columns)
    if kind in ("messages", "conversations", "instruct") or template:
        template = resolve(tokenizer, template) if kind != "text" else None
    tally = Tally(length, overlong)
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
