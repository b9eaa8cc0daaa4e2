"""A chat template, run on beginnings of one conversation: by transformers' own Jinja environment.

A template is a program that came with somebody's files. Those of this package run here, any other in a process of its
own with limits of time, memory and output (`specjax.sandbox`), many renderings at a time.
"""

import functools
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from specjax import sandbox
from specjax.data.example import Conversation
from specjax.errors import UserError

Span = tuple[int, int]

# Characters that no text has (Unicode's private use): a turn's words, and each character of the end-of-text token.
WORDS, END = "\ue0f0\ue0f1\ue0f2", "\ue0f3"

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


class Wanted(NamedTuple):
    """A rendering of a conversation's first `number` messages: what `Template.render` and `Template.marked` ask for."""

    number: int
    prompt: bool = False
    placeholder: int | None = None
    end: str = ""
    marks: bool = False


Made = tuple[str, list[Any]] | sandbox.Refused  # a text and its generation marks, or what the template failed by


class Template(NamedTuple):
    """A template, run on beginnings of one conversation.

    Attributes:
      text: of the template.
      chat: the conversation.
      names: special tokens, by the names that templates call them.
      ready: what `ahead` rendered.
    """

    text: str
    chat: Conversation
    names: Mapping[str, Any]
    ready: Mapping[Wanted, Made] | None = None

    def render(self, count: int, *, prompt: bool = False, placeholder: int | None = None, end: str = "") -> str:
        """The first `count` messages.

        Args:
          count: how many.
          prompt: whether the generation prompt follows them.
          placeholder: the message whose words are replaced by `WORDS`.
          end: what stands for the end-of-text token, where not itself.

        Raises:
          jinja2.TemplateError: the template fails, by whatever error.
          UserError: it takes more time, memory or room than it may.
        """
        return self._run(Wanted(count, prompt, placeholder, end))[0]

    def marked(self, count: int) -> tuple[str, list[Span]]:
        """The first `count` messages and their marks; errors as those of `render`."""
        text, marks = self._run(Wanted(count, marks=True))
        return text, [(start, end) for start, end in marks if start < end]

    def upto(self, turn: int) -> "Template":
        """The conversation as it is when it ends with message `turn`, which alone trains."""
        chat = self.chat
        return self._replace(chat=chat._replace(messages=chat.messages[: turn + 1], first=turn, silent=()))

    def _run(self, wanted: Wanted) -> tuple[str, list[Any]]:
        import jinja2

        made = (self.ready or {}).get(wanted) or _rendered(self.text, self.names, [(self.chat, wanted)])[0]
        if isinstance(made, sandbox.Refused):
            raise jinja2.TemplateError(str(made))
        return made


def ahead(
    text: str, names: Mapping[str, Any], chats: Sequence[tuple[Conversation, Sequence[Wanted]]]
) -> list[dict[Wanted, Made]]:
    """Renders at once what will be wanted of some conversations, for `Template.ready`; nothing where that is no gain.

    Raises:
      UserError: as `Template.render`.
    """
    if text in _own():
        return [{} for _ in chats]
    asked = [(chat, wanted) for chat, some in chats for wanted in some]
    made = iter(_rendered(text, names, asked))
    return [dict(zip(some, made, strict=False)) for _, some in chats]


def prompts(text: str, names: Mapping[str, Any], chats: Sequence[Conversation]) -> list[str]:
    """Conversations as a model is given them to answer, on today's date.

    Raises:
      UserError: the template refuses one, or takes more time, memory or room than it may.
    """
    asked = [(chat, Wanted(len(chat.messages), prompt=True)) for chat in chats]
    made = _rendered(text, names, asked, today=True)
    if refused := next((one for one in made if isinstance(one, sandbox.Refused)), None):
        raise UserError(f"the tokenizer's chat template refuses the prompt: {refused}.")
    return [one[0] for one in made if not isinstance(one, sandbox.Refused)]


def _rendered(
    text: str, names: Mapping[str, Any], asked: Sequence[tuple[Conversation, Wanted]], *, today: bool = False
) -> list[Made]:
    hows = [_arguments(names, chat, wanted) for chat, wanted in asked]
    dated = _DATE + text if "strftime_now" in text and not today else text
    if text in _own():
        return [_here(dated, how) for how in hows]
    try:
        return list(sandbox.render(dated, hows))
    except sandbox.Exceeded as error:
        where = asked[error.answered][0].where or "a conversation"
        raise UserError(f"{where}: the chat template cannot be used ({error}): use another template.") from error


def _arguments(names: Mapping[str, Any], chat: Conversation, wanted: Wanted) -> dict[str, Any]:
    """Of transformers' `render_jinja_template`, plain values alone."""
    messages = chat.messages[: wanted.number]
    if wanted.placeholder is not None:
        messages = [m | {"content": WORDS} if i == wanted.placeholder else m for i, m in enumerate(messages)]
    told: dict[str, Any] = {
        "conversations": [messages],
        "tools": chat.tools,
        "return_assistant_tokens_mask": wanted.marks,
        "add_generation_prompt": wanted.prompt,
        **{**names, **chat.options, **({"eos_token": wanted.end} if wanted.end else {})},
    }
    plain: dict[str, Any] = _plain(told)
    return plain


def _plain(value: Any) -> Any:
    """Nested values as JSON knows them; anything else, as Arrow's dates, is its class's name, as for transformers."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, str) else f"<{type(value).__name__}>"


def _here(text: str, how: Mapping[str, Any]) -> Made:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, marks = render_jinja_template(chat_template=text, **how)
        return texts[0], marks[0] if marks else []
    except jinja2.TemplateError as error:
        return sandbox.Refused("TemplateError", str(error))
    except (TypeError, ValueError, RecursionError) as error:  # of a row's own shapes
        return sandbox.Refused(type(error).__name__, str(error))


@functools.cache
def _own() -> frozenset[str]:
    """The texts of this package's templates."""
    found = files("specjax.data").joinpath("templates").iterdir()
    return frozenset(one.read_text(encoding="utf-8") for one in found if one.name.endswith(".jinja"))
