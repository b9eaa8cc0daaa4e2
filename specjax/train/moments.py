"""An optimizer's moments in fewer bits than float32: how they are stored between two steps.

Each step computes in float32 as ever; what is stored is rounded at random, up or down so that the mean is right (Gupta
et al. 2015, arXiv:1502.02551). Rounded to the nearest, a moment that moves by a thousandth a step would never move.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from specjax import sharding
from specjax.errors import UserError

KINDS = ("float32", "bfloat16", "8bit")
BLOCK = 256  # numbers with a scale of their own, along the last axis; bitsandbytes' size
SMALL = 4096  # an array of fewer numbers stays float32, as in bitsandbytes
_STATES = (optax.ScaleByAdamState, optax.ScaleByLionState)


class Packed(NamedTuple):
    """Numbers in 8 bits, by blocks of the last axis (Dettmers et al. 2022, arXiv:2110.02861).

    The codes stand for powers of their share of the block's largest: squares (with a sign) of a first moment, fourth
    powers of a second one, whose range is twice as wide. It is the range expansion of COAT (Xi et al. 2024,
    arXiv:2410.19313) with a fixed power, arithmetic alone and no table, which a TPU would have to gather from.

    Attributes:
      codes: int8 or uint8, of the array's shape.
      scales: float32, the largest of each block, [..., blocks].
    """

    codes: jax.Array
    scales: jax.Array


def store(rule: optax.GradientTransformation, kind: str) -> optax.GradientTransformation:
    """The rule with its moments stored as `kind`, one of `KINDS`.

    Raises:
      UserError: from `init`, where the rule keeps large arrays that are no moments of Adam or Lion.
    """
    if kind == "float32":
        return rule
    packed = _pack8 if kind == "8bit" else _round_bfloat16

    def init(params: Any) -> Any:
        state = rule.init(params)
        _check(state, kind)
        shapes = jax.eval_shape(lambda: _stored(state, packed))

        def empty(one: Any, shape: Any) -> Any:  # all moments begin at zero
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape) if _is_state(one) else one

        return jax.tree.map(empty, state, shapes, is_leaf=_is_state)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = rule.update(gradients, _restored(state), params)
        return updates, _stored(state, packed)

    return optax.GradientTransformation(init, update)


def _is_state(one: Any) -> bool:
    return isinstance(one, _STATES)


def _check(state: Any, kind: str) -> None:
    """Raises `UserError` where a rule has no moments, or where large arrays of another kind would stay float32."""
    parts = jax.tree.leaves(state, is_leaf=_is_state)
    others = [part for part in parts if not _is_state(part) and part.ndim and part.size >= SMALL]
    if others or not any(map(_is_state, parts)):
        raise UserError(
            f"moments {kind!r} are of rules that keep Adam's or Lion's moments, and this one keeps others: "
            "leave moments at 'float32'."
        )


def _stored(state: Any, pack: Any) -> Any:
    """The moments of every part of an optax state packed, each with a draw of its own."""

    def part(one: Any) -> Any:
        if not _is_state(one):
            return one
        step = one.count.astype(jnp.uint32)
        moments = {"mu": one.mu} | ({"nu": one.nu} if hasattr(one, "nu") else {})

        def leaf(name: str, path: Any, value: jax.Array) -> Any:
            if value.size < SMALL:
                return value
            draw = _noise(value.shape, _mixed(step) ^ jnp.uint32(zlib.crc32(f"{name} {_dotted(path)}".encode())))
            return pack(value, draw, signed=name == "mu")

        packed = {
            name: jax.tree.map_with_path(lambda path, x, name=name: leaf(name, path, x), tree)
            for name, tree in moments.items()
        }
        return one._replace(**packed)

    return jax.tree.map(part, state, is_leaf=_is_state)


def _dotted(path: Any) -> str:
    """The seed of a parameter's draws: its path, whether that is one tuple or keys within keys."""
    keys = [getattr(key, "key", key) for key in path]
    return sharding.seed_name(tuple(part for key in keys for part in (key if isinstance(key, tuple) else (key,))))


def _restored(state: Any) -> Any:
    def whole(leaf: Any) -> Any:
        if isinstance(leaf, Packed):
            return unpack(leaf)
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(whole, state, is_leaf=lambda one: isinstance(one, Packed))


def _mixed(x: jax.Array) -> jax.Array:
    """Uint32 to uint32, each bit of the input in each of the output (C. Wellons' lowbias32, hash-prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _noise(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Random uint32 by each number's place: a few operations, where `jax.random` would unroll a cipher a parameter."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    return _mixed(_mixed(place) ^ seed)


def _round_bfloat16(x: jax.Array, noise: jax.Array, *, signed: bool) -> jax.Array:
    """Float32 to one of the two bfloat16 around it, the nearer the likelier."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    cut = (bits + (noise >> 16)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)


def block_of(last: int) -> int:
    """How many numbers of a last axis share a scale: the largest divisor up to `BLOCK`; all, where it would be tiny.

    >>> block_of(4096), block_of(960), block_of(16), block_of(1031)
    (256, 240, 16, 1031)
    """
    size = next(n for n in range(min(last, BLOCK), 0, -1) if last % n == 0)
    return size if size >= min(last, 16) else last


def _pack8(x: jax.Array, noise: jax.Array, *, signed: bool) -> Packed:
    """Float32 to codes; a second moment above 0 is no code of 0, which an update would divide by."""
    split = x.reshape(*x.shape[:-1], -1, block_of(x.shape[-1]))
    scales = jnp.max(jnp.abs(split), axis=-1)
    share = jnp.abs(split) / jnp.where(scales > 0, scales, 1.0)[..., None]
    levels, power = (127, 2) if signed else (255, 4)
    low = jnp.floor(share ** (1 / power) * levels)
    below, above = (low / levels) ** power, ((low + 1) / levels) ** power
    chance = ((noise >> 8).astype(jnp.float32) / 2**24).reshape(split.shape)
    codes = low + (chance < (share - below) / (above - below))
    codes = jnp.clip(codes, 0, levels)
    if not signed:
        codes = jnp.where(split > 0, jnp.maximum(codes, 1), 0)
    codes = jnp.copysign(codes, split) if signed else codes
    return Packed(codes.reshape(x.shape).astype(jnp.int8 if signed else jnp.uint8), scales)


def unpack(packed: Packed) -> jax.Array:
    """The float32 numbers that the codes stand for."""
    codes = packed.codes.astype(jnp.float32)
    split = codes.reshape(*packed.scales.shape, -1)
    signed = packed.codes.dtype == jnp.int8
    share = (split / 127) * jnp.abs(split / 127) if signed else (split / 255) ** 4
    return (share * packed.scales[..., None]).reshape(codes.shape)
