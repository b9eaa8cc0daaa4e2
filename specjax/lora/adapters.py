"""Putting adapters on a model and choosing among them.

An adapter is a name of the model's (`Decoder.adapters`), under whose number, its slot, some of the modules hold a row
in a stack of updates (`Stack`) or copies of their parameters (`Own`). Several may be loaded over one base; one, or
none, is in use. The base's own parameters keep their paths and values.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import sharding
from specjax.cluster import processes
from specjax.errors import UserError, nearest
from specjax.lora.targets import TIED_HEAD, Layers, is_stacked, maps_of, parts
from specjax.lora.variants import LoRA, PiSSA, variant_of
from specjax.models import Decoder
from specjax.models.adapter import Adaptable, AdaptableMap, Own, Path
from specjax.models.experts import ExpertLinear
from specjax.models.layers import Axes, Embed, Linear
from specjax.models.stack import Constant, Member, Stack

DEFAULT = "default"
Array = jax.Array | np.ndarray


@dataclasses.dataclass
class Factors:
    """What an adapter adds beside one linear map: its variant's arrays, without the axis of adapters.

    Attributes:
      variant: whose arrays they are.
      values: by field, see `LoRA.arrays`.
      ranks: of each layer, see `Member`.
      alphas: likewise.
    """

    variant: LoRA
    values: Mapping[str, Array]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    def scales(self, rslora: bool) -> tuple[float, ...]:
        """What each layer's update is multiplied by, see `Member`."""
        return Member(0, self.ranks, self.alphas, 0.0, rslora).scales


@dataclasses.dataclass
class Copies:
    """What an adapter puts in the place of one module's parameters, as in `models.adapter.Own`."""

    values: dict[str, Array]
    layers: Layers
    tied: bool = False
    rows: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Adapter:
    """An adapter apart from a model, by the paths of its modules."""

    factors: dict[Path, Factors]
    copies: dict[Path, Copies]
    dropout: float
    rslora: bool


def check_free(model: Decoder, name: str) -> None:
    """Raises `UserError` where the model has an adapter of that name."""
    if name in names(model):
        raise UserError(f"the model already has an adapter {name!r}: unload it, or give another name.")


def attach(model: Decoder, name: str, adapter: Adapter) -> None:
    """Puts an adapter on the model, placed on its mesh, and in use; copies lie like what they stand for."""
    slot = next((i for i, held in enumerate(model.adapters) if held is None), len(model.adapters))
    maps, modules = maps_of(model), parts(model)
    for path, factors in adapter.factors.items():
        member = Member(slot, factors.ranks, factors.alphas, adapter.dropout, adapter.rslora)
        held = maps[path].updates.get(factors.variant.name)
        rows = [] if held is None else rows_of(held)
        maps[path].updates[factors.variant.name] = _stack(
            maps[path], factors.variant, [*rows, (member, factors.values)]
        )
    for path, copies in adapter.copies.items():
        part = modules[path]
        values = {}
        for parameter, value in copies.values.items():
            base = getattr(part, "embedding" if parameter == TIED_HEAD else parameter)
            axes, mesh = base.get_metadata("axes"), sharding.mesh_of(base[...])
            # A copy in any case: what trains is donated, and the base must outlive it.
            value = jnp.array(value, jnp.float32, copy=True)
            if parameter in copies.rows:
                axes = (None, *axes[1:])
                place = None if mesh is None else sharding.named_sharding(mesh, axes, value.shape, parameter)
            else:
                place = base[...].sharding
            values[parameter] = nnx.LoRAParam(value if place is None else jax.device_put(value, place), axes=axes)
        mask = None
        if not all(copies.layers):
            mask = constant(np.array(copies.layers, np.float32), ("layers",), mesh)
        part.own[str(slot)] = Own(values, copies.layers, mask, copies.tied, copies.rows)
    model.adapters = (*model.adapters[:slot], name, *model.adapters[slot + 1 :])
    use(model, name)


