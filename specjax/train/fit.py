"""The loop: iterate, log, evaluate, save, resume. What one step computes is in `step`."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.experimental import multihost_utils
from rich.console import Console

from specjax import files
from specjax.errors import NotFinite, UserError
from specjax.lock import Lock
from specjax.models import Decoder
from specjax.train.checkpoint import agreed
from specjax.train.metrics import Log
from specjax.train.objective import Objective, next_token
from specjax.train.optim import as_optimizer
from specjax.train.profile import Profile
from specjax.train.result import Result
from specjax.train.session import Session, check_ids

WRITES = ("checkpoints", "metrics.jsonl", "profile", "samples.jsonl", "tensorboard")  # into the workdir


def fit(
    model: Decoder,
    data: Any,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    until: int = 0,
    trainable: Any = nnx.Param,
    objective: Objective = next_token,
    workdir: str | Path | None = None,
    accumulate: int = 1,
    eval_data: Mapping[str, Any] | None = None,
    eval_every: int = 0,
    eval_batches: int = 0,
    patience: int = 0,
    best: str = "",
    save_every: int = 0,
    keep: int = 1,
    log_every: int = 10,
    seed: int = 0,
    sample: Callable[[Decoder], Sequence[tuple[str, str]]] | None = None,
    measure: Callable[[Decoder], Mapping[str, Mapping[str, float]]] | None = None,
    tensorboard: bool = True,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
    profile: bool = False,
) -> Result:
    """Trains the parameters that `trainable` selects, in place; called again on the same workdir, it goes on.

    Args:
      model: its trained parameters become float32 masters; the others are not touched.
      data: a `specjax.data.Data` or `Mixture`; step s trains on `data.batch(s)`. Of another object its `batch_size`,
        `fingerprint`, `micro_batches`, `row_ids` and `tokens_in` are asked.
      optimizer: `specjax.adamw`, `specjax.lion`, or any optax rule (see `specjax.optimizer`).
      steps: optimizer steps in all.
      until: the step to stop at, evaluated and saved: called again without it, the run goes on as if it had never
        stopped; 0: at the end. Where it is no multiple of `eval_every`, its evaluation is one more for `patience` to
        count and for the best checkpoint to be chosen from.
      trainable: `specjax.ALL` or `specjax.LORA`, or any NNX filter: one for gradients, optimizer and checkpoint.
      objective: what is minimised, see `specjax.Objective`; `specjax.next_token` unless another is given.
      workdir: where checkpoints and logs go; None: nowhere.
      accumulate: micro-batches a step; their gradients add up exactly.
      eval_data: sets by name, evaluated before the first step, every `eval_every` steps and at the end.
      eval_every: steps; 0: at the start and the end only.
      eval_batches: of each set; 0: all.
      patience: evaluations in a row without a better loss after which the run stops; 0: never.
      best: the set whose loss chooses the best checkpoint; default the first.
      save_every: steps, beside the evaluations and the end; 0: those alone.
      keep: how many of the last checkpoints stay, beside the best one.
      log_every: steps.
      seed: of LoRA's dropout.
      sample: at each evaluation, model -> [(prompt, text)] to show.
      measure: at each evaluation, model -> further numbers of sets of `eval_data`, by their names.
      tensorboard: write its event files.
      wandb: a Weights & Biases project; "": none.
      config: shown in the trackers.
      profile: trace a few steps into `<workdir>/profile`.

    Returns:
      What was done.

    Raises:
      UserError: the filter selects nothing, the batch does not divide, the data lacks a column of the objective, the
        loss, a gradient or a weight is not finite (the model keeps the last good weights), a checkpoint of another base
        or other data lies in the workdir, or files that no run wrote, or the disk is full.
    """
    if workdir:
        files.claim(workdir, WRITES)
    check_ids("the data", data, model.config.vocab_size)
    for name, one in (eval_data or {}).items():
        check_ids(f"the set {name!r}", one, model.config.vocab_size)
    rows = max(1, data.batch_size // accumulate)
    objective, sets = objective.prepare(objective, model, trainable, {"": data, **(eval_data or {})}, rows)
    data, eval_data = sets.pop(""), sets
    best = best or next(iter(eval_data), "")
    result = Result()
    with (
        own(workdir),
        stop_signal() as stop,
        Session(
            model,
            data,
            as_optimizer(optimizer),
            objective,
            trainable=trainable,
            eval_data=eval_data,
            workdir=workdir,
            keep=keep,
            accumulate=accumulate,
            seed=seed,
        ) as run,
        ExitStack() as stack,
    ):
        result, start = run.result, run.restore()
        logging: dict[str, Any] = {"start": start, "tensorboard": tensorboard, "wandb": wandb, "config": config}
        if jax.process_index():  # the first process speaks for all
            logging |= {"console": Console(quiet=True)}
        log = stack.enter_context(Log(None if jax.process_index() else workdir, steps=steps, **logging))
        if start:
            log.note(f"resumed at step {start}{run.moved}")
        folder = Path(workdir) / "profile" if profile and workdir else None
        trace = stack.enter_context(Profile(folder, start=start, steps=steps))

        def evaluate_all(step: int) -> float | None:
            if not eval_data:
                return None
            began = time.perf_counter()
            with run.clock.paused():
                result.evals = {name: run.evaluate(rows, eval_batches) for name, rows in eval_data.items()}
                for name, numbers in measure(run.model()).items() if measure else ():
                    result.evals[name] |= numbers
                log.evaluate(step, {f"eval/{n}/{k}": v for n, means in result.evals.items() for k, v in means.items()})
                for prompt, text in sample(run.model()) if sample else ():
                    log.sample(step, prompt, text)
            result.eval_seconds = time.perf_counter() - began
            loss = result.evals[best]["loss"]
            if not math.isfinite(loss):
                why = "lower the learning rate" if step else "look at the model's weights and at that data"
                raise NotFinite(f"step {step}: the loss on {best!r} is {loss}; {run.last_good()}: {why}.")
            run.selection = run.selection.after(loss)
            return loss

        if start == 0:
            evaluate_all(0)
            result.first_evals = result.evals
        pending: tuple[int, dict[str, Any]] | None = None
        for step in range(start, steps):
            if until and step >= until:
                result.stopped = "until"
                break
            if patience and run.selection.worse >= patience:
                result.stopped = "patience"
                log.note(f"stopped at step {step}: {patience} evaluations without a better loss on {best!r}")
                break
            trace.before(step)
            metrics = run.step(step, stop.begun)
            if trace.after(step, metrics):
                log.note(f"traced up to step {step + 1}: {trace.folder}")
            # Metrics are read one step late, so that the device always has work queued.
            if pending:
                _report(log, *pending, log_every, steps, run)
            if step == start and (formula := run.clock.formula()):
                log.note(formula)
            done, pending = step + 1, (step + 1, metrics)
            evals = bool(eval_data) and (done in (steps, until) or bool(eval_every and done % eval_every == 0))
            stopping = stop(done)  # asked once: a signal that comes later finds the next step
            if evals or done in (steps, until) or stopping or (save_every and done % save_every == 0):
                _report(log, *pending, log_every, steps, run)
                pending = None
                run.check_weights(done)
                loss = evaluate_all(done) if evals else None
                log.sync()
                run.save(done, loss)
            if stopping and done < steps:
                result.stopped = "signal"
                log.note(f"stopped by a signal at step {done}: the checkpoint is saved, call again to go on")
                break
        result.seconds = run.clock.seconds
    result.stopped = "signal" if stop.early else result.stopped
    return result


@contextmanager
def own(workdir: str | Path | None) -> Iterator[None]:
    """The folder is marked as a run's, and no other run's while this one is in it: the first process sees to both."""
    with Lock(workdir or ".") as lock:
        said = ""
        if workdir and not jax.process_index():
            files.mark(workdir)
            try:
                lock.take()
            except UserError as error:
                said = str(error)
        if said := agreed(said):
            raise UserError(said)
        yield


def _report(log: Log, step: int, metrics: dict[str, Any], every: int, steps: int, run: Session) -> None:
    """Reads a step's metrics, refuses a loss that is not finite, logs every so many."""
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFinite(
            f"step {step}: the loss is {loss} and the gradient norm {norm}, on the rows {_listed(run.data, step - 1)} "
            f"of the packed data; {run.weights()}, and {run.last_good()}: "
            + ("lower the learning rate or look at" if step > 1 else "look at the model's weights and at")
            + " the data of this step, which `specjax data` shows by these numbers."
        )
    counted = float(metrics[f"loss_{run.objective.counts}"])
    if not counted:  # the loss is then 0 of nothing, and no measure of anything
        run.result.empty_steps += 1
        log.note(
            f"step {step}: nothing of its rows ({_listed(run.data, step - 1)} of the packed data) counts for the loss"
        )
    if counted and (usual := run.result.spike(loss)):
        log.note(far_above(run.data, step, loss, usual))
    if step % every == 0 or step == 1 or step == steps:
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        # A source of which this batch has nothing has no loss here.
        empty = [name.removeprefix("share/") for name in numbers if name.startswith("share/") and not numbers[name]]
        for name in empty:
            del numbers[f"loss/{name}"]
        if not counted:
            del numbers["loss"]
        log.train(step, numbers | run.clock.window(metrics["tokens"]))


