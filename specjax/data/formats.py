"""What a row is: its format, told by its columns, and the shape in which the rest of the package knows it.

`recognise` finds the format, and `examples` turns rows of any format into `Text`, `Pair`, `Conversation` or
`Preference`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from specjax.data.read import Row
from specjax.errors import UserError, argument, nearest

# Format -> its columns: alternatives are separated by "|", optional ones end in "?". The order is that of recognition:
# structured columns win over a flat `text` beside them (tatsu-lab/alpaca has both).
FORMATS = {
    "messages": ("messages", "tools?"),
    "conversations": ("conversations", "tools?"),
    "prompt": ("prompt", "completion"),
    "instruct": ("instruction", "response|output", "input?"),
    "preference": ("chosen", "rejected", "prompt?", "tools?"),
    "text": ("text",),
}

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


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
    """Messages for a chat template; the assistant's turns from message `first` on are the ones to train."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first: int = 0


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
        case Conversation(_, messages, _, first):
            answers = [turn for turn in messages[first:] if turn["role"] == "assistant"]
            return not any(str(turn["content"]).strip() or turn.get("tool_calls") for turn in answers)
        case Preference(_, chosen, rejected):
            return blank(chosen) or chosen == rejected


def recognise(
    found: Sequence[str],
    format: str | Sequence[str] = "auto",
    columns: Mapping[str, str] | None = None,
    *,
    own_columns: bool = False,
) -> tuple[str, dict[str, str]]:
    """The format that the columns tell, and the column of each of its roles.

    Args:
        found: the columns of the first row.
        format: "auto", one of `FORMATS`, or several of them to choose from.
        columns: role -> column, where the data calls a role by another name.
        own_columns: whether data that has none of the columns that `columns` names, and whose own make up a format, is
            taken as it is.

    Raises:
        UserError: an unknown role or format, a column that is not there, or columns that make up no format.

    >>> recognise(["instruction", "output", "id"])
    ('instruct', {'instruction': 'instruction', 'response': 'output', 'input': 'input'})
    >>> recognise(["question", "answer"], columns={"instruction": "question", "response": "answer"})
    ('instruct', {'instruction': 'question', 'response': 'answer', 'input': 'input'})
    >>> recognise(["text"], columns={"instruction": "question", "response": "answer"}, own_columns=True)
    ('text', {'text': 'text'})
    """
    columns = dict(columns or {})
    if own_columns and columns and not set(columns.values()) & set(found):
        try:
            return recognise(found, format)
        except UserError:
            pass  # then what is wrong is that the columns named are not there
    roles = {part.rstrip("?").split("|")[0] for parts in FORMATS.values() for part in parts}
    columns = {"response" if role == "output" else role: column for role, column in columns.items()}
    for role, column in columns.items():
        if role not in roles:
            raise UserError(f"{argument('columns')} names an unknown role '{role}'.{nearest(role, roles)}")
        if column not in found:
            raise UserError(
                f"{argument(f'columns.{role}')} is '{column}', a column that is not there; the data has "
                f"{', '.join(found)}.{nearest(column, found)}"
            )
    if format != "auto" and isinstance(format, str) and format not in FORMATS:
        raise UserError(
            f"{argument('format')} is '{format}', which is unknown: use auto, {', '.join(FORMATS)}."
            f"{nearest(format, FORMATS)}"
        )
    allowed = list(FORMATS) if format == "auto" else [format] if isinstance(format, str) else list(format)
    for name in allowed:
        if not columns.keys() <= {part.rstrip("?").split("|")[0] for part in FORMATS[name]}:
            continue  # an override tells which format is meant
        mapping: dict[str, str] = {}
        for part in FORMATS[name]:
            role, *others = part.rstrip("?").split("|")
            present = [column for column in (role, *others) if column in found]
            if role in columns or present or part.endswith("?"):
                # A row further on may have an optional column that none had so far: it keeps its own name.
                mapping[role] = columns.get(role) or [*present, role][0]
        if len(mapping) == len(FORMATS[name]):
            return name, mapping
    known = "; ".join(f"{name} ({', '.join(FORMATS[name])})" for name in allowed)
    raise UserError(
        f"the data's columns ({', '.join(found)}) make up no known format: {known}; "
        f"map them with {argument('columns')}, a role to a column, such as response to answer."
    )


def examples(rows: Iterable[tuple[str, Row]], format: str, mapping: Mapping[str, str]) -> Iterator[Example]:
    """Rows of one format, each as an `Example`; a row that lacks a column is an error with its place."""
    make = {
        "text": _text,
        "prompt": _prompt,
        "instruct": _instruct,
        "preference": _preference,
        "messages": _messages,
        "conversations": _messages,
    }[format]
    for where, row in rows:
        yield make(where, row, mapping)


