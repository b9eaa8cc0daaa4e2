"""Frozen weights in 8 or 4 bits: how they are stored, and what they stand for.

nf4 is QLoRA's (Dettmers et al. 2023, arXiv:2305.14314): blocks of 64 weights along the inputs, each divided by its
largest magnitude and rounded to one of the 16 values of the paper's appendix E; the blocks' magnitudes, less their
mean, are rounded again to 8 bits in blocks of 256 (double quantisation), to the values of Dettmers' dynamic map
(arXiv:1511.04561). Codes and statistics are those of bitsandbytes' `quantize_4bit(compress_statistics=True)`, for each
Hugging Face tensor by itself.

int8 is that of LLM.int8()'s weights (Dettmers et al. 2022, arXiv:2208.07339): an output's weights are divided by their
largest magnitude and rounded to -127..127. One scale an output costs 32/inputs bits a weight, and no block boundary
can be cut by a mesh.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax import sharding
from specjax.errors import UserError

KINDS = ("int8", "nf4")
BLOCK, STATISTICS_BLOCK = 64, 256

# Table of the paper's appendix E, as float32; bitsandbytes' `get_4bit_type("nf4")`.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic_map() -> np.ndarray:
    """The signed 8-bit dynamic map, float32 [256], sorted: bitsandbytes' `create_dynamic_map()`.

    For every exponent 1e-6 .. 1, twice as many evenly spaced fractions as for the one below, with either sign; 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        # As torch's float32 `linspace`: from either end to the middle, each edge rounded once.
        count, place = 2**exponent, np.arange(2**exponent + 1)
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count))
        up, down = np.float64(np.float32(0.1)) + step * place, 1 - step * (count - place)
        edges = np.where(place < (count + 1) // 2, up, down).astype(np.float32)
        means = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


DYNAMIC = _dynamic_map()
_NF4_BOUNDS = (NF4[:-1] + NF4[1:]) / np.float32(2)
_DYNAMIC_BOUNDS = (DYNAMIC[:-1] + DYNAMIC[1:]) / np.float32(2)
_INT8_STEP = np.float32(7.874015748698502e-3)  # 1/127 as bitsandbytes writes it

Leaves = dict[str, Any]  # a quantised kernel's arrays by name


@dataclasses.dataclass(frozen=True)
class Report:
    """What quantising did to a base.

    Attributes:
      kind: "nf4" or "int8".
      parameters: how many weights are quantised.
      bits: of storage a weight, all statistics included.
      relative: ||W - W'|| / ||W|| over all layers, by kind of map ("q_proj").
      largest: max |W - W'|, likewise.
    """

    kind: str
    parameters: int
    bits: float
    relative: tuple[tuple[str, float], ...]
    largest: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        worst = dict(self.largest)
        maps = ", ".join(f"{name} {error:.4f} (max {worst[name]:.2g})" for name, error in self.relative)
        return (
            f"{self.parameters} base weights in {self.kind}: {self.bits:.3f} bits ({self.bits / 8:.4f} bytes) each; "
            f"error relative to the float base: {maps}"
        )


class QuantisedParam(nnx.Param):
    """An array of a quantised kernel: a parameter for meshes and steps, but one that can't train."""


class Quantised(nnx.Module):
    """A kernel in few bits, in the place of the `nnx.Param` it was made from: its shape, axes and `[...]` are those.

    `lead` axes count Hugging Face tensors (layers, experts). Each is quantised by itself.

    Attributes:
      codes: nf4: uint8 [*lead, *out, *in], the last axis halved, two codes a byte, the first in the high bits;
        int8: int8 [*lead, *out, *in].
      absmax: nf4: uint8 [*lead, *out, inputs/64], codes of the dynamic map; int8: float32 [*lead, *out].
      scale: nf4: float32 [*lead, ceil(blocks/256)]; int8: None.
      offset: nf4: float32 [*lead], the mean of the blocks' magnitudes; int8: None.
      kind: "nf4" or "int8".
      in_dims: how many axes are inputs.
      dtype: what it is dequantised to.
    """

    def __init__(self, kind: str, leaves: Leaves, axes: tuple[str | None, ...], in_dims: int, dtype: Any):
        self.kind, self.axes, self.in_dims, self.dtype = kind, tuple(axes), in_dims, jnp.dtype(dtype)
        named = leaf_axes(kind, self.axes, in_dims)
        self.codes = QuantisedParam(leaves["codes"], axes=named["codes"])
        self.absmax = QuantisedParam(leaves["absmax"], axes=named["absmax"])
        self.scale, self.offset = (
            QuantisedParam(leaves[name], axes=named[name]) if name in leaves else None for name in ("scale", "offset")
        )

    @property
    def leaves(self) -> Leaves:
        """The arrays by name."""
        found = {name: getattr(self, name) for name in ("codes", "absmax", "scale", "offset")}
        return {name: leaf.get_raw_value() for name, leaf in found.items() if leaf is not None}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel it stands for."""
        *first, last = self.codes.shape
        return (*first, 2 * last if self.kind == "nf4" else last)

    @property
    def ndim(self) -> int:
        """Of the kernel it stands for."""
        return len(self.shape)

    def get_metadata(self, name: str) -> Any:
        """The kernel's logical axes, under the name that `nnx.Param` has them by."""
        return {"axes": self.axes}[name]

    def __getitem__(self, index: Any) -> jax.Array:
        """The kernel, dequantised to `dtype`; inside the scan, one layer's. Only `[...]` is there."""
        assert index is ...
        axes = self.axes[len(self.axes) - self.ndim :]  # one layer's slice has lost the layer's
        lead = lead_of(axes)
        # What is gathered over fsdp are the codes, not the floats: a quarter of the bytes. Others stay split.
        whole = tuple(None if axis == "embed" else axis for axis in axes)
        named = leaf_axes(self.kind, whole, self.in_dims)
        leaves = {name: sharding.constrain(leaf, *named[name]) for name, leaf in self.leaves.items()}
        return dequantise(leaves, self.kind, self.in_dims, lead, self.dtype)


def lead_of(axes: tuple[str | None, ...]) -> int:
    """How many leading axes count tensors: layers, experts."""
    return sum(axis in ("layers", "expert") for axis in axes)


def leaf_axes(kind: str, axes: tuple[str | None, ...], in_dims: int) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of each array of a kernel with logical axes `axes`. Blocks lie along the first input axis."""
    out, lead = axes[:-in_dims], axes[: lead_of(axes)]
    if kind == "int8":
        return {"codes": axes, "absmax": out}
    return {"codes": axes, "absmax": (*out, axes[-in_dims]), "scale": (*lead, None), "offset": lead}


def check(name: str, shape: tuple[int, ...], kind: str, in_dims: int) -> None:
    """Raises `UserError` where a kernel's inputs are no multiple of nf4's blocks."""
    inputs = math.prod(shape[-in_dims:])
    if kind == "nf4" and (inputs % BLOCK or shape[-1] % 2):
        raise UserError(
            f"{name}: its {inputs} inputs are no multiple of nf4's blocks of {BLOCK}: choose quantise='int8'."
        )


def quantise(kernel: jax.Array, kind: str, in_dims: int, lead: int = 0) -> Leaves:
    """The arrays of `Quantised` for a float kernel [*lead, *out, *in]."""
    w = kernel.astype(jnp.float32)
    if kind == "int8":
        absmax = jnp.max(jnp.abs(w), axis=tuple(range(-in_dims, 0)), keepdims=True)
        codes = jnp.round(w * (1.0 / jnp.maximum(absmax, 1e-38) * 127.0)).astype(jnp.int8)
        return {"codes": codes, "absmax": absmax.reshape(w.shape[:-in_dims])}
    blocks = w.reshape(*w.shape[:-in_dims], -1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    unit = jnp.clip(blocks * (1.0 / jnp.maximum(absmax, 1e-38))[..., None], -1, 1)
    codes = jnp.zeros(unit.shape, jnp.uint8)
    for bound in _NF4_BOUNDS:
        codes += (unit > bound).astype(jnp.uint8)
    pairs = codes.reshape(*w.shape[:-1], -1, 2)
    statistics = _quantise_statistics(absmax.reshape(*w.shape[:lead], -1))
    statistics["absmax"] = statistics["absmax"].reshape(absmax.shape)
    return {"codes": (pairs[..., 0] << 4) | pairs[..., 1]} | statistics


def _quantise_statistics(absmax: jax.Array) -> Leaves:
    """Double quantisation of the blocks' magnitudes, float32 [*lead, n]."""
    # Whole on every device: the mean is then the same number on every mesh.
    absmax = sharding.constrain(absmax, *(None,) * absmax.ndim)
    offset = jnp.mean(absmax, axis=-1)
    count = absmax.shape[-1]
    centred = jnp.pad(absmax - offset[..., None], [(0, 0)] * (absmax.ndim - 1) + [(0, -count % STATISTICS_BLOCK)])
    centred = centred.reshape(*absmax.shape[:-1], -1, STATISTICS_BLOCK)
    scale = jnp.max(jnp.abs(centred), axis=-1)
    unit = jnp.clip(centred * (1.0 / jnp.maximum(scale, 1e-38))[..., None], -1, 1)
    codes = jnp.searchsorted(jnp.asarray(_DYNAMIC_BOUNDS), unit, side="left").astype(jnp.uint8)
    return {"absmax": codes.reshape(*absmax.shape[:-1], -1)[..., :count], "scale": scale, "offset": offset}


def dequantise(leaves: Leaves, kind: str, in_dims: int, lead: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """The float kernel [*lead, *out, *in] of `quantise`'s arrays: computed in float32, rounded once to `dtype`."""
    codes, absmax = leaves["codes"], leaves["absmax"]
    if kind == "int8":
        over = absmax.reshape(*absmax.shape, *(1,) * in_dims)
        return (codes.astype(jnp.float32) * over * _INT8_STEP).astype(dtype)
    scale = jnp.repeat(leaves["scale"], STATISTICS_BLOCK, axis=-1)[..., : math.prod(absmax.shape[lead:])]
    offset = leaves["offset"].reshape(*absmax.shape[:lead], *(1,) * (absmax.ndim - lead))
    magnitude = jnp.asarray(DYNAMIC)[absmax.astype(jnp.int32)] * scale.reshape(absmax.shape) + offset
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1)
    values = _nf4_values(pairs.reshape(*absmax.shape, BLOCK)) * magnitude[..., None]
    return values.astype(dtype).reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def _nf4_values(codes: jax.Array) -> jax.Array:
    """The table's values, float32, by a tree of 15 selections: accelerators look up no table for each weight."""
    values: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        on = (codes >> bit) & 1 != 0
        values = [jnp.where(on, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    found: jax.Array = values[0]
    return found
