"""One training step of N adapters over one base: the parts of `train.step`, with one value per adapter.

The rows of a batch form N groups, each with its adapter's factors, dropout key, rate, weight decay and clip.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax.models.products import exact_float32
from specjax.models.stack import fold_key
from specjax.train.objective import Batch, Objective, Sums
from specjax.train.step import Groups, Params, TrainState, accumulated, assembled, at_least_one, group_axes

Rule = Callable[[Any, Any], optax.GradientTransformation]  # learning rate, weight decay -> an optax rule
Axes = dict[Any, int]  # path -> the axis of the slots


class Told(NamedTuple):
    """The inputs of a step for each slot, arrays [N].

    Attributes:
      number: the number of the adapter's step, from 0; -1: the slot is empty and does not change.
      keys: uint32 [N, 2], the key data of its dropout.
      rate: learning rate of this step.
      decay: weight decay.
      clip: the norm that gradients are clipped to; 0: no clipping.
    """

    number: Any
    keys: Any
    rate: Any
    decay: Any
    clip: Any

    @classmethod
    def shapes(cls, count: int) -> "Told":
        """Of N slots, without values."""
        of = lambda kind, *more: jax.ShapeDtypeStruct((count, *more), kind)  # noqa: E731
        return cls(of(np.int32), of(np.uint32, 2), of(np.float32), of(np.float32), of(np.float32))


def begin(rule: Rule, trainable: Params, axes: Axes, count: int) -> TrainState:
    """The state before the first step: `step` is int32 [N]."""
    made = rule(jnp.float32(0), jnp.float32(0))
    out = _state_axes(made, trainable, axes)
    opt_state = jax.vmap(made.init, in_axes=(axes,), out_axes=out, axis_size=count)(trainable)
    return TrainState(trainable, opt_state, jnp.zeros(count, jnp.int32))


def shapes(rule: Rule, trainable: Params, axes: Axes, count: int, mesh: Mesh | None) -> TrainState:
    """The result of `begin` as `jax.ShapeDtypeStruct`, sharded: moments like their parameters, numbers replicated.

    `trainable`: arrays, or shapes with shardings.
    """

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        owners = [trainable[key.key] for key in path if getattr(key, "key", None) in trainable]
        spot: Any = next(iter(trainable.values())).sharding if mesh is None else NamedSharding(mesh, PartitionSpec())
        if owners and leaf.ndim == owners[0].ndim:
            spot = owners[0].sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spot)

    made = jax.eval_shape(partial(begin, rule, axes=axes, count=count), trainable)
    return jax.tree.map_with_path(placed, made)


def _state_axes(rule: optax.GradientTransformation, trainable: Params, axes: Axes) -> Any:
    """The slot axis of each array of an optimizer's state: that of its parameter, or the first for numbers."""

    def axis(path: Any, leaf: Any) -> int:
        owners = [key.key for key in path if getattr(key, "key", None) in axes]
        return axes[owners[0]] if owners and leaf.ndim else 0

    return jax.tree.map_with_path(axis, jax.eval_shape(rule.init, trainable))


def make_fleet_step(
    graph: Any, rule: Rule, objective: Objective, count: int, *, documents: int | None = None
) -> Callable[[TrainState, Params, Batch, Told], tuple[TrainState, dict[str, jax.Array]]]:
    """The function (state, frozen, batch [k,N*b,T], told) -> (state, metrics), to be compiled.

    Each group is computed as by `train.step.make_train_step` on its rows alone. If a group's loss or gradient norm is
    not finite, its slices of the state do not change, in this step and in every later one.

    Metrics are float32 [N]: those of `make_train_step`.

    Args:
      graph: of `train.step.split` of the grouped model.
      rule: the optimizer.
      objective: what is minimised.
      count: N.
      documents: the largest number of documents per row, if known.
    """

    def fleet_step(
        state: TrainState, frozen: Params, batch: Batch, told: Told
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        trainable = state.trainable
        model = assembled(graph, documents, trainable, frozen)
        axes = group_axes(model, trainable, count)

        def loss(trainable: Params, micro: Batch, keys: jax.Array) -> tuple[jax.Array, Sums]:
            sums = objective(assembled(graph, documents, trainable, frozen), micro, keys)
            return jnp.sum(sums["loss"][0]), sums

        def gradient(*given: Any) -> tuple[Params, Sums]:
            with exact_float32(model.dtype):
                grads, sums = jax.grad(loss, has_aux=True)(*given)
            return grads, sums

        keys = fold_key(jax.random.wrap_key_data(told.keys), state.step)
        grads, sums = accumulated(gradient, trainable, batch, keys)
        loss_count = at_least_one(sums["loss"][1])
        groups = Groups(model, trainable, count)
        norm = groups.norm(grads) / loss_count
        means = {name: total / at_least_one(of) for name, (total, of) in sums.items()}
        good = jnp.isfinite(means["loss"]) & jnp.isfinite(norm) & (state.step == told.number)
        clipped = jnp.where((norm < told.clip) | (told.clip == 0), 1.0, told.clip / norm)
        after = _update(rule, state, groups.times(grads, clipped / loss_count), told, axes)
        kept = jax.tree.map(lambda new, old, at: chosen(good, new, old, at), after, state, _axes_of(state, axes))
        metrics = means | {f"loss_{objective.counts}": sums["loss"][1], "grad_norm": norm, "lr": told.rate}
        return kept, metrics

    return fleet_step


def _update(rule: Rule, state: TrainState, grads: Params, told: Told, axes: Axes) -> TrainState:
    """One update of every slot."""
    of_state = _state_axes(rule(jnp.float32(0), jnp.float32(0)), state.trainable, axes)

    def one(grads: Params, opt_state: Any, params: Params, rate: jax.Array, decay: jax.Array) -> tuple[Params, Any]:
        updates, moved = rule(rate, decay).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), moved

    mapped = jax.vmap(one, in_axes=(axes, of_state, axes, 0, 0), out_axes=(axes, of_state))
    trainable, opt_state = mapped(grads, state.opt_state, state.trainable, told.rate, told.decay)
    return TrainState(trainable, opt_state, state.step + 1)


