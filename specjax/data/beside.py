"""What a row says in columns beside its messages, or beside its prompt and answer: all of it is used, or refused.

A system prompt, earlier turns, tools, reasoning and the template's options are read as TRL and LLaMA-Factory read them.
"""

from collections.abc import Mapping
from typing import Any

from specjax.data.example import Conversation
from specjax.data.messages import REASONING, absent, from_json, value, without_none
from specjax.data.read import Row
from specjax.errors import UserError
from specjax.values import shown

# Role -> the columns that may have it, of any format but raw text.
BESIDE = {
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "history": ("history",),
    "reasoning_content": REASONING,
}
EARLIER = ("history", "reasoning_content")  # which messages have no need of, for they say these themselves
_NO_TEXT = ("images", "videos", "audios")
_OPTIONS = (
    *("messages", "conversations", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("return_assistant_tokens_mask", "tokenize", "bos_token", "eos_token"),
)  # what the template is told otherwise


def column_of(row: Row, mapping: Mapping[str, str], role: str) -> str:
    """The column in which this row says something of a role of `BESIDE`, or ""."""
    names = (mapping[role],) if role in mapping else ()
    return next((name for name in (*names, *BESIDE[role]) if not absent(row.get(name))), "")


def check(where: str, row: Row, mapping: Mapping[str, str], *roles: str) -> None:
    """Raises `UserError` where a row says what would be lost: what is no text, and these `roles` of `BESIDE`."""
    for column in _NO_TEXT:
        if not absent(row.get(column)):
            raise UserError(f"{where} has '{column}', and specjax trains on text alone: leave such rows out.")
    if not roles and ("messages" in mapping or "conversations" in mapping or "chosen" in mapping):
        roles = EARLIER
    for role in roles:
        if column := column_of(row, mapping, role):
            raise UserError(f"{where} has '{column}', which would be lost: put it into the messages.")
    # TRL's unpaired preferences: an answer with the label False is one that nobody wants.
    if row.get("label") is False and "completion" in mapping:
        raise UserError(f"{where} is labelled false, an answer that is not wanted: leave such rows out.")


def history(where: str, row: Row, mapping: Mapping[str, str]) -> list[dict[str, Any]]:
    """Earlier turns, of which the assistant's train too: pairs of a question and its answer (LLaMA-Factory's)."""
    column = column_of(row, mapping, "history")
    found = []
    for number, pair in enumerate(value(where, row, column, list) if column else (), 1):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(
                f"{where}: turn {number} of '{column}' is no pair of texts, [question, answer]: {shown(pair)}."
            )
        found += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return found


def beside(where: str, row: Row, mapping: Mapping[str, str], said: Conversation) -> Conversation:
    """The conversation with what other columns of its row say: a system prompt, tools, the template's options."""
    if column := column_of(row, mapping, "system"):
        system, head = value(where, row, column, str), said.messages[0]
        told = head["role"] in ("system", "developer")
        if told and head["content"] != system:
            raise UserError(f"{where} has '{column}' beside a {head['role']} message that differs: keep one of them.")
        if not told:
            messages = [{"role": "system", "content": system}, *said.messages]
            first = said.first + 1 if said.first else 0
            said = said._replace(messages=messages, first=first, silent=tuple(i + 1 for i in said.silent))
    if column := column_of(row, mapping, "chat_template_kwargs"):
        options = from_json(where, f"'{column}'", row[column])
        if not isinstance(options, Mapping):
            raise UserError(f"{where}: '{column}' is no JSON object: give the template's options by name.")
        if own := [name for name in options if name in _OPTIONS]:
            raise UserError(f"{where}: '{column}' has '{own[0]}', which the template is told otherwise: leave it out.")
        said = said._replace(options=without_none(options))
    return said._replace(tools=_tools(where, row, column_of(row, mapping, "tools")))


def _tools(where: str, row: Row, column: str) -> list[Any] | None:
    """The tools, a list or (as TRL has them) JSON text; None where there are none."""
    text = row.get(column)
    tools = from_json(where, f"'{column}'", None if isinstance(text, str) and not text.strip() else text)
    if absent(tools):
        return None
    if not isinstance(tools, list | tuple):
        raise UserError(f"{where}: '{column}' is a {type(tools).__name__}, and must be a list of tools.")
    tools = [without_none(from_json(where, f"a tool of '{column}'", tool)) for tool in tools]
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise UserError(f"{where}: a tool of '{column}' is no object with a 'name': {shown(tool)}.")
    return tools
