"""What a row holds comes out, or the row is refused: nothing that it says is passed over."""

import json

import pytest
from data_fixtures import TOOL_ROWS, TOOLS, refuse, tokenizer

import specjax.data as data
from specjax.data.chat import BUILT_IN

SIZES = {"length": 1024, "batch_size": 1, "cache": False}
ASK = {"role": "user", "content": "How many cats?"}
ANSWER = {"role": "assistant", "content": "It is four."}
CALL = {"type": "function", "function": {"name": "cats", "arguments": {"mat": "other"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "cats", "content": "4"}
AGENT = {"messages": [ASK, CALLS, RESULT, ANSWER], "tools": TOOLS}
PAIR = {"prompt": "How many cats?", "completion": "It is four."}
DO = {"instruction": "How many cats?", "response": "It is four."}


def texts(*rows, template="qwen2.5", **options):
    """[(text, whether it trains)] of every document of the rows."""
    loaded = data.load(list(rows), tokenizer(), template=template, packing=False, **SIZES, **options)
    return [document for row in loaded.preview(9) for document in row]


def whole(*rows, **options):
    return ["".join(text for text, _ in document) for document in texts(*rows, **options)]


def trained(*rows, **options):
    return [[text for text, counts in document if counts] for document in texts(*rows, **options)]


# --- what the template leaves out


PLAIN = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
SAID = "{{ 'cats mat Counts the cats on a mat — même à Noël.' }}"


@pytest.mark.parametrize(
    "template", ["chatml", "llama3", "openchat", "zephyr", "phi3", "mistral-v3", "alpaca", "granite"]
)
def test_calls_and_tools_that_a_template_does_not_write_are_refused(template):
    says = "leaves out the call of 'cats' in message 2|refuses the conversation"
    for row in (AGENT, AGENT | {"tools": None}, {"messages": TOOL_ROWS["one call"]}):
        refuse(lambda row=row: texts(row, template=template), f"^row 1: the chat template ({says})")
    says = "leaves out the tool|refuses the conversation"
    if template != "granite":  # which writes tools, and no calls
        refuse(lambda: texts({"messages": [ASK, ANSWER], "tools": TOOLS}, template=template), f"^row 1: .*({says})")
        sides = {"chosen": [ASK, ANSWER], "rejected": [ASK, {**ANSWER, "content": "Five."}], "tools": TOOLS}
        refuse(lambda: texts(sides, template=template), f"^row 1: .*({says})")


@pytest.mark.rule(7)
@pytest.mark.parametrize(
    ("template", "match"),
    [
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}",
            r"words of message 1 \(system\)",
        ),
        ("{% for m in messages %}{{ m.content[:8] }}</s>{% endfor %}", r"words of message 1 \(system\)"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", r"words of message 1 \(system\)"),
        # The row's own lines are all there, by chance; a conversation of this shape shows that a call is not.
        ("cats mat other {{ tools[0].function.description }} " + PLAIN, "call of 'cats' in message 3"),
        (PLAIN.replace("{{ m.content }}", SAID + "{{ m.content }}{{ m.tool_calls }}"), "the tools"),
        (
            "{{ tools }}{% for m in messages %}{{ m.content if not m.tool_calls else m.tool_calls }}</s>{% endfor %}",
            r"words of message 3 \(assistant\), which stand beside a tool call",
        ),
    ],
)
def test_each_part_of_a_row_must_stand_in_its_rendering(template, match):
    calls = {**CALLS, "content": "I count."}
    row = {
        "messages": [{"role": "system", "content": "Be brief\nand kind."}, ASK, calls, RESULT, ANSWER],
        "tools": TOOLS,
    }
    refuse(
        lambda: texts(row, template=template), f"^row 1: the chat template leaves out the {match.removeprefix('the ')}"
    )


def test_reasoning_stands_there_under_the_name_that_the_template_knows_or_is_refused():
    for name in ("reasoning_content", "thinking", "reasoning"):
        row = {"messages": [ASK, {**ANSWER, name: "Two\nand two."}]}
        assert trained(row, template="qwen3") == [["<think>\nTwo\nand two.\n</think>\n\nIt is four.<|im_end|>\n"]]
        assert whole(DO | {name: "Two\nand two."}, template="qwen3") == whole(row, template="qwen3")
        refuse(lambda row=row: texts(row, template="qwen2.5"), "^row 1: .*leaves out the reasoning of message 2: use")
    both = {**ANSWER, "thinking": "a", "reasoning_content": "b"}
    refuse(lambda: texts({"messages": [ASK, both]}), "message 2 .* has reasoning_content and thinking, which differ")


# --- what messages say


@pytest.mark.parametrize("template", BUILT_IN)
def test_text_parts_are_the_string_and_anything_else_is_refused_with_its_place(template):
    parts = lambda *texts: [{"type": "text", "text": text, "image": None} for text in texts]  # noqa: E731
    turns = [{**ASK, "content": parts("How many ", "cats?")}, {**ANSWER, "content": parts("It is four.")}]
    assert texts({"messages": turns}, template=template) == texts({"messages": [ASK, ANSWER]}, template=template)
    for content, match in (
        (
            [{"type": "image", "image": "a.png"}],
            r"message 1 of 'messages': part 1 of its content is of the type 'image'",
        ),
        (["How many?"], "part 1 of its content is of the type 'str'"),
        ({"text": "How many?"}, "its content is a dict, and must be a str or a list of text parts"),
        (4, "its content is a int"),
    ):
        row = {"messages": [{**ASK, "content": content}, ANSWER]}
        refuse(lambda row=row: texts(row, template=template), f"^row 1: .*{match}")


def test_a_turn_that_is_kept_out_of_the_loss_does_not_train():
    turns = [ASK, {**ANSWER, "content": "Five."}, ASK, ANSWER]
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for flag in ({"weight": 0}, {"train": False}, {"training": False}):
        row = {"messages": [ASK, {**turns[1], **flag}, ASK, ANSWER | dict.fromkeys(flag, True)]}
        assert trained(row, template="chatml") == [["It is four.<|im_end|>\n"]]
        assert trained(row, template=marked) == [["It is four.<|im_end|>"]]
        assert whole(row) == whole({"messages": turns})
        alone = {"messages": [ASK, ANSWER | flag]}
        refuse(lambda alone=alone: texts(alone), "none of the 1 rows .*nothing to learn")
        sides = {"prompt": [ASK], "chosen": [ANSWER | flag], "rejected": [turns[1]]}
        refuse(lambda sides=sides: texts(sides), "message 1 of 'chosen' is kept out of the loss")
    for turn, match in (
        ({**ANSWER, "weight": 0.5}, "'weight': 0.5, but a turn trains or it does not"),
        ({**ANSWER, "train": "no"}, "'train': 'no'"),
        ({**ASK, "train": True}, "only the assistant's turns train"),
        ({**ANSWER, "train_detail": [{"begin_offset": 0}]}, "'train_detail', but a turn trains as a whole"),
    ):
        refuse(
            lambda turn=turn: texts({"messages": [ASK, turn]}), f"^row 1: message 2 of 'messages' has {match}|{match}"
        )


@pytest.mark.rule(7)
def test_an_empty_answer_does_not_train_and_is_counted():
    rows = [{"messages": [ASK, {**ANSWER, "content": ""}, ASK, ANSWER]}]
    assert trained(*rows, template="chatml") == [["It is four.<|im_end|>\n"]]
    assert data.load(rows, tokenizer(), template="chatml", **SIZES).report["empty_answers"] == 1


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "cats", "arguments": {"mat": "other", "of another row": None}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "cats", "arguments": '{"mat": "other"}'}}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": {"name": "cats", "arguments": '{"mat": "other"}'}},
        {"from": "function_call", "value": '{"name": "cats", "arguments": {"mat": "other"}}'},
        {"role": "tool_call", "content": '[{"name": "cats", "arguments": {"mat": "other"}}]'},
    ],
)
def test_a_call_is_the_same_in_every_dialect_and_trains(turn):
    expected = texts(AGENT)
    assert texts(AGENT | {"messages": [ASK, turn, RESULT, ANSWER]}) == expected
    (document,) = expected
    assert '"name": "cats", "arguments": {"mat": "other"}' in document[1][0] and document[1][1]
    assert document[2][1] is False and "\n4\n" in document[2][0]  # what the tool answers does not train


