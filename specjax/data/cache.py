"""Arrays kept on disk under the digest of all that they were made from, so that they are made once.

A file appears whole or not at all: it is written under another name and then renamed. It bears the digest of its
contents, so one that was damaged since is noticed. It is mapped into memory, not read: its pages are the system's,
which has them once for all processes and takes them back where memory is short. What is large grows in a nameless file
(`Spool`), so a process that is killed leaves nothing of it, and the next one starts anew. Processes that make the same
file at once do not harm each other:
where the filesystem has locks, one makes it and the others wait.
"""

import contextlib
import hashlib
import io
import json
import mmap
import os
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

_BLOCK = 1 << 24  # bytes that are looked at at once
_ABANDONED = 86_400.0  # seconds after which a half-written file belongs to a process that was killed


class Kept(NamedTuple):
    """Flat arrays by name, and what is to be known of them, JSON-able."""

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


def folder_of(cache: str | Path | bool) -> Path | None:
    """The folder that the argument `cache` of `specjax.data.load` means: True is the default one, False none."""
    if cache is True:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specjax" / "data"
    return Path(cache) if cache else None


def digest(*parts: bytes | str) -> str:
    """One digest of several parts, in hexadecimal; where one ends and the next begins counts.

    >>> digest("ab", "c") == digest("a", "bc"), digest("ab", "c") == digest(b"ab", b"c")
    (False, True)
    """
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def keep(path: Path, kept: Kept) -> bool:
    """Writes the file `path`, and returns whether that went well; else a warning says so and nothing is kept."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it, or finished it just now
                if time.time() - old.stat().st_mtime > _ABANDONED:
                    old.unlink()
        with partial.open("xb") as file:
            header = json.dumps({"digest": _contents(kept)} | _header(kept)).encode()
            file.write(header + b" " * (-(len(header) + 1) % 8) + b"\n")  # what follows lies at a multiple of 8 bytes
            for array in kept.arrays.values():
                for block in _blocks(array):
                    file.write(block)
        os.replace(partial, path)
        return True
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        warnings.warn(
            f"the prepared data could not be kept in {path.parent} ({error.strerror}): the next start makes it again.",
            stacklevel=2,
        )
        return False


def find(path: Path, *, fresh: bool = False) -> Kept | None:
    """What the file `path` keeps; None where there is no such file, or, with a warning, where it is damaged.

    `fresh`: this process has written it just now, and its contents are not looked at again.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            sizes = {name: (np.dtype(dtype), int(size)) for name, (dtype, size) in header["arrays"].items()}
            at = file.tell()
            if sum(dtype.itemsize * size for dtype, size in sizes.values()) == os.fstat(file.fileno()).st_size - at:
                arrays = {}
                for name, (dtype, size) in sizes.items():
                    arrays[name] = _mapped(file, dtype, size, at)
                    at += dtype.itemsize * size
                kept = Kept(arrays, header["facts"])
                if fresh or header["digest"] == _contents(kept):
                    return kept
            reason = "its contents are not those that were written"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the header is no header of ours
        reason = "its beginning is damaged"
    except OSError as error:
        reason = str(error.strerror)
    warnings.warn(f"the prepared data in {path} can't be used ({reason}): it is made anew.", stacklevel=2)
    return None


class Spool:
    """Arrays that grow at their ends: in nameless files of a folder, or in memory without one or where the disk fails.

    A context manager: at its end the files are closed, and the arrays stay.

    Args:
      folder: of the files, or None.
      dtypes: of the arrays, by name.
    """

    def __init__(self, folder: Path | None, dtypes: Mapping[str, str]):
        self._dtypes, self._sizes = dtypes, dict.fromkeys(dtypes, 0)  # bytes
        self._files: dict[str, Any] = {name: io.BytesIO() for name in dtypes}
        if folder is not None:
            with contextlib.suppress(OSError):  # `keep` will say so
                folder.mkdir(parents=True, exist_ok=True)
                self._files = {name: tempfile.TemporaryFile(dir=folder, buffering=0) for name in dtypes}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            if not isinstance(file, io.BytesIO):  # which the arrays may lie in; mapped files need not be open
                file.close()

    def add(self, name: str, values: np.ndarray) -> None:
        """Appends values to an array."""
        data = _bytes(values)
        try:
            self._write(name, data)
        except OSError:  # the disk is full: `keep` will say so
            for other, file in self._files.items():
                file.seek(0)
                self._files[other] = io.BytesIO(file.read(self._sizes[other]))
                self._files[other].seek(0, os.SEEK_END)
                file.close()
            self._write(name, data)
        self._sizes[name] += len(data)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was added, read-only; nothing can be added after."""
        return {name: self._array(file, np.dtype(self._dtypes[name])) for name, file in self._files.items()}

    def _write(self, name: str, data: Any) -> None:
        done = 0
        while done < len(data):
            done += self._files[name].write(data[done:])

    def _array(self, file: Any, dtype: np.dtype) -> np.ndarray:
        if isinstance(file, io.BytesIO):
            return np.frombuffer(file.getbuffer(), dtype)
        return _mapped(file, dtype, os.fstat(file.fileno()).st_size // dtype.itemsize, 0)


def release(*arrays: np.ndarray) -> None:
    """Gives the pages of mapped arrays back, which count as this process's memory; they stay in their file."""
    for array in arrays:
        mapped = getattr(array, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """One process at a time, of those that would make the file `path`, as far as the filesystem has locks.

    The lock ends with its process. Nothing but time depends on it: without, each process makes the file for itself.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            name = path.with_name(path.name + ".lock")
            lock = stack.enter_context(name.open("wb"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            stack.callback(name.unlink, missing_ok=True)
        yield


def _header(kept: Kept) -> dict[str, Any]:
    arrays = {name: (array.dtype.str, array.size) for name, array in kept.arrays.items()}
    return {"arrays": arrays, "facts": kept.facts}


def _contents(kept: Kept) -> str:
    # Through JSON once, for what was read back has lists where a tuple was written.
    header = json.dumps(json.loads(json.dumps(_header(kept))), sort_keys=True)
    total = hashlib.blake2b(header.encode(), digest_size=16)  # which says where one array ends and the next begins
    for array in kept.arrays.values():
        for block in _blocks(array):
            total.update(block)
    return total.hexdigest()


def _mapped(file: Any, dtype: np.dtype, size: int, at: int) -> np.ndarray:
    return np.memmap(file, dtype, "r", at, (size,)) if size else np.empty(0, dtype)


def _blocks(array: np.ndarray) -> Iterator[Any]:
    """The array's own memory, some of it at a time."""
    data = _bytes(array)
    for at in range(0, len(data), _BLOCK):
        yield data[at : at + _BLOCK]
        release(array)


def _bytes(array: np.ndarray) -> Any:
    """The array's own memory, not a copy of it."""
    return np.ascontiguousarray(array).view(np.uint8).data
