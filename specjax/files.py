"""A user's files: a folder written whole or not at all, never over somebody's files; JSON read in one way."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specjax.errors import UserError

JSON = 64 << 20  # bytes that a JSON file may have
MARK = "specjax.json"  # what a run writes into its folder first
# What makes a model's folder another model: left behind by an earlier export, they would be read beside the new one's.
_STALE = ("*.safetensors*", "config.json", "generation_config.json", "adapter_config.json")
_STALE_TOKENIZER = ("chat_template.*", "additional_chat_templates", "special_tokens_map.json", "added_tokens.json")


def claim(workdir: str | Path, names: Sequence[str] = ()) -> None:
    """Refuses a folder that is no run's and holds anything, or anything of these names; touches nothing.

    A run's folder is marked (`mark`), or has checkpoints as specjax 0.1 left them, which marked none.

    Raises:
      UserError: the folder is a file, or another's.
    """
    workdir = Path(workdir)
    if workdir.is_symlink() and not workdir.exists():
        raise UserError(f"{workdir} is a link to nothing: choose another workdir.")
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: choose another workdir.")
    if not workdir.is_dir() or (workdir / MARK).is_file() or any(workdir.glob("checkpoints/[0-9]*/meta")):
        return
    begun = f"{MARK}.partial"  # a run that was killed while it marked the folder
    held = sorted(
        entry.name for entry in workdir.iterdir() if entry.name != begun and (not names or entry.name in names)
    )
    if held:
        raise UserError(
            f"{workdir} is not empty and holds no run: it has {held[0]} but no {MARK}, which each run writes: choose "
            "another workdir."
        )


def mark(workdir: str | Path) -> None:
    """Makes a run's folder, and marks it as one."""
    Path(workdir).mkdir(parents=True, exist_ok=True)
    write_json(Path(workdir) / MARK, {"this": "is the folder of a run of specjax, which may write here"})


def read_object(path: str | Path, remedy: str = "restore the file", *, most: int = JSON) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
      path: the file.
      remedy: what to do if there is none, the end of the sentence.
      most: bytes that it may have.

    Raises:
      UserError: it cannot be read, is no plain file or a larger one, is not JSON (UTF-8), or holds something else than
        an object.
    """
    try:
        found = json.loads(read_bytes(path, most))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is not JSON (it is nested too deeply): {remedy}.") from error
    except ValueError as error:  # no JSON, no UTF-8, a number of too many digits
        raise UserError(f"{path} is not JSON ({error}): {remedy}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object: {remedy}.")
    return found


def read_bytes(path: str | Path, most: int) -> bytes:
    """All of a file.

    Raises:
      OSError: it cannot be read.
      UserError: it is no plain file (a pipe would wait, a device may have no end), or has over `most` bytes.
    """
    held = os.stat(path)
    if not stat.S_ISREG(held.st_mode) and not stat.S_ISDIR(held.st_mode):  # a folder has an error of its own
        raise UserError(f"{path} is no plain file, but a pipe or a device: give a copy of what it holds.")
    if held.st_size > most:
        raise UserError(f"{path} has {held.st_size:,} bytes, and at most {most:,} are read of a file of its kind.")
    return Path(path).read_bytes()


def is_inside(name: Any) -> bool:
    """Whether a name that a file gives is that of a file in a folder, or deeper in it: no way leads out by it.

    >>> [is_inside(name) for name in ("a.safetensors", "b/a.safetensors", "../a", "b/../../a", "/etc/passwd", "", 3)]
    [True, True, False, False, False, False, False]
    """
    if not isinstance(name, str) or not name or len(name) > 1024 or "\0" in name or "\\" in name:
        return False
    parts = name.split("/")
    return all(part not in ("", ".", "..") and len(part.encode(errors="replace")) <= 255 for part in parts)


def is_there(path: str | Path) -> bool:
    """Whether something lies at a path; nothing does at a name that is none, such as one that is too long."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, object) of each line of a file of ours, one JSON object per line, but for a last one torn by a kill.

    Raises:
      UserError: it cannot be read, or a line is something else.
    """
    rows = []
    try:
        with Path(path).open(encoding="utf-8", newline="\n") as lines:  # a text may hold any other line's end
            for line in lines:
                if line.endswith("\n"):
                    rows.append((line, dict(json.loads(line))))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}:{len(rows) + 1} cannot be read ({error}): restore the file, or delete it.") from error
    return rows


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all, whatever dies: the process, or the machine."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Has what lies in the system's caches of a file, or of a folder's names, put on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a filesystem without this, for folders at least
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `out` that takes its place when the block ends well.

    Args:
      out: the folder to make.
      overwrite: replace the files of the same names in an existing folder, and what an earlier export left there; its
        other files stay.

    Raises:
      UserError: `out` exists and is not empty (and `overwrite` is False), is a file, or the folder of a run.
    """
    out = Path(out)
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a link to nothing: choose another output folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another output folder.")
    if (out / MARK).is_file():
        raise UserError(f"{out} is the folder of a run, whose files would be replaced: choose another output folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists and is not empty: choose another output folder, or give overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out)
    staging = Path(tempfile.mkdtemp(prefix=_staging(out), dir=out.parent))
    owned = os.open(staging, os.O_RDONLY)
    try:
        _lock(owned)
        yield staging
        # mkdtemp and safetensors make private files; these are as open as any other of the user's.
        mask = os.umask(0)
        os.umask(mask)
        for file in (staging, *staging.rglob("*")):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
            sync(file)
        if out.is_dir() and any(out.iterdir()):
            _replace(out, staging)
        else:
            os.replace(staging, out)
        sync(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(owned)


def sweep(out: Path) -> None:
    """Removes what writers of a folder that were killed left beside it; not where the filesystem locks no folders."""
    for left in out.parent.glob(f"{glob.escape(_staging(out))}*"):
        with contextlib.suppress(OSError):  # another's, who is at work, or who removes it too
            owned = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _lock(owned):
                    shutil.rmtree(left)
            finally:
                os.close(owned)


def _staging(out: Path) -> str:
    return f".{out.name}.specjax-"


def _lock(folder: int) -> bool:
    """Whether this process now has the lock of an open folder, which goes with it; on NFS folders have none."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def refuse_base(out: str | Path, source: str) -> None:
    """Refuses to write a model or an adapter over the folder that its base was read from.

    Args:
      out: the folder to write.
      source: a folder, a hub name, or "".

    Raises:
      UserError: they are the same.
    """
    if source and Path(source).is_dir() and Path(out).exists() and Path(out).samefile(source):
        raise UserError(f"{out} is the folder of the base, {source}: choose another output folder.")


def _replace(out: Path, staging: Path) -> None:
    """Moves new files into a folder that has others, of which those of an earlier export go."""
    renewed = (staging / "tokenizer_config.json").is_file()
    for pattern in (*_STALE, *(_STALE_TOKENIZER if renewed else ())):
        for stale in out.glob(pattern):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    for file in staging.iterdir():
        os.replace(file, out / file.name)
