"""The clock of a run: seconds of training steps, tokens per second, and what share of the devices' peak they are."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from specjax import flops


class Throughput:
    """Measures windows of training steps.

    Args:
      devices: how many train.
      device_kind: theirs, which tells the peak where it is known.
    """

    def __init__(self, devices: int, device_kind: str):
        self._devices, self._kind, self._peak = devices, device_kind, flops.peak(device_kind)
        self._start, self._tokens = time.perf_counter(), 0
        self.flops_per_token = 0.0  # known once the step is compiled
        self.seconds = 0.0  # of all windows

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training time."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def resume(self, tokens: int) -> None:
        """Counts on from these tokens, of the steps before the resume."""
        self._tokens = tokens

    def window(self, tokens: int) -> dict[str, Any]:
        """Tokens (not padding) per second since the last call, those of a device, and MFU where the peak is known.

        Args:
          tokens: of all steps so far.
        """
        seconds, fresh = time.perf_counter() - self._start, tokens - self._tokens
        self._start, self._tokens = self._start + seconds, tokens
        self.seconds += seconds
        rate = fresh / max(seconds, 1e-9)
        measured = {"tokens_per_s": rate, "tokens_per_s_per_device": rate / self._devices}
        if self._peak:
            measured["mfu"] = rate * self.flops_per_token / (self._devices * self._peak)
        return measured

    def formula(self) -> str:
        """How `mfu` is counted, or "" where the devices' peak is not known."""
        if not self._peak:
            return ""
        return (
            f"MFU = tokens/s x {self.flops_per_token:.3g} FLOPs per token (remat not counted) / "
            f"({self._devices} x {self._peak:.3g} FLOP/s of {self._kind})"
        )
