"""Which characters of a rendered conversation are the assistant's.

A chat template is a program, so its author or the program itself is asked, and no string is ever searched for:

1. Where the template marks them, `{% generation %} ... {% endgeneration %}`, the marks decide (as TRL's
   `assistant_only_loss`). One thing is added: where a mark stops just before the special token that ends the turn,
   that token trains too, for a model that never learns to end its turn never stops.
2. Else the conversation is rendered up to each assistant turn, with the generation prompt, and up to its end. Where
   both are prefixes of the whole rendering, what lies between is the assistant's: its words and its end-of-turn token,
   with the line break after it where the template writes one (as TRL's own training templates mark it).
3. A template may write a turn otherwise once another follows: Qwen3 leaves the reasoning of earlier turns out, Phi-3
   closes only the last one with the end-of-text token. Then the turn's words are replaced by a placeholder, which tells
   what stands before and after them, here and where the conversation ends with this turn. The turn is found where what
   precedes it is the prompt that the model would be given for it, and what follows its words begins with what ends the
   turn when it is the last.

Where none of this holds, the row is refused: to guess would be silently wrong.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from specjax.data.formats import Conversation
from specjax.errors import UserError

Span = tuple[int, int]

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

# Characters that no text has (Unicode's private use): a turn's words, and each character of the end-of-text token.
_WORDS, _END = "\ue0f0\ue0f1\ue0f2", "\ue0f3"

# Data must not depend on the day it was made, so a template that writes today's date writes the one that Llama 3.1's
# has where it is told none. A macro, because transformers passes no function to a template.
_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(
        f" | replace('{code}', '{text}')"
        for code, text in {
            "%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri",
            "%H": "00", "%M": "00", "%S": "00",
        }.items()
    )
    + " -}}{%- endmacro %}\n"
)  # fmt: skip


class _Template(NamedTuple):
    """A template, run on beginnings of one conversation."""

    text: str
    chat: Conversation
    names: Mapping[str, Any]  # special tokens, by the names that templates call them

    def render(self, count: int, *, prompt: bool = False, placeholder: int | None = None, end: str = "") -> str:
        """The first `count` messages.

        Args:
            count: how many.
            prompt: whether the generation prompt follows them.
            placeholder: the message whose words are replaced by `_WORDS`.
            end: what stands for the end-of-text token, where not itself.
        """
        texts, _ = self._run(count, prompt, placeholder, end)
        return texts[0]

    def marked(self) -> tuple[str, list[Span]]:
        """The whole conversation and its marks."""
        texts, marks = self._run(len(self.chat.messages), marks=True)
        return texts[0], [(start, end) for start, end in marks[0] if start < end]

    def _run(
        self, count: int, prompt: bool = False, placeholder: int | None = None, end: str = "", marks: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = self.chat.messages[:count]
        if placeholder is not None:
            messages = [m | {"content": _WORDS} if i == placeholder else m for i, m in enumerate(messages)]
        rendered: tuple[list[str], list[list[Span]]] = render_jinja_template(
            conversations=[messages],
            tools=self.chat.tools,
            chat_template=_DATE + self.text if "strftime_now" in self.text else self.text,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **{**self.names, **({"eos_token": end} if end else {})},
        )
        return rendered


def spans(tokenizer: Any, template: str, chat: Conversation) -> tuple[str, list[Span]]:
    """The rendered conversation and the [start, end) characters of it that train.

    Args:
        tokenizer: its special tokens are what the template knows of it.
        template: the text of a Jinja chat template.
        chat: the conversation; assistant turns before message `chat.first` do not train.

    Raises:
        UserError: the template refuses the conversation, or does not tell which characters are the assistant's.
    """
    import jinja2

    run = _Template(template, chat, tokenizer.special_tokens_map)
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i >= chat.first]
    try:
        if _MARKS.search(template):
            whole, marks = run.marked()
            return whole, _ended(tokenizer, run, whole, _from_first(run, whole, marks, turns), turns)
        whole = run.render(len(chat.messages))
        return whole, [_turn(run, whole, turn) or _refuse(chat, turn) for turn in turns]
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{chat.where}: the chat template refuses the conversation: {error}.") from error


def render(tokenizer: Any, template: str, chat: Conversation, *, prompt: bool = False) -> str:
    """The conversation as text, with the generation prompt behind it where `prompt` is true.

    Raises:
        UserError: the template refuses the conversation.
    """
    import jinja2

    try:
        return _Template(template, chat, tokenizer.special_tokens_map).render(len(chat.messages), prompt=prompt)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{chat.where}: the chat template refuses the conversation: {error}.") from error


def _refuse(chat: Conversation, turn: int) -> NoReturn:
    if turn == 0:
        raise UserError(
            f"{chat.where}: the conversation begins with the assistant, and the chat template renders no prompt before "
            "any message, so the assistant's tokens cannot be told; let a user or a system message come first."
        )
    raise UserError(
        f"{chat.where}: the chat template renders the conversation up to message {turn + 1} otherwise than the whole "
        "has it, so the assistant's tokens cannot be told; keep one answer a row, or use a template that does not "
        "rewrite earlier turns."
    )


def _prompt(run: _Template, turn: int) -> str | None:
    """What the model is given before it writes message `turn`; None where a template wants a message first."""
    import jinja2

    try:
        return run.render(turn, prompt=True)
    except jinja2.TemplateError:
        if turn:
            raise
        return None


def _turn(run: _Template, whole: str, turn: int) -> Span | None:
    """The characters of message `turn`, an assistant's, or None where the template does not tell."""
    prompt = _prompt(run, turn)
    if prompt is None:
        return None
    upto = whole if turn + 1 == len(run.chat.messages) else run.render(turn + 1)
    if whole.startswith(upto) and upto.startswith(prompt):
        return len(prompt), len(upto)
    return _rewritten(run, whole, turn, prompt)


