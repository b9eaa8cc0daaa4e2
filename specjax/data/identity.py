"""What tokens are made from, as digests: the source's contents, tokenizer, template, and this package's own code."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from specjax.data.cache import digest
from specjax.data.read import Opened, Row

_BLOCK = 1 << 20  # bytes


class Contents:
    """What a source holds now.

    Attributes:
      digest: of the files' bytes, or of the rows given; None: rows that have no digest (not JSON), or can be read but
        once.
      total: how many rows; None: not known. Of JSON lines, blank ones count too.
    """

    def __init__(self, reading: Opened):
        self._files = reading.files
        self._stamps = self._stamp()
        self.total = reading.total
        if reading.files is not None:
            self.digest: str | None = self._of_files(reading.files)
        else:
            self.digest = None if reading.once else _of_rows(row for _, row in reading.rows())

    def changed(self) -> bool:
        """Whether a file was written to since."""
        return self._stamp() != self._stamps

    def _stamp(self) -> list[tuple[int, int]]:
        return [(state.st_size, state.st_mtime_ns) for state in (path.stat() for path in self._files or ())]

    def _of_files(self, paths: Iterable[Path]) -> str:
        parts, lines, only_lines = [], 0, True
        for path in paths:
            total = hashlib.blake2b(digest_size=16)
            only_lines &= path.suffix == ".jsonl"
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    total.update(block)
                    lines += block.count(b"\n") if only_lines else 0
            parts += [path.suffix, total.hexdigest()]
        if only_lines and self.total is None:
            self.total = lines
        return digest(*parts)


def _of_rows(rows: Iterable[Row]) -> str | None:
    total = hashlib.blake2b(digest_size=16)
    try:
        for row in rows:
            total.update(json.dumps(row).encode() + b"\n")
    except (TypeError, ValueError, RecursionError):
        return None
    return total.hexdigest()


def side(row: Row, seed: int) -> int:
    """A number from 0 to 2**64 - 1 that depends on the seed and on what the row says, not on where it stands."""
    text = json.dumps(row, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest(), "little")


def of_tokens(contents: str, tokenizer: Any, template: str | None, how: Mapping[str, Any]) -> str | None:
    """The digest of all that a source's tokens depend on; None for a slow tokenizer, which does not tell what it is.

    Args:
      contents: of the source.
      tokenizer: a Hugging Face tokenizer.
      template: the argument of `specjax.data.load`; the tokenizer's own may serve too.
      how: the other arguments, JSON-able.
    """
    if not tokenizer.is_fast:
        return None
    tokenizer("a")  # what an earlier call of the user's cut or padded to is written down with it, until the next call
    told = {
        "class": type(tokenizer).__qualname__,
        "special": tokenizer.special_tokens_map,
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "split": getattr(tokenizer, "split_special_tokens", False),
        "template": tokenizer.chat_template,
    }
    chosen = Path(template).read_text(encoding="utf-8") if template and _is_file(template) else template
    return digest(
        contents,
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(told, sort_keys=True, default=str),
        json.dumps([chosen, how], sort_keys=True),
        code(),
    )


def _is_file(template: str) -> bool:
    try:
        return Path(template).is_file()
    except (OSError, ValueError):  # a template's text is too long for a name
        return False


@functools.cache
def code() -> str:
    """Of this package's files and the libraries that make tokens: who changes one need not think of a version."""
    parts = [f"{name}=={version(name)}" for name in ("jinja2", "tokenizers", "transformers")]
    for file in _files_below(files("specjax.data")):
        parts += [file.name, file.read_bytes()]
    return digest(*parts)


def _files_below(folder: Any) -> Iterator[Any]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _files_below(entry)
        elif entry.name.endswith((".py", ".jinja")):
            yield entry
