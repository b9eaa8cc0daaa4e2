"""The updates of a linear map by several adapters: one stack, of which one row or one for each group of rows is in use.

A adapters of a stack, G groups, B batch, T length, D inputs, R rank, L layers. A stacked module's arrays have a leading
layer axis here too; its methods see one layer's slice.
"""

import dataclasses
import math
from collections.abc import Callable
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from specjax.errors import UserError
from specjax.models.products import contract

Arrays = dict[str, Float[Array, "..."]]


class Constant(nnx.Variable):
    """Numbers that do not train, an adapter's (float32 [(L,) (A)]) or a layer's; state, because layers are scanned."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One adapter of a stack.

    Attributes:
      slot: its number in the model.
      ranks: the true rank of each layer (one number for a map that is not stacked); 0: the layer is left alone.
      alphas: likewise.
      dropout: probability that an input is dropped while training.
      rslora: whether the scale is alpha/sqrt(r) (rsLoRA, arXiv:2312.03732) and not alpha/r.
    """

    slot: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    dropout: float
    rslora: bool

    @property
    def scales(self) -> tuple[float, ...]:
        """What each layer's update is multiplied by; 0 where the rank is 0."""
        pairs = zip(self.ranks, self.alphas, strict=True)
        return tuple(0.0 if r == 0 else a / (math.sqrt(r) if self.rslora else r) for r, a in pairs)


def split_key(key: Array, count: int) -> Array:
    """Keys [count] of one key, or [count,G] of those of G groups of rows, each as alone."""
    if not key.ndim:
        return jax.random.split(key, count)
    keys: Array = jax.vmap(lambda one: jax.random.split(one, count), out_axes=1)(key)
    return keys


def fold_key(key: Array, number: Any) -> Array:
    """`jax.random.fold_in` of one key, or of each of [G]; the number may be [G] too."""
    if not key.ndim:
        return jax.random.fold_in(key, number)
    return jax.vmap(jax.random.fold_in)(key, jnp.broadcast_to(number, key.shape))


class Call(NamedTuple):
    """One call of a linear map, as an update sees it.

    Attributes:
      x: [B,T,*in], the map's input; of experts [M,in], rows sorted by expert.
      y: W x, [B,T,*out].
      kernel: W.
      in_dims: how many axes it contracts.
      key: of the dropout, one or [G] of groups that have their own; None: no dropout.
      low: A x, where it was made together with that of other maps.
      sizes: of experts, int32 [E]: the rows of each.
    """

    x: jax.Array
    y: jax.Array | None = None
    kernel: jax.Array | None = None
    in_dims: int = 1
    key: jax.Array | None = None
    low: jax.Array | None = None
    sizes: jax.Array | None = None


class Variant(Protocol):
    """What a stack must know of its variant, one of `specjax.lora.variants`; an update of scale 0 adds nothing."""

    name: ClassVar[str]

    def apply(self, factors: Arrays, scale: Any, dropout: Any, call: Call) -> Float[Array, "..."]:
        """What one adapter adds to y, in y's shape; `factors` without the axes of layers and adapters."""
        ...

    def shared(self, factors: Arrays) -> Float[Array, " R *inputs"] | None:
        """The factor that an undropped x is multiplied by first; None: there is none."""
        ...


