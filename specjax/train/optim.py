"""Optimizers and learning-rate schedules, by optax; what does not decay, and the clip."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from specjax.errors import UserError, nearest
from specjax.train import moments as moments_lib

SCHEDULES = ("cosine", "linear", "constant")


class Optimizer(optax.GradientTransformation):
    """An optax transformation that a training step knows more of.

    The step clips, not the transformation: the clip and the mean over tokens are then one factor, applied where a
    gradient is used, no scaled copy of all gradients is in memory, and each group of rows is clipped by its own norm.

    Attributes:
      learning_rate: step -> rate, for the log; None where it is not known.
      clip_norm: gradients are scaled down to this norm; 0: off.
      offload: the state waits in the host's memory between two steps (on TPU and GPU).
    """

    learning_rate: Callable[[Any], Any] | None
    clip_norm: float
    offload: bool

    def __new__(
        cls,
        rule: optax.GradientTransformation,
        *,
        learning_rate: float | optax.Schedule | None = None,
        clip_norm: float = 0.0,
        offload: bool = False,
    ) -> "Optimizer":
        """See `optimizer`."""
        made = super().__new__(cls, rule.init, rule.update)
        known = learning_rate is None or callable(learning_rate)
        made.learning_rate = learning_rate if known else optax.constant_schedule(learning_rate)
        made.clip_norm, made.offload = clip_norm, offload
        return made

    def factor(self, norm: jax.Array) -> jax.Array:
        """What gradients of this norm are multiplied by, to have the norm `clip_norm` at most (0: any)."""
        return jnp.where(norm < self.clip_norm, 1.0, self.clip_norm / norm) if self.clip_norm else jnp.ones_like(norm)


def optimizer(
    rule: optax.GradientTransformation,
    *,
    learning_rate: float | optax.Schedule | None = None,
    clip_norm: float = 0.0,
    moments: str = "float32",
    offload: bool = False,
) -> Optimizer:
    """Any optax rule with what `adamw` has beside its rule; `fit` takes a bare rule too.

    Args:
      rule: any `optax.GradientTransformation`, its learning rate in it.
      learning_rate: that very rate, a number or a function of the step: it is logged, and changes nothing.
      clip_norm: the gradient is scaled down to this global norm before the rule sees it; 0: off.
      moments: how they are stored between two steps, see `moments.KINDS`; of rules with Adam's or Lion's moments.
      offload: keep the rule's state in the host's memory between two steps.

    Raises:
      UserError: no such kind of moments; from `init`, a rule with moments of another kind than Adam's or Lion's.
    """
    if moments not in moments_lib.KINDS:
        offered = ", ".join(moments_lib.KINDS)
        raise UserError(f"moments {moments!r}: choose one of {offered}.{nearest(moments, moments_lib.KINDS)}")
    rule = moments_lib.store(rule, moments)
    return Optimizer(rule, learning_rate=learning_rate, clip_norm=clip_norm, offload=offload)


def as_optimizer(rule: optax.GradientTransformation) -> Optimizer:
    """The rule as it is where it is an `Optimizer`, else with nothing beside it.

    Raises:
      UserError: it is no optax rule.
    """
    if isinstance(rule, Optimizer):
        return rule
    if not (callable(getattr(rule, "init", None)) and callable(getattr(rule, "update", None))):
        raise UserError(f"optimizer {rule!r}: give an optax rule, such as specjax.adamw(1e-4) or optax.lion(1e-5).")
    return Optimizer(rule)


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


_UNDECAYED = ("scale", "bias", "sinks", "alpha_p", "alpha_n", "A_log", "dt_bias")


def decays(params: Any) -> Any:
    """Weight decay's mask, a tree like `params`: matrices and LoRA factors decay, other weights do not.

    They are told by the parameter's own name, the last of its path.
    """
    return jax.tree.map_with_path(lambda path, _: name_of(path) not in _UNDECAYED, params)


def name_of(path: tuple[Any, ...]) -> str:
    """A parameter's own name, the last of its path in a tree of parameters."""
    key = getattr(path[-1], "key", getattr(path[-1], "name", None))
    return str(key[-1] if isinstance(key, tuple) else key)


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
    return optimizer(rule, learning_rate=learning_rate, clip_norm=clip_norm, moments=moments, offload=offload)


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
    return optimizer(rule, learning_rate=learning_rate, clip_norm=clip_norm, moments=moments, offload=offload)
