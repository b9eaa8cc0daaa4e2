"""The parts of a decoder: linear map, norm, embedding, attention and MLP blocks.

B batch, T length, D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers, R rank.

Every parameter carries its logical axes (`param.axes`), one name a dimension; `specjax.sharding` maps them to the mesh.
A module built with `layers=L` holds L layers' parameters stacked on a leading axis; `Decoder` scans over it and the
modules' methods see one layer's slice.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from specjax.models.adapter import Adaptable, AdaptableMap
from specjax.models.attention import Cache, attend, store
from specjax.models.config import ModelConfig
from specjax.models.products import contract
from specjax.models.quantised import Quantised
from specjax.models.rope import Tables, growth, rotate, rotate_neighbours
from specjax.models.stack import Call, Constant

Axes = tuple[str | None, ...]
Kind = tuple[Any, Tables]  # window (None, an integer, or OneOf), (cosines, sines)
Kept = tuple[jax.Array, jax.Array]  # a layer's keys and values, [B,T,K,H] each
Keys = tuple[jax.Array | None, ...]  # one dropout key a linear map


class Wide(nnx.Param):
    """A parameter that is float32 whatever the others are stored in, as in the published files (Qwen 3.5)."""


def parameter(
    init: Any,
    shape: tuple[int, ...],
    axes: Axes,
    layers: int | None,
    rngs: nnx.Rngs | None,
    dtype: Any = jnp.float32,
    kind: Any = nnx.Param,
) -> Any:
    """A `kind` of `shape`, stacked `layers` times when given, bearing its logical axes; without `rngs` no values."""
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    if rngs is None:
        return kind(jax.ShapeDtypeStruct(shape, dtype), axes=axes)
    return kind(init(rngs.params(), shape, dtype), axes=axes)


def kernel_init(stddev: float, in_dims: int, lead: int) -> Any:
    """Initialises kernels [*lead, *out, *in]: normal, drawn as [*lead, *in, *out], so that a seed keeps its meaning."""
    normal = nnx.initializers.normal(stddev)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        value = normal(key, (*shape[:lead], *shape[-in_dims:], *shape[lead:-in_dims]), dtype)
        axes = tuple(range(lead, lead + in_dims))
        return jnp.moveaxis(value, axes, tuple(range(-in_dims, 0)))

    return init


class Linear(AdaptableMap):
    """y = x W^T (+ bias) (+ the updates in use).

    `kernel` is [(L,) *out_shape, *in_shape], in the order of Hugging Face's files, so that loading is a copy; of a
    frozen base it may be a `Quantised`, which stands for such an array.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        in_axes: Axes,
        out_axes: Axes,
        *,
        bias: bool = False,
        layers: int | None = None,
        rngs: nnx.Rngs | None,
        stddev: float = 0.02,
    ):
        super().__init__()
        init = kernel_init(stddev, len(in_shape), int(layers is not None))
        kernel = parameter(init, out_shape + in_shape, out_axes + in_axes, layers, rngs)
        self.kernel: nnx.Param | Quantised = kernel
        self.bias = parameter(nnx.initializers.zeros, out_shape, out_axes, layers, rngs) if bias else None
        self.in_dims = len(in_shape)

    def __call__(
        self,
        x: Float[Array, " B *inputs"],
        dropout_key: Array | None = None,
        accumulate: Any = None,
        low: Float[Array, "B T R"] | None = None,
    ) -> Float[Array, " B *outputs"]:
        """[...,*in_shape] -> [...,*out_shape] in x's dtype, or in `accumulate` (the logits' float32); `low`: A x."""
        if not isinstance(self.kernel, Quantised):
            return self._apply(x, dropout_key, accumulate, low)
        # The backward pass dequantises again: kept, all layers' floats would be in memory at once.
        graph, state = nnx.split(self)

        def again(state: Any, x: jax.Array, dropout_key: jax.Array | None, low: jax.Array | None) -> jax.Array:
            return nnx.merge(graph, state)._apply(x, dropout_key, accumulate, low)

        return jax.checkpoint(again, prevent_cse=False)(state, x, dropout_key, low)

    def _apply(self, x: jax.Array, dropout_key: jax.Array | None, accumulate: Any, low: jax.Array | None) -> jax.Array:
        kernel = self.used("kernel")
        y = plain = contract(x, kernel, self.in_dims, accumulate)
        if self.bias is not None:
            y += jnp.broadcast_to(self.used("bias").astype(y.dtype), y.shape)
        for update in self.active_updates():
            y += update(Call(x, plain, kernel, self.in_dims, dropout_key, low))
        return y


