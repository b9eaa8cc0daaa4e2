"""Whether a checkpoint's files hold what was written: a list made with it, compared when it is read.

`SHA256SUMS` is as `sha256sum` writes it, so that `sha256sum --check SHA256SUMS` in the checkpoint compares too. Every
file is listed but those that come last (`LATER`) and hidden ones, which network filesystems leave; a file that is not
listed is as wrong as one that is missing. All of them are on the disk, not in its caches alone, before the list is.
"""

import errno
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from specjax.files import sync

NAME = "SHA256SUMS"
_ABOUT = "_CHECKPOINT_METADATA"  # Orbax's
LATER = (NAME, _ABOUT, "commit_success.txt")  # Orbax's are written once all else is there, with the time in them
MARK = {"checksums": NAME}  # what a checkpoint says of itself, so that a list that is gone is missed
_THREADS = 4  # of hashing, which lets go of Python's lock
_ARRAYS = "state/"  # where the large files are


def write(folder: Path) -> None:
    """Lists a checkpoint's files as they are, on the disk.

    Raises:
      OSError: a file cannot be read or written.
    """
    names = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: sync(folder / name), names))
        sums = list(pool.map(lambda name: _sum(folder / name), names))
    for inside in {parent for name in names for parent in (folder / name).parents if parent.is_relative_to(folder)}:
        sync(inside)  # the names in a folder, too, wait in caches
    (folder / NAME).write_text("".join(f"{digest}  {name}\n" for name, digest in zip(names, sums, strict=True)))
    sync(folder / NAME)
    sync(folder)


def glance(folder: Path) -> str:
    """What is the matter with a checkpoint, before its arrays are looked at, in words; "" is nothing."""
    return _said(_glance, folder)


def compare(folder: Path, part: int = 0, parts: int = 1) -> str:
    """Which of a checkpoint's files are not what was written, in words; "" is none, or that there is no list.

    Args:
      folder: the checkpoint.
      part: of the files, to be compared here.
      parts: that all files are dealt out to.
    """
    return _said(lambda folder: _compare(folder, _listed(folder), _files(folder)[part::parts]), folder)


def _glance(folder: Path) -> str:
    listed = _listed(folder)
    if listed is None:  # of before there were lists
        metrics = folder / "metrics" / "metrics"
        if metrics.is_file() and not isinstance(json.loads(metrics.read_bytes())["loss"], int | float):
            return "its metrics have no loss"
        return "" if any(folder.iterdir()) else "it is empty"
    json.loads((folder / _ABOUT).read_bytes())["item_handlers"]
    there = _files(folder)
    if missing := sorted(listed.keys() - set(there)):
        return f"it lacks {missing[0]}"
    return _compare(folder, listed, [name for name in there if not name.startswith(_ARRAYS)])


def _compare(folder: Path, listed: dict[str, str] | None, names: list[str]) -> str:
    if listed is None:
        return ""
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _sum(folder / name), names)
        other = [name for name, found in zip(names, sums, strict=True) if found != listed.get(name)]
    return f"{other[0]} is not what was written" if other else ""


def _said(look: Callable[[Path], str], folder: Path) -> str:
    """What a look at a folder finds, where it fails over what lies there too."""
    try:
        return look(folder)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError, FileNotFoundError) as error:
        return f"it cannot be read: {type(error).__name__}"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"it cannot be read: {error.strerror}"


def _listed(folder: Path) -> dict[str, str] | None:
    """File -> digest, or None where a checkpoint was written without."""
    if not (folder / NAME).exists():
        about = folder / _ABOUT
        said = json.loads(about.read_bytes()).get("custom_metadata") if about.exists() else None
        if not isinstance(said, dict) or said.items().isdisjoint(MARK.items()):
            return None
    lines = (folder / NAME).read_text(encoding="ascii").split("\n")
    if lines.pop():
        raise ValueError("the last line has no end")
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def _files(folder: Path) -> list[str]:
    found = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sorted(name for file in found if (name := file.relative_to(folder).as_posix()) not in LATER)


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
