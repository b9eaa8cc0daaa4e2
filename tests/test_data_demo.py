"""The demo's corpus and tokenizer: real, deterministic, and with nothing held out in the training files."""

import json
import re

import pytest

from demo import corpus
from demo.tokenizer import BOS, END, PAD, START, train_tokenizer

NAMES = ("text_train", "text_eval", "pairs_train", "pairs_eval", "general_eval", "base_train", "base_eval")
PREFERENCE = ("preference_train", "preference_eval")


@pytest.fixture(scope="module")
def rows():
    return corpus.build()


def test_every_file_has_rows_and_the_eval_sets_are_small(rows, tmp_path):
    counts = corpus.write(tmp_path / "out")
    assert sorted(counts) == sorted(NAMES + PREFERENCE)
    assert all(counts[name] == (len(rows[name]), counts[name][1]) and len(rows[name]) > 5 for name in NAMES)
    assert counts["base_train"][1] > 3_000_000 and counts["text_train"][1] > 500_000
    assert len(rows["pairs_train"]) > 2000 and len(rows["pairs_eval"]) == corpus.EVAL_PAIRS
    assert counts["text_eval"][1] <= corpus.EVAL_CHARACTERS and counts["general_eval"][1] <= corpus.GENERAL_CHARACTERS
    written = (tmp_path / "out" / "pairs_train.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in written.splitlines()] == rows["pairs_train"]  # built twice


def test_which_modules_are_held_out_depends_on_their_names_alone():
    # As on every Python: a golden list.
    assert [name for name in ("textwrap", "typing", "socket", "subprocess") if corpus.held_out(name)] == [
        "textwrap", "typing", "socket", "subprocess"
    ]  # fmt: skip
    assert not any(corpus.held_out(name) for name in ("argparse", "asyncio", "json", "logging", "re", "tkinter"))


def test_no_held_out_module_stands_in_a_training_file(rows):
    sources = list(corpus.source_files())
    tops = {top for top, _, _ in sources}
    held = {top for top in tops if corpus.held_out(top)}
    assert 0.04 < len(held) / len(tops) < 0.2
    base = {row["text"] for row in rows["base_train"]}
    assert not base & {source for top, _, source in sources if top in held}
    assert base >= {source for top, _, source in sources if top not in held}
    asked = re.compile(r"`(\w+)[.`]")
    for row in rows["pairs_train"]:
        assert not {match for text in row.values() for match in asked.findall(text)[:1]} & held
    for row in rows["pairs_eval"]:
        named = asked.findall(row["instruction"]) + re.findall(r"`(\w+)[.(]", row["response"])
        assert named[0] in held


def test_no_held_out_answer_or_paragraph_is_in_the_training_prose(rows):
    known = {row["response"] for row in rows["pairs_train"]}
    assert not known & {row["response"] for row in rows["pairs_eval"]}
    train = {" ".join(part.split()) for row in rows["text_train"] for part in corpus.paragraphs(row["text"])}
    evaluation = {" ".join(part.split()) for row in rows["text_eval"] for part in corpus.paragraphs(row["text"])}
    assert not {part for part in train & evaluation if len(part) >= 60}


def test_a_function_asks_what_it_does_and_which_function_does_it():
    thing = corpus.Thing("os", "os.f", "function", "os.f(a)", "Remove any common blanks from the left.\n\nMore.")
    text = corpus.answer(thing.doc)
    assert text == "Remove any common blanks from the left."
    pairs = corpus.questions(thing, text)
    assert ("What does `os.f` do?", text) in pairs
    assert ("How do I remove any common blanks from the left?", "Use `os.f(a)`.") in pairs


@pytest.mark.parametrize(
    "doc", [">>> f(1)", "f(a) -> b", "short", "x" * 500, "lower case words are no sentence at all"]
)
def test_what_is_no_sentence_is_no_answer(doc):
    assert corpus.answer(doc) is None


def test_the_tokenizer_opens_with_its_template_and_begins_and_ends_texts_once(rows, tmp_path):
    from transformers import AutoTokenizer

    import specjax.data as data

    train_tokenizer([row["text"] for row in rows["text_eval"]], tmp_path, vocabulary=512)
    tok = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(tok) == 512
    assert (tok.pad_token, tok.bos_token, tok.eos_token) == (PAD, BOS, END)
    assert tok.convert_tokens_to_ids([PAD, BOS, START, END]) == [0, 1, 2, 3]
    loaded = data.instruct(rows["pairs_eval"][:1], tok, length=256, batch_size=1)
    assert loaded.tokens[:2].tolist() == [1, 2] and (loaded.tokens == 1).sum() == 1
    assert loaded.end_of_turn == tok.eos_token_id
    assert data.text(["Été 🙂"], tok, length=32, batch_size=1).preview(1) == [
        [[(f"{BOS}", False), (f"Été 🙂{END}", True)]]
    ]


def test_a_tokenizer_of_another_size_than_asked_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train on more text"):
        train_tokenizer(["too little"], tmp_path)
