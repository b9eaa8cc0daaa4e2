"""LoRA: injection by target names, merging, PEFT's adapter files, several adapters over one base."""

from flax import nnx

from specjax.lora.adapters import inject, merge, names, unload, use
from specjax.lora.peft import load, save

#: Trainable filters for `specjax.fit`: every weight, or the LoRA factors alone.
ALL = nnx.Param
LORA = nnx.LoRAParam

__all__ = ["ALL", "LORA", "inject", "load", "merge", "names", "save", "unload", "use"]
