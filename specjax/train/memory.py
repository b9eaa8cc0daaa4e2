"""What is said where the memory of a device does not do."""

from typing import Any

import jax

from specjax.errors import UserError, argument


def exhausted(error: BaseException | None) -> bool:
    """Whether it is what XLA raises where a device, or the host as one, has no memory left."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def too_much(error: BaseException, device: jax.Device, compiled: Any = None, *, slots: int = 1) -> UserError:
    """What the compiled step needs, what there is, and what makes it less.

    Args:
      error: of XLA.
      device: one of those that train.
      compiled: the training step, None where compiling it is what failed: the compiler says then what it needs.
      slots: adapters of a fleet that train at once.
    """
    needs = [line.strip() for line in str(error).splitlines() if line.strip()][0].rstrip(".")
    figures = compiled.memory_analysis() if compiled is not None else None
    if figures is not None:
        parts = {
            "weights, optimizer and batch": figures.argument_size_in_bytes,
            "the rest of the step": figures.temp_size_in_bytes,
        }
        needs = "a training step takes " + " and ".join(f"{_size(size)} for {what}" for what, size in parts.items())
    limit = (device.memory_stats() or {}).get("bytes_limit")
    has = f", and a device has {_size(limit)}" if limit else ""
    fewer = f"fewer adapters at once ({argument('slots')}, now {slots}), " if slots > 1 else ""
    return UserError(
        f"the memory of a device does not do: {needs}{has}; take {fewer}more micro-batches ({argument('accumulate')}), "
        f"{argument('remat')}='full', shorter rows or more devices in the mesh; `specjax plan` says beforehand what "
        "fits."
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
