"""The loop of a fleet: `train.fit` for N adapters at once, each with its own steps, sets and end."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from specjax import files
from specjax.errors import UserError
from specjax.fleet.archive import Archive
from specjax.fleet.member import ENDED, FAILED, HALVED, PAUSED, TRAINING, WAITING, Lane, Member, adamw
from specjax.fleet.session import Fleet
from specjax.fleet.step import Rule
from specjax.lora.adapters import Adapter, check_free
from specjax.lora.adapters import attach as attach_adapter
from specjax.models import Decoder
from specjax.train.fit import WRITES, far_above, own, stop_signal
from specjax.train.metrics import Log
from specjax.train.objective import Objective, next_token
from specjax.train.result import Result

Ended = Callable[[str, Decoder, Result], None]


class Failed(UserError):
    """Some adapters of a fleet stopped because they were not finite; the others have finished.

    Attributes:
      results: the result of each adapter, by name.
      why: one sentence for each adapter that stopped, by name.
    """

    def __init__(self, sentence: str, results: Mapping[str, Result], why: Mapping[str, str]):
        super().__init__(sentence)
        self.results, self.why = results, why


def fit(
    model: Decoder,
    members: Mapping[str, Member],
    *,
    rule: Rule | None = None,
    objective: Objective = next_token,
    slots: int = 0,
    rungs: Sequence[float] = (),
    survive: float = 0.5,
    workdir: str | Path | None = None,
    accumulate: int = 1,
    save_every: int = 0,
    keep: int = 1,
    log_every: int = 10,
    tensorboard: bool = True,
    ended: Ended | None = None,
    attach: bool = True,
) -> dict[str, Result]:
    """Trains LoRA adapters over one frozen base in one run; called again on the same workdir, it resumes.

    Each is trained as `specjax.fit` would train it alone, on the same batches with the same dropout: losses, gradient
    norms and weights equal those of the single run up to the order of float32 sums. A step contains the rows of all
    adapters, N times a single batch. An adapter whose loss, gradient or weights are not finite stops, and the others
    do not change by a bit.

    Args:
      model: the base, without adapters.
      members: the adapters, by name.
      rule: makes the optimizer from (rate, weight decay); default `fleet.adamw()`. All adapters share its betas.
      objective: what is minimised, the same for all adapters.
      slots: how many adapters train at once. The others wait in the order of `members` and take the slots of ended
        adapters, without compilation. 0: all train at once.
      rungs: shares of the steps at which the adapters wait for each other, and those with the larger loss on the
        deciding set stop (successive halving: Jamieson & Talwalkar 2016, arXiv:1502.07943). With fewer slots than
        adapters, they take turns to each rung, so that no row of a batch is empty.
      survive: the share of the adapters at a rung that continues, rounded up.
      workdir: where checkpoints and logs go; None: nothing is written. Each line of `metrics.jsonl` has the key
        `adapter`. An adapter's last and best weights are in `adapters/<name>/checkpoints`.
      accumulate: micro-batches per step.
      save_every: a checkpoint every so many steps of the fleet, in addition to those at evaluations and ends; 0: only
        those.
      keep: how many of the fleet's last checkpoints are kept.
      log_every: steps between logged lines.
      tensorboard: write an adapter's event files into `adapters/<name>/tensorboard`.
      ended: called when an adapter ends, with its name, the base with the adapter of its best evaluation attached (or
        its last, without evaluations), and its result.
      attach: attach all adapters with their last weights to the model at the end.

    Returns:
      The results by name. Values of the whole fleet (seconds, compilation) are the same in each.

    Raises:
      UserError: what `specjax.fit` refuses, or an adapter that cannot share a batch.
      Failed: some adapters stopped because they were not finite; raised at the end, when all others have finished.
    """
    if jax.process_count() > 1:
        raise UserError("a fleet trains in one process: leave --distributed out, or train its adapters one by one.")
    for name in members:
        check_free(model, name)
    if workdir:
        files.claim(workdir, (*WRITES, "adapters"))
    run: Fleet | None = None
    wear: dict[str, Adapter] = {}
    with own(workdir), stop_signal() as stop, ExitStack() as stack:
        run = stack.enter_context(
            Fleet(
                model,
                members,
                rule or adamw(),
                objective,
                slots=slots,
                accumulate=accumulate,
                rungs=rungs,
            )
        )
        archive = stack.enter_context(Archive(Path(workdir) if workdir else None, keep, remember=attach))
        resumed = archive.restore(run)
        begun = {name: lane.step for name, lane in run.lanes.items() if lane.step or lane.status != WAITING}
        starts = begun if resumed else {}
        total = sum(member.steps for member in members.values())
        console = Console()
        log = stack.enter_context(Log(workdir, steps=total, start=starts, tensorboard=False, console=console))
        if resumed:
            log.note(f"resumed: {', '.join(f'{name} at step {step}' for name, step in starts.items())}")
        folder = Path(workdir) / "adapters" if workdir and tensorboard else None
        loop = _Loop(run, archive, log, folder, log_every, ended, survive)
        stack.callback(loop.close)
        loop.go(stop, save_every)
        wear = archive.ended(run) if attach else {}
    if run is None:  # a signal came before anything was ready
        return {name: Result(stopped="signal") for name in members}
    results = {name: lane.result for name, lane in run.lanes.items()}
    for result in results.values():
        result.seconds, result.compile_seconds = run.clock.seconds, run.compile_seconds
        result.stopped = "signal" if stop.early else result.stopped
    for name, adapter in wear.items():
        attach_adapter(model, name, adapter)
    if failed := [lane for lane in run.lanes.values() if lane.status == FAILED]:
        others = len(run.lanes) - len(failed)
        raise Failed(
            f"{len(failed)} of {len(run.lanes)} adapters stopped: "
            + "; ".join(f"{lane.name}: {lane.why}" for lane in failed)
            + (f" (the other{'s are' if others > 1 else ' is'} not touched by it)" if others else ""),
            results,
            {lane.name: lane.why for lane in failed},
        )
    return results


class _Loop:
    """The loop: one step after another, and what is due after each."""

    def __init__(
        self,
        run: Fleet,
        archive: Archive,
        log: Log,
        folder: Path | None,
        log_every: int,
        ended: Ended | None,
        survive: float,
    ):
        self.run, self.archive, self.log, self._folder, self._every = run, archive, log, folder, log_every
        self._told, self._survive = ended, survive
        self._logs: dict[str, Log] = {}

    def go(self, stop: Any, save_every: int) -> None:
        """Runs until all adapters have ended or a signal arrives."""
        run = self.run
        for lane in run.training():
            self._open(lane)
        self._refill()
        pending: Any = None
        while run.training():
            stepped, metrics = run.step(stop.begun)
            if pending:
                self._report(*pending)
            pending = (stepped, metrics)
            stopping = stop(run.tick)
            due = [lane for lane, _ in stepped if lane.evaluates or lane.done]
            failed = any(lane.status == FAILED for lane, _ in stepped)
            if due or failed or stopping or (save_every and run.tick % save_every == 0):
                self._report(*pending)
                pending = None
                self._check_weights()
                for lane in due:
                    if lane.status == TRAINING and lane.evaluates:
                        self._evaluate(lane)
                for lane in due:
                    if lane.status == TRAINING and lane.done:
                        self._end(lane)
                    elif lane.status == TRAINING and lane.climbs:
                        lane.passed += 1
                        run.pause(lane)
                if not stopping:
                    self._refill()
                self.log.sync()
                self.archive.save(run)
            if stopping and (run.training() or run.waiting()):
                for lane in (*run.training(), *run.waiting()):
                    lane.result.stopped = "signal"
                self.log.note("stopped by a signal: the checkpoint is saved, call again to go on")
                break

    def close(self) -> None:
        """Ends the logs of the adapters that have not ended."""
        for one in self._logs.values():
            one.end()

    def _open(self, lane: Lane) -> None:
        folder = None if self._folder is None else self._folder / lane.name / "tensorboard"
        self._logs[lane.name] = self.log.of_adapter(
            lane.name, steps=lane.member.steps, tensorboard=folder, start=lane.step
        )

    def _refill(self) -> None:
        """Puts waiting adapters into free slots and evaluates them before their first step."""
        while True:
            if not self.run.training() and not self.run.waiting():
                self._halve()
            begun = self.run.fill()
            if not begun:
                return
            for lane in begun:
                if lane.name not in self._logs:
                    self._open(lane)
                if not lane.step:
                    self._evaluate(lane)

    def _halve(self) -> None:
        """At a rung that all have reached: the better adapters continue."""
        there = sorted((lane for lane in self.run.lanes.values() if lane.status == PAUSED), key=lambda x: x.at_rung)
        going = math.ceil(self._survive * len(there))
        for lane in there[:going]:
            lane.status = WAITING
        for lane in there[going:]:
            lane.status, lane.result.stopped = ENDED, HALVED
            del self.run.held[lane.name]
            if lane.name in self._logs:
                self._logs.pop(lane.name).end()
        if there:
            self.log.note(
                f"rung {there[0].passed}: {', '.join(lane.name for lane in there[:going])} go on; "
                f"{', '.join(lane.name for lane in there[going:]) or 'none'} stop"
            )

    def _evaluate(self, lane: Lane) -> None:
        if not lane.member.eval_data:
            return
        log, found = self._logs[lane.name], self.run.evaluate(lane)
        lane.result.evals = found
        if not lane.step:
            lane.result.first_evals = found
        log.evaluate(lane.step, {f"eval/{n}/{k}": v for n, means in found.items() for k, v in means.items()})
        if lane.member.sample:
            for prompt, text in lane.member.sample(self.run.model_of(lane)):
                log.sample(lane.step, prompt, text)
        loss = found[lane.member.chooses]["loss"]
        if not math.isfinite(loss):
            why = "lower its learning rate" if lane.step else "look at the base's weights and at that data"
            self._fail(lane, f"step {lane.step}: the loss on {lane.member.chooses!r} is {loss}: {why}.")
        elif lane.chosen(loss):
            self.run.keep_best(lane)
        if lane.climbs:
            lane.at_rung = loss

    def _end(self, lane: Lane) -> None:
        if lane.result.stopped == "patience":
            self._logs[lane.name].note(
                f"stopped at step {lane.step}: {lane.member.patience} evaluations without a better loss on "
                f"{lane.member.chooses!r}"
            )
        lane.status = ENDED
        model = self.archive.write(self.run, lane, *self.run.end(lane))
        self.run.free(lane)
        if self._told is not None:
            self._told(lane.name, model, lane.result)
        self._logs.pop(lane.name).end()

    def _fail(self, lane: Lane, why: str) -> None:
        lane.status, lane.why = FAILED, why
        self._logs.pop(lane.name).note(f"{why} It stops; the others go on.")
        self.run.free(lane)

    def _check_weights(self) -> None:
        """Ends adapters whose weights an update broke: the state no longer holds their last good weights."""
        for lane in self.run.broken():
            self._fail(lane, f"step {lane.step}: an update made its weights infinite or NaN: lower its learning rate.")

    def _report(self, stepped: Sequence[tuple[Lane, int]], metrics: Mapping[str, Any]) -> None:
        """Reads a step's metrics, ends adapters whose loss is not finite, and logs every `log_every` steps."""
        read = {name: jax.device_get(value) for name, value in metrics.items() if name != "tokens"}
        counts = f"loss_{self.run.objective.counts}"
        for (lane, slot), tokens in zip(stepped, metrics["tokens"], strict=True):
            if lane.status != TRAINING:
                continue
            mine = {name: float(value[slot]) for name, value in read.items()}
            step = int(tokens[0])
            if not (math.isfinite(mine["loss"]) and math.isfinite(mine["grad_norm"])):
                lane.step = lane.result.step = step - 1
                self._fail(
                    lane,
                    f"step {step}: the loss is {mine['loss']} and the gradient norm {mine['grad_norm']}, on the rows "
                    f"{self.run.rows_of(lane, step - 1)} of its packed data: lower its learning rate, or look at them.",
                )
                continue
            if not mine[counts]:
                lane.result.empty_steps += 1
                self._logs[lane.name].note(f"step {step}: nothing of its rows counts for the loss")
                del mine["loss"]
            elif usual := lane.result.spike(mine["loss"]):
                self._logs[lane.name].note(far_above(lane.member.data, step, mine["loss"], usual))
            if step % self._every == 0 or step in (1, lane.member.steps):
                rate = self.run.window()
                self._logs[lane.name].train(step, mine | {"tokens": tokens[1]} | rate)
        self.log.progress(self.run.steps_done, f"{len(self.run.training())} adapters train")
