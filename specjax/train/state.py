"""The state of a run while it trains: parameters on their devices, the compiled step, the next batch, checkpoints."""

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax import flops, process, sharding
from specjax.errors import UserError
from specjax.models import Decoder
from specjax.train import step as steps_lib
from specjax.train.checkpoint import Checkpoints
from specjax.train.evaluate import evaluate
from specjax.train.optim import Optimizer


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


class Run:
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
        loaded = [name for name in model.adapters if name is not None]
        if len(loaded) > 1 and nnx.to_flat_state(nnx.state(model, nnx.All(trainable, nnx.LoRAParam))):
            raise UserError(f"adapters {', '.join(sorted(loaded))} are loaded: unload all but the one to train.")
        steps_lib.check_host_memory(jax.default_backend(), model.remat, optimizer)
        self.mesh = sharding.mesh_of(next(iter(self.trainable.values())))
        self.checkpoints = Checkpoints(Path(workdir) / "checkpoints") if workdir else None
        self.best_loss, self.bad_evals, self.tokens, self.result = math.inf, 0, 0, Result()
        self.result.trainable_parameters = sum(value.size for value in self.trainable.values())
        self._train_step = steps_lib.make_train_step(
            self.graph, optimizer, seed=seed, documents=getattr(data, "most_documents", None)
        )
        self._eval_step = jax.jit(steps_lib.make_eval_step(self.graph))
        self._compiled: Any = None
        self._saved: int | None = None
        self._next: Any = None
        self._window_start, self._window_tokens = time.perf_counter(), 0
        self._devices = self.mesh.size if self.mesh is not None else 1
        self._kind = (self.mesh.devices.flat[0] if self.mesh is not None else jax.devices()[0]).device_kind
        self._peak = flops.peak(self._kind)

    def __enter__(self) -> "Run":
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
        meta = self.checkpoints.meta(latest)
        for what, now in self._provenance().items():
            if meta.get(what) != now:
                raise UserError(
                    f"{self.checkpoints.folder}: the checkpoint was made with another {what.replace('_', ' ')} "
                    f"({meta.get(what)}, now {now}): restore what it was, or start in a new workdir."
                )
        state = self.checkpoints.load(latest, {"trainable": self.trainable, "opt_state": self.opt_state})
        self.trainable, self.opt_state = state["trainable"], state["opt_state"]
        self.best_loss, self.bad_evals = math.inf if meta["best"] is None else meta["best"], meta["bad"]
        self.tokens = self._window_tokens = meta.get("tokens", 0)
        self._saved = self.result.step = latest
        return latest

    def _provenance(self) -> dict[str, Any]:
        return {"data_fingerprint": self.data.fingerprint, "base_fingerprint": self.source.origin.fingerprint}

    def save(self, step: int, loss: float | None) -> None:
        """Starts a checkpoint."""
        if self.checkpoints is None:
            return
        best = self.best_loss if math.isfinite(self.best_loss) else None
        meta = {"step": step, "base": self.source.origin.source, "best": best, "bad": self.bad_evals}
        meta |= {"tokens": self.tokens}
        with self.paused():
            state = {"trainable": self.trainable, "opt_state": self.opt_state}
            self.checkpoints.save(step, state, meta | self._provenance(), loss)
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
        del lowered
        process.return_freed_memory()
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