@pytest.mark.parametrize(
    ("turn", "match"),
    [
        ({"from": "function_call", "value": "cats(mat)"}, "the call is not JSON"),
        ({"from": "function_call", "value": ""}, "the call is not JSON"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "a tool call is an object with a 'name'"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]},
            "arguments of the call of 'f' is not JSON",
        ),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "only the assistant calls tools"),
    ],
)
def test_a_call_that_is_not_understood_is_refused(turn, match):
    refuse(lambda: texts({"messages": [ASK, turn]}), f"^row 1: message 2 of 'messages'.*{match}")


# --- what other columns say


def test_columns_beside_a_pair_or_messages_are_part_of_the_conversation():
    system = {"role": "system", "content": "Be brief."}
    expected = whole({"messages": [system, ASK, ANSWER]})
    for row in (PAIR, DO, {"messages": [ASK, ANSWER]}, {"prompt": [ASK], "completion": [ANSWER]}):
        assert whole(row | {"system": "Be brief."}) == expected == whole(row | {"system_prompt": "Be brief."})
        tools = whole(row | {"tools": json.dumps(TOOLS)})
        assert tools == whole({"messages": [ASK, ANSWER], "tools": TOOLS}) and '"name": "cats"' in tools[0]
        for empty in ("", " ", [], None, "[]", "null"):
            assert whole(row | {"tools": empty}) == whole({"messages": [ASK, ANSWER]})
        thoughtless = row | {"chat_template_kwargs": {"enable_thinking": False, "of another row": None}}
        assert trained(thoughtless, template="qwen3") == [["It is four.<|im_end|>\n"]]  # its prompt has the empty block
    assert whole({"messages": [system, ASK, ANSWER], "system": "Be brief."}) == expected
    assert whole({"question": "How many cats?", "answer": "It is four.", "told": "Be brief."}, columns={
        "instruction": "question", "response": "answer", "system": "told"}) == expected  # fmt: skip
    history = [["Who?", "The cat."], ["Where?", "On the mat."]]
    said = [turn for ask, answer in history for turn in ({**ASK, "content": ask}, {**ANSWER, "content": answer})]
    for row in (PAIR, DO):
        assert texts(row | {"history": history}) == texts({"messages": [*said, ASK, ANSWER]})
        assert len(trained(row | {"history": history})[0]) == 3  # as LLaMA-Factory, earlier answers train too
    sides = {"prompt": "How many cats?", "chosen": "Four.", "rejected": "Five.", "system": "Be brief."}
    assert whole(sides)[0].startswith(expected[0].partition("<|im_start|>user")[0])


