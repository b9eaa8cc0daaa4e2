"""Foreign texts on the page: characters that cannot be shown made visible, long texts cut, differing words marked."""

import difflib
import re
import unicodedata
from typing import Any, NamedTuple

LONGEST = 1500  # characters of an answer that are shown
# What takes over the order of the letters around it: shown by its name, as a reader would not see it.
_DIRECTIONS = {
    "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO", "\u202e": "RLO",
    "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI",
}  # fmt: skip


# A blank, what ends a word, or a word with all that is within it.
_WORDS = re.compile(r"\s+|[.,;:!?)\]]+(?=\s|$)|(?:(?![.,;:!?)\]]+(?:\s|$))\S)+")


class Piece(NamedTuple):
    """A part of a text and whether it is marked."""

    text: str
    marked: bool


class Shown(NamedTuple):
    """A text as the page shows it: its pieces, and the number of characters left out after them."""

    pieces: list[Piece]
    left: int


def clean(value: Any) -> Any:
    r"""A value as text for the page: no lone surrogates, control characters as pictures, no direction overrides.

    >>> clean("a\x00\x1b\u202eb\ud800\n"), clean(None), clean(3)
    ('a␀␛‹RLO›b�\n', '', '3')
    """
    if value is None:
        return ""
    if hasattr(value, "__html__"):  # ours, and safe
        return value
    return "".join(map(_letter, str(value)))


def _letter(letter: str) -> str:
    if letter in _DIRECTIONS:
        return f"‹{_DIRECTIONS[letter]}›"
    kind = unicodedata.category(letter)
    if kind == "Cs":
        return "\ufffd"
    if kind != "Cc" or letter in "\n\t":
        return letter
    return chr(0x2400 + ord(letter)) if ord(letter) < 0x20 else "\u2421" if letter == "\x7f" else "\ufffd"


def cut(text: str, most: int = LONGEST) -> tuple[str, int]:
    """The beginning of a text, cut after a word if possible, and the number of characters left out.

    >>> cut("one two three", 9), cut("onetwothree", 6), cut("one", 9)
    (('one two', 6), ('onetwo', 5), ('one', 0))
    """
    if len(text) <= most:
        return text, 0
    kept = text[:most]
    if not text[most].isspace() and (words := re.match(r"(.*\S)\s", kept, re.DOTALL)):
        kept = words[1]
    kept = kept.rstrip() or kept
    return kept, len(text) - len(kept)


def plain(text: str) -> Shown:
    """A text, cut, without marks."""
    kept, left = cut(text)
    return Shown([Piece(kept, False)] if kept.strip() else [], left)


def differences(text: str, reference: str) -> Shown:
    """A text, cut, with marks on words that the reference does not have in that place.

    >>> differences("tail prints ten lines", "tail prints 10 lines").pieces
    [Piece(text='tail prints ', marked=False), Piece(text='ten', marked=True), Piece(text=' lines', marked=False)]
    """
    (kept, left), (other, _) = cut(text), cut(reference)
    if not kept.strip():
        return Shown([], left)
    words, others = (_WORDS.findall(one) for one in (kept, other))
    matcher = difflib.SequenceMatcher(None, others, words, autojunk=False)
    pieces: list[Piece] = []
    for what, _, _, start, end in matcher.get_opcodes():
        part = "".join(words[start:end])
        if what == "equal" or not part:
            pieces.append(Piece(part, False))
            continue
        core = part.strip()
        lead = part[: len(part) - len(part.lstrip())]
        pieces += [Piece(lead, False), Piece(core, True), Piece(part[len(lead) + len(core) :], False)]
    return Shown(_joined(pieces), left)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Joins neighbours with the same mark, and marked ones across a blank; drops empty pieces."""
    found: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        if len(found) > 1 and piece.marked and found[-1].text.isspace() and found[-2].marked:
            blank, before = found.pop(), found.pop()
            piece = Piece(before.text + blank.text + piece.text, True)
        elif found and found[-1].marked == piece.marked:
            piece = Piece(found.pop().text + piece.text, piece.marked)
        found.append(piece)
    return found