def _rewritten(run: _Template, whole: str, turn: int, prompt: str) -> Span | None:
    """`_turn`, where what follows a turn changes how it is written."""
    if not isinstance(run.chat.messages[turn].get("content"), str):
        return None
    end = str(run.names.get("eos_token") or "")
    hidden = _END * len(end)  # as long as what it stands for, so that places are the same

    def shown(text: str) -> str:
        return text.replace(hidden, end) if end else text

    parts = run.render(len(run.chat.messages), placeholder=turn, end=hidden).split(_WORDS)
    last = run.render(turn + 1, placeholder=turn, end=hidden).split(_WORDS)
    masked = run.render(len(run.chat.messages), end=hidden)
    if not len(parts) == len(last) == 2 or shown(masked) != whole:
        return None
    (before, after), closing = parts, last[1]
    if not (masked.startswith(before) and masked.endswith(after)):
        return None
    if not after.startswith(closing):
        closing = closing.removesuffix(hidden)  # the end-of-text token closes a conversation, not every turn (Phi-3)
    if not after.startswith(closing) or not (whole.startswith(prompt) or prompt.startswith(shown(before))):
        return None
    start = len(prompt) if whole.startswith(prompt) else len(before)
    stop = len(whole) - len(after) + len(closing)
    return (start, stop) if start < stop else None


def _from_first(run: _Template, whole: str, marks: list[Span], turns: list[int]) -> list[Span]:
    """The marks of the turns that train: what lies before the first of them is a prompt."""
    if not turns:
        return []
    if not run.chat.first:
        return marks
    prompt = _prompt(run, turns[0])
    if prompt is None or not whole.startswith(prompt):
        _refuse(run.chat, turns[0])
    return [(max(start, len(prompt)), end) for start, end in marks if end > len(prompt)]


def _ended(tokenizer: Any, run: _Template, whole: str, marks: list[Span], turns: list[int]) -> list[Span]:
    """The marks, each turn's last one with the special token that ends the turn where the mark stops just before it.

    Marks that touch become one.
    """
    stops = {}
    for turn in turns:
        found = _told(run, whole, turn)
        inside = [end for start, end in marks if found and start < found[1] and found[0] < end <= found[1]]
        rest = whole[max(inside) : found[1]] if found and inside else ""
        if rest.strip():
            ids, offsets = _tokens(tokenizer, rest)
            special = [at for at, token in enumerate(ids) if _is_special(tokenizer, token)]
            if special and not rest[: offsets[special[0]][0]].strip():
                stops[max(inside)] = max(inside) + offsets[special[0]][1]
    joined: list[Span] = []
    for start, end in marks:
        end = stops.get(end, end)
        touches = joined and joined[-1][1] == start
        joined[-1:] = [(joined[-1][0], end)] if touches else [*joined[-1:], (start, end)]
    return joined


def _told(run: _Template, whole: str, turn: int) -> Span | None:
    """`_turn`, or None also where the template wants no beginning of the conversation: its marks then say it all."""
    import jinja2

    try:
        return _turn(run, whole, turn)
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _is_special(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and bool(added.special)