def _stack(linear: AdaptableMap, variant: LoRA, rows: Sequence[tuple[Member, Mapping[str, Array]]]) -> Stack:
    """The stack of adapters, one row each, padded with zeros to the largest rank and placed on the map's mesh."""
    assert isinstance(linear, Linear | ExpertLinear | Embed)
    rank = max(max(member.ranks) for member, _ in rows)
    at = int(is_stacked(linear))  # the axis of adapters, behind that of the layers
    mesh = sharding.mesh_of(jax.tree.leaves(nnx.state(linear))[0])
    params: dict[str, nnx.LoRAParam | Constant] = {}
    for field, (shape, axes) in variant.arrays(linear, rank).items():
        whole, names = (*shape[:at], len(rows), *shape[at:]), (*axes[:at], "adapter", *axes[at:])
        padded = [_padded(values[field], shape) for _, values in rows]
        on_host = all(isinstance(one, np.ndarray) for one in padded)
        value = padded[0].reshape(whole) if len(rows) == 1 else (np if on_host else jnp).stack(padded, axis=at)
        param = placed(value, names, mesh, f"LoRA {field} of {variant.name}")
        params[field] = Constant(param[...], axes=names) if field in variant.frozen else param
    members = tuple(member for member, _ in rows)
    scales = np.array([member.scales for member in members], np.float32).T  # [L, A]
    alike = {scale for member in members for scale in member.scales}
    if len(alike) == 1:
        return Stack(variant, params, members, alike.pop())
    axes = ("layers", "adapter")[1 - at :]
    return Stack(variant, params, members, constant(scales if at else scales[0], axes, mesh))


def placed(value: Array, axes: Axes, mesh: Mesh | None, what: str) -> nnx.LoRAParam:
    """A factor, float32, on the mesh by its logical axes; `what`: how an error calls it."""
    if mesh is None:
        return nnx.LoRAParam(jnp.asarray(value, jnp.float32), axes=axes)
    # From the host each device takes its part; from another device that is a program for each shape.
    place = sharding.named_sharding(mesh, axes, value.shape, what)
    return nnx.LoRAParam(jax.device_put(value.astype(np.float32), place), axes=axes)


def _padded(value: Array, shape: tuple[int, ...]) -> Array:
    """With zeros behind each axis that is shorter: the rank's."""
    if value.shape == shape:
        return value
    pad = jnp.pad if isinstance(value, jax.Array) else np.pad
    return pad(value, [(0, size - have) for size, have in zip(shape, value.shape, strict=True)])


def row_of(stack: Stack, member: Member) -> dict[str, Array]:
    """One adapter's arrays, without the axis of adapters and cut to its own rank."""
    return {field: _row(stack, field, member, getattr(stack, field)[...]) for field in stack.fields}


def rows_of(stack: Stack) -> list[tuple[Member, Mapping[str, Array]]]:
    """Each adapter with its `row_of`, of NumPy: on a device, a cut would be a program to compile for each shape."""
    whole: dict[str, Any] = {field: getattr(stack, field)[...] for field in stack.fields}
    if not any(isinstance(value, jax.core.Tracer) for value in whole.values()):
        whole = {field: np.array(processes.gather(value)) for field, value in whole.items()}  # no view of what is left
    return [(one, {field: _row(stack, field, one, whole[field]) for field in whole}) for one in stack.members]


def _row(stack: Stack, field: str, member: Member, value: Any) -> Any:
    """A member's part of a field's array."""
    index = {"adapter": stack.members.index(member), "lora_rank": slice(max(member.ranks))}
    return value[tuple(index.get(axis, slice(None)) for axis in getattr(stack, field).get_metadata("axes"))]


def constant(values: np.ndarray, axes: Axes, mesh: Mesh | None) -> Constant:
    """Numbers that do not train, on every device of the mesh."""
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return Constant(jax.device_put(values, place), axes=axes)  # from NumPy: no program per shape


def collect(model: Decoder, name: str) -> Adapter:
    """An adapter's arrays as they are on the model.

    Raises:
      UserError: there is no such adapter.
    """
    slot = slot_of(model, name)
    adapter = Adapter({}, {}, 0.0, False)
    for path, part in worn(model, name):
        for stack, member in _memberships(part, slot):
            adapter.factors[path] = Factors(_variant(stack), row_of(stack, member), member.ranks, member.alphas)
            adapter.dropout, adapter.rslora = member.dropout, member.rslora
        if str(slot) in part.own:
            own = part.own[str(slot)]
            values = {key: getattr(own, key)[...] for key in own.parameters}
            adapter.copies[path] = Copies(values, own.layers, own.tied, dict(own.rows))
    return adapter


