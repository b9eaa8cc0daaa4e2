"""A chat template, run on beginnings of one conversation: by transformers' own Jinja environment."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from specjax.data.example import Conversation

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


class Template(NamedTuple):
    """A template, run on beginnings of one conversation."""

    text: str
    chat: Conversation
    names: Mapping[str, Any]  # special tokens, by the names that templates call them

    def render(self, count: int, *, prompt: bool = False, placeholder: int | None = None, end: str = "") -> str:
        """The first `count` messages.

        Args:
            count: how many.
            prompt: whether the generation prompt follows them.
            placeholder: the message whose words are replaced by `WORDS`.
            end: what stands for the end-of-text token, where not itself.
        """
        texts, _ = self._run(count, prompt, placeholder, end)
        return texts[0]

    def marked(self, count: int) -> tuple[str, list[Span]]:
        """The first `count` messages and their marks."""
        texts, marks = self._run(count, marks=True)
        return texts[0], [(start, end) for start, end in marks[0] if start < end]

    def upto(self, turn: int) -> "Template":
        """The conversation as it is when it ends with message `turn`, which alone trains."""
        chat = self.chat
        return self._replace(chat=chat._replace(messages=chat.messages[: turn + 1], first=turn, silent=()))

    def _run(
        self, count: int, prompt: bool = False, placeholder: int | None = None, end: str = "", marks: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = self.chat.messages[:count]
        if placeholder is not None:
            messages = [m | {"content": WORDS} if i == placeholder else m for i, m in enumerate(messages)]
        rendered: tuple[list[str], list[list[Span]]] = render_jinja_template(
            conversations=[messages],
            tools=self.chat.tools,
            chat_template=_DATE + self.text if "strftime_now" in self.text else self.text,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **{**self.names, **self.chat.options, **({"eos_token": end} if end else {})},
        )
        return rendered
