"""A row for each answer where a template rewrites earlier turns: the prompt as inference has it, and TRL's answers."""

from importlib.resources import files

import numpy as np
import pytest
from data_fixtures import CONVERSATIONS, TOOL_ROWS, TOOLS, refuse, tokenizer

import specjax.data as data
from specjax.data.chat import documents
from specjax.data.example import Conversation
from specjax.data.messages import reasoned
from specjax.data.turns import rows
from specjax.errors import UserError


def call(name, mat):
    return {"type": "function", "function": {"name": name, "arguments": {"mat": mat}}}


def named(name):
    return [TOOLS[0], {"type": "function", "function": {**TOOLS[0]["function"], "name": name}}]


ASK, ANSWER = CONVERSATIONS["single"]
CASES = {
    name: (CONVERSATIONS[name], None) for name in ("multi-turn", "system", "trailing spaces", "reasoning", "emoji")
}
CASES |= {name: (turns, TOOLS) for name, turns in TOOL_ROWS.items()}
CASES["parallel calls"] = (
    [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [call("cats", "one"), call("dogs", "two")]},
        {"role": "tool", "name": "cats", "content": "4"},
        {"role": "tool", "name": "dogs", "content": "5"},
        {"role": "assistant", "content": "Nine."},
    ],
    named("dogs"),
)
CASES["a reasoning field"] = (
    [ASK, reasoned(ANSWER, "Two\nand two."), {"role": "user", "content": "Sure?"}, reasoned(ANSWER, "I am.")],
    None,
)

STOCK = sorted(
    name.removesuffix("_training.jinja")
    for name in (file.name for file in files("trl").joinpath("chat_templates").iterdir())
    if name.endswith("_training.jinja")
    and name.startswith(("deepseek_r1", "gemma", "gptoss", "llama3", "phi3", "qwen"))  # those of families that are here
)
# Their twins keep what was thought before earlier answers, which the prompt of inference has not.
KEEP = ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")


def trl(name, end=""):
    return files("trl").joinpath("chat_templates", f"{name}{end}.jinja").read_text("utf-8")


def answers(turns):
    return [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]


def upto(turns, tools, turn):
    return Conversation("row 1", turns[: turn + 1], tools, turn)


def date(template):
    macro = "{%- macro strftime_now(format) -%}2024-07-26{%- endmacro %}\n"
    return macro + template if "strftime_now" in template else template


@pytest.mark.rule(7)
@pytest.mark.parametrize("name", STOCK)
def test_answers_train_as_under_trls_training_template_behind_the_prompt_of_inference(name):
    tok, seen = tokenizer(), 0
    stock, marked = trl(name), date(trl(name, "_training"))
    for case, (turns, tools) in CASES.items():
        for turn in answers(turns):
            given = {"tools": tools, "tokenize": True, "return_dict": True}
            asked = given | {"conversation": turns[:turn], "add_generation_prompt": True}
            try:
                ((document,),) = documents([upto(turns, tools, turn)], tok, stock)
            except UserError as error:  # a role or a call that the template does not know: TRL leaves it out, or fails
                assert "leaves out the" in str(error) or "refuses the" in str(error) or name == "qwen3_5_nothink", case
                continue
            # What inference is given comes first, to the token, and all that follows it trains.
            prompt = tok.apply_chat_template(chat_template=date(stock), **asked)["input_ids"]
            start = len(prompt)
            assert document.ids[:start].tolist() == prompt and not document.trained[:start].any(), case
            assert document.trained[start:].all(), case
            told = {"chat_template": marked, "return_assistant_tokens_mask": True}
            whole = tok.apply_chat_template(turns[: turn + 1], **told, **given)
            theirs = np.array(whole["input_ids"])
            start = common(tok.apply_chat_template(chat_template=marked, **asked)["input_ids"], theirs)
            mask = np.array(whole["assistant_masks"], bool) & (np.arange(len(theirs)) >= start)
            assert document.ids[len(prompt) :].tolist() == theirs[mask].tolist(), case
            if name != "deepseek_r1_distill" and (name not in KEEP or turn == answers(turns)[0]):
                assert document.ids.tolist() == theirs.tolist(), case
            seen += 1
    assert seen >= 8


