"""The slots of a fleet's adapters over one base, and how an adapter is put into a slot and read out of it.

A slot is a row of the adapter stacks of the base. Rank, scales and dropout of the adapter in it are arrays, so another
adapter may take the slot without compilation.

N slots, L layers, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import lora, sharding
from specjax.cluster import processes
from specjax.errors import UserError
from specjax.lora.adapters import DEFAULT, Adapter, Factors, attach, collect
from specjax.lora.targets import is_stacked, linears
from specjax.lora.variants import VARIANTS, LoRA
from specjax.models import Decoder
from specjax.models.adapter import Path, adaptables
from specjax.models.layers import Linear
from specjax.models.stack import Constant, Member, Stack
from specjax.train.step import Params

Outline = Mapping[Path, Member]  # of each map that an adapter touches: ranks, alphas, dropout; no values
VARIANT = next(one for one in VARIANTS if one.name == LoRA.name)
NAME = "adapter"  # of one that is looked at alone


def fresh(model: Decoder, settings: Mapping[str, Any]) -> Adapter:
    """The adapter that `lora.inject` would add to the model; the model itself does not change.

    Raises:
      UserError: what `lora.inject` raises, or an adapter that cannot share a batch.
    """
    copy = nnx.merge(*nnx.split(model))
    lora.inject(copy, name=NAME, **settings)
    adapter = collect(copy, NAME)
    others = {factors.variant.name for factors in adapter.factors.values()} - {VARIANT.name}
    if adapter.copies or others:
        what = "copies of whole modules, rows or biases" if adapter.copies else f"factors of the variant {min(others)}"
        raise UserError(
            f"it has {what}, which cannot share a batch with other adapters: leave that out, or train it alone."
        )
    return adapter


def outline(adapter: Adapter) -> Outline:
    """An adapter's structure, without its values."""
    return {
        path: Member(0, factors.ranks, factors.alphas, adapter.dropout, adapter.rslora)
        for path, factors in adapter.factors.items()
    }


