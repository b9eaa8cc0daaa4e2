"""What surrounds the state of a run: devices, the compiled step, the next batch, checkpoints, clocks."""

import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from specjax import flops, process, sharding
from specjax.errors import NotFinite, UserError, argument
from specjax.models import Decoder
from specjax.train import memory
from specjax.train import step as steps_lib
from specjax.train.checkpoint import Checkpoints, Damaged
from specjax.train.evaluate import evaluate, most_documents
from specjax.train.objective import Objective, by_source
from specjax.train.optim import Optimizer
from specjax.train.result import Result, Selection
from specjax.train.step import TrainState
from specjax.train.throughput import Throughput


class Session:
    """One `fit`: the live `TrainState`, and the pool, files and clocks around it; a context manager.

    Attributes:
      state: the live state.
      frozen: the parameters that do not train.
      selection: the best evaluation so far.
      clock: of training time.
      result: what was done so far.
      moved: on which other devices than before the run goes on, in words; "" where they are as many.
    """

    def __init__(
        self,
        model: Decoder,
        data: Any,
        optimizer: Optimizer,
        objective: Objective,
        *,
        trainable: Any,
        eval_data: Mapping[str, Any],
        workdir: str | Path | None,
        keep: int,
        accumulate: int,
        seed: int,
    ):
        if data.batch_size % accumulate:
            raise UserError(f"a batch of {data.batch_size} rows does not divide into {accumulate} micro-batches.")
        self.source, self.data, self.optimizer, self.objective = model, data, optimizer, objective
        self.accumulate = accumulate
        self.graph, self._trainable, self.frozen = steps_lib.split(model, trainable)
        _check_trainable(model, trainable, self._trainable)
        for name, rows in {"the data": data, **eval_data}.items():
            check_columns(objective, name, rows)
        self.mesh = sharding.mesh_of(next(iter(self._trainable.values())))
        device = self.mesh.devices.flat[0] if self.mesh is not None else jax.devices()[0]
        self._device, self._platform = device, device.platform
        steps_lib.check_host_memory(self._platform, model.remat, optimizer)
        jax.eval_shape(optimizer.init, self._trainable)  # it refuses before the model's buffers are donated
        self.checkpoints = Checkpoints(Path(workdir) / "checkpoints", keep=keep) if workdir else None
        self.selection, self.tokens, self.result = Selection(), 0, Result()
        self.result.trainable_parameters = sum(value.size for value in self._trainable.values())
        documents = getattr(data, "most_documents", None)
        self._trains = by_source(objective, getattr(data, "sources", ()))
        self._train_step = steps_lib.make_train_step(
            self.graph, optimizer, self._trains, seed=seed, documents=documents
        )
        self._eval_step = jax.jit(steps_lib.make_eval_step(self.graph, objective, documents=most_documents(eval_data)))
        self._compiled: Any = None
        self._saved: int | None = None
        self.moved = ""
        self._next: Any = None
        self.clock = Throughput(1 if self.mesh is None else self.mesh.size, device.device_kind)

    def __enter__(self) -> "Session":
        with ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            self._pool = stack.enter_context(ThreadPoolExecutor(1))
            if self.checkpoints:
                stack.callback(self._close_checkpoints)
            try:
                self.state = self._begin()
            except jax.errors.JaxRuntimeError as error:
                if not memory.exhausted(error):
                    raise
                raise memory.too_much(error, self._device) from error
            # Whatever ends the run, the caller's model gets its weights back: its buffers are donated from here on.
            stack.callback(lambda: steps_lib.write_back(self.source, self.state.trainable))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is not None and memory.exhausted(error):
            raise memory.too_much(error, self._device, self._compiled) from error

    def _begin(self) -> TrainState:
        """Float32 masters of what trains, and the optimizer's state, where they belong."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # bfloat16 becomes float32
            trainable = _masters(self._trainable)
        del self._trainable
        places = steps_lib.opt_shardings(self.optimizer, trainable, self.mesh)
        opt_state = jax.jit(self.optimizer.init, out_shardings=places)(trainable)
        everywhere = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return TrainState(trainable, opt_state, jax.device_put(np.int32(0), everywhere))

    def _close_checkpoints(self) -> None:
        assert self.checkpoints is not None
        self.result.best_step = self.checkpoints.best()
        self.checkpoints.close()

    def restore(self) -> int:
        """Reads the last checkpoint that is whole, if there is one, and returns its step, else 0."""
        if self.checkpoints is None:
            return 0
        while (latest := self.checkpoints.latest()) is not None:
            try:
                meta = self.checkpoints.meta(latest)
                self._check_provenance(meta)
                restored = self.checkpoints.load(latest, self._saved_state())
                break
            except Damaged as error:
                self.checkpoints.set_aside(latest, error)
        else:
            return 0
        # The number of updates is the checkpoint's own.
        step = jax.device_put(np.int32(latest), self.state.step.sharding)
        self.state = TrainState(**restored, step=step)
        self.selection, self.tokens = Selection.of(meta), meta.get("tokens", 0)
        before = meta.get("devices", self._devices())
        self.moved = "" if before == self._devices() else f", on {self._devices()}; before it was {before}"
        self.clock.resume(self.tokens)
        self._saved = self.result.step = latest
        return latest

    def _check_provenance(self, meta: Mapping[str, Any]) -> None:
        for what, now in self._provenance().items():
            if meta.get(what) != now:
                assert self.checkpoints is not None
                raise UserError(
                    f"{self.checkpoints.folder}: the checkpoint was made with another {what.replace('_', ' ')} "
                    f"({meta.get(what)}, now {now}): restore what it was, or start in a new workdir."
                )

    def _provenance(self) -> dict[str, Any]:
        return {"data_fingerprint": self.data.fingerprint, "base_fingerprint": self.source.origin.fingerprint}

    def save(self, step: int, loss: float | None) -> None:
        """Starts a checkpoint.

        Args:
          step: steps done.
          loss: of the evaluation at this step on the set that chooses; None: there was none.

        Raises:
          UserError: the weights are not finite, or the disk is full.
        """
        if self.checkpoints is None:
            return
        meta = {"step": step, "base": self.source.origin.source, "tokens": self.tokens}
        meta |= self.selection.meta() | self._provenance() | {"devices": self._devices()}
        with self.clock.paused():
            self.checkpoints.save(step, self._saved_state(), meta, loss)
        self._saved = step

    def _devices(self) -> str:
        """The mesh and the processes, in words."""
        axes = {} if self.mesh is None else {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        mesh = f" ({', '.join(f'{axis}={size}' for axis, size in axes.items())})" if axes else ""
        count, processes = 1 if self.mesh is None else self.mesh.size, jax.process_count()
        shared = f" of {processes} processes" if processes > 1 else ""
        return f"{count} device{'' if count == 1 else 's'}{mesh}{shared}"

    def _saved_state(self) -> dict[str, Any]:
        return {"trainable": self.state.trainable, "opt_state": self.state.opt_state}

    def check_weights(self, step: int) -> None:
        """Raises `NotFinite` where an update of up to this step made the weights not finite."""
        if not steps_lib.all_finite(self.state.trainable):
            raise NotFinite(
                f"step {step}: an update made the weights infinite or NaN; {self.last_good()}: lower the learning rate."
            )

    def weights(self) -> str:
        """What became of the weights where a step's loss is not finite, in words."""
        if steps_lib.all_finite(self.state.trainable):
            return "the weights are those before this step"
        return "the weights are infinite or NaN"

    def last_good(self) -> str:
        """The last checkpoint, in words."""
        return (
            "no checkpoint was saved yet" if self._saved is None else f"the last good checkpoint is step {self._saved}"
        )

    def _batch(self, step: int) -> tuple[Any, int]:
        """This process's part of the batch, on its devices, and the tokens of all of it."""
        rows = self.data.batch_size // self.accumulate
        batch = self.data.micro_batches(step, self.accumulate, sharding.held_rows(self.mesh, rows))
        read = {name: batch[name] for name in self._trains.columns}
        return sharding.put_batch(read, self.mesh, rows, lead=(None,)), self.data.tokens_in(step)

    def step(self, step: int, begun: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """One optimizer step; returns device scalars, and `tokens`, those (not padding) of all steps so far.

        `begun` is called once all is ready and the state is about to change.
        """
        began = time.perf_counter()
        batch, tokens = self._next.result() if self._next is not None else self._batch(step)
        self.result.data_seconds += time.perf_counter() - began
        if self._compiled is None:
            with self.clock.paused():
                self._compiled = self._compile(batch)
        begun()
        self.state, metrics = self._compiled(self.state, self.frozen, batch, np.int32(step))
        self._next = self._pool.submit(self._batch, step + 1)
        self.result.step, self.result.tokens = step + 1, self.result.tokens + tokens
        self.tokens += tokens
        return metrics | {"tokens": self.tokens}

    def _compile(self, batch: Any) -> Any:
        """Ahead of time, once: a second compilation cannot happen unseen, for a change of shape raises."""
        began = time.perf_counter()
        lowered = steps_lib.lower(self._train_step, self.state, self.frozen, batch)
        options = steps_lib.compiler_options(self._platform, self.source.dtype, self.source.config.num_experts)
        length = next(iter(batch.values())).shape[-1]
        self.clock.flops_per_token = flops.of_step(self.source, self.state.trainable, rows=1, length=length) / length
        compiled = aside(partial(lowered.compile, compiler_options=options))
        del lowered
        process.return_freed_memory()
        self.result.compile_seconds = time.perf_counter() - began
        return compiled

    def evaluate(self, data: Any, batches: int) -> dict[str, float]:
        """What the objective is on one data set, see `evaluate`."""
        given = (self._eval_step, self.state.trainable, self.frozen, data, self.mesh)
        return evaluate(*given, objective=self.objective, batches=batches)

    def model(self) -> Decoder:
        """The model with the weights of now."""
        return steps_lib.merge(self.graph, self.state.trainable, self.frozen)


@partial(jax.jit, donate_argnums=0)
def _masters(params: Any) -> Any:
    """Parameters in float32."""
    return jax.tree.map(lambda x: x.astype("float32"), params)


def aside(do: Callable[[], Any]) -> Any:
    """What a function returns, in a thread of its own: this one, where signals come to, can leave it to itself."""
    done: Future[Any] = Future()

    def work() -> None:
        try:
            done.set_result(do())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return done.result()


def _check_trainable(model: Decoder, trainable: Any, selected: Mapping[Any, jax.Array]) -> None:
    """Raises `UserError` where the filter's selection cannot train."""
    if not selected:
        raise UserError("the trainable filter selects no parameter: inject LoRA first, or train specjax.ALL.")
    if not all(jnp.issubdtype(value.dtype, jnp.floating) for value in selected.values()):
        raise UserError("the base is quantised and can't train: train specjax.LORA, or load it with quantise=''.")
    loaded = [name for name in model.adapters if name is not None]
    if len(loaded) > 1 and nnx.to_flat_state(nnx.state(model, nnx.All(trainable, nnx.LoRAParam))):
        raise UserError(f"adapters {', '.join(sorted(loaded))} are loaded: unload all but the one to train.")


def check_ids(name: str, data: Any, rows: int) -> None:
    """Raises `UserError` where the data has a token for which the embedding has no row: it would make NaN.

    Args:
      name: of the data, in words.
      data: a `specjax.data.Data`; of any other, whose tokens are not at hand, nothing is known.
      rows: of the embedding.
    """
    for part in getattr(data, "parts", ()):  # of a mixture
        check_ids(name, part, rows)
    tokens = getattr(data, "tokens", None)
    if not isinstance(tokens, np.ndarray) or not tokens.size or 0 <= tokens.min() <= tokens.max() < rows:
        return
    wrong = tokens[(tokens < 0) | (tokens >= rows)]
    first = int(wrong[0])
    tokenizer = getattr(data, "tokenizer", None)
    text = f" {tokenizer.convert_ids_to_tokens(first)!r}" if tokenizer is not None and first >= 0 else ""
    raise UserError(
        f"{name} has token {first}{text}, for which the model's embedding of {rows} rows has none ({len(wrong)} such "
        "tokens in all): give the model's own tokenizer, or leave the tokens that were added to it out of the data, or "
        f"give the model rows for them ({argument('add_tokens')})."
    )


def check_columns(objective: Objective, name: str, data: Any) -> None:
    """Raises `UserError` where the data lacks a column that the objective reads."""
    columns = tuple(data.micro_batches(0, 1, np.arange(1)))
    missing = [column for column in objective.columns if column not in columns]
    if missing:
        raise UserError(
            f"objective {objective.name} reads the column {missing[0]!r}, which {name} lacks; there are "
            f"{', '.join(columns)}: give data that has it."
        )
