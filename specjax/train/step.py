"""One training step and one evaluation step: pure functions, compiled once.

The trainable filter has already split the parameters: what trains is part of the state, which is differentiated,
updated and donated; `frozen` is an argument like the batch, with no gradient and no optimizer state. The objective says
what is minimised.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import sharding
from specjax.errors import UserError, argument
from specjax.models import Decoder
from specjax.models.products import exact_float32
from specjax.models.stack import split_key
from specjax.train.objective import Batch, Objective, Sums, next_token
from specjax.train.optim import Optimizer

Path = tuple[Any, ...]  # of a parameter, as NNX has it
Params = dict[Path, jax.Array]
NUMBER = jax.ShapeDtypeStruct((), np.int32)  # of a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, one pytree.

    Attributes:
      trainable: what trains, by path, float32.
      opt_state: the optimizer's.
      step: updates done, an int32 scalar.
    """

    trainable: Params
    opt_state: Any
    step: jax.Array


def split(model: Decoder, trainable: Any) -> tuple[Any, Params, Params]:
    """A model as (its graph, the parameters that train, the others), by the trainable filter."""
    graph, train_state, frozen_state = nnx.split(model, trainable, ...)
    return graph, _flat(train_state), _flat(frozen_state)


def merge(graph: Any, *params: Params) -> Decoder:
    """The inverse of `split`."""
    return nnx.merge(graph, nnx.from_flat_state([leaf for part in params for leaf in part.items()]))


def write_back(model: nnx.Module, params: Params) -> None:
    """Puts parameters into a model at their paths."""
    nnx.update(model, nnx.from_flat_state(list(params.items())))


def _flat(state: Any) -> Params:
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(state)}


def begin(optimizer: Optimizer, trainable: Params, step: int = 0) -> TrainState:
    """The state before the first step."""
    return TrainState(trainable, optimizer.init(trainable), jnp.asarray(step, jnp.int32))


