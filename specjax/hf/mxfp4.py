"""MXFP4, as gpt-oss' files hold its experts: blocks of 32 numbers of 4 bits with one exponent, read into bfloat16.

Format: OCP Microscaling Formats 1.0, section 5.3 (E2M1 numbers, E8M0 scales). What comes out is what transformers'
`convert_moe_packed_tensors` makes of them (transformers/integrations/mxfp4.py).
"""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from specjax.errors import UserError

BLOCKS, SCALES = "_blocks", "_scales"  # the ends of the two tensors' names
_BLOCK = 32  # numbers, two a byte
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=-1)  # of a byte, the low bits first


class Packed:
    """A tensor [E, in, out] of floats in so few bits; a part is made when it is asked for.

    Attributes:
      blocks: uint8 [E, *out, in/32, 16], memory-mapped.
      scales: uint8 [E, *out, in/32].
      dtype: bfloat16, which holds every number exactly.
    """

    dtype = np.dtype(ml_dtypes.bfloat16)

    def __init__(self, blocks: np.ndarray, scales: np.ndarray):
        self.blocks, self.scales = blocks, scales

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, in, *out]."""
        count, *out, groups, _ = self.blocks.shape
        return (count, groups * _BLOCK, *out)

    def reshape(self, shape: Sequence[int], copy: bool | None = None) -> "Packed":
        """The same with the outputs on other axes."""
        del copy  # there are no floats to copy
        out, (*_, groups, half) = shape[2:], self.blocks.shape
        return Packed(
            self.blocks.reshape(shape[0], *out, groups, half, copy=False),
            self.scales.reshape(shape[0], *out, groups, copy=False),
        )

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        """The floats of a slice along each axis (the last of `index` is an ellipsis), bfloat16 of its own memory."""
        experts, inputs, *out, _ = index
        start, stop, _ = inputs.indices(self.shape[1])
        groups = slice(start // _BLOCK, -(-stop // _BLOCK))
        kept = slice(start - groups.start * _BLOCK, stop - groups.start * _BLOCK)
        blocks, scales = (part[(experts, *out, groups, ...)] for part in (self.blocks, self.scales))
        made = np.empty((len(blocks), stop - start, *scales.shape[1:-1]), self.dtype)
        for expert, (codes, exponents) in enumerate(zip(blocks, scales, strict=True)):  # one at a time in float32
            numbers = _PAIRS[codes].reshape(*exponents.shape, _BLOCK)
            wide = np.ldexp(numbers, exponents.astype(np.int32)[..., None] - 127)
            made[expert] = np.moveaxis(wide.reshape(*exponents.shape[:-1], -1)[..., kept], -1, 0)
        return made


def join(tensors: dict[str, Any], where: str) -> None:
    """Puts one `Packed` in the place of every two tensors that are one.

    Args:
      tensors: of the files, by name.
      where: the files, to be named in errors.

    Raises:
      UserError: one of the two is missing, or their shapes do not fit.
    """
    stems = [name[: -len(end)] for end in (BLOCKS, SCALES) for name in tensors if name.endswith(end)]
    for stem in dict.fromkeys(stems):
        blocks, scales = (tensors.pop(stem + end, None) for end in (BLOCKS, SCALES))
        if blocks is None or scales is None:
            raise UserError(f"{where}: of {stem}{BLOCKS} and {stem}{SCALES} one is missing: download the files again.")
        if blocks.ndim != 4 or blocks.shape != (*scales.shape, _BLOCK // 2):
            raise UserError(
                f"{where}: {stem}{BLOCKS} is {list(blocks.shape)} and {stem}{SCALES} {list(scales.shape)}, which is "
                "not MXFP4: give the checkpoint in floats."
            )
        tensors[stem] = Packed(blocks, scales)