@dataclasses.dataclass(frozen=True)
class Update:
    """The update in use on a map: that of one adapter over all rows, or of G adapters over G groups of rows.

    Attributes:
      variant: the adapters'.
      factors: by field; of groups with a leading axis G.
      scale: a number, or of groups [G].
      dropout: likewise; a number where they are alike.
      groups: None: one adapter over all rows.
    """

    variant: Variant
    factors: Arrays
    scale: Any
    dropout: Any
    groups: int | None

    def __call__(self, call: Call) -> Float[Array, "..."]:
        """What is added to y, in its shape."""
        if self.groups is None:
            return self.variant.apply(self.factors, self.scale, self.dropout, call)
        key = call.key if call.key is None or call.key.ndim else jax.random.split(call.key, self.groups)
        rates = jnp.broadcast_to(self.dropout, (self.groups,)) if self.drops(call.key) else None

        def one(factors: Arrays, scale: Any, rate: Any, key: Any, x: Any, y: Any, low: Any) -> jax.Array:
            given = call._replace(x=x, y=y, low=low, key=key)
            return self.variant.apply(factors, scale, 0.0 if rate is None else rate, given)

        return self._by_group(one, (self.factors, self.scale, rates, key), (call.x, call.y, call.low))

    def drops(self, key: Array | None) -> bool:
        """Whether inputs are dropped under this key."""
        return key is not None and not (isinstance(self.dropout, float) and self.dropout == 0)

    def reduce(self, x: Float[Array, "B T D"], shared: Float[Array, "*G R D"]) -> Float[Array, "B T R"]:
        """The input by the factors `shared`, those of the update or of each group."""
        if self.groups is None:
            return contract(x, shared, 1)
        return self._by_group(lambda a, x: contract(x, a, 1), (shared,), (x,))

    def _by_group(self, function: Callable[..., jax.Array], of_groups: Any, of_rows: Any) -> jax.Array:
        """`function` of each group's arguments and of its rows [B/G,...]: [B,...], as batched products."""
        assert self.groups is not None
        count = self.groups

        def split(rows: jax.Array) -> jax.Array:
            _check_groups(rows.shape[0], count)
            return rows.reshape(count, -1, *rows.shape[1:])

        parts = jax.vmap(function)(*of_groups, *jax.tree.map(split, of_rows))
        return parts.reshape(-1, *parts.shape[2:])


def group_of_rows(rows: int, groups: int) -> Int32[Array, " {rows}"]:
    """The group of each row."""
    _check_groups(rows, groups)
    return jnp.arange(rows, dtype=jnp.int32) // (rows // groups)


def _check_groups(rows: int, groups: int) -> None:
    if rows % groups:
        raise UserError(f"{rows} rows do not divide into {groups} groups of adapters: give groups of equal size.")


