"""From a source of rows to `Data` in one call: `load` of any format, and a name for each kind of data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax.data.corpus import check_overlong
from specjax.data.loader import Data
from specjax.data.tokens import Progress, Source, tokenise


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
    turns: str = "exact",
    split: str = "train",
    holdout: tuple[float, str] | None = None,
    cache: str | Path | bool = True,
    progress: Progress | None = None,
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
        `truncation_mode`); "split" makes several documents of one. Raw text is cut into pieces, never lost, and
        preference pairs can only be dropped.
      columns: role -> column, where the data calls a role by another name.
      own_columns: whether data that has none of `columns` may be recognised by its own instead.
      turns: of a conversation whose template writes earlier turns otherwise once others follow (it drops their
        reasoning, say): "exact" makes a row for each answer, which is the prompt as inference has it and the turn
        that answers it; "whole" keeps one row, with earlier answers as they stand there.
      split: of a hub name, a `datasets` folder, or files named after their split.
      holdout: (fraction, "train" or "eval"): one part of a split by each row's content, which neither the rows' order
        nor their repetition changes. None: all rows.
      cache: the folder where tokens are kept under the digest of the rows, the tokenizer, the template and this
        package's code, so that a second start makes none. True: `$XDG_CACHE_HOME/specjax/data`, or
        `~/.cache/specjax/data`; False: nowhere. Any number of processes may share it.
      progress: called now and then while tokens are made, with the rows done and how many there are, or None.

    Raises:
      UserError: anything wrong with the data, the template or these arguments, with file and line where there is one.
    """
    check_overlong(overlong)
    corpus = tokenise(
        source,
        tokenizer,
        format=format,
        template=template,
        columns=columns,
        own_columns=own_columns,
        turns=turns,
        split=split,
        seed=seed,
        holdout=holdout is not None,
        cache=cache,
        progress=progress,
    )
    return corpus.pack(length=length, batch_size=batch_size, packing=packing, overlong=overlong, holdout=holdout)


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
    cache: str | Path | bool = True,
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
        cache=cache,
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
    turns: str = "exact",
    split: str = "train",
    holdout: tuple[float, str] | None = None,
    cache: str | Path | bool = True,
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
        turns=turns,
        split=split,
        holdout=holdout,
        cache=cache,
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
    turns: str = "exact",
    split: str = "train",
    holdout: tuple[float, str] | None = None,
    cache: str | Path | bool = True,
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
        turns=turns,
        split=split,
        holdout=holdout,
        cache=cache,
    )


def preference(
    source: Source,
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    packing: bool = True,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    holdout: tuple[float, str] | None = None,
    cache: str | Path | bool = True,
) -> Data:
    """Pairs of answers: prompt, chosen, rejected; strings joined as they are, or messages through the chat template.

    As TRL has them, with the tokens and masks of its `DPOTrainer`: where there is no prompt, it is what both answers
    begin with. Chosen and rejected are two documents, each behind the prompt and with all that follows it trained,
    which lie side by side in one row: segments 2i+1 and 2i+2. A pair that does not fit a row of `length` is dropped
    and counted. Arguments as `load`.
    """
    return load(
        source,
        tokenizer,
        length=length,
        batch_size=batch_size,
        format="preference",
        seed=seed,
        packing=packing,
        template=template,
        columns=columns,
        split=split,
        holdout=holdout,
        cache=cache,
    )
