"""Copies between parts of arrays at the speed of memory: a shard is a part of a file's tensor."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_PIECE = 1 << 24  # bytes of a target that one thread copies


def pieces(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts a copy `target[...] = source` into independent ones of some megabytes, for `copy` in several threads.

    Both arrays may have any strides. Axes come in the order of the target's memory, and those that lie together in both
    are one.
    """
    if target.nbytes <= _PIECE:
        yield target, source
        return
    order = np.argsort([-stride for stride in target.strides], kind="stable")
    target, source = target.transpose(order), source.transpose(order)
    shape: list[int] = []
    last: tuple[int, int] | None = None
    for size, *strides in zip(target.shape, target.strides, source.strides, strict=True):
        if size == 1 and shape:
            continue
        if last is not None and last == (strides[0] * size, strides[1] * size):
            shape[-1] *= size
        else:
            shape.append(size)
        last = (strides[0], strides[1])
    target, source = target.reshape(shape, copy=False), source.reshape(shape, copy=False)
    if target.size == 0:
        return
    step = max(1, shape[0] * _PIECE // target.nbytes)
    for start in range(0, shape[0], step):
        yield target[start : start + step], source[start : start + step]


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, cast, for a pair of `pieces`."""
    if target.dtype == source.dtype:  # as integers: NumPy's own copy loops, not those of bfloat16
        plain = np.dtype(f"u{target.dtype.itemsize}")
        target, source = target.view(plain), source.view(plain)
    target[...] = source


# Of an infinity's bits, without the sign: what has more is no number.
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
_BLOCK = 1 << 20  # bytes that are looked at while they lie in a core's cache


def blocks(array: np.ndarray) -> Iterator[Any]:
    """Parts of an array along its first axis, each of about `_BLOCK` bytes."""
    if not array.ndim or not array.size:
        yield ...
        return
    step = max(1, len(array) * _BLOCK // array.nbytes)
    for start in range(0, len(array), step):
        yield slice(start, start + step)


def is_finite(array: np.ndarray) -> bool:
    """Whether all of a small array's numbers are finite: as integers, which NumPy compares at the speed of memory."""
    if not array.size or array.dtype.name not in _INFINITY:  # codes of a quantised tensor are all numbers
        return True
    least, bits = _INFINITY[array.dtype.name], 8 * array.itemsize
    if int(array.view(f"i{array.itemsize}").max()) >= least:
        return False
    # Those below zero are the largest ones without a sign.
    return int(array.view(f"u{array.itemsize}").max()) < least + (1 << bits - 1)


def runs(parts: Sequence[np.ndarray], whole: np.ndarray) -> list[tuple[int, int]]:
    """Where the memory of some disjoint views of a C-contiguous array lies in it: (first, last + 1) bytes, merged.

    >>> whole = np.zeros((4, 6), np.int16)
    >>> runs([whole[1:3, :4], whole[1:3, 4:].T, whole[3:, :1]], whole)
    [(12, 38)]
    """
    found = []
    for part in parts:
        axes = sorted((stride, size) for stride, size in zip(part.strides, part.shape, strict=True) if size > 1)
        length = part.itemsize
        while axes and axes[0][0] == length:
            length *= axes.pop(0)[1]
        starts = np.array([part.ctypes.data - whole.ctypes.data])
        for stride, size in axes:
            starts = np.add.outer(starts, stride * np.arange(size)).reshape(-1)
        found.append(np.stack([starts, starts + length], axis=1))
    ranges = np.concatenate(found)
    ranges = ranges[np.argsort(ranges[:, 0])]
    breaks = np.flatnonzero(ranges[1:, 0] != ranges[:-1, 1])
    firsts, lasts = ranges[np.append(0, breaks + 1), 0], ranges[np.append(breaks, -1), 1]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))
