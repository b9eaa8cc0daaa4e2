"""Putting adapters on a model and choosing among them.

An adapter is a name under which some of the model's modules hold factors (`LoRA`) or copies of their parameters
(`Own`). Several may be loaded over one base; one, or none, is in use. The base's own parameters keep their paths and
values.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import sharding
from specjax.errors import UserError, nearest
from specjax.lora.targets import TIED_HEAD, Layers, linears, parts
from specjax.models import Decoder
from specjax.models.adapter import Adaptable, LoRA, Own, PerLayer
from specjax.models.layers import Linear
from specjax.models.moe import ExpertLinear

DEFAULT = "default"
Array = jax.Array | np.ndarray


@dataclasses.dataclass
class Factors:
    """What an adapter hangs beside one linear map, as in `models.adapter.LoRA`: ranks and alphas are one a layer."""

    a: Array
    b: Array
    magnitude: Array | None
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


@dataclasses.dataclass
class Copies:
    """What an adapter puts in the place of one module's parameters, as in `models.adapter.Own`."""

    values: dict[str, Array]
    layers: Layers
    tied: bool = False


@dataclasses.dataclass
class Adapter:
    """An adapter apart from a model, by the paths of its modules."""

    factors: dict[str, Factors]
    copies: dict[str, Copies]
    dropout: float
    rslora: bool


def is_stacked(path: str) -> bool:
    """Whether the module's arrays have a leading layer axis."""
    return path.startswith("layers.")


