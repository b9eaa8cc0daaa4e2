"""An estimate of the memory per device for training, by arithmetic; `specjax plan` asks the compiler instead.

It counts weights, AdamW's moments and gradients, on the default mesh (all devices on `fsdp`). For a dense model on an
accelerator with full rematerialisation (`model.remat=full`) it also counts the layers' inputs, and on top of them the
larger of one layer's computation and a chunk of logits: while the loss is computed, no layer is, and there are no
gradients yet. docs/guides/choose.md compares it with compiled steps.
"""

import os
from pathlib import Path
from typing import NamedTuple

from specjax.models import ModelConfig
from specjax.train.chunks import CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS

TRAINED = 16  # bytes: a float32 master, two moments, a gradient
TRAINED_CPU = (
    24  # in full training on a CPU, whose backend was seen to need 12 more for gradients and temporaries (log)
)
LOGIT = 8  # bytes of each in a chunk: float32, and its gradient
# Bytes for each weight of the layer at work: in the compute dtype, where it must be made or brought together; as a
# float32 gradient; nf4's codes unpacked, and the float32 that they become before the compute dtype.
COMPUTED, GRADIENT, DEQUANTISED = 2, 4, 1 + 4 + 2
CODES = 0.5  # bytes of a weight in nf4, where it is brought together
MARGIN = 1.3  # by which a compiled step was seen to need more than is estimated (docs/measurements.md)


class Need(NamedTuple):
    """Bytes per device: `state` is exact up to padding; `more` is an estimate, or None if none is trusted."""

    state: int
    more: int | None

    def fits(self, limit: int) -> bool | None:
        """Whether it fits; None: only compiling tells."""
        if self.state > limit:
            return False
        return True if self.more is not None and (self.state + self.more) * MARGIN <= limit else None


def need(
    sizes: ModelConfig,
    *,
    trained: int,
    frozen: int,
    devices: int,
    rows: int,
    length: int,
    family: str,
    quantised: bool = False,
    accumulated: bool = False,
) -> Need:
    """The memory that training needs.

    Args:
      sizes: the model's sizes.
      trained: the number of trained parameters.
      frozen: the bytes of frozen parameters; 0: every weight trains.
      devices: the number of devices of the mesh.
      rows: rows per device at once.
      length: tokens per row.
      family: the hardware's family, see `specjax.plan.targets`.
      quantised: whether the frozen base's linear layers are nf4.
      accumulated: whether gradients are summed over micro-batches, so that they exist from the first one on.
    """
    full = not frozen
    # A device has its part of the weights; the factors of an adapter it has whole.
    state = TRAINED * trained // devices if full else TRAINED * trained + frozen // devices
    if family == "cpu" and full:
        state = TRAINED_CPU * trained // devices
    if family == "cpu" or sizes.num_experts:
        return Need(state, None)
    weights, width = _layer(sizes)
    tokens, apart = rows * length, devices > 1
    each = COMPUTED + GRADIENT if full else DEQUANTISED + CODES * apart if quantised else COMPUTED * apart
    elements = GPU_CHUNK_ELEMENTS if family == "h100" else CHUNK_ELEMENTS
    logits = LOGIT * min(elements, tokens * sizes.vocab_size)
    inputs = 2 * sizes.num_layers * tokens * sizes.embed_dim
    layer = tokens * width + int(each * weights)
    if family == "h100":  # whose temporaries XLA allocates as one piece, the logits beside the layer
        return Need(state, inputs + layer + logits)
    gradients = 0 if accumulated else (TRAINED - 12) * trained // (devices if full else 1)
    return Need(state, inputs + max(layer, logits - gradients))


def _layer(c: ModelConfig) -> tuple[int, int]:
    """The number of weights of the largest layer, and the bytes per token while it is computed."""
    found = []
    for segment in c.segments:
        here = c.of(segment)
        heads, maps = here.mixer_dim, 3 if here.gate else 2
        # A norm leaves what it was given and what it gives.
        normed = (4 if here.norms == "sandwich" else 2) * here.embed_dim
        normed += here.head_dim * (here.num_heads + here.num_kv_heads) if here.qk_norm else 0
        wide = 4 * here.mlp_dim if here.activation == "xielu" else 0  # which is computed in float32
        if here.delta:  # as what a delta rule is given and gives
            wide += 4 * (here.delta.channels + here.delta.value_heads * here.delta.value_dim)
        width = 2 * (heads + maps * here.mlp_dim + 2 * normed) + wide
        found.append((here.embed_dim * (heads + maps * here.mlp_dim), width))
    return max(found)


def of_this_machine() -> int:
    """The bytes of memory that this process may use: the machine's or its container's."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit
        return whole