@pytest.mark.rule(7)
@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": [{"role": "system", "content": "Be kind."}, ASK, ANSWER], "system": "Be brief."}, "that differs"),
        ({"messages": [ASK, ANSWER], "history": [["a", "b"]]}, "has 'history', which would be lost"),
        ({"messages": [ASK, ANSWER], "thinking": "Two and two."}, "has 'thinking', which would be lost"),
        ({"prompt": [ASK], "completion": [ANSWER], "history": [["a", "b"]]}, "has 'history', which would be lost"),
        ({"messages": [ASK, ANSWER], "images": ["a.png"]}, "has 'images', and specjax trains on text alone"),
        (DO | {"history": [["a"]]}, r"turn 1 of 'history' is no pair of texts, \[question, answer\]"),
        (DO | {"tools": "cats"}, "'tools' is not JSON"),
        (DO | {"tools": {"name": "cats"}}, "'tools' is a dict, and must be a list"),
        (DO | {"tools": [{"type": "function"}]}, "a tool of 'tools' is no object with a 'name'"),
        (DO | {"chat_template_kwargs": {"tools": TOOLS}}, "'chat_template_kwargs' has 'tools', which"),
        (DO | {"chat_template_kwargs": "[]"}, "'chat_template_kwargs' is no JSON object"),
        (PAIR | {"label": False}, "labelled false, an answer that is not wanted"),
    ],
)
def test_columns_that_would_be_lost_are_refused(row, match):
    refuse(lambda: texts(row), f"^row 1.*{match}")


@pytest.mark.parametrize("column", ["system", "tools", "history", "reasoning_content", "chat_template_kwargs"])
def test_a_pair_that_no_template_renders_has_nothing_beside_it(column):
    row = PAIR | {
        column: {"a": 1} if column == "chat_template_kwargs" else [["a", "b"]] if column == "history" else "[1]"
    }
    refuse(lambda: texts(row, template=None), f"^row 1 has '{column}' beside prompt and completion.*set template, or")


def test_half_a_character_is_no_text_and_is_refused_with_its_place():
    broken = {**ANSWER, "content": "It is \ud83d."}
    for row in ({"messages": [ASK, broken]}, PAIR | {"completion": "\ud83d"}, {"text": "a \ud83d b"}):
        good = {key: "a" if isinstance(value, str) else [ASK, ANSWER] for key, value in row.items()}
        match = r"^row 2 has half of a character, \\ud83d without its other half"
        refuse(lambda row=row, good=good: texts(good, row, template=None if "text" in row else "qwen2.5"), match)


def test_what_a_template_writes_otherwise_is_no_loss():
    """Inside JSON, or set under headings of its own; what it trims, the tests of masks have."""
    quoted = {**RESULT, "content": 'He said:\n"four" — même à Noël \\ 🙂'}
    (text,) = whole(AGENT | {"messages": [ASK, CALLS, quoted, ANSWER]}, template="llama3.1")
    assert r"\"four\" — même" in text
    assert whole(DO | {"input": "On the mat."}, template="alpaca")