def beside(x: Float[Array, "B T D"], maps: Sequence[Linear], keys: Keys) -> list[Float[Array, "B T ..."]]:
    """The outputs of maps that share an input; their factors A, small each, are multiplied by it together."""
    in_use = [each.active_updates() for each in maps]
    updates = [update for of_map in in_use for update in of_map]
    factors = (update.variant.shared(update.factors) for update in updates)
    shared = [factor for factor in factors if factor is not None]
    several = any(len(of_map) > 1 for of_map in in_use)  # of one map, whose groups of rows differ in variant
    drops = any(update.drops(keys[0]) for update in updates)
    if len(updates) < 2 or several or drops or len(shared) < len(updates):
        return [each(x, key) for each, key in zip(maps, keys, strict=False)]
    axis = 0 if updates[0].groups is None else 1
    low = updates[0].reduce(x, jnp.concatenate(shared, axis))
    ends = np.cumsum([factor.shape[axis] for factor in shared])[:-1].tolist()
    lows = iter(jnp.split(low, ends, axis=-1))
    parts = [next(lows) if of_map else None for of_map in in_use]
    return [each(x, key, low=part) for each, key, part in zip(maps, keys, parts, strict=False)]


class RMSNorm(Adaptable):
    """x / rms(x) * scale, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    Families differ in where they return to the compute dtype, and Gemma's scale is 1 + w: `style` is
    `ModelConfig.norm_style`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        eps: float,
        *,
        style: str = "llama",
        layers: int | None = None,
        rngs: nnx.Rngs | None,
        kind: Any = nnx.Param,
    ):
        super().__init__()
        init = nnx.initializers.zeros if style == "gemma" else nnx.initializers.ones
        self.scale = parameter(init, shape, axes, layers, rngs, kind=kind)
        self.eps, self.style = eps, style

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """[..., *shape] -> the same in x's dtype, normed over all axes of `shape` together."""
        return jax.checkpoint(self._normed, prevent_cse=False)(x, self.used("scale"))

    def _normed(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        over = tuple(range(-scale.ndim, 0))
        scale = scale[(None,) * (x.ndim - scale.ndim)]
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=over, keepdims=True) + self.eps)
        if self.style == "llama":
            return scale.astype(x.dtype) * y.astype(x.dtype)
        # A frozen scale is stored in the compute dtype; one that trains is cast to it first, to be the same model.
        scale = scale.astype(x.dtype).astype(jnp.float32)
        return ((1.0 + scale if self.style == "gemma" else scale) * y).astype(x.dtype)


