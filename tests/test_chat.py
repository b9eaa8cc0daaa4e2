"""A conversation: its commands, what is kept of it, and a real terminal with Ctrl-C."""

import json
import os
import pty
import re
import select
import subprocess
import sys

import pytest
from helpers import on_devices
from run_fixtures import ROOT, write_base

import specjax as sj
from specjax.chat.terminal import Chat
from specjax.errors import UserError
from specjax.hf.tokenizer import load_tokenizer

NAMES = {"base": None, "hr": "hr", "law": "law"}


class Speakers:
    """Answers with who it is and what was asked, and keeps what it was given."""

    def __init__(self):
        self.asked = []
        self.stop_after = None

    def answers(self, asked, said, **how):
        self.asked.append((asked, how))
        texts = [f"{who or 'base'} hears {talk[-1]['content']}" for talk, who in asked]
        for number, text in enumerate(texts):
            for size in range(1, len(text)):
                said(number, text[:size])
                if size == self.stop_after:
                    os.kill(os.getpid(), 2)
        return texts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that is never at a loss for words: it repeats itself up to its limit."""
    return write_base(tmp_path_factory.mktemp("chat"), max_position_embeddings=8192)


@pytest.fixture
def talk():
    return Chat(Speakers(), NAMES, "Be brief.", {"seed": 3})


def said(capsys, talk, *lines):
    """What is printed for some lines of input."""
    capsys.readouterr()
    for line in lines:
        assert talk.line(line)
    return capsys.readouterr().out


def test_questions_go_to_the_chosen_one_with_all_that_was_said(capsys, talk):
    assert said(capsys, talk, "One?", "", "//two") == "hr hears One?\nhr hears /two\n"
    assert said(capsys, talk, "/adapter law", "Three?") == "law hears Three?\n"
    assert said(capsys, talk, "/base", "Four?") == "base hears Four?\n"
    ((conversation, who),) = talk.speakers.asked[-1][0]
    assert who is None and talk.speakers.asked[-1][1] == {"chat": True, "seed": 3}
    assert [m["role"] for m in conversation] == ["system", *["user", "assistant"] * 3, "user"]
    assert [m["content"] for m in conversation[:3]] == ["Be brief.", "One?", "hr hears One?"]
    assert said(capsys, talk, "/adapter") == "base (now), hr, law\n"
    said(capsys, talk, "/reset", "/system", "Five?")
    assert talk.speakers.asked[-1][0][0][0] == [{"role": "user", "content": "Five?"}]
    assert not talk.line("/quit")


def test_a_comparison_asks_everyone_and_joins_no_conversation(capsys, talk):
    said(capsys, talk, "One?")
    before = list(talk.messages)
    printed = "".join(f"--- [{name}]\n{name} hears Two?\n" for name in NAMES)
    assert said(capsys, talk, "/compare Two?") == printed and talk.messages == before
    assert said(capsys, talk, "/compare") == printed.replace("Two", "One")
    assert [(len(told), who) for told, who in talk.speakers.asked[-1][0]] == [(2, who) for who in NAMES.values()]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(capsys, talk):
    talk.speakers.stop_after = 5
    assert said(capsys, talk, "One?") == "hr hea [stopped]\n"
    assert [m["content"] for m in talk.messages] == ["One?", "hr hea"]
    assert said(capsys, talk, "/compare Two?") == "[stopped]\n"


def test_a_conversation_is_saved_as_a_row_that_trains(capsys, talk, tmp_path, base):
    file = tmp_path / "talk.jsonl"
    said(capsys, talk, "One?", f"/save {file}", f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == rows[1] and [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert sj.data.chat(str(file), load_tokenizer(base), length=128, batch_size=1, packing=False).num_rows == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/adaptor hr", "/adaptor is no command; there are /adapter,"),
        ("/adapter lax", "no adapter is named 'lax'; there are base, hr, law. Did you mean 'law'"),
        ("/compare", "/compare has no question yet"),
        ("/save", "/save wants a file"),
        ("/save x", "nothing was said yet"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(talk, line, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        talk.line(line)
    assert (talk.who, talk.messages, talk.system) == ("hr", [], "Be brief.")


class Terminal:
    """`specjax chat` on a terminal of its own, whose Ctrl-C is a key."""

    def __init__(self, *argv):
        ours, theirs = pty.openpty()
        self.screen, self.seen = ours, ""
        command = [sys.executable, "-m", "specjax", "chat", *argv]
        given = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "cwd": ROOT, "start_new_session": True}
        # A session of its own, whose terminal this is: else the key would be no signal.
        self.process = subprocess.Popen(["setsid", "--ctty", *command], **given, env={**os.environ, "TERM": "dumb"})
        os.close(theirs)

    def until(self, text, key=""):
        """What appears up to this text; a key is pressed again each second, for `readline` may miss one."""
        waited = 0
        while text not in self.seen:
            if not select.select([self.screen], [], [], 1)[0]:
                self.type(key)
                waited += 1
                assert waited < 120, f"no {text!r} behind {self.seen!r}"
                continue
            self.seen += os.read(self.screen, 1 << 16).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self.screen, text.encode())


@on_devices(1)
@pytest.mark.slow
def test_a_real_terminal_shows_an_answer_grow_stops_it_at_ctrl_c_and_goes_on(base):
    terminal = Terminal(f"--model={base}", "--max_new_tokens=4000", "--stop=NEVER")
    try:
        assert "base: base answers. /help lists the commands" in terminal.until("base> ")
        terminal.type("What has ada got?\n")
        terminal.until("What has ada got?\r\n")
        while not terminal.seen:  # the first of some thousand tokens
            terminal.seen += os.read(terminal.screen, 1).decode(errors="replace")
        terminal.type("\x03")
        answer = terminal.until(" [stopped]\r\n")
        assert answer and "Traceback" not in answer
        terminal.until("base> ")
        terminal.type("\x03")  # at the prompt it ends nothing
        terminal.until("(/quit, or the end of the input, ends)", key="\x03")
        terminal.until("base> ")
        terminal.type("/adapter lax\n")
        terminal.until("no adapter is named 'lax'")
        terminal.until("base> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.screen)
