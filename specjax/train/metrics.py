"""What a run shows and leaves behind: a progress bar or plain lines, `metrics.jsonl`, TensorBoard, W&B.

A resumed run continues its files as if it had never stopped: what was logged after the step that it resumes from is
dropped first, so every step stands there once.
"""

import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specjax.errors import UserError
from specjax.files import read_rows, write_text
from specjax.train.trackers import TensorBoard, Tracker, WandB


class Log:
    """Where a run's numbers go; a context manager, so that files and bar are closed however the run ends.

    Args:
      workdir: the run's folder, made if absent; None writes no files (every process but the first).
      steps: at which the run ends, for the bar and the time left.
      start: the step that the run resumes from, of a fleet by adapter; what was logged later is dropped. 0, or no
        adapter, starts all files anew.
      tensorboard: whether to write `<workdir>/tensorboard/`.
      wandb: a W&B project's name; "" does not use W&B.
      config: the resolved config, shown by W&B.
      console: where to print; default standard output. A bar on a terminal, one line per logged step elsewhere.

    Raises:
      UserError: when W&B is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | Path | None,
        *,
        steps: int,
        start: int | Mapping[str, int] = 0,
        tensorboard: bool = True,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        self._steps = steps
        self._adapter = ""
        self._console = console or Console()
        begun = sum(start.values()) if isinstance(start, Mapping) else start
        self._clock: tuple[float, int] | None = (
            None  # when, and at which step, the first step of this process was logged
        )
        self._files: dict[str, TextIO] = {}
        self._trackers: dict[str, Tracker] = {}
        self._bar: Progress | None = None
        if workdir is not None:
            where = Path(workdir)
            where.mkdir(parents=True, exist_ok=True)
            if wandb:
                self._track("W&B", lambda: WandB(wandb, where, config))
            # Both are read before either is changed.
            kept = {name: _kept(where / name, start) for name in ("metrics.jsonl", "samples.jsonl")}
            self._files = {name: _open_lines(where / name, lines) for name, lines in kept.items()}
            if tensorboard:
                self._track("TensorBoard", lambda: TensorBoard(where / "tensorboard", begun))
        if self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task("compiling the first step", total=steps, completed=begun)
            self._bar.start()

    def of_adapter(self, name: str, *, steps: int, tensorboard: Path | None = None, start: int = 0) -> "Log":
        """The log of one adapter of a fleet: its lines, which bear its name, go into the same files.

        Args:
          name: the adapter's.
          steps: its own.
          tensorboard: a folder for its event files; None: none.
          start: the step that it resumes from.
        """
        made = copy.copy(self)
        made._adapter, made._steps, made._clock, made._bar, made._trackers = name, steps, None, None, {}
        if tensorboard is not None:
            made._track("TensorBoard", lambda: TensorBoard(tensorboard, start))
        return made

    def progress(self, step: int, description: str) -> None:
        """Moves the bar, where there is one."""
        if self._bar:
            self._bar.update(self._task, completed=step, description=description)

    def end(self) -> None:
        """Closes what is this adapter's alone."""
        self._tell(lambda tracker: tracker.close())
        self._trackers = {}

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs a step's numbers, such as `loss, tokens, tokens_per_s, grad_norm, lr`: floats, or scalar arrays."""
        values = {name: _plain(value) for name, value in metrics.items()}
        self._record(step, values)
        self._clock = self._clock or (time.monotonic(), step)
        if self._bar:
            self._bar.update(self._task, completed=step, description=_line(values))
        else:
            self._print(f"step {step}/{self._steps}  {_line(values)}{self._time_left(step)}")

    def evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs an eval's numbers, named `eval/<set>/loss` and so on."""
        values = {name: _plain(value) for name, value in metrics.items()}
        self._record(step, values)
        self._print(f"step {step}/{self._steps}  " + "  ".join(f"{k} {_short(v)}" for k, v in values.items()))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Logs what the model answered to a prompt: printed, in `samples.jsonl`, and as a text in TensorBoard."""
        self._write("samples.jsonl", {"step": step, **self._of(), "prompt": prompt, "text": text})
        self._tell(lambda tracker: tracker.text(step, f"sample/{prompt}", text))
        self._print(f"step {step}/{self._steps}  {prompt}\n    {text.strip()}".replace("\n", "\n    "))

    def note(self, message: str) -> None:
        """Prints a line above the bar."""
        self._print(message)

    def close(self) -> None:
        """Ends the bar and closes every file; a second call does nothing."""
        if self._bar:
            self._bar.stop()
        for file in self._files.values():
            file.close()
        self._tell(lambda tracker: tracker.close())
        self._bar, self._files, self._trackers = None, {}, {}

    def sync(self) -> None:
        """Puts what was logged on the disk: what a checkpoint made next stands for is not lost with the power."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, step: int, values: dict[str, Any]) -> None:
        self._write("metrics.jsonl", {"step": step, **self._of(), **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._tell(lambda tracker: tracker.numbers(step, numbers))

    def _of(self) -> dict[str, str]:
        return {"adapter": self._adapter} if self._adapter else {}

    def _track(self, name: str, opened: Callable[[], Tracker]) -> None:
        with self._told(name):
            self._trackers[name] = opened()

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._told(name):
                what(tracker)

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """A tracker's failure, whatever it is, is none of the run's: it is said once, and the tracker let go."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if tracker := self._trackers.pop(name, None):
                with contextlib.suppress(Exception):  # of the same
                    tracker.close()
            self.note(f"{name} failed and is told nothing more; the run goes on ({type(error).__name__}: {error})")

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if name in self._files:
            self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
            self._files[name].flush()

    def _print(self, text: str) -> None:
        text = f"[{self._adapter}] {text}" if self._adapter else text
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        since, first = self._clock or (0.0, step)
        if step == first:
            return ""
        left = (self._steps - step) * (time.monotonic() - since) / (step - first)
        return f"  {int(left) // 60}:{int(left) % 60:02d} left"


def _plain(value: Any) -> Any:
    """A JSON value: scalar arrays as numbers, and None for NaN and infinity, which JSON does not have."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"
    return "not finite" if value is None else str(value)


def _line(values: Mapping[str, Any]) -> str:
    """The numbers one watches, in a short line.

    >>> _line({"loss": 2.5, "lr": 1e-4, "tokens": 2048, "tokens_per_s": 8512.3})
    'loss 2.5000  lr 1.00e-04  8,512 tokens/s'
    """
    parts = [f"{name} {_short(values[name])}" for name in ("loss", "lr", "grad_norm") if name in values]
    if rate := values.get("tokens_per_s"):
        parts.append(f"{rate:,.0f} tokens/s")
    return "  ".join(parts + ([f"MFU {values['mfu']:.0%}"] if "mfu" in values else []))


def _kept(path: Path, start: int | Mapping[str, int]) -> str:
    """The lines of a file up to a step (a fleet's: each adapter's), without a last one that a kill tore."""
    if not start or not path.exists():
        return ""
    rows = read_rows(path)
    for number, (_, row) in enumerate(rows, 1):
        if not isinstance(row.get("step"), int):
            raise UserError(f"{path}:{number} has no step: restore the file, or delete it.")
    upto = lambda row: start.get(row.get("adapter", ""), -1) if isinstance(start, Mapping) else start  # noqa: E731
    return "".join(line for line, row in rows if row["step"] <= upto(row))


def _open_lines(path: Path, kept: str) -> TextIO:
    """`path` for appending to the lines that are kept; it is replaced in one move, so that a kill loses none."""
    write_text(path, kept)
    return path.open("a", encoding="utf-8")


def _bar(console: Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=30),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    )
