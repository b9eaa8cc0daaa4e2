"""`specjax chat`: a conversation in the terminal with one adapter, with another, or with all side by side.

On a terminal, answers appear as they are generated. In a pipe, each line of input is a question, and each answer is
printed as a whole. Ctrl-C ends an answer, and its part so far stays in the conversation. The end of the input ends the
chat.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specjax.chat.prompts import BASE, utf8
from specjax.chat.speakers import Speakers, Who, load
from specjax.errors import UserError, keys, nearest

LONGEST = 512  # tokens of an answer, where neither a flag nor the model's files say it; at most half of its positions
NARROWEST = 24  # columns of an answer beside others; on a narrower terminal they stand one under another
HELP = """\
/adapter NAME   answer with this adapter from now on; without a name: which there are
/base           answer with the model alone
/compare TEXT   ask everyone the same, side by side; it joins no conversation. Without a text: the last question
/system TEXT    the system message; without a text: none
/reset          forget the conversation; the system message stays
/save FILE      append the conversation to FILE, a row of messages that `specjax train` reads
/help           these lines
/quit           end, as the end of the input does
Ctrl-C stops an answer. A line that begins with // is a text that begins with /."""


class Stopped(Exception):
    """Ctrl-C during an answer."""


class Chat:
    """A conversation.

    Attributes:
      speakers: the model and the adapters.
      names: name in the chat -> adapter, the model without an adapter first.
      who: the name that answers.
      system: the system message, "" for none.
      messages: the conversation, as {"role": ..., "content": ...}.
      how: arguments of `specjax.generate`.
    """

    def __init__(self, speakers: Speakers, names: Mapping[str, Who], system: str, how: Mapping[str, Any]):
        self.speakers, self.names, self.system, self.how = speakers, dict(names), system, dict(how)
        self.who = [*names][min(1, len(names) - 1)]  # the first adapter, where there is one
        self.messages: list[dict[str, str]] = []
        self.console = Console(soft_wrap=True, highlight=False, markup=False)

    def line(self, text: str) -> bool:
        """Handles a line of input; returns False to end the chat.

        Raises:
          UserError: an unknown command, or a question that cannot be answered; the conversation does not change.
        """
        if not text.strip():
            return True
        if not text.startswith("/") or text.startswith("//"):
            self.ask(text[1:] if text.startswith("//") else text)
            return True
        name, _, rest = text[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "adapter": self.switch,
            "base": lambda _: self.switch(next(iter(self.names))),
            "compare": self.compare,
            "system": self.say_system,
            "reset": lambda _: self.messages.clear(),
            "save": self.save,
            "help": lambda _: self.console.print(HELP),
        }
        if name == "quit":
            return False
        if name not in commands:
            known = [*commands, "quit"]
            raise UserError(f"/{name} is no command; there are /{', /'.join(known)}.{nearest(name, known)}")
        commands[name](rest.strip())
        return True

    def ask(self, text: str) -> None:
        """Asks the chosen adapter, shows the answer as it is generated, and keeps question and answer."""
        shown = ""

        def said(_: int, so_far: str) -> None:
            nonlocal shown
            if self.console.is_terminal:
                print(so_far[len(shown) :], end="", flush=True)
            shown = so_far
            if stop.is_set:
                raise Stopped

        with ctrl_c() as stop:
            try:
                (answer,) = self._answers(text, [self.who], said)
                end = ""
            except Stopped:
                answer, end = shown, " [stopped]"
        print((answer[len(shown) :] if self.console.is_terminal else answer) + end, flush=True)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def compare(self, text: str) -> None:
        """Asks all adapters and the base the same question."""
        asked = [message["content"] for message in self.messages if message["role"] == "user"]
        if not text and not asked:
            raise UserError("/compare has no question yet: write one behind it.")
        with ctrl_c() as stop:

            def said(*_: Any) -> None:
                if stop.is_set:
                    raise Stopped

            try:
                before = self.messages if text else self.messages[: _last_question(self.messages)]
                answers = self._answers(text or asked[-1], [*self.names], said, before)
            except Stopped:
                print("[stopped]")
                return
        if self.console.is_terminal and self.console.width // len(answers) >= NARROWEST:
            table = Table(*self.names, show_edge=False, pad_edge=False)
            table.add_row(*answers)
            self.console.print(table, soft_wrap=False)
            return
        for name, answer in zip(self.names, answers, strict=True):
            self.console.print(f"--- [{name}]\n{answer}")

    def switch(self, name: str) -> None:
        """Chooses who answers from now on."""
        if not name:
            self.console.print(", ".join(f"{one} (now)" if one == self.who else one for one in self.names))
            return
        if name not in self.names:
            there = ", ".join(self.names)
            raise UserError(f"no adapter is named {name!r}; there are {there}.{nearest(name, self.names)}")
        self.who = name

    def say_system(self, text: str) -> None:
        """Sets the system message."""
        self.system = text

    def save(self, file: str) -> None:
        """Appends the conversation to a file."""
        if not file:
            raise UserError("/save wants a file, such as /save talk.jsonl.")
        if not self.messages:
            raise UserError("nothing was said yet: there is nothing to save.")
        row = json.dumps({"messages": [*self._system(), *self.messages]}, ensure_ascii=False)
        try:
            with Path(file).open("a", encoding="utf-8") as out:
                out.write(row + "\n")
        except OSError as error:
            raise UserError(f"{file} can't be written ({error.strerror}): give another place.") from None
        self.console.print(f"{len(self.messages)} messages appended to {file}")

    def _answers(
        self,
        text: str,
        names: Sequence[str],
        said: Callable[[int, str], None],
        before: Sequence[dict[str, str]] | None = None,
    ) -> list[str]:
        held = self.messages if before is None else before
        talk = [*self._system(), *held, {"role": "user", "content": text}]
        return self.speakers.answers([(talk, self.names[name]) for name in names], said, chat=True, **self.how)

    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []


