"""Prints the command's output: a word, and beside it a value."""

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
    """Prints one pair, wrapped; a command stays on one line, so that it can be copied."""
    if value.startswith("specjax "):
        print(f"    {value}")
        return
    indent = " " * (INDENT + 2)
    first, more = f"  {what:<{INDENT}}{mark}", indent + " " * len(mark)
    folder = textwrap.TextWrapper(
        WIDTH, initial_indent=first, subsequent_indent=more, break_on_hyphens=False, break_long_words=False
    )
    print(folder.fill(value))


def duration(seconds: float) -> str:
    """A duration for people, to two digits.

    >>> [duration(s) for s in (0.3, 62, 3600, 86400 * 12)]
    ['0.3 s', '62 s', '60 min', '12 days']
    """
    units = ((1, "s", 120), (60, "min", 120), (3600, "h", 72))
    size, unit = next(((size, unit) for size, unit, most in units if seconds < most * size), (86400, "days"))
    return f"{seconds / size:.2g} {unit}"