def _axes_of(state: TrainState, axes: Axes) -> TrainState:
    """The slot axis of each array of the state."""

    def axis(path: Any, leaf: Any) -> int:
        owners = [key.key for key in path if getattr(key, "key", None) in axes]
        return axes[owners[0]] if owners and leaf.ndim > 1 else 0

    return jax.tree.map_with_path(axis, state)


def chosen(good: jax.Array, new: jax.Array, old: jax.Array, at: int) -> jax.Array:
    """New values for the slots in `good`, bool [N], and old values for the others; `at` is the slot axis."""
    shape = (*(1 for _ in range(at)), -1, *(1 for _ in range(new.ndim - at - 1)))
    return jnp.where(jnp.broadcast_to(good.reshape(shape), new.shape), new, old)


def put(state: TrainState, slot: Any, values: Params, axes: Axes) -> TrainState:
    """Puts an adapter's initial values into a slot, with zero moments."""

    def placed(leaf: jax.Array, value: jax.Array, at: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, jnp.expand_dims(value, at), slot, at)

    trainable = {path: placed(leaf, values[path], axes[path]) for path, leaf in state.trainable.items()}
    every = _axes_of(state, axes)

    def zero(leaf: jax.Array, at: int) -> jax.Array:
        return placed(leaf, jnp.zeros((*leaf.shape[:at], *leaf.shape[at + 1 :]), leaf.dtype), at)

    opt_state = jax.tree.map(zero, state.opt_state, every.opt_state)
    return dataclasses.replace(state, trainable=trainable, opt_state=opt_state, step=zero(state.step, 0))


def held(state: TrainState, slot: Any, axes: Axes) -> TrainState:
    """Everything that a slot's adapter needs to continue in another slot, with an axis of one instead of N."""
    take = lambda leaf, at: jax.lax.dynamic_slice_in_dim(leaf, slot, 1, at)  # noqa: E731
    return jax.tree.map(take, state, _axes_of(state, axes))


def put_back(state: TrainState, slot: Any, kept: TrainState, axes: Axes) -> TrainState:
    """Puts what `held` returned into a slot."""
    place = lambda leaf, value, at: jax.lax.dynamic_update_slice_in_dim(leaf, value, slot, at)  # noqa: E731
    return jax.tree.map(place, state, kept, _axes_of(state, axes))


def taken(params: Params, slot: Any, axes: Axes) -> Params:
    """One slot's parameters in the form of the view, with an axis of one instead of N."""
    return {path: jax.lax.dynamic_slice_in_dim(leaf, slot, 1, axes[path]) for path, leaf in params.items()}


def put_best(params: Params, slot: Any, kept: Params, axes: Axes) -> Params:
    """Puts what `taken` returned into a slot."""
    place = jax.lax.dynamic_update_slice_in_dim
    return {path: place(leaf, kept[path], slot, axes[path]) for path, leaf in params.items()}


def finite(params: Params, axes: Axes) -> jax.Array:
    """Whether all numbers of each slot are finite: bool [N]."""
    others = {path: tuple(i for i in range(leaf.ndim) if i != axes[path]) for path, leaf in params.items()}
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf), axis=others[path]) for path, leaf in params.items()]), axis=0)