def chat(
    model: str,
    *,
    adapters: Mapping[str, str] | None = None,
    system: str = "",
    stop: Sequence[str] = (),
    generation_config: bool = True,
    **sampling: Any,
) -> None:
    """Talks until the input ends; the arguments are those of `run.generate`."""
    speakers = load(model, adapters or {})
    decoder, file = speakers.model, speakers.model.origin.generation_config if generation_config else {}
    if sampling.get("max_new_tokens") is None and file.get("max_new_tokens") is None:
        sampling["max_new_tokens"] = min(LONGEST, decoder.config.max_positions // 2)
    how = sampling | {"stop": list(stop) or None, "generation_config": None if generation_config else {}}
    worn = [name for name in decoder.adapters if name is not None]
    talk = Chat(speakers, {BASE: None} | {name: name for name in worn}, system, how)
    terminal = sys.stdin.isatty()
    if terminal:
        talk.console.print(f"{', '.join(talk.names)}: {talk.who} answers. /help lists the commands, /quit ends.")
    for text in _lines(talk, terminal):
        try:
            with keys({"chat=False": "`specjax generate --raw`", "generation_config={}": "--generation_config=false"}):
                if not talk.line(text):
                    return
        except UserError as error:
            print(f"{error} (/help lists the commands)", file=sys.stderr, flush=True)


def _lines(talk: Chat, terminal: bool) -> Iterator[str]:
    """The lines of the input; a terminal has a prompt, and `readline` editing if Python has it."""
    if not terminal:
        with utf8("the standard input"):
            yield from (line.rstrip("\n") for line in sys.stdin)
        return
    try:
        import readline  # noqa: F401  (changes `input`)
    except ImportError:
        pass
    while True:
        try:
            yield input(f"{talk.who}> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit, or the end of the input, ends)")


class _Flag:
    is_set = False


@contextmanager
def ctrl_c() -> Iterator[_Flag]:
    """In this context Ctrl-C sets a flag, which is checked between tokens; the second one interrupts at once."""
    flag = _Flag()

    def hear(number: int, frame: Any) -> None:
        if flag.is_set:
            raise KeyboardInterrupt
        flag.is_set = True

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def _last_question(messages: Sequence[Mapping[str, str]]) -> int:
    """The index of the user's last message."""
    return max(place for place, message in enumerate(messages) if message["role"] == "user")
