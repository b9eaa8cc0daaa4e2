"""What foreign files ask to be computed, templates and patterns, in a process of its own with limits.

A Jinja sandbox keeps a template from the interpreter, but not from an endless loop, nor from all memory there is; a
regular expression can take longer than the universe. Neither can be interrupted for sure in this process, so they run
in another, which the system ends. It is started when it is first asked, and asked again and again.
"""

import atexit
import contextlib
import json
import marshal
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax.errors import UserError

SECONDS = 20.0  # for one answer
MEMORY = 4 << 30  # bytes that the process may have
OUTPUT = 64 << 20  # bytes of an answer, beside eight times those of what was asked

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", re.IGNORECASE)  # of the environment: not handed on


class Exceeded(Exception):
    """An answer took more time, memory or room than it may; `answered` were given before it."""

    def __init__(self, what: str, answered: int):
        super().__init__(f"it takes more than {what}, where it may have no more")
        self.answered = answered


class Refused(Exception):
    """What was asked has failed by an error of its own: what a template says itself, or an error's class and text."""

    def __init__(self, kind: str, text: str):
        super().__init__(text if kind in ("TemplateError", "TypeError", "ValueError") else f"{kind}: {text}")


def render(template: str, asked: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]] | Refused]:
    """What transformers' `render_jinja_template` makes of a template, for each of these arguments.

    Returns:
      (text, generation marks) each, or what the template failed by.

    Raises:
      Exceeded: one went over its limits.
    """
    return [one if isinstance(one, Refused) else (one[0], one[1]) for one in _ask("render", template, asked)]


class Pattern:
    """A regular expression. One that could take long, having a repetition of a group, or several, is matched apart."""

    def __init__(self, pattern: str, what: str):
        """Compiles it.

        Args:
          pattern: Python's.
          what: what it is, to be named in errors.

        Raises:
          UserError: it is no regular expression.
        """
        self.pattern, self.named = pattern, f"{what} {_short(pattern)}"
        try:
            self._compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{self.named} is not a regular expression ({error}).") from error
        self._quick = len(re.findall(r"[*+{]", pattern)) <= 3 and not re.search(r"\)[*+{]", pattern)
        self._took = 0.0  # seconds, of all names

    def groups(self, name: str) -> list[str | None] | None:
        """What the groups hold where it matches all of a name, else None.

        Raises:
          UserError: matching takes too long.
        """
        if self._quick:
            hit = self._compiled.fullmatch(name)
            return None if hit is None else list(hit.groups())
        began = time.monotonic()
        try:
            if self._took > SECONDS:
                raise Exceeded(f"{SECONDS:g} seconds for all names", 0)
            (found,) = _ask("match", self.pattern, [name])
        except Exceeded as error:
            raise UserError(f"{self.named} cannot be matched ({error}): write it otherwise.") from error
        self._took += time.monotonic() - began
        if isinstance(found, Refused):
            raise UserError(f"{self.named} cannot be matched ({found}): write it otherwise.")
        groups: list[str | None] | None = found
        return groups

    def __call__(self, name: str) -> bool:
        """Whether it matches all of a name; errors as those of `groups`."""
        return self.groups(name) is not None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}…")


class _Worker:
    """The process, and the pipes to it."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        command += [str(SECONDS), str(MEMORY), str(OUTPUT)]
        known = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
        # A session of its own: Ctrl-C is this process's to answer.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=known, start_new_session=True
        )
        self.owner, self.limits = os.getpid(), (SECONDS, MEMORY, OUTPUT)

    def answers(self, kind: str, shared: str, items: Sequence[Any]) -> Iterator[list[Any]]:
        """One for each item, as they come.

        Raises:
          EOFError: the process is no more.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        frame = marshal.dumps((kind, shared, list(items)))
        try:
            stdin.write(len(frame).to_bytes(8, "little") + frame)
            stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        for _ in items:
            size = int.from_bytes(stdout.read(8), "little")
            made = stdout.read(size)
            if not size or len(made) < size:
                raise EOFError
            yield json.loads(made)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


_lock = threading.Lock()
_worker: _Worker | None = None


def _ask(kind: str, shared: str, items: Sequence[Any]) -> list[Any]:
    """The answers, or `Refused` in the place of one."""
    global _worker
    found: list[Any] = []
    with _lock:
        if _worker is None or _worker.owner != os.getpid() or _worker.limits != (SECONDS, MEMORY, OUTPUT):
            _close()
            _worker = _Worker()
        try:
            for ok, *made in _worker.answers(kind, shared, items):
                if not ok and made[0] in ("MemoryError", "Output"):
                    room = (
                        f"{MEMORY >> 20} MiB of memory" if made[0] == "MemoryError" else f"{OUTPUT >> 20} MiB of text"
                    )
                    raise Exceeded(room, len(found))
                found.append(made[0] if ok else Refused(*made))
        except EOFError:
            status = _worker.process.wait()
            if status > 0:  # a bug of ours: what it was is on standard error
                raise RuntimeError(f"the process of templates and patterns ended with status {status}") from None
            raise Exceeded(f"{SECONDS:g} seconds or {MEMORY >> 20} MiB of memory", len(found)) from None
        finally:
            if _worker.process.poll() is not None or len(found) < len(items) - 1:
                _close()  # answers to what was asked may still be on their way
    return found


def _close() -> None:
    global _worker
    if _worker is not None and _worker.owner == os.getpid():
        _worker.close()
    _worker = None


atexit.register(_close)