def far_above(data: Any, step: int, loss: float, usual: float) -> str:
    """What is said of a step whose loss is far above the usual one: its rows too."""
    rows = ",".join(map(str, sorted(data.row_ids(step - 1).tolist())))
    return (
        f"step {step}: the loss is {loss:.3f}, and was {usual:.3f} before; its rows, which `specjax data` shows: {rows}"
    )


def _listed(data: Any, step: int, most: int = 16) -> str:
    rows = sorted(data.row_ids(step).tolist())
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")


class _Stopped(BaseException):
    """A signal came before the first step: nothing is lost, so nothing is waited for."""


class _Stop:
    """Whether to stop after a step, once SIGTERM (what a scheduler sends before it takes the machine) or Ctrl-C came.

    Attributes:
      early: it came before the first step.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.early, self._fresh = False, True

    def __call__(self, step: int) -> bool:
        return bool(self.received)

    def begun(self) -> None:
        """The first step is given to the devices: from here on there is something to save."""
        self._fresh = False

    def receive(self, number: int, frame: Any) -> None:
        """A second Ctrl-C means now, and raises KeyboardInterrupt."""
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)
        if self._fresh:
            self.early = True
            raise _Stopped


class _StopTogether(_Stop):
    """Under several processes JAX has its own handler of SIGTERM, and agrees with the others on the step."""

    def __call__(self, step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def stop_signal() -> Iterator[_Stop]:
    """Receives SIGTERM and Ctrl-C while a run goes on; one that comes before the first step ends the block."""
    if jax.process_count() > 1:
        yield _StopTogether()
        return
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # A process that was started to ignore Ctrl-C (nohup, a shell's background) goes on doing so.
    before = {
        number: signal.signal(number, stop.receive)
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield stop
    except _Stopped:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
