"""Checkpoints by Orbax's v1 API: written in the background, renamed when whole, only what trains.

A checkpoint is the folder `<workdir>/checkpoints/<step>/` with `state` (a pytree of arrays, as dicts of dicts), `meta`
(JSON: what the run stands on, and where early stopping is) and, where the checkpoint was evaluated, `metrics`. The last
one and the best one are kept. What specjax 0.1 wrote is read too: `trainable` and `opt_state` in place of `state`, with
parameters by dotted path.
"""

import contextlib
import errno
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.tree_util as jtu
import orbax.checkpoint.experimental.v1 as ocp

from specjax.errors import UserError

Names = tuple[str, ...]
# What Orbax raises of files that are absent, cut short or overwritten: most of it names no file. Full memory is not
# among it.
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, FileNotFoundError)


class Damaged(UserError):
    """A checkpoint that cannot be read.

    Attributes:
      what: is the matter with it, in words.
    """

    what = ""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: made when absent.
      read_only: for evaluation and export; the folder must exist.

    Raises:
      UserError: read_only, and there is no checkpoint.
    """

    def __init__(self, folder: str | Path, *, read_only: bool = False):
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise UserError(f"{self.folder} holds no checkpoints: train first, or give the workdir of a run.")
        self._read_only = read_only
        self._open()
        self._writing: Any = None

    def _open(self) -> None:
        for step in _steps(self.folder):
            try:
                with self._reading(step):  # Orbax reads these of all checkpoints at once, and stops at one that is none
                    metrics = self.folder / str(step) / "metrics" / "metrics"
                    json.loads(metrics.read_text(encoding="utf-8") if metrics.is_file() else "0")
            except Damaged as damaged:
                if self._read_only:
                    raise
                self._move(step, damaged)
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        context.pytree.loading.partial_load = True  # what trains, without the optimizer's state
        policies = ocp.training.preservation_policies
        best = policies.BestN(n=1, get_metric_fn=_loss, reverse=True, keep_checkpoints_without_metrics=False)
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
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
        items = {"state": _nested(_leaves(state, _escaped)), "meta": meta}
        metrics = None if loss is None else {"loss": loss}
        self._writing = self._guarded(
            lambda: self._orbax.save_checkpointables_async(step, items, force=True, metrics=metrics)
        )

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
        parts = {names[0] for names in _leaves(state, _escaped)}
        with self._reading(step):  # what it says of its arrays need not be what it should be, either
            stored = self._orbax.checkpointables_metadata(step).metadata
            old = "state" not in stored
            tree = {part: leaves for part, leaves in (stored if old else stored["state"]).items() if part in parts}
            saved = {names: leaf.shape for names, leaf in _leaves(tree, _as_is).items()}
        wanted = _leaves(state, _dotted if old else _escaped)
        if reason := _difference({names: leaf.shape for names, leaf in wanted.items()}, saved):
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
        older = [one for one in _steps(self.folder) if one < step]
        aside = self.folder.parent / "damaged" / str(step)
        if not older or aside.exists() or jax.process_count() > 1:
            raise damaged
        aside.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(aside)
        warnings.warn(
            f"{self.folder / str(step)} {damaged.what}: it is moved to {aside}, and the run goes on from the "
            f"checkpoint of step {max(older)}.",
            stacklevel=2,
        )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            if _disk_error(error) or "PERMISSION_DENIED" in str(error):
                raise
            what = f"is damaged and cannot be read ({type(error).__name__})"
            others = [one for one in _steps(self.folder) if one != step]
            way = f"take it away to use that of step {max(others)}" if others else "start in a new workdir"
            damaged = Damaged(f"{self.folder / str(step)} {what}: {way}.")
            damaged.what = what
            raise damaged from error

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


def _steps(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _leaves(tree: Any, spelt: Callable[[Any], Names]) -> dict[Names, Any]:
    """A pytree's leaves, in its order, by the names that lead to them; `spelt`: those of a key."""
    found = {}
    for path, leaf in jtu.tree_flatten_with_path(tree)[0]:
        # The key of a dict, the field of a tuple with names, the index in another.
        keys = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)
        found[tuple(name for key in keys for name in spelt(key))] = leaf
    return found


def _as_is(key: Any) -> Names:
    return (str(key),)


def _escaped(key: Any) -> Names:
    """A tuple is several names; Orbax joins names by dots, and files' names end at a slash."""
    parts = key if isinstance(key, tuple) else (key,)
    return tuple(str(part).replace("%", "%25").replace(".", "%2E").replace("/", "%2F") for part in parts)


def _dotted(key: Any) -> Names:
    """As specjax 0.1 wrote it: a tuple is one name, and all layers were what the first segment's are now."""
    name = ".".join(map(str, key)) if isinstance(key, tuple) else str(key)
    return (name.replace("layers.0.", "layers.", 1),)


def _nested(leaves: Mapping[Names, Any]) -> dict[str, Any]:
    """The leaves as dicts of dicts."""
    tree: dict[str, Any] = {}
    for (*folders, last), leaf in leaves.items():
        inner = tree
        for name in folders:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return tree


def _difference(wanted: Mapping[Names, Any], saved: Mapping[Names, Any]) -> str:
    """In what the arrays asked for differ from those that there are, in words, or ""."""
    for names in wanted.keys() - saved.keys():
        return f"it has no {'.'.join(names)}"
    for names in saved.keys() - wanted.keys():
        return f"it has {'.'.join(names)} too"
    for names, shape in wanted.items():
        if shape != tuple(saved[names]):
            return f"{'.'.join(names)} is {list(saved[names])} there and {list(shape)} here"
    return ""


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
