"""Checkpoints by Orbax's v1 API: written in the background, renamed when whole, only what trains.

A checkpoint is the folder `<workdir>/checkpoints/<step>/` with `state` (a pytree of arrays, as dicts of dicts), `meta`
(JSON: what the run stands on, and where early stopping is) and, where the checkpoint was evaluated, `metrics`. The last
ones and the best one are kept. `SHA256SUMS` says what each of its files holds: it is written before the folder is
renamed, and compared before anything of the checkpoint is used. What was written before there was one is read too, and
what specjax 0.1 wrote: `trainable` and `opt_state` in place of `state`, with parameters by dotted path.
"""

import contextlib
import dataclasses
import errno
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from specjax.errors import UserError
from specjax.train import checksums
from specjax.train import tree as tree_lib

_LONGEST = 512  # bytes of what a process says of a damage
# What Orbax raises of files that are absent, cut short or overwritten: most of it names no file. Full memory is not
# among it.
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, FileNotFoundError)


class Damaged(UserError):
    """A checkpoint that cannot be read.

    Attributes:
      what: is the matter with it, in words.
      everywhere: whether all processes of the run found it so.
    """

    what = ""
    everywhere = False


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: made when absent.
      read_only: for evaluation and export; the folder must exist.
      keep: how many of the last ones stay, beside the best one.

    Raises:
      UserError: read_only, and there is no checkpoint.
      Damaged: what there is cannot be used, and there is no other.
    """

    def __init__(self, folder: str | Path, *, read_only: bool = False, keep: int = 1):
        self.folder, self._keep = Path(folder).absolute(), keep
        if read_only and not self.folder.is_dir():
            raise UserError(f"{self.folder} holds no checkpoints: train first, or give the workdir of a run.")
        self._read_only = read_only
        self._whole: set[int] = set()  # steps all of whose files were compared
        self._writing: Any = None
        self._saving = 0  # the step
        self._open()

    def _open(self) -> None:
        for step in sorted(_steps(self.folder)):  # Orbax reads some of each at once, and stops at one that is none
            if what := agreed(checksums.glance(self.folder / str(step))):
                damaged = self._damaged(step, what, everywhere=True)
                if self._read_only:
                    raise damaged
                self._move(step, damaged)
        # The first process's, when all is there. Orbax copies its options deeply, and a method with what it is of.
        context = ocp.Context()
        context.async_options.__class__ = _Async  # the constructor takes options too, with a warning that it won't soon
        context.async_options.post_finalization_callback = lambda: self._sum()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        context.pytree.loading.partial_load = True  # what trains, without the optimizer's state
        # Replicas write a part each, and a part is a program to compile for each shape: not of what is small.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
        policies = ocp.training.preservation_policies
        best = policies.BestN(n=1, get_metric_fn=_loss, reverse=True, keep_checkpoints_without_metrics=False)
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
            # What a killed run left half-written is no checkpoint.
            cleanup_tmp_directories=not self._read_only,
        )

    def latest(self) -> int | None:
        """The last step saved."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def best(self) -> int | None:
        """The step with the least loss on the set that chooses, or None where no checkpoint was evaluated."""
        evaluated = [saved for saved in self._orbax.checkpoints if saved.metrics is not None]
        # Of equal ones the last, which is what the preservation policy keeps.
        return min(reversed(evaluated), key=lambda saved: _loss(saved.metrics)).step if evaluated else None

    def pick(self, which: str) -> int:
        """The step that "best", "last" or a number names.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = [saved.step for saved in self._orbax.checkpoints]
        chosen = {"last": self.latest(), "best": self.best() if self.best() is not None else self.latest()}
        step = chosen[which] if which in chosen else int(which) if which.isdigit() else None
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder} has no checkpoint {which!r}: there are {have}; say best, last, or a step.")
        assert step is not None
        return step

    def save(self, step: int, state: Any, meta: dict[str, Any], loss: float | None = None) -> None:
        """Starts writing; the arrays are copied off the device before it returns, so they may be donated.

        Args:
          step: optimizer steps done.
          state: any pytree of arrays; the keys of its dicts may be tuples of names and numbers.
          meta: JSON-able.
          loss: of the evaluation that chooses the best checkpoint, where one was made at this step.

        Raises:
          UserError: the checkpoint before this one could not be written (a full disk).
        """
        self.wait()
        items = {"state": tree_lib.nested(tree_lib.leaves(state, tree_lib.escaped)), "meta": meta}
        metrics = None if loss is None else {"loss": loss}
        self._saving = step
        self._writing = self._guarded(
            lambda: self._orbax.save_checkpointables_async(
                step, items, force=True, metrics=metrics, custom_metadata=checksums.MARK
            )
        )

    def _sum(self) -> None:
        checksums.write(self.folder / f"{self._saving}.orbax-checkpoint-tmp")

    def wait(self) -> None:
        """Until the last save is whole.

        Raises:
          UserError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            self._guarded(self._orbax.wait)
        finally:
            with contextlib.suppress(OSError, ValueError):  # the same failure, once more for who asks by the response
                writing.result()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint.

        Raises:
          Damaged: it cannot be read.
        """
        self._check(step)
        with self._reading(step):
            found: dict[str, Any] = self._orbax.load_checkpointables(step, {"meta": None})["meta"]
        return found

    def load(self, step: int, state: Any) -> Any:
        """Reads a checkpoint onto the devices of a state.

        Args:
          step: one that there is.
          state: arrays, or abstract ones with shardings, of the shapes to read: the tree that was saved, or a dict of
            some of its first level.

        Returns:
          A tree like `state`.

        Raises:
          UserError: the checkpoint's arrays are others.
          Damaged: it cannot be read.
        """
        self._check(step)
        parts = {names[0] for names in tree_lib.leaves(state, tree_lib.escaped)}
        with self._reading(step):  # what it says of its arrays need not be what it should be, either
            stored = self._orbax.checkpointables_metadata(step).metadata
            old = "state" not in stored
            tree = {part: leaves for part, leaves in (stored if old else stored["state"]).items() if part in parts}
            saved = {names: leaf.shape for names, leaf in tree_lib.leaves(tree, tree_lib.as_is).items()}
        wanted = tree_lib.leaves(state, tree_lib.dotted if old else tree_lib.escaped)
        if reason := tree_lib.difference({names: leaf.shape for names, leaf in wanted.items()}, saved):
            writer = "was written by specjax 0.1 and " if old else ""
            raise UserError(
                f"{self.folder / str(step)}: {writer}does not fit this model and optimizer ({reason}): go on with what "
                "it was written with, or start in a new workdir."
            )
        abstract = jax.tree.unflatten(jax.tree.structure(tree), [_abstract(wanted[names]) for names in saved])
        with self._reading(step):
            loaded = self._orbax.load_checkpointables(step, abstract if old else {"state": abstract})
        arrays = dict(zip(saved, jax.tree.leaves(loaded), strict=True))
        return jax.tree.unflatten(jax.tree.structure(state), [arrays[names] for names in wanted])

    def set_aside(self, step: int, damaged: Damaged) -> None:
        """Moves a damaged checkpoint out of the way, so that the one before it is the last, and warns of it.

        Raises:
          Damaged: there is none before it, or other processes may read what this one can't.
        """
        self._orbax.close()
        self._move(step, damaged)
        self._open()

    def _move(self, step: int, damaged: Damaged) -> None:
        others = [one for one in _steps(self.folder) if one != step]
        if not others or (jax.process_count() > 1 and not damaged.everywhere):
            raise damaged
        if jax.process_index() == 0:
            aside = self.folder.parent / "damaged"
            aside.mkdir(exist_ok=True)
            names = [str(step), *(f"{step}.{number}" for number in range(1, 1 + len(list(aside.iterdir()))))]
            aside /= next(name for name in names if not (aside / name).exists())
            (self.folder / str(step)).rename(aside)
            newest = max(others)
            goes = f"goes on from the checkpoint of step {newest}" if newest < step else "has lost it"
            warnings.warn(
                f"{self.folder / str(step)} {damaged.what}: it is moved to {aside}, and the run {goes}.", stacklevel=2
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"specjax_damaged_{step}")

    def _check(self, step: int) -> None:
        """Compares every file of a checkpoint, once; of several processes each compares a part."""
        if step in self._whole:
            return
        folder = self.folder / str(step)
        what = checksums.glance(folder) or checksums.compare(folder, jax.process_index(), jax.process_count())
        if what := agreed(what):
            raise self._damaged(step, what, everywhere=True)
        self._whole.add(step)

    def _damaged(self, step: int, what: str, *, everywhere: bool = False) -> Damaged:
        others = [one for one in _steps(self.folder) if one != step]
        way = f"take it away to use that of step {max(others)}" if others else "start in a new workdir"
        damaged = Damaged(f"{self.folder / str(step)} is damaged ({what}): {way}.")
        damaged.what, damaged.everywhere = f"is damaged ({what})", everywhere
        return damaged

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            if _disk_error(error) or "PERMISSION_DENIED" in str(error):
                raise
            raise self._damaged(step, f"it cannot be read: {type(error).__name__}") from error

    def close(self) -> None:
        """Waits and lets go."""
        self.wait()
        self._guarded(self._orbax.close)

    def _guarded(self, write: Callable[[], Any]) -> Any:
        try:
            return write()
        except (OSError, ValueError) as error:
            if not _disk_error(error):
                raise
            kept = max(_steps(self.folder), default=None)
            survivor = (
                f"the checkpoint of step {kept} is whole" if kept is not None else "no checkpoint was written yet"
            )
            raise UserError(
                f"{self.folder}: a checkpoint could not be written ({_reason(error)}); {survivor}."
            ) from error


class _Async(ocp.options.AsyncOptions):
    """Orbax's, with a barrier of ours."""

    def v0(self) -> Any:
        return dataclasses.replace(super().v0(), barrier_sync_fn=_meet)


def _meet(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes, but not where this one's save failed: they wait elsewhere, for 20 minutes.

    Orbax comes here in a `finally`. What is raised reaches `wait` in this process, which ends; the others hear of that.
    """
    if error := sys.exc_info()[1]:
        raise error
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _steps(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def agreed(what: str) -> str:
    """The words of the first process that has any, the same on all processes; all of them ask."""
    if jax.process_count() == 1:
        return what
    mine = np.frombuffer(what.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, _LONGEST)
    found = (bytes(words).rstrip(b"\0").decode(errors="ignore") for words in every)
    return next((words for words in found if words), "")


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _disk_error(error: BaseException) -> bool:
    """Whether the file system refused: Python says so by errno, tensorstore in its message."""
    text = str(error)
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
    return getattr(error, "errno", None) in codes or any(
        words in text for words in ("No space left", "RESOURCE_EXHAUSTED", "File too large", "quota exceeded")
    )


def _reason(error: BaseException) -> str:
    for words in ("No space left on device", "File too large", "quota exceeded"):
        if words in str(error):
            return words
    return str(error).strip().splitlines()[0]
