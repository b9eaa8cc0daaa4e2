"""The variants of low-rank adapters, a file each: its arrays, first values, product, merge, and PEFT's names for it.

A further variant is a file like `dora.py` and a line in `VARIANTS`.
"""

from collections.abc import Mapping
from typing import Any

from specjax.errors import UserError, argument
from specjax.lora.variants.dora import DoRA
from specjax.lora.variants.embedding import EmbeddingLoRA
from specjax.lora.variants.experts import ExpertLoRA
from specjax.lora.variants.lora import LoRA, Map
from specjax.lora.variants.pissa import PiSSA

VARIANTS: tuple[LoRA, ...] = (LoRA(), DoRA(), ExpertLoRA(), EmbeddingLoRA())
PISSA = PiSSA()  # none of them: its files are plain LoRA's


def variant_of(linear: Map, settings: Mapping[str, Any]) -> LoRA:
    """The variant of an adapter on a map, by the keys of PEFT's `LoraConfig` that tell it; absent keys are false.

    Raises:
      UserError: there is none, of DoRA on an embedding.
    """
    fitting = (one for one in VARIANTS if isinstance(linear, one.map_class))
    for one in fitting:
        if all(settings.get(key, False) == told for key, told in one.settings.items()):
            return one
    raise UserError(f"{argument('dora')} does not go on an embedding: leave it out of {argument('targets')}.")


__all__ = ["PISSA", "VARIANTS", "DoRA", "EmbeddingLoRA", "ExpertLoRA", "LoRA", "PiSSA", "variant_of"]
