"""Prompts for a model, as ids; what it writes, as text; the tokens that end it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from specjax.data import ends, template
from specjax.data.chat import BUILT_IN
from specjax.data.example import Conversation
from specjax.errors import UserError, argument
from specjax.models import Decoder


def end_tokens(model: Decoder, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """The ids of the tokens that end a text of this model, see `specjax.data.ends`; an export declares them all.

    Raises:
      UserError: one is no token of the model's, so that no text would end there.
    """
    found, rows = ends.end_tokens(tokenizer, model.origin.eos_ids, chat=chat), model.config.vocab_size
    if beyond := [token for token in found if token >= rows]:
        files = "its config.json or generation_config.json (eos_token_id)"
        where = files if beyond[0] in model.origin.eos_ids else "its tokenizer's files (eos_token)"
        raise UserError(
            f"{model.origin.source or 'the model'}: by {where} token {beyond[0]} ends a text, but its embedding has "
            f"{rows} rows, and no text would ever end: correct it there, or take it out."
        )
    return found


def render(tokenizer: Any, prompts: Sequence[str | Sequence[Mapping[str, str]]], system: str | None) -> list[list[int]]:
    """The ids of each prompt, a user's turn or a conversation that ends with one, ready for the answer.

    The template alone writes special tokens.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer has no chat template: continue plain text ({argument('chat=False')}), or train with a "
            f"template (built in are {', '.join(BUILT_IN)})."
        )
    before = [] if system is None else [{"role": "system", "content": system}]
    turns = ([{"role": "user", "content": one}] if isinstance(one, str) else map(dict, one) for one in prompts)
    asked = [Conversation("", [*before, *messages]) for messages in turns]
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


def settled(text: str, stop: Sequence[str] = ()) -> str:
    """The part of an unfinished text that what follows won't change: up to a stop string, or to what may become one.

    An unfinished character at the end, which decodes to U+FFFD, is left out too.

    >>> settled("one two EN", ["END"]), settled("caf\ufffd"), settled("one END two", ["END"])
    ('one two ', 'caf', 'one ')
    """
    short = cut(text, stop)
    if len(short) == len(text):
        ends = (one[:size] for one in stop for size in range(len(one) - 1, 0, -1))
        short = text.rstrip("\ufffd")
        short = short[: len(short) - max((len(end) for end in ends if short.endswith(end)), default=0)]
    return short
