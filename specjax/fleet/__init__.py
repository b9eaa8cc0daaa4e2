"""Many LoRA adapters trained in one run over one frozen base, each as if alone."""

from specjax.fleet.fit import fit
from specjax.fleet.member import Member, adamw, lion

__all__ = ["Member", "adamw", "fit", "lion"]
