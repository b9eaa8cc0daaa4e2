"""The shapes in which the rest of the package knows a row: a text, a pair, a conversation, a pair of answers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from specjax.data.messages import REASONING


def _says(turn: Mapping[str, Any]) -> bool:
    """Whether there are words in an assistant's turn, or calls of tools, or reasoning."""
    return bool(turn["content"].strip() or turn.get("tool_calls") or any(turn.get(name) for name in REASONING))


class Text(NamedTuple):
    """A document of raw text."""

    where: str
    text: str


class Pair(NamedTuple):
    """A prompt and its completion, to be joined as they are."""

    where: str
    prompt: str
    completion: str


class Conversation(NamedTuple):
    """Messages for a chat template; the assistant's turns from message `first` on train, but for the `silent` ones.

    `options` is what the template is told besides (TRL's `chat_template_kwargs`): `enable_thinking`, say.
    """

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first: int = 0
    silent: tuple[int, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})

    def answers(self) -> list[int]:
        """The numbers of the messages that train; an answer that says nothing is none to learn."""
        found = [i for i in range(self.first, len(self.messages)) if self.messages[i]["role"] == "assistant"]
        return [i for i in found if i not in self.silent and _says(self.messages[i])]

    def empty(self) -> int:
        """How many answers would train if they said something."""
        turns = (self.messages[i] for i in range(self.first, len(self.messages)) if i not in self.silent)
        return sum(turn["role"] == "assistant" and not _says(turn) for turn in turns)


class Preference(NamedTuple):
    """An answer that is preferred to another one to the same prompt, each with the prompt."""

    where: str
    chosen: Pair | Conversation
    rejected: Pair | Conversation


Example = Text | Pair | Conversation | Preference


def blank(example: Example) -> bool:
    """Whether there is nothing to learn: an empty text, completion, or no words and no tool calls by the assistant.

    Of a preference: in the chosen answer, or answers that do not differ. (To say nothing may well be rejected.)

    >>> blank(Text("x:1", " ")), blank(Pair("x:1", "2+2=", "4"))
    (True, False)
    """
    match example:
        case Text(_, text):
            return not text.strip()
        case Pair(_, _, completion):
            return not completion.strip()
        case Conversation():
            return not example.answers()
        case Preference(_, chosen, rejected):
            return blank(chosen) or chosen == rejected
