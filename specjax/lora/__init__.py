"""LoRA: injection by target names, merging, PEFT's adapter files, several adapters over one base."""

from flax import nnx

from specjax.lora.adapters import names, slots, unload, use
from specjax.lora.bank import reserve
from specjax.lora.combine import combine
from specjax.lora.inject import inject
from specjax.lora.merge import merge
from specjax.lora.peft import load, save

#: Trainable filters for `specjax.fit`: every weight, or what an adapter adds (factors, and its own copies).
ALL = nnx.Param
LORA = nnx.LoRAParam

__all__ = ["ALL", "LORA", "combine", "inject", "load", "merge", "names", "reserve", "save", "slots", "unload", "use"]
