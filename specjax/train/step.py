"""One training step and one evaluation step: pure functions, compiled once.

The trainable filter has already split the parameters: `trainable` is differentiated, updated and donated; `frozen` is
an argument like the batch, with no gradient and no optimizer state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from specjax import sharding
from specjax.models import Decoder
from specjax.train.losses import token_sums
from specjax.train.optim import Optimizer

Params = dict[str, jax.Array]  # by dotted path
Batch = dict[str, jax.Array]


def split(model: Decoder, trainable: Any) -> tuple[Any, Params, Params]:
    """A model as (its graph, the parameters that train, the others), by the trainable filter."""
    graph, train_state, frozen_state = nnx.split(model, trainable, ...)
    return graph, _flat(train_state), _flat(frozen_state)


def merge(graph: Any, *params: Params) -> Decoder:
    """The inverse of `split`."""
    leaves = [(tuple(path.split(".")), value) for part in params for path, value in part.items()]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _flat(state: Any) -> Params:
    return {sharding.path_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def make_train_step(graph: Any, optimizer: Optimizer, *, seed: int = 0) -> Callable[..., Any]:
    """The function (trainable, opt_state, frozen, batch, step) -> (trainable, opt_state, metrics), to be compiled.

    The batch is [k,b,T]: k micro-batches whose gradients of the summed loss are added and divided once by the loss
    tokens of all, so that k micro-batches of b rows equal one batch of k*b.

    Metrics are float32 scalars: `loss` (nats a loss token), `loss_tokens`, `accuracy`, `grad_norm` (before the clip),
    `lr`; of a mixture of experts also `router_loss`, which is not part of `loss` and trains times `router_aux_coef`.
    """

    def train_step(
        trainable: Params, opt_state: Any, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[Params, Any, Batch]:
        base_key = jax.random.fold_in(jax.random.key(seed), step)
        config = merge(graph, trainable, frozen).config

        def loss(trainable: Params, micro: Batch, key: jax.Array) -> tuple[jax.Array, Batch]:
            sums = token_sums(merge(graph, trainable, frozen), micro, key)
            return sums["nll"] + config.router_aux_coef * sums["router"] if config.router_aux_coef else sums[
                "nll"
            ], sums

        def accumulate(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            grads, sums = jax.grad(loss, has_aux=True)(trainable, *micro)
            return jax.tree.map(jnp.add, total, (grads, sums)), None

        parts = batch["tokens"].shape[0]
        keys = jax.random.split(base_key, parts)
        if parts == 1:
            grads, sums = jax.grad(loss, has_aux=True)(trainable, jax.tree.map(lambda x: x[0], batch), keys[0])
        else:
            zeros = jax.tree.map(jnp.zeros_like, trainable)
            start = (zeros, dict.fromkeys(("nll", "correct", "count", "router"), jnp.zeros((), jnp.float32)))
            (grads, sums), _ = jax.lax.scan(accumulate, start, (batch, keys))
        count = jnp.maximum(sums["count"], 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        metrics = {
            "loss": sums["nll"] / count,
            "loss_tokens": sums["count"],
            "accuracy": sums["correct"] / count,
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(optimizer.learning_rate(step), jnp.float32),
        }
        if config.num_experts:
            metrics["router_loss"] = sums["router"] / count
        return optax.apply_updates(trainable, updates), opt_state, metrics

    return train_step


def make_eval_step(graph: Any) -> Callable[..., dict[str, jax.Array]]:
    """The function (trainable, frozen, batch [B,T]) -> the sums of `losses.token_sums`, to be compiled."""

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> dict[str, jax.Array]:
        return token_sums(merge(graph, trainable, frozen), batch)

    return eval_step
