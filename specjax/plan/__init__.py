"""A run without its devices: the very training step of a config, compiled for hardware that is not here."""

from specjax.plan.apart import plan as plan
