"""Token ids and loss masks equal those that TRL's SFTTrainer prepares; where they do not, why ours are right."""

import json
from importlib.resources import files
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest
from data_fixtures import CHATML_MARKED, CONVERSATIONS, TOOL_ROWS, TOOLS, tokenizer

import specjax.data as data
from specjax.data.chat import BUILT_IN, resolve
from specjax.errors import UserError

SIZES = {"length": 2048, "batch_size": 1}


@pytest.fixture(scope="module")
def trl_labels(tmp_path_factory):
    """A function from rows to TRL's (ids, labels), by the code that SFTTrainer runs before training."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, max_length=None)

    def labels(rows, tok, assistant_only=False, length=None, keep="keep_start"):
        config.assistant_only_loss = assistant_only
        config.max_length, config.truncation_mode = length, keep
        trainer = SimpleNamespace(_tokenizer=tok, chat_template=tok.chat_template, completion_only_loss=True)
        prepared = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tok, config, False, None, "train")
        return [(row["input_ids"], row["labels"]) for row in prepared]

    return labels


def ours(rows, tok, **options):
    """(ids, labels) of each row."""
    loaded = data.load(rows, tok, **(SIZES | options), packing=False)
    result = []
    for batch in loaded.once():
        inside = batch["segment_ids"][0] == 1
        ids, counts = batch["tokens"][0][inside], batch["loss_mask"][0][inside][:-1] == 1
        assert np.array_equal(batch["targets"][0][inside][:-1], ids[1:])
        result.append((ids.tolist(), [-100, *np.where(counts, ids[1:], -100).tolist()]))
    return result


def unshifted(pairs):
    """TRL's labels without the first, which is nobody's target."""
    return [(ids, [-100, *labels[1:]]) for ids, labels in pairs]


@pytest.mark.rule(7)
@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_equal_trls_assistant_only_loss(trl_labels, kind, name):
    tok = tokenizer(kind, pad_token="</s>", chat_template=CHATML_MARKED)
    rows = [{"messages": CONVERSATIONS[name]}]
    assert ours(rows, tok) == ours(rows, tok, template="chatml")
    if kind != "gpt2" or "trailing spaces" not in name:  # TRL finds no token at the answer's first space, and gives up
        assert ours(rows, tok) == unshifted(trl_labels(rows, tok, assistant_only=True))


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_a_token_that_joins_the_prompts_last_space_with_the_answer_trains_as_trls_does(trl_labels, kind):
    marked = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content }}{% else %}{{ ' A: ' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' A: ' }}{% endif %}"
    )
    plain = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    rows = [{"messages": CONVERSATIONS["single"]}]
    for template in (plain, marked):
        ((ids, labels),) = ours(rows, tokenizer(kind), template=template)
        assert tokenizer(kind).convert_ids_to_tokens(label for label in labels if label >= 0)[0] == "ĠIt"
        ((trl_ids, trls),) = unshifted(trl_labels(rows, tokenizer(kind, chat_template=marked), assistant_only=True))
        assert ids == trl_ids and labels[:-1] == trls[:-1]
        # These marks leave the end token out. Ours trains it, or the model would never learn to stop.
        assert (labels[-1], trls[-1]) == (tokenizer(kind).eos_token_id, -100)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_where_a_turns_last_character_is_several_tokens_all_train_and_trl_may_train_the_first(trl_labels, name):
    tok = tokenizer("llama2", chat_template=CHATML_MARKED)
    rows = [{"messages": CONVERSATIONS[name]}]
    ((ids, labels),) = ours(rows, tok)
    ((trl_ids, trls),) = unshifted(trl_labels(rows, tok, assistant_only=True))
    assert ids == trl_ids
    more = [label for label, trl in zip(labels, trls, strict=True) if label != trl]
    answers = sum(turn["role"] == "assistant" for turn in CONVERSATIONS[name])
    # What follows the end-of-turn token, whose space is the first: transformers trains all of it since 5.24, as we do.
    assert tok.convert_ids_to_tokens(more) in ([], ["<0x0A>"] * answers)


@pytest.mark.rule(7)
@pytest.mark.parametrize("kind", ["llama3", "gpt2", "llama2"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is two plus two?", " It is four."),
        ("What is two plus two? ", "It is four."),  # the space joins the next word: the seam's token is the answer's
        ("The ca", "t sat"),
        ("Qu'est-ce ", "que la taxe ? À Noël…"),
        ("付加価", "値税とは"),
        ("🎉", "👩‍👩‍👧🙂"),
        ("a\n", "\nb"),
        ("Ends itself", " here</s>"),
        ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>"),
        ("Earlier turn</s>", "more"),
    ],
)
def test_pairs_equal_trls_completion_only_loss(trl_labels, kind, prompt, completion):
    tok = tokenizer(kind)
    rows = [{"prompt": prompt, "completion": completion}]
    assert ours(rows, tok) == unshifted(trl_labels(rows, tok))


def test_pairs_of_messages_equal_trls(trl_labels):
    tok = tokenizer(chat_template=CHATML_MARKED)
    turns = CONVERSATIONS["multi-turn"]
    rows = [{"prompt": turns[:3], "completion": turns[3:4]}]
    assert ours(rows, tok) == unshifted(trl_labels(rows, tok))


@pytest.mark.parametrize("template", BUILT_IN)
def test_the_last_answer_under_every_built_in_template_trains_as_trls_completion(trl_labels, template):
    """For these TRL needs no marks: the completion is what the whole has beyond the prompt."""
    tok = tokenizer(adds_bos=True)
    tok.chat_template = resolve(tok, template)
    try:
        for row in conversations(system=template != "gemma"):
            rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}]
            assert ours(rows, tok) == unshifted(trl_labels(rows, tok))
    finally:
        tok.chat_template = None


def test_raw_text_equals_trls(trl_labels):
    tok = tokenizer()
    texts = [turn["content"] for turns in CONVERSATIONS.values() for turn in turns]
    # TRL leaves a begin-of-text token that the text has beside the one that the tokenizer adds.
    rows = [{"text": text} for text in texts if text.strip() and not text.startswith("<s>")]
    assert ours(rows, tok) == unshifted(trl_labels(rows, tok))


def stock(family, end=""):
    return files("trl").joinpath("chat_templates", f"{family}{end}.jinja").read_text("utf-8")


def conversations(*, system=True, tools=False):
    rows = [
        {"messages": turns}
        for turns in CONVERSATIONS.values()
        if turns[-1]["role"] == "assistant" and (system or turns[0]["role"] != "system")
    ]
    # As TRL has them: the tools as JSON, for a column of objects would give each the keys of all.
    return rows + [{"messages": turns, "tools": json.dumps(TOOLS)} for turns in TOOL_ROWS.values()] * tools


@pytest.mark.parametrize(
    "family", ["llama3", "gemma", "gemma3", "cohere", "phi3", "phi3_5", "qwen2_5", "qwen3_instruct_2507"]
)
def test_stock_templates_without_marks_give_the_masks_of_trls_marked_copies(trl_labels, family):
    assert "generation %}" not in stock(family) and "generation %}" in stock(family, "_training")
    for row in conversations(system=family != "gemma", tools=family.startswith("qwen")):
        theirs = trl_labels([row], tokenizer(chat_template=stock(family, "_training")), assistant_only=True)
        assert ours([row], tokenizer(chat_template=stock(family, "_training"))) == unshifted(theirs)
        if family == "qwen2_5":  # whose copy marks the line break before the words, which the prompt already has
            theirs = [(ids, _without_the_first(labels, ids)) for ids, labels in theirs]
        assert ours([row], tokenizer(chat_template=stock(family))) == unshifted(theirs)


def _without_the_first(labels, ids):
    """Labels without the first of each run."""
    return [-100 if i and labels[i - 1] == -100 else label for i, label in enumerate(labels)]


@pytest.mark.rule(7)
def test_qwen3s_stock_template_gives_the_masks_of_the_same_template_marked_by_hand(trl_labels):
    """TRL's own copy keeps the reasoning of earlier answers, which the stock template leaves out."""
    original, header = stock("qwen3"), "<|im_start|>assistant\\n"
    first, last = (
        "{%- if loop.index0 > ns.last_query_index %}",
        "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
    )
    assert original.count(first) == original.count(last) == 1
    marked = original.replace(first, "{%- set turn %}" + first).replace(
        last,
        last.replace(
            "{%- elif",
            f"{{%- endset %}}{{{{- '{header}' }}}}{{%- generation %}}{{{{- turn[('{header}' | length):] }}}}"
            "{%- endgeneration %}{%- elif",
        ),
    )
    several = 0
    for row in conversations(tools=True):
        theirs = unshifted(trl_labels([row], tokenizer(chat_template=marked), assistant_only=True))
        assert ours([row], tokenizer(chat_template=original), turns="whole") == theirs
        assert ours([row], tokenizer(chat_template=marked), turns="whole") == theirs
        alone = [turn["role"] for turn in row["messages"]].count("assistant") == 1
        if alone:
            copy = trl_labels([row], tokenizer(chat_template=stock("qwen3", "_training")), assistant_only=True)
            assert theirs == unshifted(copy)
        several += not alone
    assert several > 5


