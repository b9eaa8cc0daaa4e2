"""Adapters that answer side by side: a bank with a slot for each, in which every row of a batch finds its own.

A bank is made of the model's stacks when texts are asked for, and again when an adapter was loaded, unloaded or trained
since. It has room: more slots than adapters, ranks and maps that some adapter had or that were reserved. A program sees
the room alone, no name, number or rank of an adapter; so nothing compiles anew while what is loaded fits. The base's
arrays are those of the model itself. The factors are there a second time, padded: float32 of `slots` x `rank`.

S slots, G rows of a batch, R rank, L layers.
"""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from specjax import sharding
from specjax.errors import UserError
from specjax.lora import targets as targets_lib
from specjax.lora.adapters import constant, placed, rows_of, slot_of, worn
from specjax.lora.targets import is_stacked, maps_of, parts
from specjax.lora.variants import PISSA, VARIANTS, LoRA, variant_of
from specjax.models import Decoder
from specjax.models.adapter import AdaptableMap, Path
from specjax.models.stack import Stack

LEAST_SLOTS, LEAST_RANK = 4, 8


@dataclasses.dataclass
class _Bank:
    """What a model's bank has room for, and the stacks that were made last.

    Attributes:
      slots: S.
      rank: R.
      maps: the maps with factors, and the names of their variants.
      made_of: members and arrays of the model's stacks when `stacks` were made.
      stacks: by map and variant, [(L,) S, ...].
    """

    slots: int = LEAST_SLOTS
    rank: int = LEAST_RANK
    maps: set[tuple[Path, str]] = dataclasses.field(default_factory=set)
    made_of: list[Any] = dataclasses.field(default_factory=list)
    stacks: dict[tuple[Path, str], Stack] = dataclasses.field(default_factory=dict)


_BANKS: "weakref.WeakKeyDictionary[Decoder, _Bank]" = weakref.WeakKeyDictionary()


def reserve(model: Decoder, *, slots: int, rank: int, targets: str | Sequence[str] = "all-linear") -> None:
    """Makes room for adapters that will answer side by side, so that loading them later compiles nothing.

    Without it there is room for what was loaded so far, rounded up: slots to a power of two of at least 4, the rank to
    one of at least 8; an adapter beyond that, or over a map that none had, compiles the programs once more.

    Args:
      model: whose adapters they are.
      slots: how many at a time.
      rank: the largest.
      targets: the maps that any of them touches, see `targets.match`.

    Raises:
      UserError: a number below 1, or targets that match nothing.
    """
    for name, number in {"slots": slots, "rank": rank}.items():
        if number < 1:
            raise UserError(f"{name} is {number}: it must be at least 1.")
    bank, maps = _BANKS.setdefault(model, _Bank()), maps_of(model)
    bank.slots, bank.rank = max(bank.slots, slots), max(bank.rank, rank)
    bank.maps |= {(path, variant_of(maps[path], {}).name) for path in targets_lib.match(model, targets)}
    bank.made_of = []


def shares(model: Decoder, name: str) -> bool:
    """Whether rows that an adapter answers may share a batch with other adapters' rows.

    Not with DoRA, whose norm would be taken from the whole kernel for every row; nor with copies of whole modules
    or of rows.

    Raises:
      UserError: there is no such adapter.
    """
    slot = str(slot_of(model, name))
    stacks = (stack for _, part in worn(model, name) if isinstance(part, AdaptableMap) for stack in _stacks(part))
    alone = any(stack.member(int(slot)) and not _variant(stack).shares for stack in stacks)
    return not alone and not any(slot in part.own for _, part in worn(model, name))


def serving(model: Decoder) -> Decoder:
    """The model with its bank in the place of its stacks; `bear` says which row bears which adapter.

    Adapters that do not share (`shares`) are left out.
    """
    bank = _BANKS.setdefault(model, _Bank())
    _fill(bank, model)
    made = bare(model)
    for path, part in maps_of(made).items():
        part.active = ...
        for at, stack in bank.stacks.items():
            if at[0] == path:  # a stack of its own, whose rows are set: the arrays are the bank's
                values = {field: getattr(stack, field) for field in stack.fields}
                part.updates[at[1]] = Stack(stack.variant, values, (), stack.scale)
    return made


