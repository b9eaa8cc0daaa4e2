"""The held-out split, and the report as it is printed."""

import io
import re

import numpy as np
import pytest
from data_fixtures import CONVERSATIONS, refuse, tokenizer
from rich.console import Console

import specjax.data as data
from specjax.data.report import show

SIZES = {"length": 64, "batch_size": 2}


# --- the held-out split


def held(source, part, fraction=0.25, seed=0):
    loaded = data.text(source, tokenizer(), length=8, batch_size=1, packing=False, seed=seed, holdout=(fraction, part))
    return {tuple(batch["tokens"][0].tolist()) for batch in loaded.once()}


def test_the_parts_of_a_split_are_disjoint_and_whole_and_of_the_size_asked_for():
    source = [f"{n}" for n in range(100, 200)]
    train, evaluation = held(source, "train"), held(source, "eval")
    assert len(evaluation) == 25 and len(train) == 75 and not train & evaluation
    assert held(source, "eval", seed=1) != evaluation
    assert len(held(source, "eval", fraction=0.001)) == 1


def test_the_order_of_rows_and_their_repetition_do_not_move_a_row_to_the_other_side():
    source = [f"{n}" for n in range(100, 200)]
    shuffled = np.random.default_rng(0).permutation(source).tolist()
    assert held(shuffled, "eval") == held(source, "eval")
    twice = source * 2
    assert not held(twice, "train") & held(twice, "eval")


def test_a_split_of_too_little_is_refused():
    refuse(lambda: held(["same", "same"], "train"), "too few different rows")
    refuse(lambda: held(["one", "two"], "test"), "held-out part is")
    refuse(lambda: held([], "eval"), "is empty")


# --- the report


def printed(loaded, **options):
    console = Console(file=io.StringIO(), width=60, **options)
    show(loaded.report, loaded.preview(1), console)
    return console.file.getvalue()


def test_the_report_marks_what_trains_in_brackets_on_a_pipe_and_in_colour_on_a_terminal():
    source = [{"messages": CONVERSATIONS["single"]}, {"messages": CONVERSATIONS["ends with the user"][2:]}]
    loaded = data.chat(source, tokenizer(), template="chatml", length=128, batch_size=1)
    text = printed(loaded)
    assert "⟦It is four.<|im_end|>\n⟧" in text and "\x1b" not in text
    assert "dropped, nothing to learn  1 row" in text
    assert "a turn ends with" in text and loaded.fingerprint in text
    text = printed(loaded, force_terminal=True, color_system="truecolor")
    assert "\x1b[1;32mIt is four.<|im_end|>" in text and "⟦" not in text


def test_the_report_shows_markup_and_control_characters_of_the_data_as_they_are():
    pair = {"prompt": "[red]not a colour[/red] [/] \x1b[31m end", "completion": " [b]bold[/b]"}
    text = printed(data.instruct([pair], tokenizer(), **SIZES))
    assert "[red]not a colour[/red] [/] \N{REPLACEMENT CHARACTER}[31m end⟦ [b]bold[/b]</s>⟧" in text


@pytest.mark.parametrize(
    ("overlong", "line"),
    [
        ("drop", r"dropped, over length +1 row, 43 tokens"),
        ("truncate", r"cut, keeping the start +1 row, 23 tokens lost"),
        ("keep_end", r"cut, keeping the answer's end +1 row, 23 tokens lost"),
        ("split", r"split +1 row into 2 documents; 20 tokens of pieces without an answer left out"),
    ],
)
def test_the_report_shows_what_became_of_the_rows_over_the_length(overlong, line):
    pairs = [{"prompt": "a" * 21 + "\n", "completion": "b" * 20}, {"prompt": "a", "completion": "b"}]
    if overlong == "truncate":
        pairs[0] = {"prompt": "a" * 5, "completion": "b" * 37}
    loaded = data.instruct(pairs, tokenizer(adds_bos=False), length=20, batch_size=1, overlong=overlong)
    counts = printed(loaded)
    assert re.search(line, counts), counts
