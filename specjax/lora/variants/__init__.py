"""The variants of low-rank adapters, a file each: its arrays, first values, product, merge, and PEFT's names for it.

A further variant is a file like `dora.py` and a line in `VARIANTS`.
"""

from collections.abc import Mapping
from typing import Any

from specjax.lora.variants.dora import DoRA
from specjax.lora.variants.experts import ExpertLoRA
from specjax.lora.variants.lora import LoRA
from specjax.lora.variants.pissa import PiSSA
from specjax.models.experts import ExpertLinear
from specjax.models.layers import Linear

VARIANTS: tuple[LoRA, ...] = (LoRA(), DoRA(), ExpertLoRA())
PISSA = PiSSA()  # none of them: its files are plain LoRA's


def variant_of(linear: Linear | ExpertLinear, settings: Mapping[str, Any]) -> LoRA:
    """The variant of an adapter on a map, by the keys of PEFT's `LoraConfig` that tell it; absent keys are false."""
    fitting = (one for one in VARIANTS if isinstance(linear, one.map_class))
    return next(one for one in fitting if all(settings.get(key, False) == told for key, told in one.settings.items()))


__all__ = ["PISSA", "VARIANTS", "DoRA", "ExpertLoRA", "LoRA", "PiSSA", "variant_of"]
