"""Folding an adapter into the base."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax import sharding
from specjax.errors import UserError, argument
from specjax.hf.quantise import dequantise_base, is_quantised
from specjax.lora.adapters import Copies, active, collect, unload
from specjax.lora.targets import TIED_HEAD, is_stacked, maps_of, part, weight
from specjax.lora.variants import LoRA
from specjax.models import Decoder
from specjax.models.adapter import Path
from specjax.models.layers import Embed, Linear
from specjax.models.stack import Member


def merge(model: Decoder, name: str | None = None, *, dequantise: bool = False) -> None:
    """Folds an adapter into the base and takes it off: W + s B A in float32, then cast to W's dtype.

    DoRA's update is scaled by magnitude / norm; copies of parameters take the base's place. Where an adapter trained
    one end alone of tied embeddings, the model is untied: it gets an `lm_head`.

    Args:
      model: changed in place.
      name: default the adapter in use.
      dequantise: of a quantised base: make it float first, with its errors, in the compute dtype, and merge into that.

    Raises:
      UserError: there is no such adapter, or none in use, or the base is quantised and `dequantise` was not given, or
        the reverse.
    """
    name = name or active(model)
    if name is None:
        raise UserError("no adapter is in use: nothing to merge.")
    adapter = collect(model, name)
    quantised = is_quantised(model)
    if quantised and not dequantise:
        raise UserError(
            "the base is quantised, and a merge would be rounded with it: load the base in bfloat16 or float32, and "
            f"the adapter onto it, and merge there, or choose the dequantised weights by {argument('dequantise=True')}."
        )
    if dequantise and not quantised:
        raise UserError(f"the base is not quantised: leave {argument('dequantise')} out of the merge.")
    if quantised:
        dequantise_base(model)
    maps = maps_of(model)
    for path in adapter.factors:
        _check_dtype((*path, "kernel"), weight(maps[path]).dtype)
    for path, copies in adapter.copies.items():
        for parameter in copies.values:
            stored = "embedding" if parameter == TIED_HEAD else parameter
            _check_dtype((*path, stored), getattr(part(model, path), stored).dtype)
    for path, copies in adapter.copies.items():
        _replace(model, path, copies)
    for path, factors in adapter.factors.items():
        linear, kernel = maps[path], weight(maps[path])
        if isinstance(linear, Embed) and model.lm_head is None:
            _untie(model, linear.embedding[...])
        scales = jnp.array(Member(0, factors.ranks, factors.alphas, 0.0, adapter.rslora).scales, jnp.float32)
        stacked = is_stacked(linear)
        merger = _merger(factors.variant, linear.in_dims, stacked, kernel[...].sharding)
        merged = merger(kernel[...], factors.values, scales if stacked else scales[0])
        # Waited for: else the kernels of all maps, still being read, are in memory beside the merged ones.
        kernel[...] = jax.block_until_ready(merged)
    unload(model, name)


def _check_dtype(path: Path, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        raise UserError(
            f"{sharding.path_name(path)} is stored as {jnp.dtype(dtype).name}, a quantised base, into which a merge "
            "would be rounded: load the base in bfloat16 or float32, and the adapter onto it, and merge there."
        )


@functools.cache
def _merger(variant: LoRA, in_dims: int, stacked: bool, place: jax.sharding.Sharding) -> Any:
    """The compiled merge of a map's sort, shared by maps of the same shapes."""

    def of_layer(parts: tuple[Any, ...]) -> jax.Array:
        kernel, factors, scale = parts
        return variant.merge(kernel, factors, scale, in_dims).astype(kernel.dtype)

    def every(*parts: Any) -> jax.Array:
        # Layer by layer: float32 copies of all layers at once would be twice the model.
        return jax.lax.map(of_layer, parts) if stacked else of_layer(parts)

    return jax.jit(every, out_shardings=place)


def _replace(model: Decoder, path: Path, copies: Copies) -> None:
    """Puts an adapter's copies in the base's place, cast to its dtype."""
    module = part(model, path)
    if isinstance(module, Embed) and model.lm_head is None and not copies.tied:
        if TIED_HEAD in copies.values or not copies.rows:  # else the rows are those of both ends
            table = model.embed_tokens.embedding[...]
            _untie(model, _with_rows(table, copies, TIED_HEAD) if TIED_HEAD in copies.values else table)
    for parameter, value in copies.values.items():
        if parameter == TIED_HEAD:
            continue
        base = getattr(module, parameter)
        old = base[...]
        if parameter in copies.rows:
            base[...] = jax.device_put(_with_rows(old, copies, parameter), old.sharding)
        elif all(copies.layers):
            base[...] = jax.device_put(jnp.array(value, old.dtype, copy=True), old.sharding)
        else:
            on = jnp.asarray(copies.layers).reshape(-1, *(1,) * (old.ndim - 1))
            base[...] = jax.device_put(jnp.where(on, jnp.asarray(value).astype(old.dtype), old), old.sharding)


def _with_rows(table: Any, copies: Copies, parameter: str) -> Any:
    """A table [V,D] with an adapter's rows in their places, or the adapter's whole copy."""
    value = jnp.asarray(copies.values[parameter])
    rows = copies.rows.get(parameter)
    return value if rows is None else table.at[np.array(rows)].set(value.astype(table.dtype))


def _untie(model: Decoder, table: Any) -> None:
    """Gives a model with tied embeddings an output layer of its own, from the table [V,D]."""
    embedding = model.embed_tokens.embedding[...]
    size, dim = embedding.shape
    head = nnx.eval_shape(lambda: Linear((dim,), (size,), ("embed",), ("vocab",), rngs=nnx.Rngs(0)))
    axes = head.kernel.get_metadata("axes")
    mesh = sharding.mesh_of(embedding)
    place = None if mesh is None else sharding.named_sharding(mesh, axes, (size, dim), "lm_head.kernel")
    kernel = jax.jit(lambda table: jnp.array(table, embedding.dtype, copy=True), out_shardings=place)(table)
    head.kernel = nnx.Param(kernel, axes=axes)
    model.lm_head = nnx.data(head)
    model.config = dataclasses.replace(model.config, tied=False)
    untied = model.origin.config_json | {"tie_word_embeddings": False}
    model.origin = dataclasses.replace(model.origin, config_json=untied)
