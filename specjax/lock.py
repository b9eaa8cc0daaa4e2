"""A folder that one run alone may write into: a lock of the system, which no crash leaves behind.

The lock is `flock`'s, on a file in the folder, and goes with the process that holds it, however that ends. On NFS Linux
makes it a lock of the server's (version 4, or 3 with its lock manager), so that it holds between hosts; a filesystem
that has none, or knows none but the host's own (a mounted bucket), keeps nobody out, of which the former is said.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

from specjax.errors import UserError

NAME = "specjax.lock"
_NONE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a filesystem without locks
_held: dict[Path, int] = {}  # folder -> the thread that holds it


class Lock:
    """The lock of a run's folder; a context manager that gives it back.

    Who holds it already, in this thread, takes it once more in vain, and does not give it back: `fit` in a run.

    Args:
      folder: of the run.
    """

    def __init__(self, folder: str | Path):
        self._folder, self._file = Path(folder), -1

    def take(self, *, make: bool = True) -> bool:
        """Takes the lock, unless it is held here.

        Args:
          make: the file, where no run has made it yet.

        Returns:
          Whether it is held.

        Raises:
          UserError: another holds it.
        """
        place, path = Path(os.path.realpath(self._folder)), self._folder / NAME
        if _held.get(place) == threading.get_ident():
            return True
        if not make and not path.exists():
            return False
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = os.read(file, 1000)
            os.close(file)
            if error.errno in _NONE:
                warnings.warn(
                    f"{self._folder}: its filesystem has no locks ({error.strerror}), so that nothing keeps a second "
                    "run out of it.",
                    stacklevel=2,
                )
                return True
            raise UserError(
                f"{self._folder} is in use by {_owner(said)}: wait for that run's end, or choose another workdir."
            ) from None
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(file, 0)
        os.write(file, json.dumps(about).encode())
        self._file, _held[place] = file, threading.get_ident()
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:
            del _held[Path(os.path.realpath(self._folder))]
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1


def _owner(said: bytes) -> str:
    try:
        about = json.loads(said)
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (ValueError, LookupError, TypeError):  # it holds the lock, and has not yet said so
        return "another process"
