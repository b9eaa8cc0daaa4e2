"""Several processes as one run: they find each other, agree on what failed, and write a folder together.

Every process calls the same functions in the same order; with one process all of this is nothing.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # JAX has no public way to the barrier that Orbax too waits at
from jax.experimental import multihost_utils

from specjax.cluster.launch import COORDINATOR, COUNT, INDEX
from specjax.cluster.others import Others
from specjax.errors import UserError
from specjax.files import new_folder

_LONGEST_PATH = 4096  # bytes
_HEARTBEAT = 30  # seconds of silence after which a process counts as ended; they come from a thread of JAX's
_COLLECTIVE = re.compile("Gloo|NCCL|CoordinationService|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED")
_watching: list[Others] = []  # one, in a process of the command's own


def join(*, watch: bool = False, workdir: str | Path | None = None) -> None:
    """Makes this process one of those that a launcher started, before any device is asked for.

    Which one, of how many, and where the first is: from SPECJAX_COORDINATOR (host:port), SPECJAX_PROCESSES and
    SPECJAX_PROCESS, else as `jax.distributed.initialize` finds it on Cloud TPU, SLURM, Open MPI and Kubernetes.

    Args:
      watch: this process ends in a sentence when another one ends; it must be the command's own (`others`).
      workdir: of the run, whose last checkpoint that sentence names.

    Raises:
      UserError: there is no cluster to be seen.
    """
    given: dict[str, Any] = {}
    if COORDINATOR in os.environ:
        try:
            given = {"num_processes": int(os.environ[COUNT]), "process_id": int(os.environ[INDEX])}
        except (KeyError, ValueError):
            raise UserError(f"{COORDINATOR} is set: set {COUNT} and {INDEX} to whole numbers too.") from None
        given["coordinator_address"] = address = os.environ[COORDINATOR]
        if address.startswith("127.0.0.1:"):
            given["coordinator_bind_address"] = address  # JAX would listen on every network there is
    if watch:
        _watching.append(Others(workdir))
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=_HEARTBEAT)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--distributed: no cluster was found ({str(error).strip().rstrip('.')}): start it by `specjax launch`, "
            "or leave --distributed out where one process has all devices."
        ) from error
    for others in _watching:
        others.joined(distributed.global_state.client, distributed.global_state.process_id)


def wait_for_the_cause(error: BaseException | None) -> None:
    """Where an error may come of another process's end: this one ends meanwhile, saying which."""
    kinds = (jax.errors.JaxRuntimeError, TimeoutError)  # of collectives; of barriers, as Orbax has it
    while error is not None and not (isinstance(error, kinds) and _COLLECTIVE.search(str(error))):
        error = error.__cause__ or error.__context__
    if any(others.ending() or (error is not None and others.all_there()) for others in _watching):
        time.sleep(_HEARTBEAT + 15)


def leave(status: int, *, failed: bool, seconds: int = 15) -> None:
    """Waits a moment for the others to end too, whose coordinator this process may be; then it may go.

    Args:
      status: that it ends with, at once where the first process goes before it.
      failed: the others are told, and end where they do not come to the same.
      seconds: at most.
    """
    for others in _watching:
        others.leave(status, failed=failed)
    client = distributed.global_state.client
    if client is not None:
        with contextlib.suppress(Exception):  # the others are somewhere else, and find this one gone
            client.wait_at_barrier("specjax_leave", timeout_in_ms=1000 * seconds)


def first() -> bool:
    """Whether this process speaks for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def agreement(what: str) -> Iterator[None]:
    """A stretch of all processes' work at whose end each knows whether it went well everywhere.

    A process that fails raises what it met, the others a UserError that names it: none waits for it.

    Args:
      what: the end of a sentence that says what was not done, such as "out was not written".
    """
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
    if failure is not None:
        raise failure
    if failed.size:
        raise UserError(f"{what}, because process {failed[0]} failed: see what it says.")


def gather(array: Any) -> np.ndarray:
    """The whole of an array, on every process."""
    if jax.process_count() == 1 or not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def together(
    out: str | Path, overwrite: bool, begin: Callable[[Path], None], write: Callable[[Path], None] | None = None
) -> None:
    """Makes the folder `out`: the first process begins it, then all `write` into it; it appears when all are done.

    Raises:
      UserError: `out` is not empty, is not on a filesystem that all processes share, or another process failed.
    """
    if jax.process_count() == 1:
        with new_folder(out, overwrite=overwrite) as folder:
            begin(folder)
            if write:
                write(folder)
        return
    staged, missed = b"", f"{out} was not written"
    with contextlib.ExitStack() as stack:
        with agreement(missed):
            if first():
                folder = stack.enter_context(new_folder(out, overwrite=overwrite))
                staged = str(folder.absolute()).encode()
                begin(folder)
        told = multihost_utils.broadcast_one_to_all(np.frombuffer(staged.ljust(_LONGEST_PATH, b"\0"), np.uint8))
        folder = Path(bytes(np.asarray(told)).rstrip(b"\0").decode())
        with agreement(missed):
            if not folder.is_dir():
                raise UserError(f"{out} is not on a filesystem that all processes share: choose a folder that is.")
            if write:
                write(folder)
        with agreement(missed):
            stack.close()  # the first process renames the folder