def factor_shapes(model: Decoder, path: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of A, B and DoRA's magnitude, [(L,) R, *in], [(L,) *out, R] and [(L,) *out], for the map at `path`."""
    linear = linears(model)[path]
    lead, shape = leading(linear), linear.kernel.shape
    out, inputs = shape[: -linear.in_dims], shape[-linear.in_dims :]
    return (*shape[:lead], rank, *inputs), (*out, rank), out


def leading(linear: Linear | ExpertLinear) -> int:
    """How many leading axes of a map's kernel count maps: the layers', the experts'."""
    return sum(axis in ("layers", "expert") for axis in linear.kernel.get_metadata("axes"))


def scales(ranks: tuple[int, ...], alphas: tuple[float, ...], rslora: bool) -> list[float]:
    """alpha/r of each layer, or alpha/sqrt(r) (rsLoRA, arXiv:2312.03732); 0 where the rank is 0."""
    return [0.0 if r == 0 else a / (math.sqrt(r) if rslora else r) for r, a in zip(ranks, alphas, strict=True)]


def check_free(model: Decoder, name: str) -> None:
    """Raises `UserError` where the model has an adapter of that name."""
    if name in names(model):
        raise UserError(f"the model already has an adapter {name!r}: unload it, or give another name.")


def attach(model: Decoder, name: str, adapter: Adapter) -> None:
    """Puts an adapter on the model, placed on its mesh, and in use.

    Over `fsdp` factors are replicated: they are small, and gathering them in every layer costs more than it saves.
    Copies lie like what they stand for.
    """
    maps = linears(model)
    for path, factors in adapter.factors.items():
        _hang(maps[path], name, factors, adapter.dropout, adapter.rslora)
    for path, copies in adapter.copies.items():
        part = parts(model)[path]
        values = {}
        for parameter, value in copies.values.items():
            base = getattr(part, "embedding" if parameter == TIED_HEAD else parameter)
            # A copy in any case: what trains is donated, and the base must outlive it.
            value = jax.device_put(jnp.array(value, jnp.float32, copy=True), base[...].sharding)
            values[parameter] = nnx.LoRAParam(value, axes=base.get_metadata("axes"))
            mesh = sharding.mesh_of(base[...])
        mask = None if all(copies.layers) else _per_layer([float(on) for on in copies.layers], mesh)
        part.own[name] = Own(values, copies.layers, mask, copies.tied)
    use(model, name)


def _hang(linear: Linear | ExpertLinear, name: str, factors: Factors, dropout: float, rslora: bool) -> None:
    axes = tuple(None if axis == "embed" else axis for axis in linear.kernel.get_metadata("axes"))
    lead, out, inputs = leading(linear), axes[: -linear.in_dims], axes[-linear.in_dims :]
    mesh = sharding.mesh_of(jax.tree.leaves(nnx.state(linear))[0])

    def param(value: Array, axes: tuple[str | None, ...], what: str) -> nnx.LoRAParam:
        value = jnp.asarray(value, jnp.float32)
        if mesh is not None:
            value = jax.device_put(value, sharding.named_sharding(mesh, axes, value.shape, f"LoRA {what} of {name}"))
        return nnx.LoRAParam(value, axes=axes)

    by_layer = scales(factors.ranks, factors.alphas, rslora)
    magnitude = factors.magnitude
    linear.lora[name] = LoRA(
        param(factors.a, (*axes[:lead], "lora_rank", *inputs), "A"),
        param(factors.b, (*out, "lora_rank"), "B"),
        None if magnitude is None else param(magnitude, out, "magnitude"),
        ranks=factors.ranks,
        alphas=factors.alphas,
        scale=by_layer[0] if len(set(by_layer)) == 1 else _per_layer(by_layer, mesh),
        dropout=dropout,
        rslora=rslora,
    )


def _per_layer(values: list[float], mesh: Mesh | None) -> PerLayer:
    array = jnp.asarray(values, jnp.float32)
    return PerLayer(array if mesh is None else jax.device_put(array, NamedSharding(mesh, PartitionSpec())))


def collect(model: Decoder, name: str) -> Adapter:
    """An adapter's arrays as they are on the model.

    Raises:
      UserError: there is no such adapter.
    """
    found = Adapter({}, {}, 0.0, False)
    for path, part in worn(model, name):
        if isinstance(part, Linear | ExpertLinear) and name in part.lora:
            lora = part.lora[name]
            magnitude = None if lora.magnitude is None else lora.magnitude[...]
            found.factors[path] = Factors(lora.a[...], lora.b[...], magnitude, lora.ranks, lora.alphas)
            found.dropout, found.rslora = lora.dropout, lora.rslora
        if name in part.own:
            own = part.own[name]
            found.copies[path] = Copies({key: getattr(own, key)[...] for key in own.parameters}, own.layers, own.tied)
    return found


def worn(model: Decoder, name: str) -> Iterator[tuple[str, Adaptable]]:
    """(path, module) of each module that adapter `name` touches.

    Raises:
      UserError: there is no such adapter.
    """
    have = names(model)
    if name not in have:
        raise UserError(f"no adapter {name!r} is loaded; loaded are: {', '.join(have) or 'none'}.{nearest(name, have)}")
    for path, part in parts(model).items():
        if name in part.own or name in getattr(part, "lora", ()):
            yield path, part


def names(model: Decoder) -> list[str]:
    """The loaded adapters."""
    return list(dict.fromkeys(name for part in parts(model).values() for held in _held(part) for name in held))


def _held(part: Adaptable) -> list[Any]:
    return [part.lora, part.own] if isinstance(part, Linear | ExpertLinear) else [part.own]


def active(model: Decoder) -> str | None:
    """The adapter in use, or None for the base alone."""
    return next((part.active for part in parts(model).values() if part.active is not None), None)


def use(model: Decoder, name: str | None) -> None:
    """Puts an adapter in use in place of the one before; None: the base alone.

    Raises:
      UserError: there is no such adapter.
    """
    chosen = set() if name is None else {path for path, _ in worn(model, name)}
    for path, part in parts(model).items():
        part.active = name if path in chosen else None


def unload(model: Decoder, name: str) -> None:
    """Takes an adapter off the model.

    Raises:
      UserError: there is no such adapter.
    """
    for _, part in list(worn(model, name)):
        for held in _held(part):
            if name in held:
                del held[name]
        if part.active == name:
            part.active = None
