"""Checkpoints by Orbax: written in the background, renamed when whole, only what trains.

A checkpoint is three items under `<workdir>/checkpoints/<step>/`: `trainable` (by dotted path), `opt_state`, and `meta`
(JSON: what the run stands on, and where early stopping is). The last one and the best one are kept.
"""

import errno
import gc
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from specjax.errors import UserError


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
        policies = checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=lambda metrics: metrics["loss"],
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(1),
                        policies.BestN(
                            n=1,
                            get_metric_fn=lambda metrics: metrics["loss"],
                            reverse=True,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                create=not read_only,
                read_only=read_only,
                # What a killed run left half-written is no checkpoint.
                cleanup_tmp_directories=not read_only,
            ),
        )

    def latest(self) -> int | None:
        """The last step saved."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the least loss on the set that chooses, or None where no checkpoint was evaluated."""
        return self._manager.best_step()

    def pick(self, which: str) -> int:
        """The step that "best", "last" or a number names.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        chosen = {"last": self.latest(), "best": self.best() if self.best() is not None else self.latest()}
        step = chosen[which] if which in chosen else int(which) if which.isdigit() else None
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder} has no checkpoint {which!r}: there are {have}; say best, last, or a step.")
        assert step is not None
        return step

    def save(self, step: int, trainable: Any, opt_state: Any, meta: dict[str, Any], loss: float | None = None) -> None:
        """Starts writing; the arrays are copied off the device before it returns, so they may be donated.

        Args:
          step: optimizer steps done.
          trainable: parameters by dotted path.
          opt_state: the optimizer's.
          meta: JSON-able.
          loss: of the evaluation that chooses the best checkpoint, where one was made at this step.

        Raises:
          UserError: the checkpoint before this one could not be written (a full disk).
        """
        items = ocp.args.Composite(
            trainable=ocp.args.StandardSave(trainable),
            opt_state=ocp.args.StandardSave(opt_state),
            meta=ocp.args.JsonSave(meta),
        )
        self._guarded(lambda: self._manager.save(step, args=items, metrics=None if loss is None else {"loss": loss}))

    def wait(self) -> None:
        """Until the last save is whole.

        Raises:
          UserError: it could not be written.
        """
        self._guarded(self._manager.wait_until_finished)

    def restore_meta(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, step: int, trainable: Any, opt_state: Any = None) -> tuple[Any, Any]:
        """Reads a checkpoint onto the devices of the given trees.

        Args:
          step: one that there is.
          trainable: arrays (or abstract ones with shardings) of the shapes to read.
          opt_state: likewise; None: not read.

        Returns:
          (trainable, opt_state).

        Raises:
          UserError: the checkpoint's parameters are others than the model's.
        """
        items = {"trainable": ocp.args.StandardRestore(_abstract(trainable))}
        if opt_state is not None:
            items["opt_state"] = ocp.args.StandardRestore(_abstract(opt_state))
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.folder / str(step)}: does not fit this model and optimizer ({reason}).") from error
        return found["trainable"], found["opt_state"] if opt_state is not None else None

    def close(self) -> None:
        """Waits and lets go."""
        self.wait()
        self._manager.close()

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except (OSError, ValueError) as error:
            if not _disk_error(error):
                raise
            _drop_unawaited()
            whole = [int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()]
            kept = max(whole, default=None)
            survivor = (
                f"the checkpoint of step {kept} is whole" if kept is not None else "no checkpoint was written yet"
            )
            raise UserError(
                f"{self.folder}: a checkpoint could not be written ({_reason(error)}); {survivor}."
            ) from error


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _drop_unawaited() -> None:
    """Keeps Python quiet about writes that Orbax had not begun when another one failed: one sentence says it."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    gc.collect()


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
