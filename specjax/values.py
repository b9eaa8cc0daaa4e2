"""What a value of a foreign file may be: said in words, and checked at the door.

A file's reader has one table, key -> `Kind`, and what comes through needs no further question.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from specjax.errors import UserError

INT32 = 2**31 - 1
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


class Kind(NamedTuple):
    """What a value may be: in words that go on from "give it", and as a check."""

    words: str
    fits: Callable[[Any], bool]


def whole(least: int = 0, most: int = INT32) -> Kind:
    """A whole number of a range; true is none."""
    words = f"a whole number of at least {least}" if most == INT32 else f"a whole number from {least} to {most:,}"
    return Kind(words, lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most)


def number(words: str, fits: Callable[[float], bool] = lambda v: True) -> Kind:
    """A finite number for which `fits` holds; true is none, nor is what no float holds."""

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return abs(value) <= 1e300 and math.isfinite(value) and fits(value)

    return Kind(words, holds)


def optional(kind: Kind) -> Kind:
    """Also null."""
    return Kind(f"{kind.words}, or null", lambda v: v is None or kind.fits(v))


def either(*kinds: Kind) -> Kind:
    """Any of some kinds."""
    return Kind(" or ".join(kind.words for kind in kinds), lambda v: any(kind.fits(v) for kind in kinds))


def listed(kind: Kind, words: str) -> Kind:
    """A list, each of whose entries is of a kind."""
    return Kind(words, lambda v: isinstance(v, list) and all(kind.fits(one) for one in v))


def mapped(kind: Kind, words: str) -> Kind:
    """An object, each of whose values is of a kind."""
    return Kind(words, lambda v: isinstance(v, dict) and all(kind.fits(one) for one in v.values()))


ANYTHING = Kind("anything", lambda v: True)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
TEXT = Kind("a string", lambda v: isinstance(v, str))
OBJECT = mapped(ANYTHING, "an object")
NAMES = listed(TEXT, "a list of names")
POSITIVE = number("a number above 0", lambda v: v > 0)


def check(found: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Raises `UserError` at the first key whose value is of another kind than it must be; absent ones are passed over.

    Args:
      found: of a file.
      kinds: key -> what its value may be.
      where: the file, and what of it, to be named.
    """
    for key, kind in kinds.items():
        if key in found and not kind.fits(found[key]):
            raise UserError(f"{where}: {key} is {shown(found[key])}: give it {kind.words}.")


def several(names: Iterable[str]) -> str:
    """Names in a sentence: the first of them, and the beginnings of long ones.

    >>> several("abc"), several(["x" * 99])
    ('a, b, c', 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…')
    """
    found = [name if name.isprintable() else repr(name)[1:-1] for name in names]
    shortened = [name if len(name) <= 40 else f"{name[:40]}…" for name in found[:20]]
    return ", ".join(shortened) + (", …" if len(found) > 20 else "")


def shown(value: Any) -> str:
    """A value in a sentence: as it is, or what there is room for of one that is long or deep.

    >>> shown([1, "a"]), len(shown("x" * 200)), shown(10**50)
    ("[1, 'a']", 80, 'a number of over 40 digits')
    """
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of over 40 digits"
    text = _SHORT.repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
