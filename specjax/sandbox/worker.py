"""The process that runs foreign templates and patterns: it is told what to do on standard input, and ends with it.

It has its limits from the system, so that no template and no pattern can go round them: an alarm for each answer, the
memory it may have, no file to write. It is run as a file, and imports nothing of this package.
"""

import json
import marshal
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO


def _render(template: str, how: dict[str, Any]) -> Any:
    """What transformers renders: the text, and the [start, end) characters of its generation marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marks = render_jinja_template(chat_template=template, **how)
    return texts[0], marks[0] if marks else []


class Output(Exception):
    """More than an answer may hold."""


def _match(pattern: str, name: str) -> Any:
    """The groups where a pattern matches all of a name, else null."""
    hit = re.fullmatch(pattern, name)
    return None if hit is None else list(hit.groups())


def _limit(memory: int) -> None:
    for which, most in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(which)
        resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answer(do: Callable[[str, Any], Any], shared: str, item: Any, most: int) -> bytes:
    """JSON: [true, what came of it], or [false, the error's class, its text]."""
    try:
        made = do(shared, item)
        if made and isinstance(made[0], str) and len(made[0]) > most:
            raise Output
        return json.dumps([True, made]).encode()
    except Exception as error:  # whatever a template does wrong
        bases = [one.__name__ for one in type(error).__mro__]
        return json.dumps(
            [False, "TemplateError" if "TemplateError" in bases else bases[0], str(error)[:1000]]
        ).encode()


def main(seconds: float, memory: int, output: int, asked: BinaryIO, answers: int) -> None:
    """Answers until standard input ends: a frame is its length, 8 bytes, and (kind, shared, items) by marshal."""
    _limit(memory)
    kinds: dict[str, Callable[[str, Any], Any]] = {"render": _render, "match": _match}
    while head := asked.read(8):
        size = int.from_bytes(head, "little")
        kind, shared, items = marshal.loads(asked.read(size))
        if kind == "render":  # which takes its time, once
            import transformers.utils.chat_template_utils  # noqa: F401
        for item in items:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its default ends the process, wherever it is
            made = _answer(kinds[kind], shared, item, output + 8 * size)
            signal.setitimer(signal.ITIMER_REAL, 0)
            rest = memoryview(len(made).to_bytes(8, "little") + made)
            while rest:
                rest = rest[os.write(answers, rest) :]


if __name__ == "__main__":
    stream, out = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(2, 1)  # what anything prints is no answer
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), stream, out)
