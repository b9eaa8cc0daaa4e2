"""What a row is: its format, told by its columns, and how its columns become an example.

`recognise` finds the format, and `examples` turns rows of any format into `Text`, `Pair`, `Conversation` or
`Preference`. A row that says what its example could not is refused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from specjax.data.beside import BESIDE, EARLIER, beside, check, column_of, history
from specjax.data.example import Conversation, Example, Pair, Preference, Text
from specjax.data.messages import TRAINS, reasoned, turns, value
from specjax.data.read import Row
from specjax.errors import UserError, argument, nearest
from specjax.values import several

# Format -> its columns: alternatives are separated by "|", optional ones end in "?". The order is that of recognition:
# structured columns win over a flat `text` beside them (tatsu-lab/alpaca has both). For what else a row may say, see
# `specjax.data.beside`.
FORMATS = {
    "messages": ("messages", "tools?"),
    "conversations": ("conversations", "tools?"),
    "prompt": ("prompt", "completion"),
    "instruct": ("instruction", "response|output", "input?"),
    "preference": ("chosen", "rejected", "prompt?", "tools?"),
    "text": ("text",),
}


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
    roles = {part.rstrip("?").split("|")[0] for parts in FORMATS.values() for part in parts} | {*BESIDE}
    columns = {"response" if role == "output" else role: column for role, column in columns.items()}
    for role, column in columns.items():
        if role not in roles:
            raise UserError(f"{argument('columns')} names an unknown role '{role}'.{nearest(role, roles)}")
        if column not in found:
            raise UserError(
                f"{argument(f'columns.{role}')} is '{column}', a column that is not there; the data has "
                f"{several(found)}.{nearest(column, found)}"
            )
    if format != "auto" and isinstance(format, str) and format not in FORMATS:
        raise UserError(
            f"{argument('format')} is '{format}', which is unknown: use auto, {', '.join(FORMATS)}."
            f"{nearest(format, FORMATS)}"
        )
    allowed = list(FORMATS) if format == "auto" else [format] if isinstance(format, str) else list(format)
    for name in allowed:
        others = BESIDE if name != "text" else {}
        if not columns.keys() <= {part.rstrip("?").split("|")[0] for part in FORMATS[name]} | {*others}:
            continue  # an override tells which format is meant
        mapping: dict[str, str] = {}
        for part in FORMATS[name]:
            role, *names = part.rstrip("?").split("|")
            present = [column for column in (role, *names) if column in found]
            if role in columns or present or part.endswith("?"):
                # A row further on may have an optional column that none had so far: it keeps its own name.
                mapping[role] = columns.get(role) or [*present, role][0]
        if len(mapping) == len(FORMATS[name]):
            for role, aliases in others.items():
                if present := [column for column in (columns.get(role, role), *aliases) if column in found]:
                    mapping.setdefault(role, present[0])
            return name, mapping
    known = "; ".join(f"{name} ({', '.join(FORMATS[name])})" for name in allowed)
    raise UserError(
        f"the data's columns ({several(found)}) make up no known format: {known}; "
        f"map them with {argument('columns')}, a role to a column, such as response to answer."
    )


def examples(
    rows: Iterable[tuple[str, Row]], format: str, mapping: Mapping[str, str], *, chat: bool = False
) -> Iterator[Example]:
    """Rows of one format, each as an `Example`.

    Args:
      rows: `(where, row)`.
      format: one of `FORMATS`.
      mapping: role -> column, as `recognise` has it.
      chat: whether strings go through a chat template: a pair of them is a conversation then.

    Raises:
      UserError: a row that lacks a column, or says what its example could not, with its place.
    """
    make = {
        "text": _text,
        "prompt": _prompt,
        "instruct": _instruct,
        "preference": _preference,
        "messages": _messages,
        "conversations": _messages,
    }[format]
    for where, row in rows:
        if format != "text":
            check(where, row, mapping)
        yield make(where, row, mapping, chat)


def _text(where: str, row: Row, mapping: Mapping[str, str], chat: bool) -> Example:
    return Text(where, value(where, row, mapping["text"], str))


def _prompt(where: str, row: Row, mapping: Mapping[str, str], chat: bool) -> Example:
    """`{prompt, completion}`: strings, or (as TRL has it) two lists of messages of which the second is trained."""
    if isinstance(row.get(mapping["prompt"]), list):
        (prompt, _), (completion, silent) = (turns(where, row, mapping[role]) for role in ("prompt", "completion"))
        check(where, row, mapping, *EARLIER)
        first = len(prompt)
        said = Conversation(where, prompt + completion, None, first, tuple(first + i for i in silent))
        return beside(where, row, mapping, said)
    prompt, completion = (value(where, row, mapping[role], str) for role in ("prompt", "completion"))
    return _pair(where, row, mapping, chat, {"role": "user", "content": prompt}, completion) or Pair(
        where, prompt, completion
    )


def _instruct(where: str, row: Row, mapping: Mapping[str, str], chat: bool) -> Example:
    """A pair as a conversation, the input after the instruction and a blank line.

    The user's message also bears both apart, for alpaca's template, which sets them under headings of their own.
    """
    instruction = value(where, row, mapping["instruction"], str)
    response = value(where, row, mapping["response"], str)
    extra = row.get(mapping["input"]) or ""
    if not isinstance(extra, str):
        raise UserError(f"{where}: '{mapping['input']}' is a {type(extra).__name__}, and must be a str.")
    user = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction}
    if extra.strip():
        user |= {"instruction": instruction, "input": extra}
    said = _pair(where, row, mapping, True, user, response)
    assert said is not None
    return said


def _pair(
    where: str, row: Row, mapping: Mapping[str, str], chat: bool, user: dict[str, Any], answer: str
) -> Conversation | None:
    """A question and its answer as a conversation; None where there is no template, and nothing that needs one."""
    if not chat:
        if extra := [column for role in BESIDE if (column := column_of(row, mapping, role))]:
            raise UserError(
                f"{where} has '{extra[0]}' beside prompt and completion, which are joined as they are without a "
                f"chat template, so it would be lost: set {argument('template')}, or leave '{extra[0]}' out."
            )
        return None
    turn: dict[str, Any] = {"role": "assistant", "content": answer}
    if column := column_of(row, mapping, "reasoning_content"):
        turn = reasoned(turn, value(where, row, column, str))
    return beside(where, row, mapping, Conversation(where, [*history(where, row, mapping), user, turn]))


def _preference(where: str, row: Row, mapping: Mapping[str, str], chat: bool) -> Example:
    """`{prompt, chosen, rejected}`, strings or messages.

    As TRL has it, the prompt may be left out: then it is what both answers begin with. It is left out, too, where it is
    a string beside whole conversations (ultrafeedback_binarized).
    """
    prompt = row.get(mapping["prompt"])
    if isinstance(row.get(mapping["chosen"]), list):
        answers = [_whole(where, row, mapping[role]) for role in ("chosen", "rejected")]
        if isinstance(prompt, list):
            before = _whole(where, row, mapping["prompt"])
            answers = [before + answer for answer in answers]
            shared = len(before)
        else:
            shared = _shared(*answers)
        if not shared:
            raise UserError(
                f"{where}: '{mapping['chosen']}' and '{mapping['rejected']}' share no first message to be the prompt: "
                f"give '{mapping['prompt']}' as a list of messages."
            )
        sides = (beside(where, row, mapping, Conversation(where, answer, None, shared)) for answer in answers)
        return Preference(where, *sides)
    texts = [value(where, row, mapping[role], str) for role in ("chosen", "rejected")]
    if prompt is not None:
        prompt = value(where, row, mapping["prompt"], str)
    else:
        shared = _shared(*texts)
        if shared and texts[0][shared] != texts[1][shared]:
            shared -= texts[0][shared - 1] == " "  # the space belongs to the answers
        prompt, texts = texts[0][:shared], [text[shared:] for text in texts]
    user = {"role": "user", "content": prompt}
    made = [_pair(where, row, mapping, chat, user, text) for text in texts]
    if chat:
        return Preference(where, *(said._replace(first=len(said.messages) - 1) for said in made if said))
    return Preference(where, *(Pair(where, prompt, text) for text in texts))


def _whole(where: str, row: Row, column: str) -> list[dict[str, Any]]:
    """The messages of a preference's column: what follows the prompt trains, all of it."""
    messages, silent = turns(where, row, column)
    if silent:
        raise UserError(
            f"{where}: message {silent[0] + 1} of '{column}' is kept out of the loss, but an answer that is compared "
            f"counts as a whole: leave out the flag ({', '.join(TRAINS)})."
        )
    return messages


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many first messages, or characters, two answers share; something is left of the shorter one."""
    least = min(len(chosen), len(rejected))
    return next((i for i in range(least) if chosen[i] != rejected[i]), max(0, least - 1))


def _messages(where: str, row: Row, mapping: Mapping[str, str], chat: bool) -> Example:
    messages, silent = turns(where, row, mapping.get("messages") or mapping["conversations"])
    return beside(where, row, mapping, Conversation(where, messages, silent=silent))
