"""Whether all that a row says stands in its rendering: a chat template leaves out what it does not know, in silence.

Two questions are asked. Does the template write each part at all: each message's words, each tool call, the tools? A
conversation of the same shape, whose every part is a word that nothing else has, is rendered once for all rows of that
shape. And did it write what this row says? Its lines are looked for, also as they stand inside JSON.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from specjax.data.example import Conversation
from specjax.data.messages import REASONING, reasoned
from specjax.data.template import Template
from specjax.errors import UserError, argument

_THOUGHT = re.compile(r".*(?:</think>|\[/THINK\])", re.DOTALL)
_SEAMS = re.compile(r"[\r\n]|</?think>|\[/?THINK\]")  # where a template may put other spaces than the row has


def check(run: Template, answers: Sequence[int], text: str, elsewhere: Sequence[int] = ()) -> None:
    """Raises `UserError` where the rendering leaves out something of the conversation, with its place.

    Args:
      run: the template and the conversation.
      answers: the messages whose reasoning must stand there too; what was thought before is no part of a prompt.
      text: the rendering.
      elsewhere: the messages that are answers of other rows, where all of them must stand; here they are a prompt.
    """
    there = [number for number in elsewhere if number not in answers]
    lost = next(_missing(run.chat, answers, there, text), "") or _dropped(run, there)
    if lost:
        raise UserError(
            f"{run.chat.where}: the chat template leaves out {lost}: use a template that has it, set by "
            f"{argument('template')}, or leave it out of the row."
        )


def _missing(chat: Conversation, answers: Sequence[int], elsewhere: Sequence[int], text: str) -> Iterator[str]:
    """What of this row does not stand in the text, in words."""
    for number, message in enumerate(chat.messages):
        if number in elsewhere:
            continue
        said = _content(message)
        if message["role"] == "assistant" and number not in answers and (thought := _THOUGHT.match(said)):
            said = said[thought.end() :]
        if not _stands(said, text):
            yield _words(number + 1, message)
        if number in answers and not _stands(message.get(REASONING[0]) or "", text):
            yield f"the reasoning of message {number + 1}"
        for call in message.get("tool_calls") or ():
            function = call["function"]
            if not all(_stands(leaf, text) for leaf in (function["name"], *_leaves(function["arguments"]))):
                yield f"the call of '{function['name']}' in message {number + 1}"
    for tool in chat.tools or ():
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        parts = (function["name"], function.get("description") or "", *(properties or ()))
        if not all(_stands(part, text) for part in parts):
            yield f"the tool '{function['name']}'"


def _content(message: Mapping[str, Any]) -> str:
    """A message's words; an instruction and its input may stand under headings of their own (alpaca)."""
    return f"{message['instruction']}\n{message['input']}" if "instruction" in message else message["content"]


def _words(number: int, message: Mapping[str, Any]) -> str:
    beside = ", which stand beside a tool call" if message.get("tool_calls") else ""
    return f"the words of message {number} ({message['role']}){beside}"


def _stands(said: Any, text: str) -> bool:
    """Whether each line of what is said stands in the text, as it is or inside JSON; of a number, its digits."""
    if not isinstance(said, str):
        return json.dumps(said) in text or str(said) in text
    if said.strip() in text:
        return True
    parts = (part.strip() for part in _SEAMS.split(said))
    return all(
        part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text
        for part in parts
    )


def _leaves(value: Any) -> Iterator[Any]:
    """The keys and the plain values of nested JSON."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None:
        yield value


def _dropped(run: Template, elsewhere: Sequence[int]) -> str:
    """What the template leaves out of every conversation of this shape, in words, or ""."""
    parts = _Parts()
    messages = [parts.message(number, message) for number, message in enumerate(run.chat.messages, 1)]
    tools = [parts.tool("function" in run.chat.tools[0])] if run.chat.tools else None
    shape = json.dumps([messages, tools, dict(run.chat.options)], default=str)
    wanted = tuple((word, what) for word, what, number in parts.wanted if number - 1 not in elsewhere)
    return _left_out(run.text, tuple(run.names.items()), shape, wanted) if wanted else ""


@functools.lru_cache(maxsize=4096)
def _left_out(
    template: str, names: tuple[tuple[str, Any], ...], shape: str, wanted: tuple[tuple[str, str], ...]
) -> str:
    """What of `wanted`, words and what they stand for, the template does not write."""
    import jinja2

    messages, tools, options = json.loads(shape)
    try:
        text = Template(template, Conversation("", messages, tools, options=options), dict(names)).render(len(messages))
    except jinja2.TemplateError:
        return ""  # it wants the row's own words, and of these every line was looked for
    return next((what for word, what in wanted if word not in text), "")


class _Parts:
    """Makes a conversation of the same shape, each part of it a word that nothing else has.

    Attributes:
      wanted: (word, what it stands for, its message's number from 1, or 0) of all that a template must write.
    """

    def __init__(self) -> None:
        self.wanted: list[tuple[str, str, int]] = []
        self._ids: dict[Any, str] = {}
        self._names: dict[Any, str] = {}

    def message(self, number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message's likeness."""
        made: dict[str, Any] = {"role": message["role"], "content": ""}
        if "instruction" in message:  # which alpaca writes apart
            made |= {key: self._word(f"the {key} of message {number}", number) for key in ("instruction", "input")}
            made["content"] = f"{made['instruction']}\n\n{made['input']}"
        elif message["content"].strip():
            made["content"] = self._word(_words(number, message), number)
        if message.get(REASONING[0]):
            made = reasoned(made, "thought")
        calls = message.get("tool_calls") or ()
        if calls:
            made["tool_calls"] = [self._call(number, call) for call in calls]
        for key in ("tool_call_id", "id"):
            if key in message:
                made[key] = self._id(message[key])
        if "name" in message:
            made["name"] = self._names.setdefault(message["name"], f"zqname{len(self._names)}jx")
        return made

    def tool(self, nested: bool) -> dict[str, Any]:
        """A tool's likeness."""
        name, says, key = (self._word("the tools", 0) for _ in range(3))
        schema = {"type": "object", "properties": {key: {"type": "string", "description": "a"}}, "required": [key]}
        function = {"name": name, "description": says, "parameters": schema}
        return {"type": "function", "function": function} if nested else function

    def _call(self, number: int, call: Mapping[str, Any]) -> dict[str, Any]:
        name = call["function"]["name"]
        what = f"the call of '{name}' in message {number}"
        word = self._names.setdefault(name, f"zqname{len(self._names)}jx")
        self.wanted.append((word, what, number))
        arguments = {self._word(what, number): self._word(what, number)} if call["function"]["arguments"] else {}
        made = {"type": call["type"], "function": {"name": word, "arguments": arguments}}
        return made | ({"id": self._id(call["id"])} if "id" in call else {})

    def _word(self, what: str, number: int) -> str:
        self.wanted.append((f"zq{len(self.wanted)}jx", what, number))
        return self.wanted[-1][0]

    def _id(self, own: Any) -> str:
        """As long as Mistral's templates want one."""
        return self._ids.setdefault(own, f"call{len(self._ids):05d}")
