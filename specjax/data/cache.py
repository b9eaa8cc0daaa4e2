"""Arrays kept on disk under the digest of all that they were made from, so that they are made once.

A file appears whole or not at all: it is written under another name and then renamed. It bears the digest of its
contents, so one that was damaged since is noticed. Processes that make the same file at once do not harm each other:
where the filesystem has locks, one makes it and the others wait.
"""

import contextlib
import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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


def keep(path: Path, kept: Kept) -> None:
    """Writes the file `path`; where that fails, a warning says so and nothing is kept."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it, or finished it just now
                if time.time() - old.stat().st_mtime > _ABANDONED:
                    old.unlink()
        with partial.open("xb") as file:
            file.write(json.dumps({"digest": _contents(kept)} | _header(kept)).encode() + b"\n")
            for array in kept.arrays.values():
                file.write(_bytes(array))
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        warnings.warn(
            f"the prepared data could not be kept in {path.parent} ({error.strerror}): the next start makes it again.",
            stacklevel=2,
        )


def find(path: Path) -> Kept | None:
    """What the file `path` keeps; None where there is no such file, or, with a warning, where it is damaged."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            sizes = {name: (np.dtype(dtype), int(size)) for name, (dtype, size) in header["arrays"].items()}
            rest = os.fstat(file.fileno()).st_size - file.tell()
            if sum(dtype.itemsize * size for dtype, size in sizes.values()) == rest:
                arrays = {name: np.fromfile(file, dtype, size) for name, (dtype, size) in sizes.items()}
                kept = Kept(arrays, header["facts"])
                if header["digest"] == _contents(kept):
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
    return digest(header, *(_bytes(array) for array in kept.arrays.values()))


def _bytes(array: np.ndarray) -> bytes:
    """The array's own memory, not a copy of it."""
    return np.ascontiguousarray(array).view(np.uint8).data  # type: ignore[return-value]
