"""Prompts for a model, as ids; what it writes, as text; the tokens that end it."""

import functools
from collections.abc import Sequence
from typing import Any

from specjax.data.chat import BUILT_IN, encode, end_of_turn, resolve
from specjax.data.formats import Conversation
from specjax.errors import UserError, argument
from specjax.models import Decoder


def end_tokens(model: Decoder, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """The ids of the tokens that end a text.

    They are the `eos_token_id` (a number or a list) of `generation_config.json`, or else of `config.json`, as in
    transformers; the tokenizer's eos token; and in a chat the first special token that the template writes after an
    assistant's words, which need not be that (Llama 3's `<|eot_id|>`; `<|im_end|>` of a model taught ChatML). Where the
    template does not tell (it renders an answer otherwise than the prompt for one), the others serve.
    """
    ids = model.origin.generation_config.get("eos_token_id")
    ids = model.origin.config_json.get("eos_token_id") if ids is None else ids
    found = [*(ids if isinstance(ids, (list, tuple)) else [ids]), tokenizer.eos_token_id]
    if chat:
        found.append(_end_of_turn(tokenizer))
    return sorted({int(token) for token in found if token is not None})


def render(tokenizer: Any, prompts: Sequence[str], system: str | None) -> list[list[int]]:
    """The ids of each prompt as a user's turn, ready for the answer; the template alone writes special tokens."""
    import jinja2

    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer has no chat template: continue plain text ({argument('chat=False')}), or train with a "
            f"template (built in are {', '.join(BUILT_IN)})."
        )
    before = [] if system is None else [{"role": "system", "content": system}]
    chats = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
    try:
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses the prompt: {error}.") from error
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant's words, if there is one to be told."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        (document,) = encode([Conversation("the chat template", turns)], tokenizer, resolve(tokenizer))
    except UserError:
        return None
    return end_of_turn(document, tokenizer)


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
