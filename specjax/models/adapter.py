"""What adapters add to a module: updates beside a linear map, and copies of parameters in their place; which answer.

Several adapters lie over one base. The model numbers them: an adapter's slot is its place in `Decoder.adapters`, which
alone has the names. Their updates of a map are a stack (`specjax.models.stack`), and which adapter answers is
`Adaptable.active`: none, one for all rows, or one for each of G equal groups of consecutive rows (`select`).
"""

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from specjax.errors import UserError
from specjax.models.stack import Constant, Update

Path = tuple[str | int, ...]


class Own(nnx.Module):
    """An adapter's own copies of a module's parameters, or of some of their rows, used in their place.

    They are PEFT's `modules_to_save`, `bias` and `trainable_token_indices`: float32 `nnx.LoRAParam`, attributes named
    like the parameters they stand for.

    Attributes:
      layers: the layers whose copies are used, of a stacked module.
      tied: of a tied embedding: the copy is the output's table too.
      rows: (parameter, numbers of its rows) of those of which a copy has these rows alone.
    """

    def __init__(
        self,
        values: dict[str, nnx.LoRAParam],
        layers: tuple[bool, ...],
        mask: Constant | None,
        tied: bool,
        rows: dict[str, tuple[int, ...]],
    ):
        for name, value in values.items():
            setattr(self, name, value)
        self.parameters, self.layers, self.mask, self.tied = tuple(values), layers, mask, tied
        self.rows = tuple(rows.items())

    def rows_of(self, name: str) -> tuple[int, ...]:
        """The numbers of the rows that a copy has; (): it has all of the parameter."""
        return dict(self.rows).get(name, ())


class Adaptable(nnx.Module):
    """A module whose parameters adapters may replace by their own.

    Attributes:
      own: an adapter's copies by its slot, written as a string.
      active: the slot of the adapter in use; None: the base alone; `...`: those of the groups of rows.
    """

    def __init__(self) -> None:
        self.own = nnx.Dict()
        self.active: int | EllipsisType | None = None

    @property
    def copies(self) -> Own | None:
        """The copies in use."""
        key = str(self.active)
        return self.own[key] if isinstance(self.active, int) and key in self.own else None

    def used(self, name: str, base: str = "") -> Float[Array, "..."]:
        """The parameter `name` that is in use: the active adapter's copy, else the base's (called `base` there)."""
        value: jax.Array = getattr(self, base or name)[...]
        own = self.copies
        if own is None or name not in own.parameters:
            return value
        copy: jax.Array = getattr(own, name)[...]
        if rows := own.rows_of(name):
            return value.at[np.array(rows)].set(copy.astype(value.dtype), unique_indices=True)
        return copy if own.mask is None else jnp.where(own.mask[...] != 0, copy, value.astype(copy.dtype))


class AdaptableMap(Adaptable):
    """A linear map, whose updates are a stack for each variant that the loaded adapters have."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = nnx.Dict()

    def active_updates(self) -> list[Update]:
        """The updates in use: one at most, but of groups, whose adapters may be of several variants."""
        found = (stack.update(self.active) for stack in self.updates.values()) if self.active is not None else ()
        return [update for update in found if update is not None]


def adaptables(model: nnx.Module) -> dict[Path, Adaptable]:
    """The modules that can wear an adapter, by NNX path."""
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Adaptable)}


def select(model: Any, adapters: int | Sequence[int] | Int32[Array | np.ndarray, " G"] | None) -> Any:
    """The same model with the same parameters, whose rows other adapters answer; the given one stays as it is.

    It may be called inside a traced function, and the gradient of the new model's factors is that of the given one's.

    Args:
      model: a `Decoder`.
      adapters: None: the base; a slot: that adapter for all rows; several: the slots of G equal groups of consecutive
        rows of the batch, a negative one for the base. An array of JAX may change without compiling again.

    Raises:
      UserError: no adapter has such a slot, or one of several has copies of whole modules or of rows, which cannot
        share a batch.
    """
    if adapters is not None and not isinstance(adapters, jax.Array):
        check_slots(model, adapters)
    model = nnx.merge(*nnx.split(model))
    parts = adaptables(model).values()
    if adapters is None or isinstance(adapters, int):
        for part in parts:
            part.active = None if adapters is None or adapters < 0 else adapters
        return model
    # Of slots that are known only when the program runs, any may be asked for.
    slots = adapters if isinstance(adapters, jax.Array) else np.asarray(adapters, np.int32)
    asked = range(len(model.adapters)) if isinstance(slots, jax.Array) else slots.tolist()
    for part in parts:
        part.active = ...
        held = [model.adapters[int(slot)] for slot in part.own if int(slot) in asked]
        if held:
            raise UserError(
                f"adapter {held[0]!r} has copies of whole modules or of rows, which cannot share a batch: give it one "
                "of its own, or unload it."
            )
        if isinstance(part, AdaptableMap):
            for name, stack in list(part.updates.items()):
                part.updates[name] = stack.grouped(slots, len(model.adapters))
    return model


def check_slots(model: Any, slots: Any) -> None:
    """Raises `UserError` at a slot, of a number or of several, that no adapter has; below 0 is the base."""
    for slot in np.atleast_1d(np.asarray(slots)).tolist():
        if slot >= len(model.adapters) or slot >= 0 and model.adapters[slot] is None:
            raise UserError(f"no adapter has the slot {slot}: give those that `specjax.lora.slots` gives.")


def in_use(module: Any) -> Any:
    """The module with the updates of the one adapter in use alone, without the axis of adapters.

    Where a layer's values are kept for the backward pass, what is scanned is then kept itself: were the axis taken off
    inside the scan, each factor would be kept a second time.
    """
    maps = [part for part in adaptables(module).values() if isinstance(part, AdaptableMap) and part.updates]
    if not any(isinstance(part.active, int) for part in maps):
        return module
    module = nnx.merge(*nnx.split(module))
    for part in adaptables(module).values():
        if isinstance(part, AdaptableMap) and isinstance(part.active, int):
            for name, stack in list(part.updates.items()):
                only = stack.only(part.active)
                if only is None:
                    del part.updates[name]
                else:
                    part.updates[name] = only
    return module


def without_adapters(model: Any) -> Any:
    """The same model with the same parameters and no adapter in use; see `select`."""
    return select(model, None)
