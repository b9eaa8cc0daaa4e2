"""Putting LoRA factors beside a model's linear maps, choosing among them, folding them in.

An adapter is a name under which some of the model's `Linear` modules hold a `LoRA`. Several may be loaded over one
base; one, or none, is in use. The base's own parameters keep their paths and values.
"""

import math
import re
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax import sharding
from specjax.errors import UserError, nearest
from specjax.models import Decoder
from specjax.models.layers import Linear, LoRA

DEFAULT = "default"
Array = jax.Array | np.ndarray


def linears(model: Decoder) -> dict[str, Linear]:
    """The model's linear maps by dotted path ("layers.self_attn.q_proj" stands for that map in every layer)."""
    return {sharding.path_name(path): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def hf_modules(path: str, num_layers: int) -> list[str]:
    """The names PEFT knows a linear map by: one a layer.

    >>> hf_modules("layers.mlp.up_proj", 2)
    ['model.layers.0.mlp.up_proj', 'model.layers.1.mlp.up_proj']
    """
    if path.startswith("layers."):
        return [f"model.layers.{i}.{path.removeprefix('layers.')}" for i in range(num_layers)]
    return [path]


def match(model: Decoder, targets: str | Sequence[str]) -> list[str]:
    """The linear maps that `targets` names, as PEFT matches `target_modules`.

    Args:
      model: the model.
      targets: "all-linear" (every linear map of the layers, not the head); another string is a regular expression that
        must match a module's full name ("model.layers.0.self_attn.q_proj"); a list holds names or ends of names.

    Raises:
      UserError: a target matches nothing, or only some layers; the names that are there are listed.
    """
    maps, layers = linears(model), model.config.num_layers
    known = sorted({path.rsplit(".", 1)[-1] for path in maps})
    if targets == "all-linear":
        return [path for path in maps if path != "lm_head"]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(f"LoRA targets {targets!r} is not a regular expression ({error}).") from error
        hits = {path: [bool(pattern.fullmatch(name)) for name in hf_modules(path, layers)] for path in maps}
    else:
        hits = {path: [] for path in maps}
        for target in targets:
            ends = {path: [n == target or n.endswith(f".{target}") for n in hf_modules(path, layers)] for path in maps}
            if not any(any(found) for found in ends.values()):
                raise UserError(
                    f"LoRA target {target!r} matches no linear map; there are {', '.join(known)}."
                    f"{nearest(target, known)}"
                )
            hits = {path: [a or b for a, b in zip(hits[path] or ends[path], ends[path], strict=True)] for path in maps}
    partial = [path for path, found in hits.items() if any(found) and not all(found)]
    if partial:
        raise UserError(f"LoRA targets {targets!r} match {partial[0]} in some layers only: name it for every layer.")
    chosen = [path for path, found in hits.items() if found and all(found)]
    if not chosen:
        raise UserError(
            f"LoRA targets {targets!r} match no linear map; there are {', '.join(known)}: give names, 'all-linear', or "
            "a regular expression that matches a full name such as model.layers.0.self_attn.q_proj."
        )
    return chosen


def inject(
    model: Decoder,
    *,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
    name: str = DEFAULT,
) -> None:
    """Adds a fresh adapter to the model and puts it in use; the model's output stays the same, bit for bit.

    y = Wx + s B(A(dropout(x))), s = alpha/rank (alpha/sqrt(rank) for rsLoRA, arXiv:2312.03732), A uniform in
    +-1/sqrt(inputs), B zero, both float32, as PEFT initialises them.

    Args:
      model: changed in place.
      rank: of the update.
      alpha: default 2 * rank.
      targets: see `match`.
      dropout: probability that an input of A is dropped while training.
      rslora: rank-stabilised scale.
      seed: of A.
      name: the adapter's name.

    Raises:
      UserError: targets that match nothing, a rank below 1, or a name in use.
    """
    if rank < 1:
        raise UserError(f"LoRA rank {rank}: it must be at least 1.")
    if name in names(model):
        raise UserError(f"the model already has an adapter {name!r}: unload it, or give another name.")
    maps = linears(model)
    alpha = 2.0 * rank if alpha is None else float(alpha)
    for path in match(model, targets):
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        a_shape, b_shape = factor_shapes(model, path, rank)
        stacked = path.startswith("layers.")
        bound = 1 / math.sqrt(math.prod(a_shape[1:-1] if stacked else a_shape[:-1]))
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
        add(maps[path], name, a, jnp.zeros(b_shape, jnp.float32), alpha=alpha, dropout=dropout, rslora=rslora)
    use(model, name)


def factor_shapes(model: Decoder, path: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B, [(L,) *in, R] and [(L,) R, *out], for the linear map at `path`."""
    linear = linears(model)[path]
    lead = 1 if path.startswith("layers.") else 0
    split = lead + linear.in_dims
    shape = linear.kernel.shape
    return (*shape[:split], rank), (*shape[:lead], rank, *shape[split:])


def add(linear: Linear, name: str, a: Array, b: Array, *, alpha: float, dropout: float, rslora: bool) -> None:
    """Hangs the factors A and B (arrays) beside a linear map, placed like it on its mesh.

    Over `fsdp` the factors are replicated: they are small, and gathering them in every layer costs more than it saves.
    """
    axes: tuple[str | None, ...] = tuple(
        None if axis == "embed" else axis for axis in linear.kernel.get_metadata("axes")
    )
    lead = 1 if axes[0] == "layers" else 0
    split = lead + linear.in_dims
    a_axes, b_axes = (*axes[:split], "lora_rank"), (*axes[:lead], "lora_rank", *axes[split:])
    mesh = sharding.mesh_of(linear.kernel[...])
    if mesh is not None:
        a = jax.device_put(a, sharding.named_sharding(mesh, a_axes, a.shape, f"LoRA A of {name}"))
        b = jax.device_put(b, sharding.named_sharding(mesh, b_axes, b.shape, f"LoRA B of {name}"))
    rank = b.shape[lead]
    linear.lora[name] = LoRA(
        nnx.LoRAParam(a, axes=a_axes),
        nnx.LoRAParam(b, axes=b_axes),
        alpha=alpha,
        scale=alpha / math.sqrt(rank) if rslora else alpha / rank,
        dropout=dropout,
        rslora=rslora,
    )


def worn(model: Decoder, name: str) -> Iterator[tuple[str, Linear, LoRA]]:
    """(path, linear map, its factors) of each map that adapter `name` touches.

    Raises:
      UserError: there is no such adapter.
    """
    have = names(model)
    if name not in have:
        raise UserError(f"no adapter {name!r} is loaded; loaded are: {', '.join(have) or 'none'}.{nearest(name, have)}")
    for path, linear in linears(model).items():
        if name in linear.lora:
            yield path, linear, linear.lora[name]


def names(model: Decoder) -> list[str]:
    """The loaded adapters."""
    return list(dict.fromkeys(name for linear in linears(model).values() for name in linear.lora))


def active(model: Decoder) -> str | None:
    """The adapter in use, or None for the base alone."""
    return next((linear.active for linear in linears(model).values() if linear.active is not None), None)


def use(model: Decoder, name: str | None) -> None:
    """Puts an adapter in use in place of the one before; None: the base alone.

    Raises:
      UserError: there is no such adapter.
    """
    chosen = set() if name is None else {path for path, _, _ in worn(model, name)}
    for path, linear in linears(model).items():
        linear.active = name if path in chosen else None


def unload(model: Decoder, name: str) -> None:
    """Takes an adapter off the model.

    Raises:
      UserError: there is no such adapter.
    """
    for _, linear, _ in list(worn(model, name)):
        del linear.lora[name]
        if linear.active == name:
            linear.active = None


def merge(model: Decoder, name: str | None = None) -> None:
    """Folds an adapter into the base, W + s A B, in float32 and then cast to W's dtype, and takes it off.

    Args:
      model: changed in place.
      name: default the adapter in use.

    Raises:
      UserError: there is no such adapter, or none in use.
    """
    name = name or active(model)
    if name is None:
        raise UserError("no adapter is in use: nothing to merge.")
    for _, linear, lora in list(worn(model, name)):
        stacked = linear.kernel.get_metadata("axes")[0] == "layers"
        linear.kernel[...] = _merged(linear.kernel[...], lora.a[...], lora.b[...], lora.scale, stacked)
    unload(model, name)


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, stacked: bool) -> jax.Array:
    def one(parts: tuple[jax.Array, ...]) -> jax.Array:
        w, a, b = parts
        update = jnp.tensordot(a, b, axes=1, precision="highest") * scale
        return (w.astype(jnp.float32) + update).astype(w.dtype)

    def every(*parts: jax.Array) -> jax.Array:
        # Layer by layer: float32 copies of all layers at once would be twice the model.
        return jax.lax.map(one, parts) if stacked else one(parts)

    return jax.jit(every, out_shardings=kernel.sharding)(kernel, a, b)
