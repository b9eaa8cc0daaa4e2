"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the factors B, which start at zero, learn at a larger rate than A."""

from typing import Any

import jax
import optax

from specjax.errors import UserError
from specjax.train.optim import Optimizer, as_optimizer, name_of

# What PEFT's `create_loraplus_optimizer` gives the larger rate: B, and every parameter with one axis in its files.
_FASTER = ("b", "magnitude", "bias", "scale")


def lora_plus(rule: optax.GradientTransformation, ratio: float) -> Optimizer:
    """A rule under which B learns at `ratio` times the rate of A, as PEFT's `create_loraplus_optimizer` (0.21).

    DoRA's magnitudes, and biases and norms that an adapter trains whole, learn like B, as they do there; whole matrices
    (`modules_to_save`) like A. Weight decay goes with the rate; norms are spared by it as ever (`optim.decays`), where
    PEFT spares LayerNorm alone. The logged rate is that of A.

    Args:
      rule: `specjax.adamw(...)`, `specjax.lion(...)` or any optax rule whose updates are proportional to its rate.
      ratio: 1 is the rule itself; the paper advises 16 and a smaller rate.

    Raises:
      UserError: a ratio that is not above 0; from `init`, parameters without LoRA's factors, or with
        those of an embedding.
    """
    if not ratio > 0:
        raise UserError(f"ratio is {ratio}: it must be above 0; 1 is off.")
    inner = as_optimizer(rule)

    def init(params: Any) -> Any:
        if not any(name_of(path) == "b" for path, _ in jax.tree.leaves_with_path(params)):
            raise UserError("LoRA+ is for LoRA's factors, and none of them trains: use the rule as it is.")
        if any("embed_tokens" in str(path) and name_of(path) == "b" for path, _ in jax.tree.leaves_with_path(params)):
            raise UserError(
                "LoRA+ has a rate of its own for an embedding's factors in PEFT, which is not supported: leave the "
                "embedding out of LoRA's targets, or use the rule as it is."
            )
        return inner.init(params)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, state, params)
        faster = lambda path, one: one * ratio if name_of(path) in _FASTER else one  # noqa: E731
        return jax.tree.map_with_path(faster, updates), state

    made = optax.GradientTransformation(init, update)
    return Optimizer(made, learning_rate=inner.learning_rate, clip_norm=inner.clip_norm, offload=inner.offload)