def _value(where: str, row: Row, column: str, kind: type) -> Any:
    """The value of a column that must be there; CSV and Arrow spell absence as None."""
    value = row.get(column)
    if value is None:
        has = ", ".join(key for key, v in row.items() if v is not None)
        raise UserError(f"{where} lacks '{column}' (it has {has or 'nothing'}).")
    if not isinstance(value, kind):
        raise UserError(f"{where}: '{column}' is a {type(value).__name__}, and must be a {kind.__name__}.")
    return value


def _text(where: str, row: Row, mapping: Mapping[str, str]) -> Example:
    return Text(where, _value(where, row, mapping["text"], str))


def _prompt(where: str, row: Row, mapping: Mapping[str, str]) -> Example:
    """`{prompt, completion}`: strings, or (as TRL has it) two lists of messages of which the second is trained."""
    if isinstance(row.get(mapping["prompt"]), list):
        prompt, completion = (_turns(where, row, mapping[role]) for role in ("prompt", "completion"))
        return Conversation(where, prompt + completion, first=len(prompt))
    return Pair(where, *(_value(where, row, mapping[role], str) for role in ("prompt", "completion")))


def _instruct(where: str, row: Row, mapping: Mapping[str, str]) -> Example:
    """A pair as a conversation, the input after the instruction and a blank line.

    The user's message also bears both apart, for alpaca's template, which sets them under headings of their own.
    """
    instruction = _value(where, row, mapping["instruction"], str)
    response = _value(where, row, mapping["response"], str)
    extra = row.get(mapping["input"]) or ""
    if not isinstance(extra, str):
        raise UserError(f"{where}: '{mapping['input']}' is a {type(extra).__name__}, and must be a str.")
    user = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction}
    if extra.strip():
        user |= {"instruction": instruction, "input": extra}
    return Conversation(where, [user, {"role": "assistant", "content": response}])


def _preference(where: str, row: Row, mapping: Mapping[str, str]) -> Example:
    """`{prompt, chosen, rejected}`, strings or messages.

    As TRL has it, the prompt may be left out: then it is what both answers begin with. It is left out, too, where it is
    a string beside whole conversations (ultrafeedback_binarized).
    """
    prompt = row.get(mapping["prompt"])
    if isinstance(row.get(mapping["chosen"]), list):
        answers = [_turns(where, row, mapping[role]) for role in ("chosen", "rejected")]
        if isinstance(prompt, list):
            before = _turns(where, row, mapping["prompt"])
            answers = [before + turns for turns in answers]
            shared = len(before)
        else:
            shared = _shared(*answers)
        if not shared:
            raise UserError(
                f"{where}: '{mapping['chosen']}' and '{mapping['rejected']}' share no first message to be the prompt: "
                f"give '{mapping['prompt']}' as a list of messages."
            )
        tools = _tools(where, row, mapping)
        return Preference(where, *(Conversation(where, turns, tools, shared) for turns in answers))
    texts = [_value(where, row, mapping[role], str) for role in ("chosen", "rejected")]
    if prompt is not None:
        prompt = _value(where, row, mapping["prompt"], str)
        return Preference(where, *(Pair(where, prompt, text) for text in texts))
    shared = _shared(*texts)
    if shared and texts[0][shared] != texts[1][shared]:
        shared -= texts[0][shared - 1] == " "  # the space belongs to the answers
    return Preference(where, *(Pair(where, text[:shared], text[shared:]) for text in texts))


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many first messages, or characters, two answers share; something is left of the shorter one."""
    least = min(len(chosen), len(rejected))
    return next((i for i in range(least) if chosen[i] != rejected[i]), max(0, least - 1))


def _messages(where: str, row: Row, mapping: Mapping[str, str]) -> Example:
    column = mapping.get("messages") or mapping["conversations"]
    return Conversation(where, _turns(where, row, column), _tools(where, row, mapping))


def _tools(where: str, row: Row, mapping: Mapping[str, str]) -> list[Any] | None:
    tools = row.get(mapping["tools"])
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists in lists
            raise UserError(f"{where}: '{mapping['tools']}' is not JSON: {error}.") from error
    return tools or None


def _turns(where: str, row: Row, column: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, from those or from ShareGPT's `from` and `value`; role names made equal."""
    turns = []
    for number, message in enumerate(_value(where, row, column, list), 1):
        role = message.get("role") or message.get("from") if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise UserError(f"{where}: message {number} of '{column}' has neither a 'role' nor a 'from'.")
        if role.lower() not in ROLES:
            raise UserError(
                f"{where}: message {number} of '{column}' has the unknown role '{role}'.{nearest(role, ROLES)}"
            )
        # Arrow fills the keys that other rows have with None.
        turn = {k: v for k, v in message.items() if v is not None and k not in ("from", "value")}
        turn["role"] = ROLES[role.lower()]
        if "content" not in turn:
            if message.get("value") is None and not turn.get("tool_calls"):
                raise UserError(f"{where}: message {number} of '{column}' has neither 'content' nor 'value'.")
            turn["content"] = message.get("value") or ""
        turns.append(turn)
    if not turns:
        raise UserError(f"{where}: '{column}' is an empty list.")
    return turns