def common(prompt, ids):
    """How many first tokens are equal."""
    return next((i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other), len(prompt))


@pytest.mark.rule(7)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gptoss", "deepseek_r1_distill", "gemma4", "gemma4_v5"])
def test_a_conversation_whose_earlier_turns_are_rewritten_becomes_a_row_for_each_answer(name):
    tok, branched = tokenizer(), 0
    for turns, tools in CASES.values():
        try:
            made = rows(tok, trl(name), Conversation("row 1", turns, tools))
        except UserError as error:
            assert "leaves out the" in str(error)
            continue
        if len(made) > 1:
            asked = [Conversation("row 1", turns[: turn + 1], tools) for turn in answers(turns)]
            last = [rows(tok, trl(name), chat)[-1] for chat in asked]
            assert made == [(text, found[-1:]) for text, found in last]
            branched += 1
    assert branched
    if name == "qwen3":
        turns = CASES["a reasoning field"][0]
        source = [{"messages": turns}, {"messages": turns[:2]}]
        loaded = data.load(source, tok, template=trl(name), length=512, batch_size=1, cache=False)
        assert loaded.report["branched"] == {"rows": 1, "documents": 2} and loaded.report["documents"] == 3
        refuse(
            lambda: data.load(source, tok, turns="hole", length=512, batch_size=1), "use exact or whole. Did you mean"
        )
        assert len(rows(tok, trl(name), Conversation("row 1", turns), exact=False)) == 1


NAMED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LED = PROMPT.replace("{% endif %}", "<think>\n\n</think>\n\n{% endif %}")


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        # A generation prompt that is no prefix of the turn: what inference is given, then the turn's words.
        (NAMED + LED, [ASK, ANSWER], ["<think>\n\n</think>\n\n", ("It is four.<|im_end|>\n",)]),
        # Begin tokens: the template's alone, also where the tokenizer adds one.
        ("{{ bos_token }}" + NAMED + PROMPT, [ASK, ANSWER], ["assistant\n", ("It is four.<|im_end|>\n",)]),
        # A last question without an answer is what nobody learns from, and no harm.
        (NAMED + PROMPT, [ASK, ANSWER, ASK], ["assistant\n", ("It is four.<|im_end|>\n",), "<|im_start|>user"]),
        # An empty answer trains nothing, not even its end.
        (NAMED + PROMPT, [ASK, {**ANSWER, "content": ""}, ASK, ANSWER], ["assistant\n", ("It is four.<|im_end|>\n",)]),
        # A line break at the end of the words, or behind the turn, is as the template has it.
        (NAMED + PROMPT, [ASK, {**ANSWER, "content": "Four.\n"}], ["assistant\n", ("Four.\n<|im_end|>\n",)]),
        # No template renders a role that it knows nothing of in silence.
        (
            NAMED.replace("in messages", "in messages if m.role != 'system'"),
            CONVERSATIONS["system"],
            r"words of message 1",
        ),
    ],
)
def test_cases_that_others_report(template, turns, expected):
    tok = tokenizer(adds_bos=True, pad_token="<|im_end|>")
    load = lambda: data.load([{"messages": turns}], tok, template=template, length=96, batch_size=1, cache=False)  # noqa: E731
    if isinstance(expected, str):
        refuse(load, expected)
        return
    loaded = load()
    ((document,),) = loaded.preview(1)
    said = [text for text, trained in document if trained]
    before, (answer,), *after = expected
    assert said == [answer]
    at = [trained for _, trained in document].index(True)
    assert document[at - 1][0].endswith(before)
    assert [text[: len(last)] for (text, _), last in zip(document[at + 1 :], after, strict=True)] == after
    assert (loaded.tokens == tok.bos_token_id).sum() == template.count("bos_token")
    batch = loaded.batch(0)  # the padding token, which also ends the turn, trains where it does and nowhere else
    ends = (batch["targets"][0] == tok.pad_token_id) & (batch["loss_mask"][0] == 1)
    assert ends.sum() == 1 and batch["loss_mask"][0][batch["segment_ids"][0] == 0].sum() == 0
