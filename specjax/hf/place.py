"""From memory-mapped tensors into the shards of a parameter: read, cast, stacked, with no second copy on the host."""

import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.errors import UserError
from specjax.hf import names
from specjax.hf.strided import blocks, copy, is_finite, pieces

_ALIGNMENT = 64  # bytes; what XLA's CPU client asks of memory that it takes over without a copy

_JOB = 1 << 24  # bytes that a thread copies before it looks for more work

Pair = tuple[np.ndarray, np.ndarray, str]  # a target, its source, and the tensor that this is of
Bounds = tuple[tuple[int, int], ...]  # of a shard: where it starts and stops on every axis


def threads() -> ThreadPoolExecutor:
    """A thread for each of the cores that this process may use: copies of NumPy's run beside each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cores)


def finish(jobs: list[Future[None]]) -> None:
    """Waits for all; where one raises, so does this, and those not yet begun are left out."""
    try:
        for job in jobs:
            job.result()
    except BaseException:
        for job in jobs:
            job.cancel()
        raise


def place(
    entry: names.Entry,
    shape: tuple[int, ...],
    dtype: Any,
    where: jax.sharding.Sharding,
    tensors: dict[str, Any],
    pool: ThreadPoolExecutor,
) -> jax.Array:
    """One parameter in its place.

    This process's shards alone are read, and one that several of its devices hold is read once.

    Args:
      entry: its row of the table.
      shape: of the whole parameter.
      dtype: what the file's values are cast to.
      where: any sharding.
      tensors: those of the file by name, of the shapes that the row says.
      pool: whose threads copy.

    Raises:
      UserError: a tensor holds what is no finite number; it is named.
    """
    holders: dict[Bounds, list[Any]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        bounds = tuple(i.indices(n)[:2] for i, n in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    if all(_in_host_memory(device) for devices in holders.values() for device in devices):
        # The array may be the buffer itself, if it is aligned: what is read is placed.
        buffers = _aligned([[stop - start for start, stop in bounds] for bounds in holders], dtype)
        pairs: list[Pair] = []
        for bounds, buffer in zip(holders, buffers, strict=True):
            for within, source, name in _sources(entry, shape, bounds, tensors):
                pairs += [(*pair, name) for pair in pieces(buffer[within], source)]
                if source.flags.owndata:  # made here (MXFP4), and no view of a file: not kept until all are there
                    finish([pool.submit(_copy_all, batch) for batch in _batches(pairs)])
                    pairs = []
        finish([pool.submit(_copy_all, batch) for batch in _batches(pairs)])
        shards = jax.device_put(
            [buffer for buffer, devices in zip(buffers, holders.values(), strict=True) for _ in devices],
            [device for devices in holders.values() for device in devices],
        )
    else:
        shards = []
        for bounds, devices in holders.items():
            sizes = [stop - start for start, stop in bounds]
            shards += _stream(sizes, dtype, devices, _sources(entry, shape, bounds, tensors), pool)
    return jax.make_array_from_single_device_arrays(shape, where, shards)


def _batches(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """The copies in the file's order, as many to a job as make it worth a thread's while.

    So the parts of a page that go to several shards are read one after another, by one thread.
    """
    batch: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: pair[1].ctypes.data):
        batch.append(pair)
        if sum(target.nbytes for target, *_ in batch) >= _JOB:
            yield batch
            batch = []
    if batch:
        yield batch


def _copy_all(pairs: list[Pair]) -> None:
    for pair in pairs:
        _copy(*pair)


def _copy(target: np.ndarray, source: np.ndarray, name: str) -> None:
    """Copies block by block, and looks at each while it is at hand: one number that is none spoils all of a model's."""
    for part in blocks(source):
        copy(target[part], source[part])
        check(name, source[part])


def check(name: str, tensor: np.ndarray) -> None:
    """Raises `UserError` where a tensor holds NaN or an infinity."""
    if not is_finite(tensor):
        raise UserError(
            f"tensor {name} holds NaN or an infinity: its file is damaged, or was written by a training that failed: "
            "copy or download it again."
        )


def _in_host_memory(device: Any) -> bool:
    return device.platform == "cpu"


def _stream(
    shape: list[int],
    dtype: Any,
    devices: list[Any],
    sources: Iterator[tuple[tuple[Any, ...], np.ndarray, str]],
    pool: ThreadPoolExecutor,
) -> list[jax.Array]:
    """One shard on each of some accelerators, stacked there: the host holds two tensors of the stack at most."""
    stacks = [jnp.empty(shape, dtype, device=device) for device in devices]
    sent: list[jax.Array] = []
    for within, source, name in sources:
        buffer = np.empty(source.shape, dtype)
        finish([pool.submit(_copy, *pair, name) for pair in pieces(buffer, source)])
        jax.block_until_ready(sent)  # the buffer before this one
        sent = [jax.device_put(buffer, device) for device in devices]
        stacks = [_insert(stack, part, within[:-1]) for stack, part in zip(stacks, sent, strict=True)]
    return stacks


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, part: jax.Array, within: tuple[int, ...]) -> jax.Array:
    starts = (*within, *(0 for _ in part.shape))
    return jax.lax.dynamic_update_slice(stack, jnp.expand_dims(part, range(len(within))), starts)


def _sources(
    entry: names.Entry, shape: tuple[int, ...], bounds: Bounds, tensors: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], np.ndarray, str]]:
    """For every tensor of the stack within a shard's bounds: its place in the shard, its part as a view, its name."""
    stack = bounds[: entry.stacked]
    # With an ellipsis a part is an array, also where it is one number.
    inner: tuple[Any, ...] = (*(slice(*b) for b in bounds[entry.stacked :]), ...)
    for place, name in entry.tensors(shape):
        if all(start <= i < stop for i, (start, stop) in zip(place, stack, strict=True)):
            within = (*(i - start for i, (start, _) in zip(place, stack, strict=True)), ...)
            yield within, names.view(tensors[name], shape[entry.stacked :])[inner], name


def _aligned(shapes: list[list[int]], dtype: Any) -> list[np.ndarray]:
    """Empty arrays whose memory begins at multiples of what XLA asks for.

    They are parts of one allocation: the system gives a large one memory by large pages, but for its two ends.
    """
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape in shapes]
    starts = np.cumsum([0] + [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes])
    raw = np.empty(int(starts[-1]) + _ALIGNMENT, np.uint8)
    raw = raw[-raw.ctypes.data % _ALIGNMENT :]
    parts = zip(shapes, sizes, starts.tolist(), strict=False)
    return [raw[start : start + size].view(dtype).reshape(shape) for shape, size, start in parts]
