"""Mixture of experts: routing, the experts' MLPs over tokens sorted by expert, the balancing loss.

Every token is computed by its k experts and no other: tokens are sorted by expert and go through grouped matrix
products (`specjax.models.grouped`). There is no capacity and no token is dropped.

B batch, T length, D embed, E experts, k experts a token, F mlp, M rows (of a token for an expert), L layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int32

from specjax import sharding
from specjax.models.adapter import AdaptableMap
from specjax.models.grouped import grouped_matmul
from specjax.models.layers import Axes, Linear, activate, kernel_init, parameter
from specjax.models.quantised import Quantised
from specjax.models.stack import Call, group_of_rows

Stats = dict[str, Float32[Array, "..."]]


class Router(Linear):
    """A token's score of each expert: its output stays whole on every device, because a token compares all experts."""


class ExpertLinear(AdaptableMap):
    """y = x W_e^T (+ the updates in use, of expert e): one linear map per expert, W [(L,) E, out, in]."""

    def __init__(
        self,
        num_experts: int,
        in_size: int,
        out_size: int,
        in_axis: str,
        out_axis: str,
        *,
        layers: int | None,
        rngs: nnx.Rngs | None,
        stddev: float = 0.02,
    ):
        super().__init__()
        shape, axes = (num_experts, out_size, in_size), ("expert", out_axis, in_axis)
        init = kernel_init(stddev, 1, 1 + int(layers is not None))
        self.kernel: nnx.Param | Quantised = parameter(init, shape, axes, layers, rngs)
        self.in_dims = 1

    def __call__(self, x: Float[Array, "M in"], sizes: Int32[Array, " E *G"]) -> Float[Array, "M out"]:
        """Rows of expert 0, then of expert 1, ..., in x's dtype; `sizes` counts them.

        Where the rows of an expert are sorted by their groups of adapters, `sizes` is [E,G].
        """
        y = grouped_matmul(x, self.kernel[...].astype(x.dtype), sizes if sizes.ndim == 1 else jnp.sum(sizes, axis=1))
        for update in self.active_updates():  # not `update` itself: its groups are parts of `sizes`, not of the rows
            y += update.variant.apply(update.factors, update.scale, update.dropout, Call(x, sizes=sizes))
        return y


class Experts(nnx.Module):
    """E gated MLPs, down(activation(gate(x)) * up(x)) each."""

    def __init__(
        self,
        *,
        embed_dim: int,
        mlp_dim: int,
        num_experts: int,
        activation: str,
        layers: int | None,
        rngs: nnx.Rngs | None,
        out_stddev: float,
    ):
        def linear(in_size: int, out_size: int, in_axis: str, out_axis: str, stddev: float) -> ExpertLinear:
            return ExpertLinear(
                num_experts, in_size, out_size, in_axis, out_axis, layers=layers, rngs=rngs, stddev=stddev
            )

        self.gate_proj = linear(embed_dim, mlp_dim, "embed", "mlp", 0.02)
        self.up_proj = linear(embed_dim, mlp_dim, "embed", "mlp", 0.02)
        self.down_proj = linear(mlp_dim, embed_dim, "mlp", "embed", out_stddev)
        self.activation = activation

    @property
    def groups(self) -> int | None:
        """Into how many groups adapters divide the rows; None: one answers all of them, or none."""
        maps = (self.gate_proj, self.up_proj, self.down_proj)
        return next((update.groups for linear in maps for update in linear.active_updates()), None)

    def __call__(
        self,
        x: Float[Array, "N D"],
        chosen: Int32[Array, "N k"],
        weights: Float[Array, "N k"],
        first: Int32[Array, ""] | int = 0,
        group: Int32[Array, " N"] | None = None,
    ) -> Float[Array, "N D"]:
        """The weighted sum of each token's experts.

        Args:
          x: the tokens.
          chosen: the experts of each token; those outside of first..first+E-1 add nothing.
          weights: of the experts.
          first: the number of this module's first expert (a device may hold some of them only).
          group: each token's group of adapters, where there are `groups`.

        Returns:
          In x's dtype, summed in float32.
        """
        num_experts = self.gate_proj.kernel.shape[0]
        local = chosen.reshape(-1) - first
        local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)  # the others sort to the end
        shape: tuple[int, ...] = (num_experts,)
        if group is not None:  # sorted by it within an expert
            shape = (num_experts, self.groups or 1)
            local = local * shape[1] + jnp.repeat(group, chosen.shape[1])
        order = jnp.argsort(local, stable=True)
        place = jnp.argsort(order)
        sizes = jnp.sum(local[:, None] == jnp.arange(math.prod(shape))[None], axis=0, dtype=jnp.int32).reshape(shape)
        rows = _permute(jnp.repeat(x, chosen.shape[1], axis=0), order, place)
        hidden = activate(self.gate_proj(rows, sizes), self.activation) * self.up_proj(rows, sizes)
        y = _permute(self.down_proj(hidden, sizes), place, order).reshape(*chosen.shape, -1)
        return jnp.sum(y.astype(jnp.float32) * weights[..., None].astype(jnp.float32), axis=1).astype(x.dtype)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order]; its transpose is the inverse's gather, where JAX, which knows of no inverse, would scatter."""
    return x[order]


