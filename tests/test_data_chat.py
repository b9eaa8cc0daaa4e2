"""Masks and token ids: by hand as numbers, and for every template by language and kind of tokenizer."""

import random

import pytest
from data_fixtures import CONVERSATIONS, refuse, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import specjax.data as data
from specjax.data import windows
from specjax.data.chat import BUILT_IN, documents, encode, resolve, spans
from specjax.data.example import Conversation, Pair, Text

SIZES = {"length": 512, "batch_size": 1}


def trained_text(source, tok, **options):
    """The text that trains, in pieces."""
    loaded = data.load([source], tok, **SIZES, **options)
    return [text for row in loaded.preview(1) for document in row for text, trained in document if trained]


# --- by hand


@pytest.fixture(scope="module")
def words():
    """One token a word: <s>=0 </s>=1 <u>=2 <a>=3 hi=4 yes=5 no=6 ok=7."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<u>", "<a>", "hi", "yes", "no", "ok", "?"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<u>", "<a>"])
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' + m.content }}"
        "{% else %}{{ '<a>' + m.content + '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "llama2"])
def test_a_long_text_in_windows_has_the_tokens_of_the_whole(name, monkeypatch):
    tok, draw = tokenizer(name), random.Random(0)
    bits = [
        "The cat sat. ",
        "\n\n",
        "    ",
        "naïve 🙂🙂 ",
        "漢字かな交じり文",
        "12345",
        "\tx = f(x)\n",
        "a" * 40,
        "e\u0301",
        " the",
    ]
    texts = ["".join(draw.choice(bits) for _ in range(3000)), "short", "ab" * 9000, " " * 9000, "", "漢" * 9000]
    rows = [{"prompt": text, "completion": text[:100] + "b"} for text in texts]
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in texts
    ]
    whole, cut = [], []
    for made in (whole, cut):
        for source in ([{"text": text} for text in texts], rows, chats):
            options = {"template": "zephyr"} if source is chats else {}
            loaded = data.load(source, tok, length=64, batch_size=2, overlong="split", cache=False, **options)
            made.append((loaded.fingerprint, loaded.report))
        for size, short in {"LONG": 3000, "WINDOW": 2000, "OVERLAP": 300}.items():
            monkeypatch.setattr(windows, size, short)
    assert whole == cut


def test_a_conversation_trains_every_answer_with_its_end_token_and_nothing_else(words):
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "no"), ("assistant", "ok")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    batch = data.chat([row], words, length=13, batch_size=1).batch(0)
    #                                           <s> <u>  hi <a> yes </s> <u> no <a> ok </s>  -  -
    assert batch["tokens"].tolist() == [[0, 2, 4, 3, 5, 1, 2, 6, 3, 7, 1, 0, 0]]
    assert batch["targets"].tolist() == [[2, 4, 3, 5, 1, 2, 6, 3, 7, 1, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "targets": "int32", "loss_mask": "float32", "positions": "int32", "segment_ids": "int32"
    }  # fmt: skip


def test_a_pair_trains_the_completion_and_the_end_token(words):
    batch = data.instruct([{"prompt": "hi no ", "completion": "yes"}], words, length=4, batch_size=1).batch(0)
    assert batch["tokens"].tolist() == [[4, 6, 5, 1]]
    assert batch["targets"].tolist() == [[6, 5, 1, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 0]]


def test_raw_text_trains_every_token_and_the_end_token(words):
    batch = data.text(["hi yes no"], words, length=5, batch_size=1).batch(0)
    assert batch["tokens"].tolist() == [[4, 5, 6, 1, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 0, 0]]


# --- every kind of tokenizer, language and template


# What each built-in template writes before the words of an answer and after them, where the prompt ends before it.
AROUND = {
    "alpaca": ("", "</s>"),
    "chatml": ("", "<|im_end|>\n"),
    "gemma": ("", "<end_of_turn>\n"),
    "gemma3": ("", "<end_of_turn>\n"),
    "granite": ("", "<|end_of_text|>\n"),
    "llama2": (" ", " </s>"),
    "llama3": ("", "<|eot_id|>"),
    "llama3.1": ("", "<|eot_id|>"),
    "mistral": (" ", "</s>"),
    "mistral-nemo": ("", "</s>"),
    "mistral-v3": (" ", "</s>"),
    "olmo2": ("", "</s>"),
    "openchat": (" ", "<|end_of_turn|>"),
    "phi3": ("", "<|end|>\n"),
    "phi4": ("", "<|im_end|>"),
    "qwen2.5": ("", "<|im_end|>\n"),
    "qwen3": ("", "<|im_end|>\n"),
    "zephyr": ("", "</s>\n"),
}


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "llama2"])
@pytest.mark.parametrize("template", BUILT_IN)
@pytest.mark.parametrize("name", ["single", "multi-turn", "french", "cjk", "emoji", "one letter"])
def test_the_trained_text_is_the_answers_and_the_ids_are_the_templates(kind, template, name):
    tok, turns = tokenizer(kind), CONVERSATIONS[name]
    start, end = AROUND[template]
    answers = [start + turn["content"] + end for turn in turns if turn["role"] == "assistant"]
    if template == "phi3":
        answers[-1] += "</s>"  # closes the conversation
    if template == "qwen3":
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]  # only the last answer keeps its reasoning
    trained = trained_text({"messages": turns}, tok, template=template, turns="whole")
    if kind == "llama2":  # which writes a space of its own after special tokens
        trained, answers = ([text.replace(" ", "") for text in texts] for texts in (trained, answers))
    assert trained == answers

    text = resolve(tok, template)
    ((document,),) = documents([Conversation("row 1", turns)], tok, text, exact=False)
    assert document.ids.tolist() == tok.apply_chat_template(turns, chat_template=text)["input_ids"]


words_of_all_kinds = st.lists(
    st.sampled_from([*" \n\tab1é—付🎉<|>", "</s>", "<|im_end|>", "assistant\n", "[/INST]"]), min_size=1
).map("".join)


@given(st.lists(words_of_all_kinds, min_size=2, max_size=7), st.sampled_from(BUILT_IN))
@settings(max_examples=300, deadline=None)
def test_whatever_is_said_the_answers_and_nothing_else_train(contents, template):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    tok, (start, end) = tokenizer(), AROUND[template]
    whole, found = spans(tok, resolve(tok, template), Conversation("row 1", turns))
    trims = template in ("gemma", "gemma3", "llama2", "llama3", "llama3.1", "mistral-v3")
    said = [text for text in contents[1::2] if text.strip()]  # an answer that says nothing is none to learn
    answers = [start + (text.strip() if trims else text) + end for text in said]
    if len(contents) % 2 == 0 and said[-1:] == contents[-1:]:  # the last message is an answer
        if template == "phi3":
            answers[-1] += "</s>"
        if template == "qwen3":
            answers[-1] = "<think>\n\n</think>\n\n" + answers[-1].lstrip("\n")
    assert [whole[first:last] for first, last in found] == answers


@pytest.mark.parametrize("template", ["chatml", "alpaca", "llama3", "mistral"])
def test_one_begin_token_results_where_both_template_and_tokenizer_add_it(template):
    tok = tokenizer(adds_bos=True)
    loaded = data.chat([{"messages": CONVERSATIONS["multi-turn"]}], tok, template=template, **SIZES)
    assert loaded.tokens[0] == tok.bos_token_id
    assert (loaded.tokens == tok.bos_token_id).sum() == 1


def test_plain_text_that_already_begins_with_the_begin_token_gets_no_second():
    tok = tokenizer(adds_bos=True)
    for source in ("<s>The cat", {"prompt": "<s>The", "completion": " cat"}):
        assert (data.load([source], tok, **SIZES).tokens == tok.bos_token_id).sum() == 1


def test_text_that_already_ends_with_the_end_token_gets_no_second():
    tok = tokenizer()
    for source in ("The cat</s>", {"prompt": "The", "completion": " cat</s>"}):
        assert (data.load([source], tok, **SIZES).tokens == tok.eos_token_id).sum() == 1


def test_a_tokenizer_that_adds_the_end_token_adds_no_second_and_none_within_a_pair():
    plain, adds = tokenizer(), tokenizer(adds_eos=True)
    assert adds("The cat")["input_ids"] == [*plain("The cat")["input_ids"], plain.eos_token_id]
    for source in (
        "The cat",
        "The cat</s>",
        {"prompt": "The", "completion": " cat"},
        {"prompt": "The</s>", "completion": " cat"},
    ):
        fingerprints = {data.load([source], tok, **SIZES).fingerprint for tok in (plain, adds)}
        assert len(fingerprints) == 1


@pytest.mark.parametrize("template", ["alpaca", "mistral", "zephyr"])
def test_the_end_token_trains_even_where_it_is_also_the_padding(template):
    tok = tokenizer(pad_token="</s>")
    assert tok.pad_token_id == tok.eos_token_id
    batch = data.chat([{"messages": CONVERSATIONS["multi-turn"]}], tok, template=template, **SIZES).batch(0)
    ends = batch["targets"][batch["loss_mask"] == 1] == tok.eos_token_id
    assert ends.sum() == 3
    padding = batch["segment_ids"] == 0
    assert padding.any() and batch["loss_mask"][padding].sum() == 0


def test_alpaca_sets_the_input_under_a_heading_and_other_templates_after_a_blank_line():
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    loaded = data.instruct([row], tokenizer(), template="alpaca", **SIZES)
    ((before, _), (after, trained)) = loaded.preview(1)[0][0]
    assert before.startswith("<s>Below is an instruction that describes a task, paired with an input")
    assert before.endswith("### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n")
    assert (after, trained) == ("4</s>", True)
    loaded = data.instruct([row], tokenizer(), template="chatml", **SIZES)
    assert "Add.\n\n2 and 2<|im_end|>" in loaded.preview(1)[0][0][0][0]


def test_alpaca_without_an_input_says_nothing_of_one():
    loaded = data.instruct(
        [{"instruction": "Add.", "input": "", "output": "4"}], tokenizer(), template="alpaca", **SIZES
    )
    before = loaded.preview(1)[0][0][0][0]
    assert "### Input" not in before and "paired with an input" not in before


def test_a_template_may_be_a_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert trained_text({"messages": CONVERSATIONS["single"]}, tokenizer(), template=str(path)) == ["[It is four.]"]


def test_the_turns_end_token_is_told_for_generation_to_stop_at():
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "zephyr": "</s>", "phi3": "<|end|>", "qwen3": "<|im_end|>"}
    for template, end in ends.items():
        tok = tokenizer()
        loaded = data.chat([{"messages": CONVERSATIONS["single"]}], tok, template=template, **SIZES)
        assert loaded.end_of_turn == tok.convert_tokens_to_ids(end)
        assert loaded.report["end_of_turn"] == end


@pytest.mark.parametrize(
    ("template", "date"),
    [
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
            "{{ date_string }}",
            "26 Jul 2024",
        ),
        ("{{ strftime_now('%B %d, %Y') }}", "July 26, 2024"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
    ],
)  # fmt: skip
def test_a_template_that_writes_the_date_gives_the_same_data_every_day(template, date):
    template += "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    loaded = data.chat([{"messages": CONVERSATIONS["single"]}], tokenizer(), template=template, **SIZES)
    assert loaded.preview(1)[0][0][0][0].startswith(date + "What")
    indented = "  \n  {% if true %}a{% endif %}" + template  # nothing of the template's own spaces goes
    whole, _ = spans(tokenizer(), indented, Conversation("row 1", CONVERSATIONS["single"]))
    assert whole.startswith(f"  \na{date}What")
    assert loaded.template == template  # what is exported is the template as it was


def test_examples_of_mixed_kinds_are_all_encoded():
    tok = tokenizer()
    mixed = [Text("a", "The cat"), Pair("b", "The", " cat"), Conversation("c", CONVERSATIONS["single"])]
    assert len(encode(mixed, tok, resolve(tok, "chatml"))) == 3


# --- refusals


def refuse_rows(source, tok, match, **options):
    refuse(lambda: data.load(source, tok, **SIZES, **options), match)


THINKING = (  # as Qwen3's: only the last answer keeps its reasoning
    "{% for m in messages %}{{ m.role + ':' }}"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_earlier_turns_that_are_written_otherwise_than_the_last_are_found_where_it_can_be_exact():
    rows = [{"messages": CONVERSATIONS[name]} for name in ("single", "multi-turn")]
    assert trained_text(rows[0], tokenizer(), template=THINKING) == ["<think></think>It is four.;"]
    assert trained_text(rows[1], tokenizer(), template=THINKING, turns="whole") == [
        "Yes?;", "The cat sat.;", "<think></think>On the mat.;"
    ]  # fmt: skip
    # The prompt for an answer may open its reasoning, which earlier answers no longer have (DeepSeek-R1, Qwen3.5).
    led = THINKING.replace("{{ m.content }}", "{{ ' ' + m.content }}")  # the space is not in the prompt
    assert trained_text(rows[1], tokenizer(), template=led, turns="whole")[:2] == [" Yes?;", " The cat sat.;"]
    opened = THINKING.replace("assistant:{% endif %}", "assistant:<think>{% endif %}")
    assert trained_text(rows[1], tokenizer(), template=opened, turns="whole") == [
        "Yes?;",
        "The cat sat.;",
        "</think>On the mat.;",
    ]


@pytest.mark.parametrize(
    "template",
    [
        # What stands before an answer is not what the model is shown for it.
        "{{ messages | length }}" + THINKING,
        THINKING.replace("{{ m.content }};", "{{ m.content }}{{ ',' if not loop.last else ';' }}"),
        THINKING.replace("{{ m.role + ':' }}", "{{ m.role + ('>' if not loop.last else ':') }}"),
        # What ends a turn is not what ends the last one.
        THINKING.replace("{{ m.content }};", "{{ m.content }}{{ ',' if m.role != 'user' and not loop.last else ';' }}"),
        # The words do not show, or show twice, so they tell no place.
        THINKING.replace("{{ m.content }}", "{{ m.content | length }}"),
        THINKING.replace("{{ m.content }}", "{{ m.content + m.content }}"),
    ],
)
def test_a_template_that_rewrites_earlier_turns_beyond_that_is_refused_with_the_row(template):
    refused = r"^row 1: the chat template renders .* up to message 2 otherwise"
    refuse_rows([{"messages": CONVERSATIONS["multi-turn"]}], tokenizer(), refused, template=template, turns="whole")


def test_a_template_that_rejects_a_role_is_refused_with_the_row_and_its_own_words():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    refuse_rows(
        [{"messages": CONVERSATIONS["system"]}], tokenizer(), "^row 1: .*System role not supported", template=template
    )
    tools = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]
    refuse_rows([{"messages": tools}], tokenizer(), "^row 1: .*not tool", template="alpaca")


def test_a_conversation_may_begin_with_the_assistant_where_the_template_renders_an_empty_prompt():
    greeted = {"messages": [{"role": "assistant", "content": "Hi!"}, *CONVERSATIONS["single"]]}
    assert trained_text(greeted, tokenizer(), template="chatml") == ["Hi!<|im_end|>\n", "It is four.<|im_end|>\n"]
    needs_one = "{% if messages[0].role == 'system' %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    refuse_rows([greeted], tokenizer(), "^row 1: .*begins with the assistant, .*let a user", template=needs_one)
    refuse_rows([greeted], tokenizer(), "^row 1: .*refuses the conversation: Conversation roles must", template="gemma")


# --- templates that mark what the assistant says


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_marks_say_what_trains():
    row = {"messages": CONVERSATIONS["multi-turn"]}
    assert trained_text(row, tokenizer(), template=MARKED) == [
        "Yes?<|im_end|>", "The cat sat.<|im_end|>", "On the mat.<|im_end|>"
    ]  # fmt: skip
    last = MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}")
    assert trained_text(row, tokenizer(), template=last) == ["On the mat.<|im_end|>"]
    thought = MARKED.replace("{% generation %}{{ m.content", "{{ m.content[:3] }}{% generation %}{{ m.content[3:]")
    assert trained_text(row, tokenizer(), template=thought)[0] == "?<|im_end|>"


def test_marks_that_stop_before_the_end_of_turn_token_train_it_too():
    row = {"messages": CONVERSATIONS["multi-turn"]}
    open_ended = MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
                                "{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}")  # fmt: skip
    assert open_ended != MARKED
    assert trained_text(row, tokenizer(), template=open_ended) == trained_text(row, tokenizer(), template=MARKED)
    # Words that are left out stay out; the end of a turn that comes behind them would never train.
    words = MARKED.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}!<|im_end|>"
    )
    refuse_rows([row], tokenizer(), r"^row 1: .*ends message 2 with '<\|im_end\|>', but .*never stop", template=words)
    # Nor would one that the template writes with the message that follows (GLM 4's).
    later = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}{% endfor %}"
    )
    later += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    refuse_rows([row], tokenizer(), r"what follows one is '<\|user\|>', which would not train", template=later)


def test_marks_need_no_beginning_of_the_conversation_that_the_template_would_render():
    whole_only = "{% if messages | length < 6 %}{{ raise_exception('not yet') }}{% endif %}" + MARKED
    row = {"messages": CONVERSATIONS["multi-turn"]}
    assert trained_text(row, tokenizer(), template=whole_only) == trained_text(row, tokenizer(), template=MARKED)
    refuse_rows(
        [row],
        tokenizer(),
        "^row 1: .*not yet",
        template=whole_only.replace("generation", "if true", 1).replace("endgeneration", "endif"),
    )


def test_marks_that_touch_are_one():
    apart = MARKED.replace(
        "{{ m.content + '<|im_end|>' }}", "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>"
    )
    chat = Conversation("row 1", CONVERSATIONS["multi-turn"])
    assert spans(tokenizer(), apart, chat) == spans(tokenizer(), MARKED, chat)
    assert len(spans(tokenizer(), MARKED, chat)[1]) == 3


def test_of_a_pair_of_messages_only_the_completions_marks_train():
    turns = CONVERSATIONS["multi-turn"]
    row = {"prompt": turns[:3], "completion": turns[3:4]}
    for template in (MARKED, MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        assert trained_text(row, tokenizer(), template=template)[0].rstrip() == "The cat sat.<|im_end|>"


def test_a_row_in_which_nothing_is_marked_is_counted_and_alone_is_an_error():
    unmarked = MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'")
    refuse_rows([{"messages": CONVERSATIONS["single"]}], tokenizer(), "no trained token: 1", template=unmarked)


# --- more refusals


def test_a_tokenizer_without_a_template_is_told_which_there_are():
    refuse_rows(
        [{"messages": CONVERSATIONS["single"]}],
        tokenizer(),
        "no chat template: set template to one of alpaca, chatml, gemma",
    )


def test_an_unknown_template_names_its_neighbour():
    refuse_rows([{"messages": CONVERSATIONS["single"]}], tokenizer(), "Did you mean 'chatml'", template="chatlm")


def test_a_tokenizer_without_an_end_token_cannot_end_a_document():
    tok = tokenizer(eos_token=None)
    refuse_rows(["some text"], tok, "no eos token")


def test_rows_without_an_answer_are_counted_and_alone_are_an_error():
    silent = {"messages": [{"role": "user", "content": "Hello"}]}
    empty = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " "}]}
    good = {"messages": CONVERSATIONS["single"]}
    loaded = data.chat([silent, good, empty], tokenizer(), template="chatml", **SIZES)
    assert loaded.report["dropped"] == {"nothing to learn": {"rows": 2, "tokens": 0}}
    assert loaded.report["documents"] == 1
    refuse_rows([silent, empty], tokenizer(), "none of the 2 rows .*nothing to learn: 2", template="chatml")


@pytest.mark.rule(7)
def test_a_template_that_leaves_the_answer_out_is_no_silent_empty_mask():
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    refuse_rows(
        [{"messages": CONVERSATIONS["single"]}],
        tokenizer(),
        r"^row 1: the chat template leaves out the words of message 2 \(assistant\): use",
        template=template,
    )
