"""The inputs of `generate` and `chat`: adapters by name, and prompts, which may name the adapter that answers."""

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

from specjax.errors import UserError, nearest
from specjax.values import shown

BASE = "base"  # how a prompt, and a chat, calls the model without an adapter


class Prompt(NamedTuple):
    """A text and the adapter that answers it; None: the base; `...`: every given adapter."""

    text: str
    adapter: str | EllipsisType | None = ...


def adapters(given: Sequence[str], *, addressed: bool = True) -> dict[str, str]:
    """Name -> folder, from `NAME=DIR`, or from DIR, whose last part is then the name.

    Args:
      given: as on the command line.
      addressed: whether a prompt may begin with @NAME, which needs a name that can be written there.

    Raises:
      UserError: two adapters have the same name, or a name cannot be addressed.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = Path(text).resolve().name, text
        if name in found:
            raise UserError(f"Two adapters are named '{name}': give one another name, --adapter=NAME={folder}.")
        if addressed and (name == BASE or not re.fullmatch(r"[^\s@]\S*", name)):
            why = "stands for the model without an adapter" if name == BASE else "is no word without spaces and @"
            raise UserError(f"An adapter is named {shown(name)}, which {why}: give another, --adapter=NAME={folder}.")
        found[name] = folder
    return found


def prompts(given: Sequence[str], file: str, names: Collection[str]) -> list[Prompt]:
    """The prompts of the command line and of a file.

    Args:
      given: texts; - is standard input.
      file: a text file with one prompt per line, or `.jsonl`: {"prompt": ..., "adapter": a name, or null for the base}.
      names: the names of the given adapters.

    Raises:
      UserError: there is no prompt, or a prompt names an adapter that was not given.
    """
    found = []
    for text in given:
        where = "--prompt=-" if text == "-" else "--prompt"
        with utf8("the standard input"):
            found.append(addressed(sys.stdin.read() if text == "-" else text, names, where))
    if file.endswith(".jsonl"):
        from specjax.data.read import read  # most prompts are texts

        found += [_row(row, names, where) for where, row in read(file)]
    elif file:
        lines = enumerate(_lines(file), 1)
        found += [addressed(line, names, f"{file}:{number}") for number, line in lines if line.strip()]
    if not any(prompt.text.strip() for prompt in found):
        raise UserError(
            "`specjax generate` needs --prompt: a text, such as --prompt='What is VAT?', or - for standard input."
        )
    return found


def addressed(text: str, names: Collection[str], where: str) -> Prompt:
    """Reads a text that may begin with its adapter, @NAME, or with @base; @@ stands for an @ of the text itself.

    Without adapters an @ is text. With adapters an unknown name is an error, because as text a misspelt name would be
    answered by every adapter.

    Raises:
      UserError: the name is unknown, or the prompt is empty.

    >>> addressed("@hr Who?", ["hr"], ""), addressed("@base Who?", ["hr"], ""), addressed("@@hr", ["hr"], "").text
    (Prompt(text='Who?', adapter='hr'), Prompt(text='Who?', adapter=None), '@hr')
    >>> addressed("@hr Who?", [], "").text
    '@hr Who?'
    """
    if not names or not text.startswith("@"):
        return Prompt(text)
    if text.startswith("@@"):
        return Prompt(text[1:])
    name = text[1:].split(maxsplit=1)[0] if text[1:].strip() else ""
    rest = text[1 + len(name) :].strip()
    adapter = _named(name, names, where, "; write @@ where the text itself begins with @")
    if not rest:
        raise UserError(f"{where}: @{name} names an adapter and asks it nothing: write a question behind it.")
    return Prompt(rest, adapter)


def _named(name: str, names: Collection[str], where: str, more: str = "") -> str | None:
    if name == BASE:
        return None
    if name not in names:
        raise UserError(
            f"{where}: no adapter is named {shown(name)}; there are {', '.join(names)}, and {BASE} for none{more}."
            f"{nearest(name, [*names, BASE])}"
        )
    return name


def _row(row: Mapping[str, Any], names: Collection[str], where: str) -> Prompt:
    """The prompt in a row of a `.jsonl` file."""
    if not isinstance(row.get("prompt"), str) or row.keys() - {"prompt", "adapter"}:
        raise UserError(f'{where}: write {{"prompt": a text}} and, where one adapter answers it, "adapter": its name.')
    if "adapter" not in row:
        return Prompt(row["prompt"])
    if row["adapter"] is not None and not isinstance(row["adapter"], str):
        raise UserError(f"{where}: adapter is {shown(row['adapter'])}: give a name, or null for the base.")
    return Prompt(row["prompt"], None if row["adapter"] is None else _named(row["adapter"], names, where))


@contextmanager
def utf8(what: str) -> Iterator[None]:
    """Reads text in this context.

    Raises:
      UserError: the text is not UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text: {error.reason} at byte {error.start}: save it as UTF-8.") from error


def _lines(file: str) -> list[str]:
    try:
        with utf8(file):
            return Path(file).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"There is no file {file}: --prompt_file is a text file with a prompt per line.") from None
