"""Optimizers and learning-rate schedules, by optax; what does not decay, and the clip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from specjax.errors import UserError, nearest
from specjax.train import moments as moments_lib

SCHEDULES = ("cosine", "linear", "constant")


class Optimizer(NamedTuple):
    """An optax transformation that also tells the learning rate at a step (for the log), and the clip before it.

    The step clips, not the transformation: the clip and the mean over tokens are then one factor, applied where a
    gradient is used, and no scaled copy of all gradients is in memory. With `offload` the state waits in the host's
    memory between two steps (on TPU and GPU).
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    learning_rate: Callable[[Any], Any]
    clip_norm: float = 0.0
    offload: bool = False

    def factor(self, norm: jax.Array) -> jax.Array:
        """What gradients of this global norm are multiplied by, to have the norm `clip_norm` at most (0: any)."""
        return jnp.where(norm < self.clip_norm, 1.0, self.clip_norm / norm) if self.clip_norm else jnp.ones_like(norm)


def schedule(
    name: str, *, learning_rate: float, steps: int, warmup_steps: int = 0, final_fraction: float = 0.1
) -> optax.Schedule:
    """Linear warmup from 0 to the peak, then constant, or cosine or linear decay to `final_fraction` of the peak.

    The first update uses 1/warmup_steps of the peak (transformers' schedules waste it at 0).

    >>> [round(float(schedule("linear", learning_rate=1.0, steps=4, warmup_steps=2, final_fraction=0.0)(s)), 2)
    ...  for s in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]

    Raises:
      UserError: an unknown name.
    """
    decay_steps = max(1, steps - warmup_steps)
    if name == "cosine":
        main = optax.cosine_decay_schedule(learning_rate, decay_steps, final_fraction)
    elif name == "linear":
        main = optax.linear_schedule(learning_rate, learning_rate * final_fraction, decay_steps)
    elif name == "constant":
        main = optax.constant_schedule(learning_rate)
    else:
        raise UserError(f"schedule {name!r}: choose one of {', '.join(SCHEDULES)}.{nearest(name, SCHEDULES)}")

    def rate(step: Any) -> Any:
        warm = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
        return jnp.where(step < warmup_steps, learning_rate * warm, main(step - warmup_steps))

    return rate


def decays(params: dict[str, jax.Array]) -> dict[str, bool]:
    """Weight decay's mask by dotted path: matrices and LoRA factors decay, norm scales and biases do not."""
    return {path: path.rsplit(".", 1)[-1] not in ("scale", "bias") for path in params}


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float = 1.0,
    moments: str = "float32",
    offload: bool = False,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) as `torch.optim.AdamW` computes it.

    Args:
      learning_rate: a number, or a function of the step (see `schedule`).
      weight_decay: times the learning rate; see `decays` for what it spares.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      clip_norm: the gradient is scaled down to this global norm; 0: off.
      moments: how they are stored between two steps, see `moments.KINDS`; other than float32 it is no longer torch's.
      offload: keep them in the host's memory between two steps.

    Raises:
      UserError: no such kind of moments.
    """
    rule = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    return _finish(rule, learning_rate, clip_norm, moments, offload)


def lion(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.99,
    clip_norm: float = 1.0,
    moments: str = "float32",
    offload: bool = False,
) -> Optimizer:
    """Lion (Chen et al. 2023, arXiv:2302.06675): one moment, half of AdamW's state; wants a tenth of its rate.

    The arguments are `adamw`'s.
    """
    rule = optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays)
    return _finish(rule, learning_rate, clip_norm, moments, offload)


def _finish(
    rule: optax.GradientTransformation, learning_rate: Any, clip_norm: float, moments: str, offload: bool
) -> Optimizer:
    if moments not in moments_lib.KINDS:
        offered = ", ".join(moments_lib.KINDS)
        raise UserError(f"moments {moments!r}: choose one of {offered}.{nearest(moments, moments_lib.KINDS)}")
    rule = moments_lib.store(rule, moments)
    rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    return Optimizer(rule.init, rule.update, rate, clip_norm, offload)