def make_train_step(
    graph: Any,
    optimizer: Optimizer,
    objective: Objective = next_token,
    *,
    seed: int = 0,
    documents: int | None = None,
) -> Callable[[TrainState, Params, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The function (state, frozen, batch, number) -> (state, metrics), to be compiled.

    The batch is [k,b,T]: k micro-batches whose gradients of the summed loss are added and divided once by the loss's
    denominator, so that k micro-batches of b rows equal one batch of k*b. `number` is that of the step whose batch it
    is. Where the loss or the gradient's norm is not finite, the state comes out as it went in, and so it does from
    every later step: `state.step` is then behind `number`.

    Metrics are float32 scalars ([G] where the rows are of several groups): each pair of the objective divided,
    `loss_<counts>` (the loss's denominator), `grad_norm` (before the clip), and `lr` where the optimizer knows it.

    Args:
      graph: of `split`.
      optimizer: see `optim`.
      objective: what is minimised.
      seed: of LoRA's dropout.
      documents: at most so many in a row, where that is known.
    """

    def train_step(
        state: TrainState, frozen: Params, batch: Batch, number: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        trainable = state.trainable
        model = assembled(graph, documents, trainable, frozen)

        def loss(trainable: Params, micro: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
            sums = objective(assembled(graph, documents, trainable, frozen), micro, key)
            return jnp.sum(sums["loss"][0]), sums

        def gradient(*given: Any) -> tuple[Params, Sums]:
            with exact_float32(model.dtype):  # those of the backward pass too
                grads, sums = jax.grad(loss, has_aux=True)(*given)
            return grads, sums

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, sums = accumulated(gradient, trainable, batch, key)
        if sharding.platform() == "gpu":
            # The layout of a gradient would become that of the old state, which the update's selection reads.
            axes = {path: leaf.get_metadata("axes") for path, leaf in nnx.to_flat_state(nnx.state(model))}
            grads = {path: sharding.constrain(value, *axes[path]) for path, value in grads.items()}
        count = at_least_one(sums["loss"][1])
        groups = Groups(model, trainable, count.shape[0])
        norm = groups.norm(grads) / count
        means = {name: total / at_least_one(of) for name, (total, of) in sums.items()}
        good = jnp.all(jnp.isfinite(means["loss"]) & jnp.isfinite(norm)) & (state.step == number)
        after = _update_if(good, optimizer, state, lambda: groups.times(grads, optimizer.factor(norm) / count))
        metrics = means | {f"loss_{objective.counts}": sums["loss"][1], "grad_norm": norm}
        if count.shape[0] == 1:
            metrics = {name: value[0] for name, value in metrics.items()}
        if optimizer.learning_rate is not None:
            metrics["lr"] = jnp.asarray(optimizer.learning_rate(state.step), jnp.float32)
        return after, metrics

    return train_step


def _update_if(good: jax.Array, optimizer: Optimizer, state: TrainState, grads: Callable[[], Params]) -> TrainState:
    """The state after one update, or as it was."""

    def on_device(waiting: Any) -> Any:
        return jax.device_put(waiting, jax.memory.Space.Device) if optimizer.offload else waiting

    def update(state: TrainState) -> TrainState:
        updates, moved = optimizer.update(grads(), on_device(state.opt_state), state.trainable)
        if optimizer.offload:
            back = lambda new, old: jax.device_put(new, jax.typeof(old).memory_space)  # noqa: E731
            moved = jax.tree.map(back, moved, state.opt_state)
        return TrainState(optax.apply_updates(state.trainable, updates), moved, state.step + 1)

    # In a branch XLA updates in place on a TPU and a CPU. Where it selects, it keeps copies there: a new weight is made
    # of the old moment, which the new one overwrites. On a GPU it is the other way round: one fusion makes both.
    if sharding.platform() != "gpu":
        return jax.lax.cond(good, update, lambda state: state, state)
    state = dataclasses.replace(state, opt_state=on_device(state.opt_state))
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), update(state), state)


def assembled(graph: Any, documents: int | None, *params: Params) -> Decoder:
    """The model of these parameters, which knows that a row has so many documents at most."""
    model = merge(graph, *params)
    model.documents = documents
    return model


def at_least_one(of: jax.Array) -> jax.Array:
    """A denominator, 1 where nothing was counted."""
    return jnp.where(of > 0, of, 1.0)


def accumulated(gradient: Callable[..., Any], trainable: Params, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
    """Gradients and sums of all micro-batches [k,b,T], added; `key`: one, or [G] of groups of rows."""
    parts = next(iter(batch.values())).shape[0]
    keys = split_key(key, parts)
    if parts == 1:
        grads, sums = gradient(trainable, jax.tree.map(lambda x: x[0], batch), keys[0])
        return grads, sums

    def add(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, *micro)), None

    first = jax.tree.map(lambda x: x[0], (batch, keys))
    shapes = jax.eval_shape(lambda *micro: gradient(trainable, *micro)[1], *first)
    start = (jax.tree.map(jnp.zeros_like, trainable), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    (grads, sums), _ = jax.lax.scan(add, start, (batch, keys))
    return grads, sums


def group_axes(model: Decoder, trainable: Params, count: int) -> dict[Path, int]:
    """Along which axis, `adapter` of size G, each group of rows has its own slice of what trains.

    Raises:
      ValueError: a parameter has none, so that all groups would train it.
    """
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path in trainable:
            axes = leaf.get_metadata("axes")
            if "adapter" not in axes or leaf.shape[axes.index("adapter")] != count:
                raise ValueError(f"{path} has no axis 'adapter' of {count} groups: all groups would train it.")
            found[path] = axes.index("adapter")
    return found


class Groups:
    """Norms and factors of gradients by group of rows: with one group all parameters are its own."""

    def __init__(self, model: Decoder, trainable: Params, count: int):
        self.count, self.axes = count, {} if count == 1 else group_axes(model, trainable, count)

    def norm(self, grads: Params) -> jax.Array:
        """float32 [G]."""
        if self.count == 1:
            return optax.tree.norm(grads)[None]
        others = {path: tuple(i for i in range(g.ndim) if i != self.axes[path]) for path, g in grads.items()}
        return jnp.sqrt(sum(jnp.sum(jnp.square(g), axis=others[path]) for path, g in grads.items()))

    def times(self, grads: Params, factor: jax.Array) -> Params:
        """Each group's gradients times its factor, [G]."""
        if self.count == 1:
            return jax.tree.map(lambda g: g * factor[0], grads)
        along = {path: (-1, *(1,) * (g.ndim - self.axes[path] - 1)) for path, g in grads.items()}
        return {path: g * jnp.broadcast_to(factor.reshape(along[path]), g.shape) for path, g in grads.items()}


def opt_shardings(optimizer: Optimizer, trainable: Any, mesh: Mesh | None) -> Any:
    """Where the optimizer's state lies: moments like their parameters, scalars everywhere.

    The scales of a moment's blocks lie like it too, but for an axis that its devices do not divide. Offloaded, all but
    scalars are in the host's memory. None: on the one device, without a mesh.
    """
    if mesh is None and not optimizer.offload:
        return None

    def place(path: Any, leaf: Any) -> Any:
        owners = [trainable[key.key] for key in path if getattr(key, "key", None) in trainable]
        if mesh is None:
            spot: Any = next(iter(trainable.values())).sharding
        elif not owners or owners[0].ndim != leaf.ndim:
            spot = NamedSharding(mesh, PartitionSpec())
        elif owners[0].shape == leaf.shape:
            spot = owners[0].sharding
        else:
            spec = owners[0].sharding.spec
            axes = zip((*spec, *(None,) * (leaf.ndim - len(spec))), leaf.shape, strict=True)
            kept = [axis if size % sharding.ways(mesh, axis) == 0 else None for axis, size in axes]
            spot = NamedSharding(mesh, PartitionSpec(*kept))
        return spot.with_memory_kind("pinned_host") if optimizer.offload and leaf.ndim else spot

    return jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, trainable))


def check_host_memory(platform: str, remat: str, optimizer: Optimizer) -> None:
    """Raises `UserError` where something is to wait in the host's memory and the platform has no other."""
    if platform != "cpu" or not (remat == "offload" or optimizer.offload):
        return
    asked = f"{argument('remat')}=offload" if remat == "offload" else f"{argument('offload')}=True"
    raise UserError(f"{asked}: a CPU has no memory apart from the host's; leave it out, or use a TPU or GPU.")


def lower(train_step: Callable[..., Any], state: TrainState, frozen: Any, batch: Any, told: Any = NUMBER) -> Any:
    """The step for these arguments (arrays, or shapes with shardings), before it is compiled.

    `told` is what the step takes last: the number of the step, unless it is one of a fleet.

    The state is donated, and comes out where it lay. Under a mesh, call it with that mesh set.
    """
    kept = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(kept, None))
    return jitted.lower(state, frozen, batch, told)


def compiler_options(platform: str, dtype: Any, experts: int = 0) -> dict[str, Any]:
    """What a platform's compiler is told of the step, in a compute dtype, of a model with so many experts."""
    if platform == "cpu" and dtype != np.float32:
        # XLA:CPU multiplies bfloat16 as float32 and would convert all layers' weights before the loop over them:
        # twice the model again in memory.
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    if platform == "tpu":
        # XLA:TPU would break gathered products into loops over pieces that neighbours pass on, and hold them all.
        options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}
        if experts:
            # Its kernel for grouped products tiles a LoRA factor's gradient beyond its own limit of 16 MiB.
            options["xla_tpu_scoped_vmem_limit_kib"] = 48 << 10
        return options
    return {}


def make_eval_step(
    graph: Any, objective: Objective = next_token, *, documents: int | None = None
) -> Callable[[Params, Params, Batch], Sums]:
    """The function (trainable, frozen, batch [B,T]) -> the objective's sums, to be compiled."""

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> Sums:
        return objective(assembled(graph, documents, trainable, frozen), batch, None)

    return eval_step


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether all numbers are finite: bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in params.values()]))
