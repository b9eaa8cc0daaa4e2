"""Prompts for a model, as ids; what it writes, as text; the tokens that end it."""

import functools
from collections.abc import Sequence
from typing import Any

from specjax.data import ends, template
from specjax.data.chat import BUILT_IN
from specjax.data.example import Conversation
from specjax.errors import UserError, argument
from specjax.models import Decoder


def end_tokens(model: Decoder, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """The ids of the tokens that end a text of this model, see `specjax.data.ends`; an export declares them all."""
    return ends.end_tokens(tokenizer, model.origin.eos_ids, chat=chat)


def render(tokenizer: Any, prompts: Sequence[str], system: str | None) -> list[list[int]]:
    """The ids of each prompt as a user's turn, ready for the answer; the template alone writes special tokens."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer has no chat template: continue plain text ({argument('chat=False')}), or train with a "
            f"template (built in are {', '.join(BUILT_IN)})."
        )
    before = [] if system is None else [{"role": "system", "content": system}]
    asked = [Conversation("", [*before, {"role": "user", "content": prompt}]) for prompt in prompts]
    texts = template.prompts(tokenizer.get_chat_template(), tokenizer.special_tokens_map, asked)
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def decode(tokenizer: Any, head: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds to `head`, without special tokens, its spaces as the model wrote them."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, whole = decode(head), decode([*head, *new])
    return whole[len(before) :] if whole.startswith(before) else decode(new)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string.

    >>> cut("one. two; three", (";", "."))
    'one'
    """
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]