def as_saved(model: Decoder, adapter: Adapter) -> Adapter:
    """The adapter of `on_host` as files have it: PiSSA is plain LoRA of twice the rank, and of the same scale."""
    maps, factors = maps_of(model), {}
    for path, one in adapter.factors.items():
        if isinstance(one.variant, PiSSA):
            values = one.variant.as_lora(dict(one.values), one.ranks, int(is_stacked(maps[path])))
            more = math.sqrt(2) if adapter.rslora else 2.0
            ranks, alphas = tuple(2 * rank for rank in one.ranks), tuple(more * alpha for alpha in one.alphas)
            one = Factors(variant_of(maps[path], {}), values, ranks, alphas)
        factors[path] = one
    return dataclasses.replace(adapter, factors=factors)


def on_host(adapter: Adapter) -> Adapter:
    """The same with NumPy arrays, whole on every process."""
    factors = {
        path: dataclasses.replace(one, values={field: processes.gather(value) for field, value in one.values.items()})
        for path, one in adapter.factors.items()
    }
    copies = {
        path: dataclasses.replace(one, values={key: processes.gather(value) for key, value in one.values.items()})
        for path, one in adapter.copies.items()
    }
    return dataclasses.replace(adapter, factors=factors, copies=copies)


def _memberships(part: Adaptable, slot: int) -> Iterator[tuple[Stack, Member]]:
    """The stack in which a module has a row of that adapter, and which it is."""
    for stack in part.updates.values() if isinstance(part, AdaptableMap) else ():
        member = stack.member(slot)
        if member is not None:
            yield stack, member


def _variant(stack: Stack) -> LoRA:
    assert isinstance(stack.variant, LoRA)
    return stack.variant


def worn(model: Decoder, name: str) -> Iterator[tuple[Path, Adaptable]]:
    """(path, module) of each module that adapter `name` touches.

    Raises:
      UserError: there is no such adapter.
    """
    slot = slot_of(model, name)
    for path, part in parts(model).items():
        if str(slot) in part.own or any(_memberships(part, slot)):
            yield path, part


def names(model: Decoder) -> list[str]:
    """The loaded adapters."""
    return [name for name in model.adapters if name is not None]


def slot_of(model: Decoder, name: str) -> int:
    """The number by which the model knows an adapter.

    Raises:
      UserError: there is no such adapter.
    """
    have = names(model)
    if name not in have:
        raise UserError(f"no adapter {name!r} is loaded; loaded are: {', '.join(have) or 'none'}.{nearest(name, have)}")
    return model.adapters.index(name)


def slots(model: Decoder, chosen: Sequence[str | None]) -> np.ndarray:
    """What `model(tokens, adapters=...)` takes: int32 [G], the adapter of each group of rows; None is the base, -1.

    Raises:
      UserError: there is no such adapter.
    """
    return np.array([-1 if name is None else slot_of(model, name) for name in chosen], np.int32)


def active(model: Decoder) -> str | None:
    """The adapter in use, or None for the base alone."""
    slot = next(iter(parts(model).values())).active
    return model.adapters[slot] if isinstance(slot, int) else None


def use(model: Decoder, name: str | None) -> None:
    """Puts an adapter in use in place of the one before; None: the base alone.

    Raises:
      UserError: there is no such adapter.
    """
    slot = None if name is None else slot_of(model, name)
    for part in parts(model).values():
        part.active = slot


def unload(model: Decoder, name: str) -> None:
    """Takes an adapter off the model.

    Raises:
      UserError: there is no such adapter.
    """
    slot = slot_of(model, name)
    for _, part in list(worn(model, name)):
        for stack, member in list(_memberships(part, slot)):
            assert isinstance(part, AdaptableMap)
            rest = [(one, values) for one, values in rows_of(stack) if one is not member]
            if rest:
                part.updates[stack.variant.name] = _stack(part, _variant(stack), rest)
            else:
                del part.updates[stack.variant.name]
        if str(slot) in part.own:
            del part.own[str(slot)]
    if active(model) == name:
        use(model, None)
    kept = [None if held == name else held for held in model.adapters]
    while kept and kept[-1] is None:
        kept.pop()
    model.adapters = tuple(kept)
