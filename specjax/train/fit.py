"""The loop: iterate, log, evaluate, save, resume. What one step computes is in `step`."""

import dataclasses
import math
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from rich.console import Console

from specjax import flops, sharding
from specjax.errors import UserError
from specjax.models import Decoder
from specjax.train import step as steps_lib
from specjax.train.checkpoint import Checkpoints
from specjax.train.evaluate import evaluate
from specjax.train.metrics import Log
from specjax.train.optim import Optimizer
from specjax.train.profile import Profile


@dataclasses.dataclass
class Result:
    """What a run did.

    Attributes:
      step: optimizer steps done, those before a resume included.
      evals: the last evaluation by set: loss, perplexity, accuracy, tokens.
      first_evals: the evaluation before the first step ({} in a resumed run).
      best_step: the step with the least loss on the set that chooses (None: no evaluation).
      stopped: "" at the end of the steps, else "signal" or "patience".
      seconds: of training steps alone, compilation and evaluation apart.
      compile_seconds: of the training step.
      tokens: tokens trained on (not padding) since the run was last started.
      trainable_parameters: how many numbers train.
      data_seconds: of the training seconds, those spent waiting for batches.
    """

    step: int = 0
    evals: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    first_evals: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    best_step: int | None = None
    stopped: str = ""
    seconds: float = 0.0
    compile_seconds: float = 0.0
    tokens: int = 0
    trainable_parameters: int = 0
    data_seconds: float = 0.0


