"""A row's messages, in the one shape in which chat templates know them.

People write them in several dialects: OpenAI's and ShareGPT's names, text as parts, arguments of a call as JSON text,
reasoning under three names, a flag that keeps a turn out of the loss. What is understood is made equal here, and what
is not is refused: nothing that a message says is passed over.
"""

import json
from collections.abc import Mapping
from typing import Any

from specjax.data.read import Row
from specjax.errors import UserError, nearest
from specjax.values import several, shown

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose text is the call, as JSON (LLaMA-Factory, ms-swift)
REASONING = ("reasoning_content", "thinking", "reasoning")  # as Qwen's, gpt-oss's and Gemma's templates call it
# Whether a turn trains, as OpenAI (weight) and axolotl (train, training) say it.
TRAINS = ("weight", "train", "training")
_PARTLY = ("train_detail", "training_detail")

Turns = tuple[list[dict[str, Any]], tuple[int, ...]]


def absent(value: Any) -> bool:
    """Whether a column or a key says nothing: CSV and Arrow spell absence as None, and many as an empty text."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def without_none(value: Any) -> Any:
    """Nested values without the keys whose value is None: Arrow gives every object the keys of all (as TRL)."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list | tuple) else value


def turns(where: str, row: Row, column: str) -> Turns:
    """The messages of a column, and the numbers of the assistant's that do not train.

    Each has `role` and `content`, a string; an assistant's may have `tool_calls`, and its reasoning under all names
    that templates know. Other keys are as they were, for the template to read.

    Args:
      where: the row's place.
      row: the row.
      column: a list of messages, with `role` and `content` or ShareGPT's `from` and `value`.

    Raises:
      UserError: a message that is not understood, with its place.
    """
    messages = value(where, row, column, list)
    if not messages:
        raise UserError(f"{where}: '{column}' is an empty list.")
    made, silent = [], []
    for number, message in enumerate(messages):
        turn, trains = _turn(f"{where}: message {number + 1} of '{column}'", message)
        made.append(turn)
        if not trains:
            silent.append(number)
    return made, tuple(silent)


def value(where: str, row: Row, column: str, kind: type) -> Any:
    """The value of a column that must be there; CSV and Arrow spell absence as None."""
    found = row.get(column)
    if found is None:
        has = several(key for key, v in row.items() if v is not None)
        raise UserError(f"{where} lacks '{column}' (it has {has or 'nothing'}).")
    if not isinstance(found, kind):
        raise UserError(f"{where}: '{column}' is a {type(found).__name__}, and must be a {kind.__name__}.")
    return found


def from_json(where: str, what: str, text: Any) -> Any:
    """The value of a JSON text; anything else as it is."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists in lists
        raise UserError(f"{where}: {what} is not JSON: {error}.") from error


def reasoned(turn: dict[str, Any], reasoning: str) -> dict[str, Any]:
    """The turn with its reasoning, under every name: a template reads the one that it knows."""
    return turn | dict.fromkeys(REASONING, reasoning)


def _turn(place: str, message: Any) -> tuple[dict[str, Any], bool]:
    """A message in its one shape, and whether it may train."""
    name = message.get("role") or message.get("from") if isinstance(message, Mapping) else None
    if not isinstance(name, str):
        raise UserError(f"{place} has neither a 'role' nor a 'from'.")
    if name.lower() not in ROLES:
        raise UserError(f"{place} has the unknown role {shown(name)}.{nearest(name, ROLES)}")
    own = ("role", "from", "content", "value", "tool_calls", "function_call", *TRAINS, *REASONING)
    kept = {key: without_none(one) for key, one in message.items() if one is not None and key not in own}
    turn: dict[str, Any] = {"role": ROLES[name.lower()]}
    said = message.get("content") if message.get("content") is not None else message.get("value")
    calls = message.get("tool_calls")
    if name.lower() in CALLS:
        calls, said = from_json(place, "the call", said), None
        if absent(calls):
            raise UserError(f"{place} has the role '{name}' and no call: give it as JSON, a name and its arguments.")
    elif not absent(message.get("function_call")):
        if not absent(calls):
            raise UserError(f"{place} has both 'tool_calls' and 'function_call': keep one of them.")
        calls = message["function_call"]
    if said is None and absent(calls):
        raise UserError(f"{place} has neither 'content' nor 'value'.")
    turn["content"] = _text(place, said)
    if not absent(calls):
        if turn["role"] != "assistant":
            raise UserError(f"{place} has a tool call, but its role is '{name}': only the assistant calls tools.")
        turn["tool_calls"] = _calls(place, calls)
    trains = _trains(place, turn["role"], message)
    if reasoning := _reasoning(place, turn["role"], message):
        turn = reasoned(turn, reasoning)
    return turn | kept, trains


def _text(place: str, said: Any) -> str:
    """The words of a message: a string, or text parts end to end, as templates write them."""
    if said is None or isinstance(said, str):
        return said or ""
    if not isinstance(said, list | tuple):
        raise UserError(f"{place}: its content is a {type(said).__name__}, and must be a str or a list of text parts.")
    texts = []
    for number, part in enumerate(said, 1):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{place}: part {number} of its content is of the type '{kind}', and specjax trains on text alone: "
                "leave it out, or write it as {'type': 'text', 'text': ...}."
            )
        texts.append(part["text"])
    return "".join(texts)


def _calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls as OpenAI has them, `{"type": "function", "function": {"name", "arguments"}}`, arguments an object."""
    made = []
    calls = from_json(place, "its tool calls", calls)
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        call = without_none(from_json(place, "a tool call", call))
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise UserError(f"{place}: a tool call is an object with a 'name' and 'arguments', not {shown(call)}.")
        arguments = inner.get("arguments", inner.get("parameters"))
        what = f"the arguments of the call of {shown(inner['name'])}"
        arguments = {} if absent(arguments) else from_json(place, what, arguments)
        if not isinstance(arguments, Mapping):
            raise UserError(f"{place}: {what} are no JSON object: {shown(arguments)}.")
        beside = {key: one for key, one in call.items() if key in ("id", "type")}
        function = {"name": inner["name"], "arguments": dict(arguments)}
        made.append({"type": "function"} | beside | {"function": function})
    return made


def _trains(place: str, role: str, message: Mapping[str, Any]) -> bool:
    """Whether a flag of the message lets it train; who is not the assistant never does."""
    if partly := [key for key in _PARTLY if not absent(message.get(key))]:
        raise UserError(f"{place} has '{partly[0]}', but a turn trains as a whole or not at all: use 'train'.")
    said = {key: message[key] for key in TRAINS if message.get(key) is not None}
    for key, flag in said.items():
        if not (isinstance(flag, bool | int | float) and flag in (0, 1)):
            raise UserError(f"{place} has '{key}': {shown(flag)}, but a turn trains or it does not: use 1 or 0.")
        if flag and role != "assistant":
            raise UserError(f"{place} has '{key}': {shown(flag)}, but only the assistant's turns train: leave it out.")
    return all(said.values()) if role == "assistant" else True


def _reasoning(place: str, role: str, message: Mapping[str, Any]) -> str:
    """An assistant's reasoning, under whichever name, or ""."""
    found = {key: message[key] for key in REASONING if not absent(message.get(key))}
    if not found:
        return ""
    key, reasoning = next(iter(found.items()))
    if any(other != reasoning for other in found.values()):
        raise UserError(f"{place} has {' and '.join(found)}, which differ: keep one of them.")
    if not isinstance(reasoning, str) or role != "assistant":
        raise UserError(f"{place} has '{key}': it takes a string, in a turn of the assistant's.")
    return reasoning