class Embed(AdaptableMap):
    """Token embedding, [V,D] (+ the updates in use)."""

    in_dims = 1  # a token

    def __init__(self, vocab_size: int, embed_dim: int, *, rngs: nnx.Rngs | None, stddev: float = 0.02):
        super().__init__()
        init = nnx.initializers.normal(stddev)
        self.embedding = parameter(init, (vocab_size, embed_dim), ("vocab", "embed"), None, rngs)

    def __call__(self, tokens: Int32[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """The tokens' rows of the table, in `dtype`."""
        x = self._rows(tokens, dtype)
        for update in self.active_updates():
            x = (x + update(Call(tokens))).astype(dtype)
        return x

    def _rows(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        held = self.copies
        rows = () if held is None else held.rows_of("embedding")
        if held is None or not rows:
            return jnp.take(self.used("embedding"), tokens, axis=0).astype(dtype)
        # The adapter's few rows are looked up by themselves: a table with them in place would be a second one.
        base: jax.Array = self.embedding[...]
        places = jnp.full(base.shape[0], -1, jnp.int32).at[np.array(rows)].set(np.arange(len(rows), dtype=np.int32))
        place = jnp.take(places, tokens, axis=0)
        own = jnp.take(held.embedding[...], place, axis=0, mode="clip").astype(base.dtype)
        return jnp.where(place[..., None] >= 0, own, jnp.take(base, tokens, axis=0)).astype(dtype)

    def output(self) -> Float[Array, "V D"]:
        """The table of a tied output layer: not an adapter's copy of the embedding, unless it ties them.

        An adapter's rows of the embedding are in it, where the output layer has none of its own.
        """
        own = self.copies
        tied = own is not None and (own.tied or (own.rows_of("embedding") and "lm_head" not in own.parameters))
        return self.used("embedding") if tied else self.used("lm_head", base="embedding")


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, layers: int | None, rngs: nnx.Rngs | None):
        d, n, k, h = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        out_stddev = 0.02 / math.sqrt(2 * config.num_layers)
        self.config = config

        def into(heads: int, axis: str, times: int = 1) -> Linear:
            out, axes, bias = (heads, times * h), (axis, "head_dim"), config.qkv_bias
            return Linear((d,), out, ("embed",), axes, bias=bias, layers=layers, rngs=rngs)

        def norm(heads: int, axis: str) -> RMSNorm | None:
            shape, axes = ((h,), ("head_dim",)) if config.qk_norm == "head" else ((heads, h), (axis, "head_dim"))
            made = RMSNorm(shape, axes, config.norm_eps, style=config.norm_style, layers=layers, rngs=rngs)
            return made if config.qk_norm else None

        if config.fused_qkv:
            self.qkv_proj = into(n + 2 * k, "heads")
        else:
            self.q_proj = into(n, "heads", 1 + config.output_gate)
            self.k_proj = None if config.shares else into(k, "kv_heads")
            self.v_proj = into(k, "kv_heads") if config.values and not config.shares else None
        self.q_norm, self.k_norm = norm(n, "heads"), None if config.shares else norm(k, "kv_heads")
        sink = nnx.initializers.normal(0.02)
        self.sinks = parameter(sink, (n,), ("heads",), layers, rngs) if config.sinks else None
        out_axes = (("heads", "head_dim"), ("embed",))
        self.o_proj = Linear((n, h), (d,), *out_axes, bias=config.o_bias, layers=layers, rngs=rngs, stddev=out_stddev)

    def _qkv(self, x: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Of x, before they are rotated, and the output's gate; k and v are q's where the layer has none of its own."""
        gate = None
        if self.config.fused_qkv:
            last_q, last_k = self.config.num_heads, self.config.num_heads + self.config.num_kv_heads
            fused = self.qkv_proj(x, keys[0])
            q, k, v = fused[:, :, :last_q], fused[:, :, last_q:last_k], fused[:, :, last_k:]
        else:
            maps = [each for each in (self.q_proj, self.k_proj, self.v_proj) if each is not None]
            found = beside(x, maps, keys)
            q, k, v = found[0], found[min(1, len(found) - 1)], found[-1]
        if self.config.output_gate:
            q, gate = jnp.split(q, 2, axis=-1)
        v = _unscaled(v, self.config.norm_eps) if self.config.v_norm else v
        return self.q_norm(q) if self.q_norm else q, self.k_norm(k) if self.k_norm else k, v, gate

    def __call__(
        self,
        x: Float[Array, "B T D"],
        kind: Kind,
        where: dict[str, Any],
        cache: Cache | None = None,
        keys: Keys = (None,) * 4,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Kept | None]:
        """The block's output, the cache with x's keys and values, and those alone where the layer keeps them.

        Args:
          x: the block's input.
          kind: this layer's window (None: all keys) and the tables of `rope.tables` for the queries' positions.
          where: q_positions, k_positions, q_segments, k_segments; with a cache also `slot`, the index there of x's
            first token, and `layer`, this layer's (or that of the layer whose keys and values it shares); of a layer
            that shares, `shared`: x's keys and values where they are not to be had from the cache.
          cache: None, or that of all layers of this shape; x's keys and values are written into it.
          keys: dropout keys for q, k, v, o; a fused map has q's.
        """
        window, (cos, sin) = kind
        q, k, v, gate = self._qkv(x, keys)
        turn = rotate_neighbours if self.config.interleaved else rotate
        q = turn(q, cos, sin)
        if not self.config.shares:
            k = turn(k, cos, sin)
        elif where["shared"] is not None:
            k, v = where["shared"]
        if self.config.query_growth:
            q = q * growth(where["q_positions"], *self.config.query_growth).astype(q.dtype)
        sees = {name: value for name, value in where.items() if name not in ("slot", "layer", "shared", "per_layer")}
        kept = (k, v) if self.config.keeps else None
        if cache is not None:
            if not self.config.shares:
                cache = store(cache, k, v, where["layer"], where["slot"])
            if isinstance(where["slot"], int) and where["slot"] == 0:  # nothing stands before x: it sees itself alone
                sees |= {"k_positions": sees["q_positions"], "k_segments": sees["q_segments"]}
            else:
                k, v = (jax.lax.dynamic_index_in_dim(part, where["layer"], keepdims=False) for part in cache)
                sees["cached"], kept = True, None
        scale, softcap = self.config.query_scale, self.config.attention_softcap
        sinks = None if self.sinks is None else self.sinks[...].astype(q.dtype)
        heads = attend(q, k, v, window=window, scale=scale, softcap=softcap, sinks=sinks, **sees)
        heads = heads if gate is None else heads * jax.nn.sigmoid(gate)
        return self.o_proj(heads, keys[3]), cache, kept


def _unscaled(x: Float[Array, "*shape H"], eps: float) -> Float[Array, "*shape H"]:
    """Each head normed, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def activate(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """The named activation: silu, gelu (exact), gelu_tanh or relu."""
    if name.startswith("gelu"):
        return jax.nn.gelu(x, approximate=name == "gelu_tanh")
    return jax.nn.silu(x) if name == "silu" else jax.nn.relu(x)


class XIELU(nnx.Module):
    """alpha_p x^2 + beta x above 0, alpha_n (e^x - 1 - x) + beta x below (Huang & Schlag 2024, arXiv:2411.13010).

    `alpha_p` and `alpha_n` [(L,) 1] train, under a softplus; `beta` and `eps` [(L)] are the file's, as in transformers'
    `XIELUActivation`, which takes min(x, eps) below 0.
    """

    def __init__(self, *, layers: int | None, rngs: nnx.Rngs | None):
        def alpha(start: float) -> nnx.Param:
            init = nnx.initializers.constant(math.log(math.expm1(start)))
            return parameter(init, (1,), (None,), layers, rngs)

        def fixed(value: float) -> Constant:
            return parameter(nnx.initializers.constant(value), (), (), layers, rngs, kind=Constant)

        self.alpha_p, self.alpha_n = alpha(0.8), alpha(0.3)
        self.beta, self.eps = fixed(0.5), fixed(-1e-6)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Of each element, computed in float32, in x's dtype."""
        alphas = (self.alpha_p, self.alpha_n)
        above, below = (jax.nn.softplus(a[0].astype(x.dtype).astype(jnp.float32)) for a in alphas)
        beta, eps = (c[...].astype(jnp.float32) for c in (self.beta, self.eps))
        y = x.astype(jnp.float32)
        curved = jnp.where(y > 0, above * y * y, (beta + below) * (jnp.expm1(jnp.minimum(y, eps)) - y))
        return (curved + beta * y).astype(x.dtype)


class MLP(nnx.Module):
    """Gated MLP, down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), or down(act(up(x))) without a gate."""

    def __init__(self, config: ModelConfig, *, layers: int | None, rngs: nnx.Rngs | None):
        d, f, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        out_stddev = 0.02 / math.sqrt(2 * config.num_layers)
        self.activation, self.gate = config.activation, config.gate
        if self.gate == "fused":
            self.gate_up_proj = Linear((d,), (2, f), ("embed",), (None, "mlp"), bias=bias, layers=layers, rngs=rngs)
        else:
            if self.gate:
                self.gate_proj = Linear((d,), (f,), ("embed",), ("mlp",), bias=bias, layers=layers, rngs=rngs)
            self.up_proj = Linear((d,), (f,), ("embed",), ("mlp",), bias=bias, layers=layers, rngs=rngs)
        self.act_fn = XIELU(layers=layers, rngs=rngs) if self.activation == "xielu" else None
        self.down_proj = Linear(
            (f,), (d,), ("mlp",), ("embed",), bias=bias, layers=layers, rngs=rngs, stddev=out_stddev
        )

    def __call__(self, x: Float[Array, "B T D"], keys: Keys = (None,) * 3) -> Float[Array, "B T D"]:
        """The block's output; `keys` are dropout keys for gate, up, down; a fused map has gate's."""
        if not self.gate:
            up = self.up_proj(x, keys[1])
            return self.down_proj(self.act_fn(up) if self.act_fn else activate(up, self.activation), keys[2])
        if self.gate == "fused":
            both = self.gate_up_proj(x, keys[0])
            gate, up = both[:, :, 0], both[:, :, 1]
        else:
            gate, up = beside(x, (self.gate_proj, self.up_proj), keys)
        # The backward pass makes down's input again, which is as large as both of these and quickly made.
        graph, state = nnx.split(self.down_proj)

        def down(state: Any, gate: jax.Array, up: jax.Array, key: jax.Array | None) -> jax.Array:
            return nnx.merge(graph, state)(activate(gate, self.activation) * up, key)

        return jax.checkpoint(down, prevent_cse=False)(state, gate, up, keys[2])