def fit(
    model: Decoder,
    data: Any,
    optimizer: Optimizer,
    *,
    steps: int,
    trainable: Any = nnx.Param,
    workdir: str | Path | None = None,
    accumulate: int = 1,
    eval_data: Mapping[str, Any] | None = None,
    eval_every: int = 0,
    eval_batches: int = 0,
    patience: int = 0,
    best: str = "",
    save_every: int = 0,
    log_every: int = 10,
    seed: int = 0,
    sample: Callable[[Decoder], Sequence[tuple[str, str]]] | None = None,
    tensorboard: bool = True,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
    profile: bool = False,
) -> Result:
    """Trains the parameters that `trainable` selects, in place; called again on the same workdir, it goes on.

    Args:
      model: its trained parameters become float32 masters; the others are not touched.
      data: a `specjax.data.Data`; step s trains on `data.batch(s)`.
      optimizer: see `specjax.adamw`.
      steps: optimizer steps in all.
      trainable: `specjax.ALL` or `specjax.LORA`, or any NNX filter: one for gradients, optimizer and checkpoint.
      workdir: where checkpoints and logs go; None: nowhere.
      accumulate: micro-batches a step; their gradients add up exactly.
      eval_data: sets by name, evaluated before the first step, every `eval_every` steps and at the end.
      eval_every: steps; 0: at the start and the end only.
      eval_batches: of each set; 0: all.
      patience: evaluations in a row without a better loss after which the run stops; 0: never.
      best: the set whose loss chooses the best checkpoint; default the first.
      save_every: steps, beside the evaluations and the end; 0: those alone.
      log_every: steps.
      seed: of LoRA's dropout.
      sample: at each evaluation, model -> [(prompt, text)] to show.
      tensorboard: write its event files.
      wandb: a Weights & Biases project; "": none.
      config: shown in the trackers.
      profile: trace a few steps into `<workdir>/profile`.

    Returns:
      What was done.

    Raises:
      UserError: the filter selects nothing, the batch does not divide, the loss is not finite, a checkpoint of another
        base or other data lies in the workdir, or the disk is full.
    """
    eval_data = dict(eval_data or {})
    best = best or next(iter(eval_data), "")
    with (
        _stop_signal() as stop,
        _Run(model, data, optimizer, trainable, workdir, accumulate, seed) as run,
        ExitStack() as stack,
    ):
        result, start = run.result, run.restore()
        logging: dict[str, Any] = {"start": start, "tensorboard": tensorboard, "wandb": wandb, "config": config}
        if jax.process_index():  # the first process speaks for all
            logging |= {"console": Console(quiet=True)}
        log = stack.enter_context(Log(None if jax.process_index() else workdir, steps=steps, **logging))
        if start:
            log.note(f"resumed at step {start}")
        folder = Path(workdir) / "profile" if profile and workdir else None
        trace = stack.enter_context(Profile(folder, start=start, steps=steps))

        def evaluate_all(step: int) -> float | None:
            if not eval_data:
                return None
            with run.paused():
                result.evals = {name: run.evaluate(rows, eval_batches) for name, rows in eval_data.items()}
                log.evaluate(step, {f"eval/{n}/{k}": v for n, found in result.evals.items() for k, v in found.items()})
                for prompt, text in sample(run.model()) if sample else ():
                    log.sample(step, prompt, text)
            loss = result.evals[best]["loss"]
            if not math.isfinite(loss):
                raise UserError(
                    f"step {step}: the loss on {best!r} is {loss}; {run.last_good()}: lower the learning rate."
                )
            run.bad_evals = 0 if loss < run.best_loss else run.bad_evals + 1
            run.best_loss = min(loss, run.best_loss)
            return loss

        if start == 0:
            evaluate_all(0)
            result.first_evals = result.evals
        pending: tuple[int, dict[str, Any]] | None = None
        for step in range(start, steps):
            if patience and run.bad_evals >= patience:
                result.stopped = "patience"
                log.note(f"stopped at step {step}: {patience} evaluations without a better loss on {best!r}")
                break
            trace.before(step)
            metrics = run.step(step)
            if trace.after(step, metrics):
                log.note(f"traced up to step {step + 1}: {trace.folder}")
            # Metrics are read one step late, so that the device always has work queued.
            if pending:
                _report(log, *pending, log_every, steps, run)
            if step == start and (formula := run.formula()):
                log.note(formula)
            done, pending = step + 1, (step + 1, metrics)
            evals = bool(eval_data) and (done == steps or bool(eval_every and done % eval_every == 0))
            stopping = stop(done)  # asked once: a signal that comes later finds the next step
            if evals or done == steps or stopping or (save_every and done % save_every == 0):
                _report(log, *pending, log_every, steps, run)
                pending = None
                loss = evaluate_all(done) if evals else None
                run.save(done, loss)
            if stopping and done < steps:
                result.stopped = "signal"
                log.note(f"stopped by a signal at step {done}: the checkpoint is saved, call again to go on")
                break
    return result


def _report(log: Log, step: int, metrics: dict[str, Any], every: int, steps: int, run: "_Run") -> None:
    """Reads a step's metrics, refuses a loss that is not finite, logs every so many."""
    loss = float(metrics["loss"])
    if not math.isfinite(loss) or not math.isfinite(float(metrics["grad_norm"])):
        raise UserError(
            f"step {step}: the loss is {loss} and the gradient norm {float(metrics['grad_norm'])}; {run.last_good()}: "
            "lower the learning rate or look at the data of this step."
        )
    if step % every == 0 or step == 1 or step == steps:
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        log.train(step, numbers | run.speed(metrics["tokens"]))


