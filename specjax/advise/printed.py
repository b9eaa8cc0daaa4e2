"""How the command prints what it says: a word, and beside it what is said of it."""

import textwrap
from collections.abc import Iterable

WIDTH, INDENT = 116, 18


def say(title: str, entries: Iterable[tuple[str, str]]) -> None:
    """Prints (what, value) pairs under a title, and an empty line."""
    print(title)
    for what, value in entries:
        entry(what, value)
    print()


def entry(what: str, value: str, mark: str = "") -> None:
    """Prints one, folded; a command stays on its line, to be copied."""
    if value.startswith("specjax "):
        print(f"    {value}")
        return
    indent = " " * (INDENT + 2)
    first, more = f"  {what:<{INDENT}}{mark}", indent + " " * len(mark)
    folder = textwrap.TextWrapper(
        WIDTH, initial_indent=first, subsequent_indent=more, break_on_hyphens=False, break_long_words=False
    )
    print(folder.fill(value))
