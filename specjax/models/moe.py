"""Mixture of experts: routing, where the experts compute, the balancing loss.

Every token is computed by its k experts and no other: tokens are sorted by expert and go through grouped matrix
products (`specjax.models.grouped`). There is no capacity and no token is dropped.

B batch, T length, D embed, E experts, k experts a token, F mlp, L layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32

from specjax import sharding
from specjax.models.clamped import BiasedRouter, ClampedExperts
from specjax.models.experts import Experts
from specjax.models.layers import Axes, Linear
from specjax.models.stack import group_of_rows

Stats = dict[str, Float32[Array, "..."]]


class Router(Linear):
    """A token's score of each expert: its output stays whole on every device, because a token compares all experts."""


class MoE(nnx.Module):
    """Sparse MLP: a router, and for each token the k experts that it chooses (Mixtral, arXiv:2401.04088; Qwen3).

    Equal to transformers' `MixtralSparseMoeBlock` (normalise), `Qwen3MoeSparseMoeBlock` (normalise as the config's
    `norm_topk_prob`, round_weights) and `GptOssMLP` (normalise, round_weights, clamp).

    Args:
      embed_dim: D.
      mlp_dim: F, of one expert.
      num_experts: E.
      experts_per_token: k.
      normalise: whether a token's k weights are divided by their sum.
      round_weights: whether the weights are rounded to the compute dtype, as Qwen3's are and Mixtral's are not.
      activation: of the gate, one that `layers.activate` knows.
      clamp: (alpha, limit) of gpt-oss' experts, `ClampedExperts`, which no adapter touches; None: `Experts`.
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
        clamp: tuple[float, float] | None = None,
        layers: int | None,
        rngs: nnx.Rngs | None,
        out_stddev: float = 0.02,
    ):
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"{experts_per_token} experts a token of {num_experts}: give 1 to {num_experts}.")
        sizes: dict[str, Any] = {"embed_dim": embed_dim, "mlp_dim": mlp_dim, "num_experts": num_experts}
        given: dict[str, Any] = {"layers": layers, "rngs": rngs}
        self.gate: Router | BiasedRouter
        self.experts: Experts
        if clamp is None:
            self.gate = Router((embed_dim,), (num_experts,), ("embed",), (None,), **given)
            self.experts = Experts(**sizes, activation=activation, out_stddev=out_stddev, **given)
        else:
            self.gate = BiasedRouter(embed_dim, num_experts, **given)
            self.experts = ClampedExperts(**sizes, clamp=clamp, out_stddev=out_stddev, **given)
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
        if not self.experts.quantised:
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
        params = {path: _cast(leaf[...], x.dtype) for path, leaf in nnx.to_flat_state(state)}

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
        biases = [(path, leaf) for path, leaf in nnx.to_flat_state(state) if path[-1] == "bias"]
        once = [path for path, leaf in biases if "mlp" not in leaf.get_metadata("axes")]
        tokens = PartitionSpec(rows, columns, None)

        def local(params: Any, *given: jax.Array) -> jax.Array:
            # Everything is made to vary over the same axes, so that gradients are summed here and nowhere within.
            params = {path: _vary(leaf, specs[path], (*rows, *columns, expert, *mlp)) for path, leaf in params.items()}
            first_part = sum((jax.lax.axis_index(axis) for axis in mlp), jnp.int32(0)) == 0
            for path in once:  # what the sum over the parts of an MLP would count in each of them
                params[path] = jnp.where(first_part, params[path], jnp.zeros_like(params[path]))
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


def _cast(value: jax.Array, dtype: Any) -> jax.Array:
    """In `dtype`, but for whole numbers: the rows of a bank of adapters."""
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value


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