def bear(model: Decoder, slots: np.ndarray) -> None:
    """Says of a model of `serving` which adapter each row of the next batch bears: int32 [G]; below 0: the base."""
    mesh, rows = _mesh(model), np.asarray(slots, np.int32)
    for part in maps_of(model).values():
        for stack in _stacks(part):
            layers = part.kernel.shape[0] if is_stacked(part) else None
            whole = rows if layers is None else np.broadcast_to(rows, (layers, len(rows)))
            axes = ("layers", None)[layers is None :]
            stack.rows = nnx.data(constant(np.ascontiguousarray(whole), axes, mesh))


def bare(model: Decoder) -> Decoder:
    """The same base, by the same arrays, without adapters: its programs are those of a model that never had any."""
    made: Decoder = nnx.merge(*nnx.split(model))
    made.adapters = ()
    for part in parts(made).values():
        part.active, part.own = None, nnx.Dict()
        if isinstance(part, AdaptableMap):
            part.updates = nnx.Dict()
    return made


def _fill(bank: _Bank, model: Decoder) -> None:
    """Makes the bank's stacks, where the model's are others than those that it was made of; room only grows."""
    maps = maps_of(model)
    held = {(path, stack.variant.name): stack for path, part in maps.items() for stack in _stacks(part)}
    held = {at: stack for at, stack in held.items() if _variant(stack).shares}
    made_of = [(at, one.members, *(getattr(one, field)[...] for field in one.fields)) for at, one in held.items()]
    if len(made_of) == len(bank.made_of) and all(map(_same, made_of, bank.made_of)) and bank.stacks:
        return
    ranks = [rank for stack in held.values() for member in stack.members for rank in member.ranks]
    bank.slots = max(bank.slots, _power(len(model.adapters)))
    bank.rank = max(bank.rank, _power(max(ranks, default=1)))
    bank.maps |= held.keys()
    mesh, variants = _mesh(model), {variant.name: variant for variant in (*VARIANTS, PISSA)}
    bank.stacks = {
        (path, name): _padded(maps[path], variants[name], held.get((path, name)), bank, mesh)
        for path, name in sorted(bank.maps, key=str)
    }
    bank.made_of = made_of


def _padded(linear: Any, variant: LoRA, stack: Stack | None, bank: _Bank, mesh: Mesh | None) -> Stack:
    """The stack of all slots, each adapter at its own; zeros where none is."""
    at = int(is_stacked(linear))
    rows = [] if stack is None else rows_of(stack)
    params: dict[str, Any] = {}
    for field, (shape, axes) in variant.arrays(linear, bank.rank).items():
        names = (*axes[:at], None, *axes[at:])  # on every device: any row may ask for any slot
        whole = np.zeros((*shape[:at], bank.slots, *shape[at:]), np.float32)
        for member, values in rows:
            held = values[field].shape
            inside: Any = (*map(slice, held[:at]), member.slot, *map(slice, held[at:]))
            whole[inside] = values[field]
        params[field] = placed(whole, names, mesh, f"LoRA {field} of {variant.name}")
    scales = np.zeros((linear.kernel.shape[0] if at else 1, bank.slots), np.float32)
    for member, _ in rows:
        scales[:, member.slot] = member.scales
    return Stack(variant, params, (), constant(scales if at else scales[0], ("layers", None)[1 - at :], mesh))


def _same(one: Any, other: Any) -> bool:
    return one[:2] == other[:2] and all(a is b for a, b in zip(one[2:], other[2:], strict=True))


def _stacks(part: AdaptableMap) -> list[Stack]:
    return list(part.updates.values())


def _variant(stack: Stack) -> LoRA:
    assert isinstance(stack.variant, LoRA)
    return stack.variant


def _mesh(model: Decoder) -> Mesh | None:
    return sharding.mesh_of(model.norm.scale[...])


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
