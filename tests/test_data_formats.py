"""The columns tell the format, names may be mapped, and a row that does not fit is named."""

import json

import pytest
from data_fixtures import CONVERSATIONS, refuse, tokenizer

import specjax.data as data
from specjax.data.example import Conversation, Pair, Text
from specjax.data.formats import examples, recognise

ROWS = [{"instruction": f"Say {n}", "response": f"{n}"} for n in range(5)]
SIZES = {"length": 64, "batch_size": 2}


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["text"], "text"),
        (["text", "id", "source"], "text"),
        (["instruction", "response"], "instruct"),
        (["instruction", "output", "input", "text"], "instruct"),
        (["prompt", "completion"], "prompt"),
        (["messages"], "messages"),
        (["id", "conversations", "tools"], "conversations"),
        (["messages", "prompt", "completion"], "messages"),
    ],
)
def test_the_columns_tell_the_format(columns, format):
    assert recognise(columns)[0] == format


def test_unknown_columns_are_listed_with_the_known_formats():
    refuse(
        lambda: recognise(["question", "answer"]),
        r"columns \(question, answer\) .*instruct \(instruction, response.out",
    )
    refuse(lambda: recognise(["instruction"]), "no known format")
    refuse(lambda: data.text(ROWS, tokenizer(), **SIZES), r"no known format: text \(text\)")
    refuse(lambda: recognise(["text"], "txet"), "format is 'txet', which is unknown.*Did you mean 'text'")


def test_columns_may_be_mapped():
    mapping = {"instruction": "question", "output": "answer"}
    assert recognise(["text", "question", "answer"], columns=mapping) == (
        "instruct",
        {"instruction": "question", "response": "answer", "input": "input"},
    )
    assert recognise(["a", "b"], columns={"text": "b"}) == ("text", {"text": "b"})
    refuse(
        lambda: recognise(["question"], columns={"instrution": "question"}), "role 'instrution'. Did you mean 'instr"
    )
    refuse(lambda: recognise(["question"], columns={"text": "questoin"}), "'questoin', .*Did you mean 'question'")


def test_data_may_be_recognised_by_its_own_columns_where_it_has_none_of_those_named():
    named = {"instruction": "question", "response": "answer"}
    own = lambda found: recognise(found, columns=named, own_columns=True)  # noqa: E731
    assert own(["question", "answer"]) == recognise(["question", "answer"], columns=named)
    assert own(["question", "answer", "text"])[0] == "instruct"  # those named win
    assert own(["instruction", "output"]) == recognise(["instruction", "output"])
    assert own(["messages"])[0] == "messages"
    refuse(lambda: own(["question", "response"]), r"columns\['response'\] is 'answer', a column that is not there")
    refuse(lambda: own(["question", "instruction", "response"]), r"columns\['response'\] is 'answer', a column that is")
    refuse(lambda: own(["a", "b"]), r"columns\['instruction'\] is 'question', a column that is not there")
    refuse(lambda: recognise(["messages"], columns=named), r"columns\['instruction'\] is 'question', a column that is")


def test_a_named_eval_set_may_call_its_columns_otherwise_than_the_training_rows(tmp_path):
    from specjax import build
    from specjax.config import get_config

    config = get_config()
    config.data.columns = {"instruction": "question", "response": "answer"}
    config.data.template, config.data.length = "chatml", 64
    rows = {"same": [{"question": "q", "answer": "a"}], "own": [{"instruction": "q", "output": "a"}], "text": ["a"]}
    for name, found in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in found))
        config.data.eval[name] = str(path)
    sets = build.eval_data_of(config, tokenizer())
    assert [sets[name].report["format"] for name in rows] == ["instruct", "instruct", "text"]
    assert sets["same"].fingerprint == sets["own"].fingerprint
    config.data.columns.response = "anwser"
    refuse(lambda: build.eval_data_of(config, tokenizer()), "'anwser', .*Did you mean 'answer'")
    config.data.train, config.data.eval_fraction = str(tmp_path / "own.jsonl"), 0.0
    refuse(
        lambda: build.train_data_of(config, tokenizer()),
        r"config\.data\.columns\.instruction is 'question', a column that is",
    )


def test_an_optional_column_that_the_first_row_lacks_is_still_read():
    source = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "input": "e"}]
    kind, mapping = recognise(list(source[0]))
    first, second = examples(zip("12", source, strict=True), kind, mapping)
    assert [turn["content"] for turn in first.messages] == ["a", "b"]
    assert [turn["content"] for turn in second.messages] == ["c\n\ne", "d"]


def test_sharegpt_conversations_become_messages():
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    }
    (example,) = examples([("row 1", row)], *recognise(list(row)))
    assert example.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [
        {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}
        for turns in CONVERSATIONS.values()
    ]
    plain = [{"messages": turns} for turns in CONVERSATIONS.values()]
    options = {"template": "chatml", "length": 256, "batch_size": 1}
    assert (
        data.chat(sharegpt, tokenizer(), **options).fingerprint == data.chat(plain, tokenizer(), **options).fingerprint
    )


def test_tools_and_tool_calls_reach_the_template_and_empty_keys_do_not():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    row = {"messages": turns, "tools": json.dumps([{"name": "f"}])}
    (example,) = examples([("row 1", row)], *recognise(list(row)))
    assert example.messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert example.tools == [{"name": "f"}]
    row["tools"] = "[{"
    refuse(lambda: list(examples([("row 1", row)], *recognise(list(row)))), "^row 1: 'tools' is not JSON")


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ([], "'messages' is an empty list"),
        ("Hello", "'messages' is a str, and must be a list"),
        (["Hello"], "message 1 of 'messages' has neither a 'role' nor a 'from'"),
        ([{"role": "user"}], "message 1 of 'messages' has neither 'content' nor 'value'"),
        (
            [{"role": "assitant", "content": "a"}],
            "message 1 of 'messages' has the unknown role 'assitant'. Did you mean 'assistant'",
        ),
    ],
)
def test_broken_messages_are_named_with_their_row(turns, match):
    good = {"messages": CONVERSATIONS["single"]}
    refuse(lambda: data.load([good, {"messages": turns}], tokenizer(), template="chatml", **SIZES), f"^row 2: {match}")


def test_prompts_are_pairs_of_strings_or_of_messages():
    shape = lambda row: next(examples([("", row)], "prompt", {"prompt": "prompt", "completion": "completion"}))  # noqa: E731
    assert shape({"prompt": "a", "completion": "b"}) == Pair("", "a", "b")
    user, answer = CONVERSATIONS["single"]
    assert shape({"prompt": [user], "completion": [answer]}) == Conversation("", [user, answer], None, 1)
    assert next(examples([("", {"text": "a"})], "text", {"text": "text"})) == Text("", "a")


def test_a_named_template_serves_prompt_and_completion_too():
    pair = [{"prompt": "q", "completion": "a"}]
    chat = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    options = {"template": "chatml", **SIZES}
    assert (
        data.instruct(pair, tokenizer(), **options).fingerprint == data.chat(chat, tokenizer(), **options).fingerprint
    )
    assert data.instruct(pair, tokenizer(), **SIZES).template is None


def test_what_is_ignored_is_reported():
    report = data.load([{"text": "a", "url": "b"}], tokenizer(), **SIZES).report
    assert report["columns"] == {"text": "text"} and report["ignored_columns"] == ["url"]


def test_an_unknown_way_with_overlong_rows_is_refused():
    refuse(
        lambda: data.load(["a"], tokenizer(), overlong="truncat", **SIZES),
        "use one of drop, truncate, keep_end, split. Did you mean 'truncate'",
    )