class Stack(nnx.Module):
    """The updates of one linear map by adapters of one variant: arrays [(L,) A, ...], attributes named by `fields`.

    An adapter, or a layer of it, of a smaller rank has zeros behind it, which stay zero in training: A = 0 gives
    dB = 0, and B = 0 gives dA = 0. The arrays are float32 `nnx.LoRAParam`, whatever the compute dtype.

    Attributes:
      variant: what it is.
      members: the adapters, in the order of the axis; of groups none.
      alone: whether there is one member and no axis of adapters (`in_use`).
      scale: a number, or where layers or adapters differ a Constant [(L,) A].
      dropout: a number, or of groups that differ a Constant [(L,) G].
      rows: of a bank (`specjax.lora.bank`), int32 [(L,) G]: the place in A of each group's adapter, below 0 for none.
        They are taken where the layer axis is gone, so that a layer's factors alone are there G times.
    """

    def __init__(
        self,
        variant: Variant,
        values: dict[str, nnx.LoRAParam | Constant],
        members: tuple[Member, ...],
        scale: float | Constant,
        dropout: float | Constant = 0.0,
        rows: Constant | None = None,
    ):
        for field, value in values.items():
            setattr(self, field, value)
        self.variant, self.fields, self.members = variant, tuple(values), members
        self.scale, self.dropout, self.alone, self.rows = scale, dropout, False, rows

    def member(self, slot: Any) -> Member | None:
        """The adapter of that slot, or None."""
        return next((one for one in self.members if one.slot == slot), None)

    def update(self, active: int | EllipsisType | None) -> Update | None:
        """What the adapters in use add; it is read where the layer axis is gone."""
        values: Arrays = {field: getattr(self, field)[...] for field in self.fields}
        scale, rate = (one[...] if isinstance(one, Constant) else one for one in (self.scale, self.dropout))
        if self.rows is not None:
            rows = self.rows[...]
            values, scale = jax.tree.map(lambda one: jnp.take(one, rows, axis=0, mode="clip"), (values, scale))
            scale = jnp.where(rows >= 0, scale, 0.0)
        if active is ...:
            groups = next(iter(values.values())).shape[0]
            return Update(self.variant, values, jnp.broadcast_to(scale, (groups,)), rate, groups)
        member = self.member(active)
        if member is None:
            return None
        if not self.alone:
            row = self.members.index(member)
            values = {field: _row(value, row, 0) for field, value in values.items()}
            scale = _row(scale, row, 0) if isinstance(scale, jax.Array) else scale
        return Update(self.variant, values, scale, member.dropout, None)

    def only(self, slot: int) -> "Stack | None":
        """One member's arrays, without the axis of adapters; None: there is no such member."""
        member = self.member(slot)
        if member is None or self.alone:
            return None if member is None else self
        row, made = self.members.index(member), {}
        for field in (*self.fields, *(() if isinstance(self.scale, float) else ("scale",))):
            leaf = getattr(self, field)
            axes = leaf.get_metadata("axes")
            at = axes.index("adapter")
            made[field] = type(leaf)(_row(leaf[...], row, at), axes=(*axes[:at], *axes[at + 1 :]))
        scale: Any = made.pop("scale", self.scale)
        stack = Stack(self.variant, made, (member,), scale)
        stack.alone = True
        return stack

    def grouped(self, slots: Any, count: int) -> "Stack":
        """The stack whose rows are those of the slots, int32 [G], in that order; slots of no member add nothing.

        Args:
          slots: of NumPy, or of JAX where they are known only when the program runs.
          count: how many slots the model has.
        """
        rows, count = self._rows(slots, count), len(self.members)
        leaves = {field: getattr(self, field) for field in self.fields}
        first = next(iter(leaves.values()))
        lead = first.get_metadata("axes").index("adapter")
        at, shape = first.get_metadata("axes")[: lead + 1], (*first.shape[:lead], len(slots))
        in_order = isinstance(rows, np.ndarray) and rows.tolist() == list(range(count))

        def take(value: jax.Array) -> jax.Array:
            return value if in_order else jnp.take(value, jnp.maximum(rows, 0), axis=lead)

        params = {f: nnx.LoRAParam(take(leaf[...]), axes=leaf.get_metadata("axes")) for f, leaf in leaves.items()}
        scale = self.scale[...] if isinstance(self.scale, Constant) else jnp.full((*shape[:-1], count), self.scale)
        scale = jnp.where(jnp.broadcast_to(rows >= 0, shape), take(scale), 0.0).astype(jnp.float32)
        rates = [member.dropout for member in self.members]
        dropout: float | Constant = rates[0]
        if len(set(rates)) > 1:
            dropout = Constant(jnp.broadcast_to(jnp.asarray(rates, jnp.float32)[rows], shape), axes=at)
        return Stack(self.variant, params, (), Constant(scale, axes=at), dropout)

    def _rows(self, slots: Any, count: int) -> Any:
        """The members' places by their slots, int32 [G]; -1 where the slot is of no member."""
        table = np.full(count + 1, -1, np.int32)  # the last is that of slots below 0
        for row, member in enumerate(self.members):
            table[member.slot] = row
        if isinstance(slots, np.ndarray):
            return table[np.where(slots < 0, count, slots)]
        return jnp.asarray(table)[jnp.where(slots < 0, count, slots)]


def _row(value: jax.Array, row: int, axis: int) -> jax.Array:
    """One row along an axis, which goes; of an axis of one it is the same memory."""
    if value.shape[axis] == 1:
        return jnp.squeeze(value, axis)
    return jax.lax.index_in_dim(value, row, axis, keepdims=False)
