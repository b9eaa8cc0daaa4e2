"""Questions with known answers: what is asked is what inference would see, and which answers are the known ones."""

import numpy as np
import pytest
from data_fixtures import tokenizer as plain
from helpers import model

from specjax.data import Data, load
from specjax.data.chat import resolve
from specjax.data.questions import questions
from specjax.generation import answers

CHATS = [
    [("user", "one two"), ("assistant", "three")],
    [("user", "one"), ("assistant", "two"), ("user", "and three"), ("assistant", "four five")],
]


def tokenizer():
    tok = plain("llama3")
    tok.chat_template = resolve(tok, "llama3")
    return tok


def chats():
    return [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in CHATS]


def test_a_question_is_the_prompt_that_inference_would_see_and_the_last_answer():
    tok, rows = tokenizer(), chats()
    data = load(rows, tok, length=512, batch_size=1, cache=False)
    found = questions(data, 9)
    for (prompt, answer), row in zip(found, rows, strict=True):
        *before, last = row["messages"]
        asked = tok.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert prompt == asked and answer[-1] == data.end_of_turn
        assert tok.decode(answer[:-1]) == last["content"]
    assert questions(data, 1) == found[:1]
    assert not questions(load([{"text": "one two three"}], tok, length=8, batch_size=1, cache=False), 9)


def test_a_rejected_answer_is_none_to_give():
    pairs = {"tokenizer": None, "length": 8, "batch_size": 1, "together": 2}
    data = Data(np.arange(8, dtype=np.int32), np.arange(8) % 4 > 1, np.array([0, 4, 8]), **pairs)
    assert not questions(data, 9)


@pytest.mark.parametrize(
    "said, share",
    [(["Three!", "four five"], 1.0), (["three", "four five six"], 0.5), (["La three", "five"], 0.0)],
    ids=["case and punctuation", "one that goes on", "other words"],
)
def test_an_answer_counts_that_is_the_known_one_but_for_case_and_punctuation(monkeypatch, said, share):
    tok = tokenizer()
    data = load(chats(), tok, length=512, batch_size=1, cache=False)
    asked = questions(data, 9)

    def generated(_, prompts, *, max_new_tokens, eos_ids, **more):
        assert prompts == [question.prompt for question in asked] and data.end_of_turn in eos_ids
        assert max_new_tokens > max(len(question.answer) for question in asked)  # what goes on is seen
        return [tok(text, add_special_tokens=False)["input_ids"] for text in said]

    monkeypatch.setattr(answers, "generate_tokens", generated)
    assert answers.exact(model(), tok, asked, end_of_turn=data.end_of_turn) == share
