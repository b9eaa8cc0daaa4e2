"""Specialise a pretrained language model: from a Hugging Face checkpoint to a Hugging Face checkpoint.

The public names are written out here and imported at first use: `import specjax` and `specjax --help` stay quick.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from specjax.errors import UserError as UserError

if TYPE_CHECKING:
    from specjax import data as data
    from specjax import fleet as fleet
    from specjax import lora as lora
    from specjax.generation.generate import generate as generate
    from specjax.hf.export import export as export
    from specjax.hf.load import load as load
    from specjax.hf.vocabulary import add_tokens as add_tokens
    from specjax.lora import ALL as ALL
    from specjax.lora import LORA as LORA
    from specjax.sharding import make_mesh as make_mesh
    from specjax.train.dpo import dpo as dpo
    from specjax.train.fit import fit as fit
    from specjax.train.logprobs import token_logprobs as token_logprobs
    from specjax.train.loraplus import lora_plus as lora_plus
    from specjax.train.objective import Objective as Objective
    from specjax.train.objective import by_group as by_group
    from specjax.train.objective import next_token as next_token
    from specjax.train.optim import adamw as adamw
    from specjax.train.optim import lion as lion
    from specjax.train.optim import optimizer as optimizer

__version__ = "0.2.0"

_HOMES = {
    "make_mesh": "specjax.sharding",
    "load": "specjax.hf.load",
    "add_tokens": "specjax.hf.vocabulary",
    "export": "specjax.hf.export",
    "fit": "specjax.train.fit",
    "dpo": "specjax.train.dpo",
    "adamw": "specjax.train.optim",
    "lion": "specjax.train.optim",
    "optimizer": "specjax.train.optim",
    "lora_plus": "specjax.train.loraplus",
    "Objective": "specjax.train.objective",
    "next_token": "specjax.train.objective",
    "by_group": "specjax.train.objective",
    "token_logprobs": "specjax.train.logprobs",
    "generate": "specjax.generation.generate",
    "ALL": "specjax.lora",
    "LORA": "specjax.lora",
}
_SUBMODULES = ("data", "fleet", "lora")

__all__ = [*_HOMES, *_SUBMODULES, "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"specjax.{name}")
    else:
        raise AttributeError(f"module 'specjax' has no attribute '{name}'")
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
