"""What a device must hold to train, by arithmetic alone: an estimate, for which `specjax plan` asks the compiler.

What is counted, on the mesh that a config has by default (all devices on `fsdp`): weights, AdamW's moments and
gradients; of a dense model on an accelerator, where each layer is computed a second time (`model.remat=full`), also
the layers' inputs, one layer at work and a chunk of logits. docs/guides/choose.md holds it against compiled steps.
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
MARGIN = 1.25  # by which a compiled step may need more than is estimated


class Need(NamedTuple):
    """Bytes of one device: `state` is exact up to padding, `more` an estimate, None where none is trusted."""

    state: int
    more: int | None

    def fits(self, limit: int) -> bool | None:
        """Whether it does; None: it cannot be told without compiling."""
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
) -> Need:
    """What training needs.

    Args:
      sizes: of the model.
      trained: parameters that train.
      frozen: bytes of those that do not; 0: every weight trains.
      devices: of the mesh.
      rows: on a device at once.
      length: tokens of a row.
      family: of the hardware, see `specjax.plan.targets`.
      quantised: the frozen base's maps are.
    """
    full = not frozen
    # A device has its part of the weights; the factors of an adapter it has whole.
    state = TRAINED * trained // devices if full else TRAINED * trained + frozen // devices
    if family == "cpu" and full:
        state = TRAINED_CPU * trained // devices
    if family == "cpu" or sizes.num_experts:
        return Need(state, None)
    weights, width = _layer(sizes)
    tokens = rows * length
    copies = (devices > 1 or full) + full + quantised  # brought together; a gradient of it; as floats
    elements = GPU_CHUNK_ELEMENTS if family == "h100" else CHUNK_ELEMENTS
    logits = 2 * 4 * min(elements, tokens * sizes.vocab_size)
    inputs = 2 * sizes.num_layers * tokens * sizes.embed_dim
    return Need(state, inputs + 2 * tokens * width + 2 * copies * weights + logits)


def _layer(c: ModelConfig) -> tuple[int, int]:
    """The weights of the largest layer, and what a token leaves in it while it is computed."""
    found = []
    for segment in c.segments:
        here = c.of(segment)
        keys = 0 if here.shares else (1 + here.values) * here.num_kv_heads
        heads, maps = here.head_dim * (2 * here.num_heads + keys), 3 if here.gate else 2
        found.append((here.embed_dim * (heads + maps * here.mlp_dim), heads + maps * here.mlp_dim + 4 * here.embed_dim))
    return max(found)


def of_this_machine() -> int:
    """Bytes of memory that this process may have: the machine's, or its container's."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit
        return whole
