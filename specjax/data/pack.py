"""Which piece of which document lies in which row: planned once, from lengths alone.

A plan is three arrays. `starts` and `sizes` [P] cut pieces out of the flat token array; `rows` [R+1] says that row `r`
is made of the pieces `rows[r] : rows[r+1]`, side by side. Nothing here looks at a token.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64


class Plan(NamedTuple):
    """Rows made of pieces: `rows` has one number more than there are rows."""

    starts: Int64[np.ndarray, " P"]
    sizes: Int64[np.ndarray, " P"]
    rows: Int64[np.ndarray, " R+1"]


def ranges(starts: Int64[np.ndarray, " P"], sizes: Int64[np.ndarray, " P"]) -> Int64[np.ndarray, " total"]:
    """The integers of several ranges, end to end.

    >>> ranges(np.array([5, 20]), np.array([3, 2])).tolist()
    [5, 6, 7, 20, 21]
    """
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + sizes, sizes)


def cut(offsets: Int64[np.ndarray, " ends"], length: int) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
    """Pieces of at most `length` tokens of documents that lie at `offsets`; every token is in exactly one piece.

    >>> [a.tolist() for a in cut(np.array([0, 3, 10]), 4)]
    [[0, 3, 7], [3, 4, 3]]
    """
    sizes = np.diff(offsets)
    pieces = -(-sizes // length)
    inside = length * ranges(np.zeros_like(pieces), pieces)
    return np.repeat(offsets[:-1], pieces) + inside, np.minimum(np.repeat(sizes, pieces) - inside, length)


def best_fit(sizes: Int64[np.ndarray, " P"], length: int) -> Int64[np.ndarray, " P"]:
    """Best-fit decreasing: the row of each piece.

    The longest pieces are placed first, each into the fullest row that still has room for it, else into a new one.
    At most 11/9 of the fewest possible rows and a few more (Johnson 1974), in practice within a percent. Takes
    O(P log length): rows of equal room lie in one stack, and the rooms that have a row are kept sorted.

    >>> best_fit(np.array([3, 5, 2, 6, 2]), length=8).tolist()
    [1, 1, 0, 0, 2]
    """
    stacks: list[list[int]] = [[] for _ in range(length + 1)]  # room -> the rows that have exactly this much left
    rooms: list[int] = []
    row_of, count = np.empty(len(sizes), np.int64), 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in _pairs(order, sizes[order]):
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = stacks[room].pop()
            if not stacks[room]:
                del rooms[at]
        else:
            row, room, count = count, length, count + 1
        row_of[piece] = row
        left = room - size
        if left:
            if not stacks[left]:
                insort(rooms, left)
            stacks[left].append(row)
    return row_of


def _pairs(first: np.ndarray, second: np.ndarray, block: int = 1 << 16) -> Iterator[tuple[int, int]]:
    """Both arrays side by side as Python's integers, of which no more than a block's are there at once."""
    for at in range(0, len(first), block):
        yield from zip(first[at : at + block].tolist(), second[at : at + block].tolist(), strict=True)


def plan(offsets: Int64[np.ndarray, " ends"], length: int, packing: bool = True, together: int = 1) -> Plan:
    """The plan of documents at `offsets` in rows of `length`; without packing, a row holds one piece.

    Args:
      offsets: where documents begin and end.
      length: tokens in a row.
      packing: whether a row may hold more than one piece, or group of documents.
      together: documents that go side by side into one row: groups of so many, each of at most `length` tokens. 1:
        each for itself, cut into pieces where it is longer.

    >>> plan(np.array([0, 3, 8, 10, 16, 18]), 8).rows.tolist()
    [0, 2, 4, 5]
    >>> plan(np.array([0, 3, 5, 6, 8]), 8, together=2)[::2]
    (array([0, 3, 5, 6]), array([0, 4]))
    """
    if together == 1:
        starts, sizes = cut(offsets, length)
    else:
        starts, sizes = offsets[:-1], np.diff(offsets)
    units = sizes.reshape(-1, together).sum(1)
    if together > 1 and units.max(initial=0) > length:
        raise ValueError(f"{together} documents have {units.max()} tokens together, and a row has {length}")
    row_of = np.repeat(best_fit(units, length) if packing else np.arange(len(units)), together)
    order = np.argsort(row_of, kind="stable")
    count = int(row_of.max(initial=-1)) + 1
    rows = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))])
    return Plan(starts[order], sizes[order], rows.astype(np.int64))
