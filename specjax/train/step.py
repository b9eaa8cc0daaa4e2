"""One training step and one evaluation step: pure functions, compiled once.

The trainable filter has already split the parameters: `trainable` is differentiated, updated and donated; `frozen` is
an argument like the batch, with no gradient and no optimizer state.
"""

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


def make_train_step(
    graph: Any, optimizer: Optimizer, *, seed: int = 0, documents: int | None = None
) -> Callable[..., Any]:
    """The function (trainable, opt_state, frozen, batch, step) -> (trainable, opt_state, metrics), to be compiled.

    The batch is [k,b,T]: k micro-batches whose gradients of the summed loss are added and divided once by the loss
    tokens of all, so that k micro-batches of b rows equal one batch of k*b. `documents`: at most so many in a row.

    Metrics are float32 scalars: `loss` (nats a loss token), `loss_tokens`, `accuracy`, `grad_norm` (before the clip),
    `lr`; of a mixture of experts also `router_loss`, which is not part of `loss` and trains times `router_aux_coef`.
    """

    def train_step(
        trainable: Params, opt_state: Any, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[Params, Any, Batch]:
        base_key = jax.random.fold_in(jax.random.key(seed), step)
        model = merge(graph, trainable, frozen)
        config = model.config

        def loss(trainable: Params, micro: Batch, key: jax.Array) -> tuple[jax.Array, Batch]:
            sums = token_sums(merge(graph, trainable, frozen), micro, key, documents)
            return sums["nll"] + config.router_aux_coef * sums["router"] if config.router_aux_coef else sums[
                "nll"
            ], sums

        def gradient(*given: Any) -> tuple[Any, Any]:
            with exact_float32(model.dtype):  # those of the backward pass too
                return jax.grad(loss, has_aux=True)(*given)

        def accumulate(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            grads, sums = gradient(trainable, *micro)
            return jax.tree.map(jnp.add, total, (grads, sums)), None

        parts = batch["tokens"].shape[0]
        keys = jax.random.split(base_key, parts)
        if parts == 1:
            grads, sums = gradient(trainable, jax.tree.map(lambda x: x[0], batch), keys[0])
        else:
            zeros = jax.tree.map(jnp.zeros_like, trainable)
            start = (zeros, dict.fromkeys(("nll", "correct", "count", "router"), jnp.zeros((), jnp.float32)))
            (grads, sums), _ = jax.lax.scan(accumulate, start, (batch, keys))
        count = jnp.maximum(sums["count"], 1.0)
        norm = optax.tree.norm(grads) / count
        factor = optimizer.factor(norm) / count
        grads = jax.tree.map(lambda g: g * factor, grads)
        if optimizer.offload:
            opt_state = jax.device_put(opt_state, jax.memory.Space.Device)
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        metrics = {
            "loss": sums["nll"] / count,
            "loss_tokens": sums["count"],
            "accuracy": sums["correct"] / count,
            "grad_norm": norm,
            "lr": jnp.asarray(optimizer.learning_rate(step), jnp.float32),
        }
        if config.num_experts:
            metrics["router_loss"] = sums["router"] / count
        return optax.apply_updates(trainable, updates), opt_state, metrics

    return train_step


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


def lower(train_step: Callable[..., Any], trainable: Any, opt_state: Any, frozen: Any, batch: Any) -> Any:
    """The step for these arguments (arrays, or shapes with shardings), before it is compiled.

    What is replaced is donated, and comes out where it lay. Under a mesh, call it with that mesh set.
    """
    kept = [jax.tree.map(lambda x: x.sharding, tree) for tree in (trainable, opt_state)]
    jitted = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*kept, None))
    return jitted.lower(trainable, opt_state, frozen, batch, jax.ShapeDtypeStruct((), np.int32))


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


def make_eval_step(graph: Any) -> Callable[..., dict[str, jax.Array]]:
    """The function (trainable, frozen, batch [B,T]) -> the sums of `losses.token_sums`, to be compiled."""

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> dict[str, jax.Array]:
        return token_sums(merge(graph, trainable, frozen), batch)

    return eval_step
