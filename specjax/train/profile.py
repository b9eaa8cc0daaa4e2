"""A profiler's trace of a few steps, to be read with XProf (`pip install xprof`) or TensorBoard."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax


class Profile:
    """Traces three steps of a run, the first ones left out: they compile, and wait for their data.

    Args:
      folder: where the trace goes; None: none is made.
      start: the step that the run begins with.
      steps: at which it ends.
    """

    def __init__(self, folder: Path | None, *, start: int, steps: int):
        self.folder = folder
        self._first = max(start, min(start + 2, steps - 1))
        self._last = min(self._first + 2, steps - 1)
        self._on = False

    def before(self, step: int) -> None:
        """Called before each step is begun."""
        if self.folder is not None and step == self._first:
            jax.profiler.start_trace(str(self.folder))
            self._on = True

    def after(self, step: int, metrics: Any) -> bool:
        """Called when a step is under way, with its results; whether the trace is whole now."""
        if not self._on or step < self._last:
            return False
        jax.block_until_ready(metrics)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
