"""What a process of a run does when another one ends: one sentence and status 75, within a bounded time.

Its main thread may wait for ever in a collective that the other one will not join. JAX's own client hears of it (the
service of the first process, to which all send heartbeats) and aborts, with a stack of C++ on stderr. So stderr of the
compiled libraries passes through a thread here, which turns that abort into a sentence; and a process that fails in
Python leaves word in the service's store, where a second thread of the others looks for it.
"""

import atexit
import contextlib
import ctypes
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

ENDED = 75  # sysexits.h: EX_TEMPFAIL, "the user is invited to retry"
GRACE = 10.0  # seconds for this process to fail too, or to agree with the one that did, and say so itself
_NAMES, _WORD = "specjax/process/", "specjax/failed/"  # in the store of JAX's coordination service
_JOINED = 300_000  # milliseconds
_ABORTING = 6  # seconds that a thread which aborts waits; the number of SIGABRT, see `Others`
_ABORT = b"Terminating process because the JAX distributed service detected fatal errors"
_OMINOUS = re.compile(rb"coordination_service\w*\.cc|preemption_sync_manager\.cc|" + re.escape(_ABORT))
_SILENT = re.compile(rb"stopped sending heartbeats\):\s*([\d,\s]+)")
_JOINING = b"CoordinationService/RegisterTask"
_UNREACHED = b"Failed to send RPC to coordination service"


class Others:
    """Watches over the other processes of a run; made before JAX joins them, which may fail already.

    Args:
      workdir: of the run, whose last checkpoint is named; None: there is none.
    """

    def __init__(self, workdir: str | Path | None):
        self._workdir, self._names, self._word = workdir, dict[int, str](), ""
        self._client: Any = None
        self._index, self._leaving, self._ending = 0, 0, threading.Lock()
        self._stderr = os.dup(2)
        sys.stderr.flush()
        sys.stderr = open(self._stderr, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
        pipe, write = os.pipe()
        os.dup2(write, 2)
        os.close(write)
        libc = ctypes.CDLL(None)
        # A thread that aborts (JAX's) is to wait, while this one reads why. A handler is given the signal's number, so
        # sleep is one of 6 seconds; when it returns, the abort goes on.
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        reader = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        reader.start()

        def finish() -> None:
            os.dup2(self._stderr, 2)
            reader.join(1.0)

        atexit.register(finish)

    def joined(self, client: Any, index: int) -> None:
        """All processes are there: each tells its name to the others, and looks for word of a failure."""
        self._client, self._index = client, index
        client.key_value_set(f"{_NAMES}{index}", f"process {index} (pid {os.getpid()} on {socket.gethostname()})")
        client.wait_at_barrier("specjax_joined", timeout_in_ms=_JOINED)
        self._names = {int(key.rpartition("/")[2]): name for key, name in client.key_value_dir_get(_NAMES)}
        threading.Thread(target=self._look, args=(client,), daemon=True).start()

    def ending(self) -> bool:
        """Whether it was said that another process ended, and this one ends with it."""
        return self._ending.locked()

    def all_there(self) -> bool:
        """Whether all processes had joined."""
        return bool(self._names)

    def leave(self, status: int, *, failed: bool) -> None:
        """This process ends by itself with a status other than 0, and has said why; `failed`: the others are told."""
        sys.stdout.flush()
        self._ending.acquire()
        self._leaving = status
        if failed and self._index in self._names:
            with contextlib.suppress(Exception):  # the service is gone
                self._client.key_value_set(f"{_WORD}{self._index}", self._names[self._index])

    def _look(self, client: Any) -> None:
        while not self._word:
            time.sleep(1.0)
            with contextlib.suppress(Exception):  # the service is gone, as `_read` will hear
                self._word = next((word for _, word in client.key_value_dir_get(_WORD)), "")
        time.sleep(GRACE)
        self._end("")

    def _read(self, pipe: int) -> None:
        """Passes on what compiled libraries say on stderr, but for what leads to JAX's abort."""
        held, since = b"", 0.0
        while True:
            ready = select.select([pipe], [], [], 1.0)[0]
            new = os.read(pipe, 1 << 16) if ready else b""
            if not held:
                since = time.monotonic()
            held += new
            if _ABORT in held:
                self._end(blamed(held, self._names))
            if not _OMINOUS.search(held) or time.monotonic() - since > _ABORTING - 1 or (ready and not new):
                with contextlib.suppress(OSError):  # nobody reads it any more
                    os.write(self._stderr, held)
                held = b""
            if ready and not new:
                return

    def _end(self, why: str) -> None:
        """Says why, and ends this process."""
        if self._leaving:
            os._exit(self._leaving)
        self._ending.acquire()  # once
        why = f"{self._word} failed (see what it says)" if self._word else why
        with contextlib.suppress(OSError):
            os.write(self._stderr, f"specjax: {why}, so this process ends too; {last(self._workdir)}.\n".encode())
        if self._index == 0:
            time.sleep(_ABORTING / 2)  # the service is here: without it the others would blame this process
        os._exit(ENDED)


def blamed(said: bytes, names: dict[int, str]) -> str:
    r"""Why JAX aborts, in words: of which processes nothing is heard.

    >>> blamed(b"unhealthy (stopped sending heartbeats):\n1\n2\nThe tasks have crashed", {1: "process 1 (pid 8)"})
    'process 1 (pid 8), process 2 ended or cannot be reached'
    """
    if _JOINING in said:
        return "not all processes of the run came in time"
    numbers = [0] if _UNREACHED in said else []
    if silent := _SILENT.search(said):
        numbers = [int(number) for number in re.findall(rb"\d+", silent[1])]
    who = ", ".join(names.get(number, f"process {number}") for number in numbers) or "another process of the run"
    return f"{who} ended or cannot be reached"


def last(workdir: str | Path | None) -> str:
    """The last checkpoint, and what to do, in words."""
    folder = Path(workdir) / "checkpoints" if workdir else None
    steps = [int(one.name) for one in folder.glob("[0-9]*") if one.name.isdigit()] if folder else []
    found = f"the last checkpoint is of step {max(steps)}: " if steps else ""
    return f"{found}run the same command again to go on"