def _permute_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x[order], inverse


def _permute_backward(inverse: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
    nothing = np.zeros(inverse.shape, jax.dtypes.float0)
    return dy[inverse], nothing, nothing


_permute.defvjp(_permute_forward, _permute_backward)


class MoE(nnx.Module):
    """Sparse MLP: a router, and for each token the k experts that it chooses (Mixtral, arXiv:2401.04088; Qwen3).

    Equal to transformers' `MixtralSparseMoeBlock` (normalise) and `Qwen3MoeSparseMoeBlock` (normalise as the config's
    `norm_topk_prob`, round_weights).

    Args:
      embed_dim: D.
      mlp_dim: F, of one expert.
      num_experts: E.
      experts_per_token: k.
      normalise: whether a token's k weights are divided by their sum.
      round_weights: whether the weights are rounded to the compute dtype, as Qwen3's are and Mixtral's are not.
      activation: of the gate, one that `layers.activate` knows.
      layers: L, or None for one layer.
      rngs: for the initial values.
      out_stddev: of the initial down projections.

    Raises:
      ValueError: k is not in 1..E.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        mlp_dim: int,
        num_experts: int,
        experts_per_token: int,
        normalise: bool,
        round_weights: bool = False,
        activation: str = "silu",
        layers: int | None,
        rngs: nnx.Rngs | None,
        out_stddev: float = 0.02,
    ):
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"{experts_per_token} experts a token of {num_experts}: give 1 to {num_experts}.")
        self.gate = Router((embed_dim,), (num_experts,), ("embed",), (None,), layers=layers, rngs=rngs)
        self.experts = Experts(
            embed_dim=embed_dim,
            mlp_dim=mlp_dim,
            num_experts=num_experts,
            activation=activation,
            layers=layers,
            rngs=rngs,
            out_stddev=out_stddev,
        )
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.normalise, self.round_weights = normalise, round_weights

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Stats]:
        """Routes and computes.

        Args:
          x: the block's input.
          valid: False for padding, which goes to no expert (its output is zero) and is not counted; default all True.

        Returns:
          y in x's dtype, and this layer's part of `load_balancing_loss`: float32 sums over the valid tokens,
          `chosen` [E], how often each expert was chosen, `probability` [E], its probability, and `tokens`.
        """
        probability = jax.nn.softmax(self.gate(x).astype(jnp.float32), axis=-1)
        chosen = _top(jax.lax.stop_gradient(probability), self.experts_per_token)
        # [B,T,k,E], never in memory. A sum of one term, and not a gather, whose transpose is a scatter.
        hit = chosen[..., None] == jnp.arange(self.num_experts)[None, None, None]
        weights = jnp.sum(jnp.where(hit, probability[:, :, None], 0.0), axis=-1)
        if self.normalise:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        if self.round_weights:
            weights = weights.astype(x.dtype)
        if valid is None:
            valid = jnp.ones(x.shape[:2], bool)
        stats = {
            "chosen": jnp.sum(hit & valid[:, :, None, None], axis=(0, 1, 2), dtype=jnp.float32),
            "probability": jnp.sum(jnp.where(valid[..., None], probability, 0.0), axis=(0, 1)),
            "tokens": jnp.sum(valid, dtype=jnp.float32),
        }
        nowhere = jnp.where(valid[..., None], chosen, self.num_experts)
        return self._compute(x, nowhere, weights), stats

    def _compute(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """`_routed` through the experts; a quantised base's are dequantised here, and again in the backward pass."""
        if not isinstance(self.experts.gate_proj.kernel, Quantised):
            return self._routed(self.experts, x, chosen, weights)
        graph, state = nnx.split(self.experts)

        def again(state: Any, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
            experts = nnx.merge(graph, state)
            for linear in (experts.gate_proj, experts.up_proj, experts.down_proj):
                kernel = nnx.Param(linear.kernel[...], axes=linear.kernel.axes)
                del linear.kernel
                linear.kernel = nnx.data(kernel)
            return self._routed(experts, x, chosen, weights)

        return jax.checkpoint(again, prevent_cse=False)(state, x, chosen, weights)

    def _routed(self, experts: Experts, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """The experts' weighted sum: [B,T,D], [B,T,k], [B,T,k] -> [B,T,D], each device computing its own experts.

        A device gathers the tokens of its group along the mesh axis `expert`, sends them through the experts that it
        holds, and the shares are summed on the way back: exact, in static shapes, and no expert's weights cross that
        axis. Over `tensor` each expert's MLP is split; over `fsdp` its weights are gathered, as a dense layer's are.
        """
        graph, state = nnx.split(experts)
        # Cast first: what is gathered over fsdp is then in the compute dtype.
        params = {path: leaf[...].astype(x.dtype) for path, leaf in nnx.to_flat_state(state)}

        def share(params: Any, first: Any, x: jax.Array, *routes: jax.Array) -> jax.Array:
            experts = nnx.merge(graph, nnx.from_flat_state(list(params.items())))
            chosen, weights, *group = (part.reshape(-1, part.shape[-1]) for part in routes)
            return experts(x.reshape(-1, x.shape[-1]), chosen, weights, first, *(part[:, 0] for part in group))

        given: tuple[jax.Array, ...] = (x, chosen, weights)
        if experts.groups is not None:
            given = (*given, jnp.broadcast_to(group_of_rows(len(x), experts.groups)[:, None, None], (*x.shape[:2], 1)))
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return share(params, 0, *given).reshape(x.shape)

        rows, columns = _dividing(mesh, "batch", x.shape[0]), _dividing(mesh, "length", x.shape[1])
        (expert,), mlp = sharding.RULES["expert"], sharding.RULES["mlp"]
        gathers = expert in rows and mesh.shape[expert] > 1
        specs = {path: _expert_spec(leaf.get_metadata("axes")) for path, leaf in nnx.to_flat_state(state)}
        tokens = PartitionSpec(rows, columns, None)

        def local(params: Any, *given: jax.Array) -> jax.Array:
            # Everything is made to vary over the same axes, so that gradients are summed here and nowhere within.
            params = {path: _vary(leaf, specs[path], (*rows, *columns, expert, *mlp)) for path, leaf in params.items()}
            inputs = tuple(_vary(part, tokens, (expert, *mlp)) for part in given)
            if gathers:
                inputs = tuple(jax.lax.all_gather(part, expert, axis=0, tiled=True) for part in inputs)
            first = jax.lax.axis_index(expert) * (self.num_experts // mesh.shape[expert])
            y = share(params, first, *inputs).reshape(inputs[0].shape)
            if gathers:
                y = jax.lax.psum_scatter(y, expert, scatter_dimension=0, tiled=True)
            return jax.lax.psum(y, mlp if expert in rows else (expert, *mlp))

        in_specs = (specs, *(tokens for _ in given))
        return jax.shard_map(local, in_specs=in_specs, out_specs=tokens)(params, *given)


def _top(values: jax.Array, k: int) -> jax.Array:
    """The indices of the k largest along the last axis, the largest first, the lower first of equals: int32 [...,k].

    By k maxima: XLA splits those over the mesh, and gathers all tokens on each device for `jax.lax.top_k`.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    found = []
    for _ in range(k):
        best = jnp.argmax(values, axis=-1, keepdims=True).astype(jnp.int32)
        values = jnp.where(index == best, -jnp.inf, values)
        found.append(best)
    return jnp.concatenate(found, axis=-1)


def load_balancing_loss(stats: Stats) -> Float32[Array, ""]:
    """E * sum over experts of (share of the choices) * (mean probability): k where all experts are chosen alike.

    Equal to transformers' `load_balancing_loss_func` (Switch Transformer, arXiv:2101.03961, equations 4-6): that one
    takes the tokens of all layers together, so the layers' sums are added before they are multiplied. For the same
    reason sums of several batches may be added first: their loss is then that of one batch, and differs from the mean
    of their losses. transformers computes it for each micro-batch (and each process) by itself; gradients can only be
    added over micro-batches in that form, because every batch's choices multiply every other's probabilities. Under a
    mesh the sums run over all devices: a micro-batch is the global one.

    Args:
      stats: the sums of `MoE`, with any leading axes ([L,E], [L] of the layers with experts).

    Returns:
      0 where there is no token. Multiply it by the config's `router_aux_loss_coef`.
    """
    num_experts = stats["chosen"].shape[-1]
    tokens = jnp.maximum(jnp.sum(stats["tokens"]), 1.0)
    chosen, probability = (
        jnp.sum(stats[name].reshape(-1, num_experts), axis=0) / tokens for name in ("chosen", "probability")
    )
    return num_experts * jnp.sum(chosen * probability)


def _expert_spec(axes: Axes) -> PartitionSpec:
    """Where the experts' parameters lie while they compute: split by expert and MLP, whole otherwise."""
    kept = tuple(axis if axis in ("expert", "mlp") else None for axis in axes if axis != "layers")
    return sharding.partition_spec(kept)


def _dividing(mesh: Any, axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes that split a logical axis of this size: as many as divide it (one prompt is on all devices)."""
    names: tuple[str, ...] = ()
    for name in sharding.RULES[axis]:
        if size % math.prod(mesh.shape[n] for n in (*names, name)) == 0:
            names = (*names, name)
    return names


def _vary(x: jax.Array, spec: PartitionSpec, axes: tuple[str, ...]) -> jax.Array:
    """Marks x as varying over mesh axes over which it is the same so far; the transpose is the sum over them."""
    have = {name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())}
    return jax.lax.pcast(x, tuple(dict.fromkeys(name for name in axes if name not in have)), to="varying")
