"""How the next token is chosen: what the caller and `generation_config.json` ask for, and the drawing itself.

B batch, V vocab.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int32, Key

from specjax.errors import UserError, argument

_MOST = 2**31 - 1
# What specjax reads of a generation_config.json, beside eos_token_id.
_READ = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Keys that change the text and are not done here, with the values that ask for nothing; None is always one of them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
    "token_healing": (False,),
}
_NEUTRAL_DRAWS: dict[str, tuple[Any, ...]] = {  # these matter only where tokens are drawn
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How long a text grows and how its tokens are chosen.

    Attributes:
      max_new_tokens: the limit.
      temperature: 0 takes the likeliest token; otherwise the logits are divided by it and a token is drawn.
      top_k: draw from this many of the likeliest tokens; 0: from all.
      top_p: draw from the fewest of the likeliest tokens whose probabilities sum to this; 1: from all.
      min_p: draw from the tokens at least this many times as probable as the likeliest; 0: from all.
      repetition_penalty: divides the positive logits, and multiplies the negative ones, of every token that the prompt
        or the new text holds (Keskar et al. 2019, arXiv:1909.05858); 1: off.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          UserError: a value is out of its range.
        """
        for name, fits, wanted in (
            ("max_new_tokens", lambda n: 1 <= n <= _MOST and n == int(n), "a whole number of at least 1, below 2^31"),
            ("temperature", lambda t: 0 <= t < math.inf, "0 (greedy) or more"),
            ("top_k", lambda k: 0 <= k <= _MOST and k == int(k), "a whole number, 0 (off) or more, below 2^31"),
            ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", lambda p: 0 <= p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", lambda r: 0 < r < math.inf, "above 0; 1 is off"),
        ):
            value = getattr(self, name)
            if isinstance(value, (bool, str)) or not fits(value):
                raise UserError(f"{name} is {value}: it must be {wanted}.")

    @classmethod
    def of(cls, generation: Mapping[str, Any], **given: Any) -> "Sampling":
        """What the caller gives, for the rest what `generation_config.json` says, then transformers' defaults.

        Tokens are drawn if a temperature above 0 is given, or none and the file sets `do_sample`; then `top_k` is 50
        where nobody says otherwise, as in transformers. `max_length`, which counts the prompt too, is not read.

        Args:
          generation: the file's content, {} for none.
          **given: the fields; None: not given.

        Raises:
          UserError: the file asks for something that is not done here, a value is out of range, or a filter of draws is
            given where the likeliest token is taken.
        """
        given = {name: value for name, value in given.items() if value is not None}
        cls(**given)  # what is out of range is told before what does not fit together
        told = {name: generation[name] for name in _READ if generation.get(name) is not None}
        drawn = given["temperature"] > 0 if "temperature" in given else bool(generation.get("do_sample"))
        neutral = _NEUTRAL | (_NEUTRAL_DRAWS if drawn else {})
        odd = [key for key, fits in neutral.items() if generation.get(key) is not None and generation[key] not in fits]
        if odd:
            raise UserError(
                f"generation_config.json sets {', '.join(f'{key} = {generation[key]}' for key in odd)}, which specjax "
                f"does not do: remove it there, or give {argument('generation_config={}')} to leave the file out."
            )
        if drawn:
            return cls(**{"temperature": 1.0, "top_k": 50} | told | given)
        for name in ("top_k", "top_p", "min_p"):
            if name in given and given[name] != getattr(cls, name):
                raise UserError(
                    f"{name} is {given[name]}, and no token is drawn: give a temperature above 0 with it, or leave it "
                    "out."
                )
        kept = ("max_new_tokens", "repetition_penalty")
        return cls(**{name: value for name, value in (told | given).items() if name in kept})


def penalise(logits: Float32[Array, "B V"], seen: Bool[Array, "B V"], penalty: Any) -> Float32[Array, "B V"]:
    """The logits, those of the tokens in `seen` made less likely (transformers' processor)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample(
    logits: Float32[Array, "B V"],
    keys: Key[Array, " B"],
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any = 0.0,
    *,
    few: int = 0,
) -> Int32[Array, " B"]:
    """Draws a token a row: temperature, then top-k, top-p and min-p over what is left, as transformers' warpers.

    Args:
      logits: of the next token.
      keys: a row's random key each.
      temperature: above 0.
      top_k: 0: off. Tokens that tie with the last one kept are kept, here and in top-p.
      top_p: of the least likely tokens, those that together have at most 1 - top_p go (arXiv:1904.09751); 1: off.
      min_p: tokens less than this many times as probable as the likeliest go (arXiv:2407.01082); 0: off.
      few: static; where not 0, top_k is from 1 to this, and only so many tokens are sorted.
    """
    scores = logits / temperature

    def floor() -> Array:
        few_or_all = min(few, scores.shape[-1]) or scores.shape[-1]
        ascending = jnp.flip(jax.lax.top_k(scores, few_or_all)[0], -1) if few else jnp.sort(scores, axis=-1)
        count = jnp.where(top_k > 0, jnp.minimum(top_k, few_or_all), few_or_all)
        least = jnp.take(ascending, few_or_all - count, axis=-1)[:, None]
        mass = jnp.cumsum(jax.nn.softmax(jnp.where(ascending < least, -jnp.inf, ascending), axis=-1), axis=-1)
        kept = (mass > 1 - top_p).at[:, -1].set(True)
        return jnp.min(jnp.where(kept, ascending, jnp.inf), axis=-1, keepdims=True)

    no_floor = jnp.full_like(scores[:, :1], -jnp.inf)
    lowest = jax.lax.cond((top_k > 0) | (top_p < 1), floor, lambda: no_floor)  # without filters nothing is sorted
    lowest = jnp.maximum(lowest, jnp.max(scores, axis=-1, keepdims=True) + jnp.log(jnp.float32(min_p)))
    return jax.vmap(jax.random.categorical)(keys, jnp.where(scores < lowest, -jnp.inf, scores)).astype(jnp.int32)
