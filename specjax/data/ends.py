"""The tokens that end what a model writes."""

from collections.abc import Sequence
from typing import Any

from specjax.data.chat import encode, end_of_turn, resolve
from specjax.data.example import Conversation
from specjax.errors import UserError


def end_tokens(tokenizer: Any, declared: Sequence[int], *, chat: bool = False) -> list[int]:
    """The ids of the tokens that end a text, in ascending order.

    They are those that the model's files declare; the tokenizer's eos token; and in a chat the first special token that
    the template writes after an assistant's words, which need not be one of them (Llama 3's `<|eot_id|>`; `<|im_end|>`
    of a model taught ChatML). Where the template does not tell (it renders an answer otherwise than the prompt for
    one), the others serve.
    """
    found = [*declared, tokenizer.eos_token_id]
    if chat:
        found.append(_end_of_turn(tokenizer))
    return sorted({int(token) for token in found if token is not None})


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant's words, if there is one to be told."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        (document,) = encode([Conversation("the chat template", turns)], tokenizer, resolve(tokenizer))
    except UserError:
        return None
    return end_of_turn(document, tokenizer)