def test_llama_3_1s_stock_template_gives_the_masks_of_trls_marked_llama_3_under_the_same_system_prompt(trl_labels):
    preamble = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    for row in conversations():
        turns = row["messages"]
        system = turns[0]["content"].strip() if turns[0]["role"] == "system" else ""
        turns = turns[turns[0]["role"] == "system" :]
        # Llama 3's template trims the whole system turn; a word in its place keeps the line breaks.
        told = [{"role": "system", "content": preamble + (system or "x")}, *turns]
        theirs = trl_labels([{"messages": told}], tokenizer(chat_template=stock("llama3", "_training")), True)
        mine = [{"messages": [{"role": "system", "content": system or "x"}, *turns]}]
        assert ours(mine, tokenizer(chat_template=stock("llama3_1"))) == unshifted(theirs)


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "glm4moe"])
def test_tool_turns_equal_trls_under_its_marked_templates(trl_labels, family):
    for row in conversations(tools=True)[-len(TOOL_ROWS) :]:
        tok = tokenizer(chat_template=stock(family, "_training"))
        assert ours([row], tok) == unshifted(trl_labels([row], tok, assistant_only=True))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_end_token_trains_as_trls_where_it_is_also_the_padding_and_one_begin_token_results(trl_labels, name):
    tok = tokenizer(
        adds_bos=True, pad_token="<|eot_id|>", eos_token="<|eot_id|>", chat_template=stock("llama3", "_training")
    )
    assert tok.pad_token_id == tok.eos_token_id
    rows = [{"messages": CONVERSATIONS[name]}]
    ((ids, labels),) = ours(rows, tok)
    assert [(ids, labels)] == unshifted(trl_labels(rows, tok, assistant_only=True))
    written = sum(turn["content"].count("<|eot_id|>") for turn in CONVERSATIONS[name] if turn["role"] == "assistant")
    answers = sum(turn["role"] == "assistant" for turn in CONVERSATIONS[name])
    assert labels.count(tok.eos_token_id) == answers + written
    begins = sum(turn["content"].count("<s>") for turn in CONVERSATIONS[name])
    assert ids[0] == tok.bos_token_id and ids.count(tok.bos_token_id) == 1 + begins


def test_a_template_that_rejects_a_system_role_is_an_error_here_and_in_trl(trl_labels):
    tok = tokenizer(chat_template=stock("gemma", "_training"))
    rows = [{"messages": CONVERSATIONS["system"]}]
    with pytest.raises(UserError, match=r"^row 1: the chat template refuses .*: System role not supported"):
        ours(rows, tok)
    with pytest.raises(jinja2.TemplateError, match="System role not supported"):
        trl_labels(rows, tok, assistant_only=True)


@pytest.mark.parametrize(("ours_is", "theirs"), [("truncate", "keep_start"), ("keep_end", "keep_end")])
def test_a_row_over_the_length_is_cut_as_trl_does(trl_labels, ours_is, theirs):
    tok = tokenizer(chat_template=CHATML_MARKED)
    rows = conversations()
    for length in (40, 50, 60):
        cut = unshifted(trl_labels(rows, tok, assistant_only=True, length=length, keep=theirs))
        cut = [(ids, labels) for ids, labels in cut if any(label >= 0 for label in labels)]
        assert 3 < len(cut) and ours(rows, tok, overlong=ours_is, length=length) == cut