class Slots:
    """A model whose rows form N groups, each answered by the adapter in its slot.

    Attributes:
      model: the grouped model; a slot's factors are slices of its parameters.
      view: the base with one adapter, from any slot: the same paths, with an axis of one instead of N.
      count: N.
    """

    def __init__(self, base: Decoder, outlines: Sequence[Outline], count: int, mesh: Mesh | None = None):
        """Makes empty slots for adapters with these outlines.

        Args:
          base: a model without adapters; its arrays are shared. If it is abstract, the slots are `jax.ShapeDtypeStruct`
            too.
          outlines: of all adapters that will ever be in a slot.
          count: N.
          mesh: default that of the base's arrays.
        """
        self.count, self._base = count, base
        self._maps: dict[Path, Linear] = {}
        for path, linear in linears(base).items():
            if any(path in one for one in outlines):
                assert isinstance(linear, Linear)
                self._maps[path] = linear
        self._ranks = {path: max(max(one[path].ranks) for one in outlines if path in one) for path in self._maps}
        self._drops = any(member.dropout for one in outlines for member in one.values())
        first = jax.tree.leaves(nnx.state(base))[0]
        self._abstract, self._mesh = isinstance(first, jax.ShapeDtypeStruct), mesh or sharding.mesh_of(first)
        self.model, self.view = self._worn(count, ...), self._worn(1, 0)
        self.model.groups = count

    def _worn(self, count: int, active: Any) -> Decoder:
        model: Decoder = nnx.merge(*nnx.split(self._base))
        for part in adaptables(model).values():
            part.active = active
        worn = linears(model)
        for path in self._maps:
            linear = worn[path]
            assert isinstance(linear, Linear)
            values = {}
            for field, (shape, axes) in self._arrays(path, count).items():
                values[field] = nnx.LoRAParam(self._filled(np.float32(0), shape, self._place(axes, shape)), axes=axes)
            constants = {name: self._constant(path, np.float32(0), count) for name in ("scale", "dropout")}
            layers = len(self._layers(path))
            members = () if active is ... else (Member(0, (self._ranks[path],) * layers, (1.0,) * layers, 0.0, False),)
            dropout: Any = constants["dropout"] if self._drops and active is ... else 0.0
            linear.updates[VARIANT.name] = Stack(VARIANT, values, members, constants["scale"], dropout)
        if active is not ...:
            model.adapters = (NAME,)
        return model

    def _layers(self, path: Path) -> range:
        return range(self._maps[path].kernel.shape[0] if is_stacked(self._maps[path]) else 1)

    def _arrays(self, path: Path, count: int) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
        """Shape and logical axes of a map's factors in so many slots."""
        at = int(is_stacked(self._maps[path]))
        given = VARIANT.arrays(self._maps[path], self._ranks[path])
        return {
            field: ((*shape[:at], count, *shape[at:]), (*axes[:at], "adapter", *axes[at:]))
            for field, (shape, axes) in given.items()
        }

    def _place(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Any:
        """The layer's sharding; slots are split over the devices with rows of their own if these divide them."""
        if self._mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.tree.leaves(nnx.state(self._base))[0].devices().pop())
        spec = list(sharding.named_sharding(self._mesh, axes, shape, "LoRA's factors").spec)
        at = axes.index("adapter")
        if shape[at] % sharding.ways(self._mesh, sharding.RULES["batch"]) == 0:
            spec[at] = sharding.RULES["batch"]
        return NamedSharding(self._mesh, PartitionSpec(*spec))

    def _constant(self, path: Path, value: Any, count: int) -> Constant:
        """Numbers [(L,) N] that do not train, on all devices."""
        at = int(is_stacked(self._maps[path]))
        shape = (len(self._layers(path)), count)[1 - at :]
        return Constant(self._filled(value, shape, self._replicated(self._mesh)), axes=("layers", "adapter")[1 - at :])

    def _filled(self, value: Any, shape: tuple[int, ...], place: Any) -> Any:
        """float32 values, broadcast to a shape; only their shape if the base is abstract."""
        if self._abstract:
            return jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
        return jax.device_put(np.broadcast_to(np.asarray(value, np.float32), shape), place)

    def _replicated(self, mesh: Mesh | None) -> Any:
        return self._place((), ()) if mesh is None else NamedSharding(mesh, PartitionSpec())

    def frozen(self, params: Params, placed: Sequence[Outline | None]) -> Params:
        """The frozen parameters with the scales and dropout rates of the adapters that are in the slots."""
        made = dict(params)
        for path in self._maps:
            members = [None if one is None else one.get(path) for one in placed]
            layers = len(self._layers(path))
            scales = np.array([(0.0,) * layers if one is None else one.scales for one in members], np.float32).T
            rates = np.array([0.0 if one is None else one.dropout for one in members], np.float32)
            for name, values in (("scale", scales), ("dropout", np.broadcast_to(rates, scales.shape))):
                key = (*path, "updates", VARIANT.name, name)
                if key in made:
                    at = values if is_stacked(self._maps[path]) else values[0]
                    made[key] = self._constant(path, at, len(placed))[...]
        return made

    def padded(self, adapter: Adapter) -> dict[Path, np.ndarray]:
        """An adapter's values in the form of a slot, without the slot axis, by the model's paths."""
        found = {}
        for path in self._maps:
            at = int(is_stacked(self._maps[path]))
            for field, (shape, _) in self._arrays(path, 1).items():
                value = np.zeros((*shape[:at], *shape[at + 1 :]), np.float32)
                if path in adapter.factors:
                    held = processes.gather(adapter.factors[path].values[field])
                    value[tuple(slice(size) for size in held.shape)] = held
                found[*path, "updates", VARIANT.name, field] = value
        return found

    def adapter(self, params: Params, told: Outline) -> Adapter:
        """The inverse of `padded` for the view's parameters, in NumPy."""
        factors = {}
        for path, member in told.items():
            values = {}
            for field, (_, axes) in self._arrays(path, 1).items():
                whole = processes.gather(params[*path, "updates", VARIANT.name, field])
                index: dict[str, Any] = {"adapter": 0, "lora_rank": slice(max(member.ranks))}
                chosen: tuple[Any, ...] = tuple(index.get(str(axis), slice(None)) for axis in axes)
                values[field] = np.ascontiguousarray(whole[chosen])
            factors[path] = Factors(VARIANT, values, member.ranks, member.alphas)
        first = next(iter(told.values()))
        return Adapter(factors, {}, first.dropout, first.rslora)

    def alone(self, adapter: Adapter, name: str = DEFAULT) -> Decoder:
        """The base with this adapter attached, as `lora.inject` would attach it; it shares the base's arrays."""
        model: Decoder = nnx.merge(*nnx.split(self._base))
        attach(model, name, adapter)
        return model
