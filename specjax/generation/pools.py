"""Which prompts share batches: those whose rows may bear different adapters, and those whose adapter wants its own."""

from collections.abc import Sequence
from types import EllipsisType
from typing import NamedTuple

import numpy as np

from specjax.errors import UserError
from specjax.lora import adapters, bank
from specjax.models import Decoder
from specjax.models.adapter import select

Adapters = str | Sequence[str | None] | EllipsisType | None  # for all prompts, or for each; `...`: the one in use


class Pool(NamedTuple):
    """Prompts that share batches.

    Attributes:
      prompts: their numbers.
      model: what answers.
      slots: int32, of every prompt of the call, what `bank.bear` tells the model of a batch; None: nothing is told.
    """

    prompts: list[int]
    model: Decoder
    slots: np.ndarray | None = None


def pools(model: Decoder, chosen: Adapters, count: int) -> list[Pool]:
    """The pools of `count` prompts, each in one of them; the model itself stays as it is.

    Raises:
      UserError: no such adapter, or another number of names than of prompts.
    """
    everyone = list(range(count))
    if chosen is None or isinstance(chosen, str | EllipsisType):
        if len(adapters.names(model)) < 2:  # the program of a model that wears this adapter, or the base, alone
            return [Pool(everyone, model if chosen is ... else _alone(model, chosen))]
        chosen = [adapters.active(model) if isinstance(chosen, EllipsisType) else chosen] * count
    if len(chosen) != count:
        raise UserError(f"adapter has {len(chosen)} names for {count} prompts: give one for each, None for the base.")
    slots = adapters.slots(model, chosen)
    if not any(chosen):
        return [Pool(everyone, bank.bare(model))]
    loners = [name for name in dict.fromkeys(chosen) if name is not None and not bank.shares(model, name)]
    found = [Pool([i for i in everyone if chosen[i] == name], _alone(model, name)) for name in loners]
    sharing = [i for i in everyone if chosen[i] not in loners]
    return [Pool(sharing, bank.serving(model), slots), *found] if sharing else found


def _alone(model: Decoder, name: str | None) -> Decoder:
    return select(model, None if name is None else adapters.slot_of(model, name))
