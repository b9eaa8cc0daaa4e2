"""The token that ends an assistant's turn: it must train, for a model that never learns to write it never stops."""

from collections.abc import Sequence
from typing import Any

from specjax.data.template import Span
from specjax.errors import UserError


def ended(tokenizer: Any, where: str, whole: str, marks: list[Span], turns: Sequence[tuple[int, Span]]) -> list[Span]:
    """The marks, each turn's last one with the special token that ends the turn where the mark stops just before it.

    Marks that touch become one. `turns` are messages and their characters, where these can be told.

    Raises:
      UserError: words that no mark has stand before that token, so that the model would never learn to write it.
    """
    stops = {}
    for turn, (begin, last) in turns:
        inside = [end for start, end in marks if start < last and begin < end <= last]
        rest = whole[max(inside) : last] if inside else ""
        if rest.strip():
            ids, offsets = tokens_of(tokenizer, rest)
            special = [at for at, token in enumerate(ids) if is_special(tokenizer, token)]
            if special and rest[: offsets[special[0]][0]].strip():
                token = tokenizer.convert_ids_to_tokens(ids[special[0]])
                raise UserError(
                    f"{where}: the chat template ends message {turn + 1} with '{token}', but its generation marks end "
                    "before other words, so that token would not train and the model would never stop: mark the turn "
                    "up to its end."
                )
            if special:
                stops[max(inside)] = max(inside) + offsets[special[0]][1]
    joined: list[Span] = []
    for start, end in marks:
        end = stops.get(end, end)
        touches = joined and joined[-1][1] == start
        joined[-1:] = [(joined[-1][0], end)] if touches else [*joined[-1:], (start, end)]
    return joined


def check(tokenizer: Any, whole: str, span: Span, what: str) -> None:
    """Raises `UserError` where no token ends an answer, and the one that follows it would, but does not train.

    Args:
      tokenizer: whose added tokens end turns.
      whole: a conversation in which another message follows the answer.
      span: the characters of the answer that train.
      what: the template, in words.
    """
    ids, offsets = tokens_of(tokenizer, whole)
    inside = [at for at, (start, end) in enumerate(offsets) if end > span[0] and start < span[1]]
    said = [at for at in inside if tokenizer.decode([ids[at]]).strip()]
    if not said or ids[said[-1]] in tokenizer.added_tokens_decoder:
        return
    after = [at for at in range(inside[-1] + 1, len(ids)) if tokenizer.decode([ids[at]]).strip()]
    if after and is_special(tokenizer, ids[after[0]]):
        token = tokenizer.convert_ids_to_tokens(ids[after[0]])
        raise UserError(
            f"{what} ends no answer with a token of its own: what follows one is '{token}', which would not train, so "
            "the model would never stop; use a template that writes the end of a turn with the turn."
        )


def tokens_of(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """The ids of a text that has its special tokens, and the characters of each."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def is_special(tokenizer: Any, token: int) -> bool:
    """Whether a token is one of the special ones."""
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and bool(added.special)
