"""A process of specjax's own has no use for torch."""

import os
import sys
from typing import Any, cast


def leave_torch_out() -> None:
    """Keeps transformers from loading torch, where it is installed, for a tokenizer and a config, which need none.

    That is 0.27 GiB and seconds at start. To be called before transformers is imported, and only in a process that is
    specjax's own: for all else in it there is no torch either.
    """
    sys.modules.setdefault("torch", cast(Any, None))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that models of its own need torch
