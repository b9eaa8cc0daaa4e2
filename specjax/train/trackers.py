"""Where a run's numbers are shown beside its own files: TensorBoard and W&B.

Both write when they are called, so that what fails fails there: a writer of its own thread that dies of a full disk
leaves a queue that fills, and a run that waits for it.
"""

import contextlib
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from specjax.errors import UserError, argument


class Tracker(Protocol):
    """What is told of a run."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Of a step, by name."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text of a step."""

    def close(self) -> None:
        """The run is over."""


class TensorBoard:
    """TensorBoard's event files.

    Args:
      folder: made when absent.
      start: the step that the run resumes from; TensorBoard itself hides the events of earlier files after it.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX import proto, summary
        from tensorboardX.record_writer import RecordWriter

        self._event, self._summary = proto.event_pb2.Event, summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{start}"  # as TensorBoard looks for them
        self._file = RecordWriter(str(folder / name))
        log = proto.event_pb2.SessionLog
        try:
            self._write(file_version="brain.Event:2")
            self._write(step=start + 1 if start else 0, session_log=log(status=log.START))
        except OSError:
            with contextlib.suppress(OSError):  # the same
                self.close()
            raise

    def _write(self, **event: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **event).SerializeToString())
        self._file.flush()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars; those of training steps under `train/`."""
        for name, value in values.items():
            self._write(step=step, summary=self._summary.scalar(name if "/" in name else f"train/{name}", value))

    def text(self, step: int, name: str, text: str) -> None:
        """A text."""
        self._write(step=step, summary=self._summary.text(name, text))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WandB:
    """A page of Weights & Biases, which a resumed run continues.

    Raises:
      UserError: it is not installed.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any] | None):
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"{argument('wandb')} is {project!r}, but W&B is not installed: run `pip install wandb`, or set it to "
                "''."
            ) from None
        name = workdir / "wandb_id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex, encoding="utf-8")
        given = {"id": name.read_text(encoding="utf-8"), "resume": "allow", "config": dict(config or {})}
        self._run = wandb.init(project=project, name=workdir.name, dir=str(workdir), **given)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Of a step."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Texts are not shown there."""

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()
