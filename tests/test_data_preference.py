"""Preference pairs have the tokens and masks of TRL's DPOTrainer, and both answers of a pair lie side by side."""

import io
import json
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
from data_fixtures import CHATML_MARKED, CONVERSATIONS, TOOL_ROWS, TOOLS, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import specjax.data as data
from specjax.data.chat import BUILT_IN, resolve
from specjax.data.report import show
from specjax.errors import UserError

SIZES = {"length": 4096, "batch_size": 1}


def refuse(action, match):
    with pytest.raises(UserError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


# --- against TRL


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """A function from rows to TRL's [ids, mask of the completion], chosen and rejected of each row."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        config = DPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, max_length=None)

    def prepared(rows, tok):
        trainer = SimpleNamespace(_tokenizer=tok)
        result = []
        for row in DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tok, config, "train"):
            batch = DataCollatorForPreference(pad_token_id=tok.pad_token_id)([row])
            for side in range(2):
                inside = batch["attention_mask"][side].bool()
                result.append([batch[name][side][inside].tolist() for name in ("input_ids", "completion_mask")])
        return result

    return prepared


def ours(rows, tok, **options):
    """[ids, mask of what trains] of chosen and rejected of each row."""
    loaded = data.preference(rows, tok, **(SIZES | options), packing=False)
    result = []
    for batch in loaded.once():
        for segment in (1, 2):
            inside = batch["segment_ids"][0] == segment
            ids, counts = batch["tokens"][0][inside], batch["loss_mask"][0][inside][:-1] == 1
            assert np.array_equal(batch["targets"][0][inside][:-1], ids[1:])
            assert np.array_equal(batch["positions"][0][inside], np.arange(len(ids)))
            result.append([ids.tolist(), [0, *counts.astype(int).tolist()]])
        assert batch["segment_ids"].max() == 2
    return result


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "llama2"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_pairs_equal_trls(trl, kind, adds_bos):
    tok = tokenizer(kind, adds_bos=adds_bos)
    rows = [
        {"prompt": "What is two plus two?", "chosen": " It is four.", "rejected": " It is the cat."},
        {"prompt": "What is two plus two? ", "chosen": "It is four.", "rejected": "No"},  # the space joins the answer
        {"prompt": "What is two plus two? ", "chosen": "4", "rejected": "It is four."},  # the rejected one alone
        {
            "prompt": "The ca",
            "chosen": "t sat",
            "rejected": "r",
        },  # tokens merge across the seam, in one and not the other
        {"prompt": "Qu'est-ce ", "chosen": "que la taxe ? À Noël…", "rejected": "taxe"},
        {"prompt": "🎉", "chosen": "👩‍👩‍👧🙂", "rejected": "🙂"},
        {"prompt": "Ends itself", "chosen": " here</s>", "rejected": " here not"},
        {"prompt": "Earlier turn</s>", "chosen": "more", "rejected": ""},
        {"prompt": "a\n", "chosen": "\nb  ", "rejected": "\n\n"},
        {"prompt": "", "chosen": "The cat", "rejected": "The mat"},
    ]
    if not adds_bos:
        rows.pop()  # TRL trains on a first token that nothing comes before
    assert ours(rows, tok) == trl(rows, tok)


def test_an_implicit_prompt_of_strings_is_trls(trl):
    tok = tokenizer()
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is blue, and", "rejected": "The sky is blue"},
        {"chosen": "Two plus two? Four", "rejected": "Two plus two? Five"},
        {"chosen": "The cat  sat", "rejected": "The cat  mat"},
    ]
    assert ours(rows, tok) == trl(rows, tok)


def test_one_begin_and_one_end_token_where_trl_has_two(trl):
    """Where the tokenizer adds an end token behind that of the text, or the prompt begins with the one that it adds."""
    tok = tokenizer(adds_eos=True)
    rows = [{"prompt": "Two plus two?", "chosen": " Four", "rejected": " Five"}]
    assert ours(rows, tok) == [[ids[:-1], mask[:-1]] for ids, mask in trl(rows, tok)]
    tok = tokenizer()
    rows = [{"prompt": "<s>Two plus two?", "chosen": " Four", "rejected": " Five"}]
    assert ours(rows, tok) == [[ids[1:], mask[1:]] for ids, mask in trl(rows, tok)]


def conversations(*, system=True):
    """Rows of messages: the last answer of each conversation against another one."""
    rows = []
    for turns in CONVERSATIONS.values():
        if turns[-1]["role"] == "assistant" and (system or turns[0]["role"] != "system"):
            other = [{"role": "assistant", "content": "No, the mat. 🙂"}]
            rows.append({"prompt": turns[:-1], "chosen": turns[-1:], "rejected": other})
    return rows


@pytest.mark.parametrize("template", BUILT_IN)
def test_conversations_under_every_built_in_template_equal_trls(trl, template):
    tok = tokenizer()
    rows = conversations(system=template != "gemma")
    expected = resolve(tok, template)
    found = ours(rows, tok, template=template)
    tok.chat_template = expected
    try:
        assert found == trl(rows, tok) == ours(rows, tok)
    finally:
        tok.chat_template = None


@pytest.mark.parametrize(
    "family", ["llama3", "gemma3", "cohere", "phi3", "phi3_5", "qwen2_5", "qwen3", "qwen3_instruct_2507", "glm4moe"]
)
@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_conversations_under_stock_templates_equal_trls(trl, family, kind):
    text = files("trl").joinpath("chat_templates", f"{family}.jinja").read_text("utf-8")
    tok = tokenizer(kind, chat_template=text)
    assert ours(conversations(), tok) == trl(conversations(), tok)


def test_an_implicit_prompt_of_messages_is_trls_also_over_several_turns(trl):
    tok = tokenizer(chat_template=CHATML_MARKED)
    turns, other = CONVERSATIONS["multi-turn"], CONVERSATIONS["french"]
    whole = [
        {"chosen": turns, "rejected": [*turns[:5], other[1]]},
        {"chosen": turns, "rejected": [*turns[:3], *other[1:4]]},  # the users' turns differ, too
        {"chosen": turns, "rejected": turns[:4]},
    ]
    assert ours(whole, tok) == trl(whole, tok)
    # A prompt that is a string, beside whole conversations, says what these say.
    assert ours([row | {"prompt": "Hello"} for row in whole], tok) == ours(whole, tok)


def test_tools_reach_the_template_as_trls_do(trl):
    text = files("trl").joinpath("chat_templates", "qwen2_5.jinja").read_text("utf-8")
    tok = tokenizer(chat_template=text)
    other = [{"role": "assistant", "content": "No cat."}]
    rows = [
        {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": other, "tools": json.dumps(TOOLS)}
        for turns in TOOL_ROWS.values()
    ][:1]
    assert ours(rows, tok) == trl(rows, tok)
    assert "Counts the cats" in tok.decode(ours(rows, tok)[0][0])


# --- rows of pairs


def test_strings_go_through_a_template_that_is_named():
    plain = [{"prompt": "Two plus two?", "chosen": "Four", "rejected": "Five"}]
    turns = {
        role: [{"role": "user" if role == "prompt" else "assistant", "content": plain[0][role]}] for role in plain[0]
    }
    assert ours(plain, tokenizer(), template="chatml") == ours([turns], tokenizer(), template="chatml")


pairs = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=30)


@given(pairs, st.booleans(), st.integers(12, 40))
@settings(max_examples=60, deadline=None)
def test_both_answers_of_a_pair_lie_side_by_side_and_every_pair_that_fits_is_there_once(sizes, packing, length):
    tok = tokenizer(adds_bos=False)
    # Letters that merge with nothing: a token each. Each pair's answers differ from those of all others of its sizes.
    rows = [{"prompt": "a" * p, "chosen": "b" * c, "rejected": "c" * r} for p, c, r in sizes]
    documents = [
        [tok(row["prompt"] + row[side] + "</s>")["input_ids"] for side in ("chosen", "rejected")] for row in rows
    ]
    fit = [pair for pair in documents if len(pair[0]) + len(pair[1]) <= length]
    if not fit:
        refuse(lambda: data.preference(rows, tok, length=length, batch_size=2), "are over the length of")
        return
    loaded = data.preference(rows, tok, length=length, batch_size=2, packing=packing)
    found, most = [], 0
    for batch in loaded.once():
        for ids, segments, mask in zip(batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True):
            count = int(segments.max())
            assert count % 2 == 0
            assert (np.diff(segments[segments > 0]) >= 0).all() and not segments[int((segments > 0).sum()) :].any()
            most = max(most, count)
            for i in range(count // 2):
                inside = [segments == 2 * i + 1, segments == 2 * i + 2]
                assert all(mask[side].any() for side in inside)
                found.append([ids[side].tolist() for side in inside])
    assert sorted(found) == sorted(fit)
    assert loaded.most_documents == most and (packing or most == 2)
    report = json.loads(json.dumps(loaded.report))
    assert report["documents"] == 2 * len(fit) and report["rows"] == len(rows)
    lost = [pair for pair in documents if len(pair[0]) + len(pair[1]) > length]
    counts = {"rows": len(lost), "tokens": sum(len(ids) for pair in lost for ids in pair)}
    assert report["dropped"] == ({"over length": counts} if lost else {})


def test_pairs_share_rows_as_tightly_as_documents_do():
    rows = [{"prompt": "a" * n, "chosen": "b", "rejected": "c"} for n in range(1, 30)]
    packed, apart = (data.preference(rows, tokenizer(), length=80, batch_size=1, packing=p) for p in (True, False))
    assert apart.num_rows == 29 and packed.num_rows <= 29 / 2
    assert packed.report["tokens"] == apart.report["tokens"]


def test_pairs_without_a_preference_are_dropped_and_counted():
    rows = [
        {"prompt": "Two?", "chosen": " Two", "rejected": " Two"},
        {"prompt": "Two?", "chosen": " ", "rejected": " Two"},
        {"prompt": "Two?", "chosen": " Two", "rejected": ""},  # to say nothing is an answer that one may reject
    ]
    report = data.preference(rows, tokenizer(), **SIZES).report
    assert report["dropped"] == {"nothing to learn": {"rows": 2, "tokens": 0}} and report["documents"] == 2


def test_the_columns_tell_pairs_of_answers():
    row = {"prompt": "Two?", "chosen": " Two", "rejected": " Three", "score": 3}
    loaded = data.load([row], tokenizer(), **SIZES)
    assert loaded.report["format"] == "preference" and loaded.report["ignored_columns"] == ["score"]
    assert loaded.fingerprint == data.preference([row], tokenizer(), **SIZES).fingerprint
    renamed = {"question": "Two?", "good": " Two", "bad": " Three"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert data.load([renamed], tokenizer(), columns=columns, **SIZES).fingerprint == loaded.fingerprint
    # What is trained on otherwise stays so.
    both = {"messages": CONVERSATIONS["single"], "chosen": CONVERSATIONS["single"], "rejected": CONVERSATIONS["french"]}
    assert data.load([both], tokenizer(), template="chatml", **SIZES).report["format"] == "messages"


def test_parts_of_a_split_are_pairs():
    rows = [{"prompt": f"{n}?", "chosen": f" {n}", "rejected": " no"} for n in range(100, 140)]
    parts = [data.preference(rows, tokenizer(), **SIZES, holdout=(0.25, part)) for part in ("train", "eval")]
    assert [part.report["documents"] for part in parts] == [60, 20]
    assert [part.report["rows"] for part in parts] == [30, 10]


def test_mistakes_in_pairs_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "Two?", "chosen": " Two", "rejected": " Three"}

    def load(row, **options):
        path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
        return lambda: data.load(path, tokenizer(), template="chatml", **(SIZES | options))

    user, answer = ({"role": role, "content": "Two"} for role in ("user", "assistant"))
    refuse(load({"prompt": "Two?", "chosen": " Two"}), rf"^{path}:2 lacks 'rejected' \(it has prompt, chosen\)")
    refuse(load(good | {"rejected": [answer]}), rf"^{path}:2: 'rejected' is a list, and must be a str")
    refuse(load(good | {"chosen": [answer]}), rf"^{path}:2: 'rejected' is a str, and must be a list")
    refuse(
        load({"chosen": [user], "rejected": [answer]}), rf"^{path}:2: 'chosen' and 'rejected' share no first message"
    )
    refuse(load({"prompt": [user], "chosen": [answer], "rejected": [{"content": "Two"}]}), f"^{path}:2: message 1 of")
    refuse(load(good, overlong="truncate"), "overlong is 'truncate', but of preference pairs .* can only be dropped")


def test_the_report_shows_pairs():
    row = {"prompt": "Two plus two?", "chosen": " It is four.", "rejected": " It is."}
    loaded = data.preference([row, row], tokenizer(), **SIZES)
    console = Console(file=io.StringIO(), width=80)
    show(loaded.report, loaded.preview(1), console)
    text = console.file.getvalue()
    assert "pairs of answers" in text
    assert "row 1, pair 1 of 2, chosen" in text and "row 1, pair 2 of 2, rejected" in text
    assert "Two plus two?⟦ It is four.</s>⟧" in text and "Two plus two?⟦ It is.</s>⟧" in text
