"""Copies between arrays of any strides at the speed of memory: a tensor of a file is ours, transposed."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_SCRATCH = 1 << 18  # bytes of a transpose that stay in a core's cache
_LINE = 64  # elements of a target's row written at a time: whole cache lines, whatever the dtype
_PAD = 64  # bytes between scratch rows: of a power-of-two length, they would fall on the same lines of the cache
_PIECE = 1 << 24  # bytes of a target that one thread copies


def pieces(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts a copy `target[...] = source` into independent ones of some megabytes, for `copy` in several threads.

    Both arrays may have any strides. Axes come in the order of the target's memory, and those that lie together in both
    are one.
    """
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
    # Along the longer of the axes that may be cut: the last one only into whole lines.
    axis = 0 if len(shape) == 1 or shape[0] >= shape[-1] else len(shape) - 1
    step = max(1, shape[axis] * _PIECE // target.nbytes)
    step = -(-step // _LINE) * _LINE if axis else step
    for start in range(0, shape[axis], step):
        cut = (slice(None),) * axis + (slice(start, start + step),)
        yield target[cut], source[cut]


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, cast, for a pair of `pieces`; a transpose goes through a block that stays in the cache.

    NumPy alone walks a transpose along one side and misses the cache on the other: with rows of a power-of-two length,
    at a fifth of the speed.
    """
    if target.dtype == source.dtype:  # as integers: NumPy's own copy loops, not those of bfloat16
        plain = np.dtype(f"u{target.dtype.itemsize}")
        target, source = target.view(plain), source.view(plain)
    last = target.ndim - 1
    fast = min(range(target.ndim), key=lambda axis: source.strides[axis] if source.shape[axis] > 1 else 1 << 62)
    if fast == last:
        target[...] = source
        return
    size, pad = target.dtype.itemsize, _PAD // target.dtype.itemsize
    width = min(target.shape[fast], _SCRATCH // (_LINE * size))
    scratch = np.empty((_LINE, width + pad), target.dtype)
    outer = [range(n) if axis not in (fast, last) else [slice(None)] for axis, n in enumerate(target.shape)]
    planes: Iterator[Any] = itertools.product(*outer)
    for plane in planes:
        to, of = target[plane], source[plane]
        for row in range(0, to.shape[0], width):
            for column in range(0, to.shape[1], _LINE):
                block = of[row : row + width, column : column + _LINE].T
                held = scratch[: block.shape[0], : block.shape[1]]
                held[...] = block
                to[row : row + width, column : column + _LINE] = held.T


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
