"""Tokens of texts of any length: a long one is tokenised in windows, which are joined where both agree.

A tokenizer takes some 200 bytes for each character while it works. A window overlaps the one before; the seam lies at a
character where a token of both begins, with `AGREE` equal tokens on either side. What stands further away than that has
no say in where a tokenizer's merges and words end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LONG = 1 << 20  # characters, from which on a text is tokenised in windows
WINDOW = 1 << 18  # characters of a window
OVERLAP = 1 << 13  # characters that it has in common with the one before
AGREE = 32  # tokens


def is_long(tokenizer: Any, text: str) -> bool:
    """Whether a text is tokenised in windows; a slow tokenizer, which tells no places, has none."""
    return len(text) > LONG and tokenizer.is_fast


class Encoded(NamedTuple):
    """Ids int32 [n], and where each begins and ends in the text, int64 [n] each."""

    ids: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """The tokens of each text, without those that a tokenizer adds around it; `tokenizer` is a fast one."""
    long = [is_long(tokenizer, text) for text in texts]
    short = iter(_whole(tokenizer, [text for text, one in zip(texts, long, strict=True) if not one]))
    return [_in_windows(tokenizer, text) if one else next(short) for text, one in zip(texts, long, strict=True)]


def ids(tokenizer: Any, texts: Sequence[str], **settings: Any) -> list[Sequence[int]]:
    """The ids that `tokenizer(texts, **settings)` gives."""
    long = [is_long(tokenizer, text) for text in texts]
    rest = [text for text, one in zip(texts, long, strict=True) if not one]
    found = tokenizer(rest, return_attention_mask=False, verbose=False, **settings)["input_ids"] if rest else []
    short, made = iter(found), []
    for text, one in zip(texts, long, strict=True):
        if not one:
            made.append(next(short))
            continue
        bare, around = (tokenizer("a", **how)["input_ids"] for how in ({"add_special_tokens": False}, settings))
        at = next(at for at in range(len(around)) if around[at : at + len(bare)] == bare)
        before, after = (np.array(some, np.int32) for some in (around[:at], around[at + len(bare) :]))
        made.append(np.concatenate([before, _in_windows(tokenizer, text).ids, after]))
    return made


def _whole(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    if not texts:
        return []
    found = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    made = []
    for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        begin, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
        made.append(Encoded(np.asarray(ids, np.int32), begin, end))
    return made


def _in_windows(tokenizer: Any, text: str) -> Encoded:
    """The parts up to each seam; a window in which there is none is made twice as long, at last the whole text."""
    parts: list[Encoded] = []
    (last,) = _whole(tokenizer, [text[:WINDOW]])
    stop = WINDOW
    while stop < len(text):
        overlap, seam = OVERLAP, None
        while seam is None:
            start = max(0, stop - overlap)
            (window,) = _whole(tokenizer, [text[start : stop + WINDOW]])
            window = Encoded(window.ids, window.begin + start, window.end + start)
            if start == 0:  # nothing is left to be joined
                parts, seam = [], (0, 0)
            else:
                seam = _seam(last, window)
            overlap *= 2
        parts.append(Encoded(*(values[: seam[0]] for values in last)))
        last, stop = Encoded(*(values[seam[1] :] for values in window)), stop + WINDOW
    return Encoded(*(np.concatenate(values) for values in zip(*parts, last, strict=True)))


def _seam(left: Encoded, right: Encoded) -> tuple[int, int] | None:
    """The places of one token in both, so far from their ends that `AGREE` equal tokens lie on either side."""
    _, ours, theirs = np.intersect1d(left.begin, right.begin, return_indices=True)  # the first at each character
    for place in np.argsort(np.abs(np.arange(len(ours)) - len(ours) // 2)):  # from the middle on
        i, j = int(ours[place]), int(theirs[place])
        if min(i, j) < AGREE or min(len(left.ids) - i, len(right.ids) - j) < AGREE:
            continue
        if all(
            np.array_equal(a[i - AGREE : i + AGREE], b[j - AGREE : j + AGREE]) for a, b in zip(left, right, strict=True)
        ):
            return i, j
    return None