@contextmanager
def _stop_signal() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step, once SIGTERM came (what a scheduler sends before it takes the machine).

    Under several processes JAX has its own handler, and agrees with the others on the step: one signal stops all.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """The state of one `fit`: parameters on their devices, compiled steps, the next batch, the checkpoints."""

    def __init__(
        self,
        model: Decoder,
        data: Any,
        optimizer: Optimizer,
        trainable: Any,
        workdir: str | Path | None,
        accumulate: int,
        seed: int,
    ):
        if data.batch_size % accumulate:
            raise UserError(f"a batch of {data.batch_size} rows does not divide into {accumulate} micro-batches.")
        self.source, self.data, self.optimizer, self.accumulate = model, data, optimizer, accumulate
        self.graph, self.trainable, self.frozen = steps_lib.split(model, trainable)
        if not self.trainable:
            raise UserError("the trainable filter selects no parameter: inject LoRA first, or train specjax.ALL.")
        if not all(jnp.issubdtype(value.dtype, jnp.floating) for value in self.trainable.values()):
            raise UserError("the base is quantised and can't train: train specjax.LORA, or load it with quantise=''.")
        adapters = {hit[1] for path in self.trainable if (hit := re.search(r"\.(?:lora|own)\.([^.]+)\.", path))}
        if len(adapters) > 1:
            raise UserError(f"adapters {', '.join(sorted(adapters))} are loaded: unload all but the one to train.")
        steps_lib.check_host_memory(jax.default_backend(), model.remat, optimizer)
        self.mesh = sharding.mesh_of(next(iter(self.trainable.values())))
        self.checkpoints = Checkpoints(Path(workdir) / "checkpoints") if workdir else None
        self.best_loss, self.bad_evals, self.tokens, self.result = math.inf, 0, 0, Result()
        self.result.trainable_parameters = sum(value.size for value in self.trainable.values())
        self._train_step = steps_lib.make_train_step(self.graph, optimizer, seed=seed)
        self._eval_step = jax.jit(steps_lib.make_eval_step(self.graph))
        self._compiled: Any = None
        self._saved: int | None = None
        self._next: Any = None
        self._window_start, self._window_tokens = time.perf_counter(), 0
        self._devices = self.mesh.size if self.mesh is not None else 1
        self._kind = (self.mesh.devices.flat[0] if self.mesh is not None else jax.devices()[0]).device_kind
        self._peak = flops.peak(self._kind)

    def __enter__(self) -> "_Run":
        with ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            self._pool = stack.enter_context(ThreadPoolExecutor(1))
            if self.checkpoints:
                stack.callback(self._close_checkpoints)
            # Whatever ends the run, the caller's model gets its weights back: its buffers are donated from here on.
            stack.callback(self._write_back)
            masters = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype("float32"), tree), donate_argnums=0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # bfloat16 becomes float32
                self.trainable = masters(self.trainable)
            places = steps_lib.opt_shardings(self.optimizer, self.trainable, self.mesh)
            self.opt_state = jax.jit(self.optimizer.init, out_shardings=places)(self.trainable)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _close_checkpoints(self) -> None:
        assert self.checkpoints is not None
        self.result.best_step = self.checkpoints.best()
        self.checkpoints.close()

    def _write_back(self) -> None:
        leaves = [(tuple(path.split(".")), value) for path, value in self.trainable.items()]
        nnx.update(self.source, nnx.from_flat_state(leaves))

    def restore(self) -> int:
        """Reads the last checkpoint, if there is one, and returns its step, else 0."""
        latest = self.checkpoints.latest() if self.checkpoints else None
        if self.checkpoints is None or latest is None:
            return 0
        meta = self.checkpoints.restore_meta(latest)
        for what, now in self._provenance().items():
            if meta.get(what) != now:
                raise UserError(
                    f"{self.checkpoints.folder}: the checkpoint was made with another {what.replace('_', ' ')} "
                    f"({meta.get(what)}, now {now}): restore what it was, or start in a new workdir."
                )
        self.trainable, self.opt_state = self.checkpoints.restore(latest, self.trainable, self.opt_state)
        self.best_loss, self.bad_evals = math.inf if meta["best"] is None else meta["best"], meta["bad"]
        self.tokens = self._window_tokens = meta.get("tokens", 0)
        self._saved = self.result.step = latest
        return latest

    def _provenance(self) -> dict[str, Any]:
        return {"data_fingerprint": self.data.fingerprint, "base_fingerprint": self.source.config.fingerprint}

    def save(self, step: int, loss: float | None) -> None:
        """Starts a checkpoint."""
        if self.checkpoints is None:
            return
        best = self.best_loss if math.isfinite(self.best_loss) else None
        meta = {"step": step, "base": self.source.config.source, "best": best, "bad": self.bad_evals}
        meta |= {"tokens": self.tokens}
        with self.paused():
            self.checkpoints.save(step, self.trainable, self.opt_state, meta | self._provenance(), loss)
        self._saved = step

    def last_good(self) -> str:
        """The last checkpoint, in words."""
        return (
            "no checkpoint was saved yet" if self._saved is None else f"the last good checkpoint is step {self._saved}"
        )

    def _batch(self, step: int) -> tuple[Any, int]:
        """This process's part of the batch, on its devices, and the tokens of all of it."""
        k = self.accumulate
        rows = self.data.batch_size // k
        held = sharding.held_rows(self.mesh, rows)
        # Micro-batch i takes every k-th row, so that each device keeps its own rows.
        batch = self.data.batch(step, (held[:, None] * k + np.arange(k)).ravel())
        micro = {name: np.moveaxis(x.reshape(len(held), k, x.shape[1]), 1, 0) for name, x in batch.items()}
        return sharding.put_batch(micro, self.mesh, rows, lead=(None,)), self.data.tokens_in(step)

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns device scalars, and `tokens`, those (not padding) of all steps so far."""
        began = time.perf_counter()
        batch, tokens = self._next.result() if self._next is not None else self._batch(step)
        self.result.data_seconds += time.perf_counter() - began
        if self._compiled is None:
            with self.paused():
                self._compiled = self._compile(batch)
        args = (self.trainable, self.opt_state, self.frozen, batch, np.int32(step))
        self.trainable, self.opt_state, metrics = self._compiled(*args)
        self._next = self._pool.submit(self._batch, step + 1)
        self.result.step, self.result.tokens = step + 1, self.result.tokens + tokens
        self.tokens += tokens
        return metrics | {"tokens": self.tokens}

    def _compile(self, batch: Any) -> Any:
        """Ahead of time, once: a second compilation cannot happen unseen, for a change of shape raises."""
        began = time.perf_counter()
        lowered = steps_lib.lower(self._train_step, self.trainable, self.opt_state, self.frozen, batch)
        options = steps_lib.compiler_options(jax.default_backend(), self.source.dtype, self.source.config.num_experts)
        length = batch["tokens"].shape[-1]
        count = flops.of_step(self.source.config, self.trainable, rows=1, length=length)
        self._flops_per_token = count / length
        compiled = lowered.compile(compiler_options=options)
        self.result.compile_seconds = time.perf_counter() - began
        return compiled

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training time."""
        began = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - began

    def speed(self, tokens: int) -> dict[str, float]:
        """Tokens (not padding) a second since the last call, those of a device, and MFU where the peak is known.

        `tokens` are those of all steps so far.
        """
        seconds, fresh = time.perf_counter() - self._window_start, tokens - self._window_tokens
        self._window_start, self._window_tokens = self._window_start + seconds, tokens
        self.result.seconds += seconds
        rate = fresh / max(seconds, 1e-9)
        found = {"tokens_per_s": rate, "tokens_per_s_per_device": rate / self._devices}
        if self._peak:
            found["mfu"] = rate * self._flops_per_token / (self._devices * self._peak)
        return found

    def formula(self) -> str:
        """How `mfu` is counted, or "" where the devices' peak is not known."""
        if not self._peak:
            return ""
        return (
            f"MFU = tokens/s x {self._flops_per_token:.3g} FLOPs a token (remat not counted) / "
            f"({self._devices} x {self._peak:.3g} FLOP/s of {self._kind})"
        )

    def evaluate(self, data: Any, batches: int) -> dict[str, float]:
        """The sums of one data set, see `evaluate`."""
        return evaluate(self._eval_step, self.trainable, self.frozen, data, self.mesh, batches=batches)

    def model(self) -> Decoder:
        """The model with the weights of now."""
        return steps_lib.merge(self.graph, self.trainable, self.frozen)
