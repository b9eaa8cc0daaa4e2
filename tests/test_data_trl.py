"""Token ids and loss masks equal those that TRL's SFTTrainer prepares; where they do not, why ours are right."""

from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
from data_fixtures import CHATML_MARKED, CONVERSATIONS, tokenizer

import specjax.data as data

SIZES = {"length": 512, "batch_size": 1}


@pytest.fixture(scope="module")
def trl_labels(tmp_path_factory):
    """A function from rows to TRL's (ids, labels), by the code that SFTTrainer runs before training."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, max_length=None)

    def labels(rows, tok, assistant_only=False):
        config.assistant_only_loss = assistant_only
        trainer = SimpleNamespace(_tokenizer=tok, chat_template=tok.chat_template, completion_only_loss=True)
        prepared = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tok, config, False, None, "train")
        return [(row["input_ids"], row["labels"]) for row in prepared]

    return labels


def ours(rows, tok, **options):
    """(ids, labels) of each row."""
    loaded = data.load(rows, tok, **SIZES, packing=False, **options)
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


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_equal_trls_assistant_only_loss(trl_labels, kind, name):
    tok = tokenizer(kind, pad_token="</s>", chat_template=CHATML_MARKED)
    rows = [{"messages": CONVERSATIONS[name]}]
    assert ours(rows, tok) == ours(rows, tok, template="chatml")
    if (kind, name) != ("gpt2", "trailing spaces"):  # TRL finds no token at the answer's first space, and gives up
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
    ((ids, labels),) = ours(rows, tokenizer(kind), template=plain)
    assert tokenizer(kind).convert_ids_to_tokens(label for label in labels if label >= 0)[0] == "ĠIt"
    ((trl_ids, trls),) = unshifted(trl_labels(rows, tokenizer(kind, chat_template=marked), assistant_only=True))
    assert ids == trl_ids and labels[:-1] == trls[:-1]
    assert (labels[-1], trls[-1]) == (tokenizer(kind).eos_token_id, -100)  # these marks leave the end token out


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_where_a_turns_last_character_is_several_tokens_all_train_and_trl_trains_the_first(trl_labels, name):
    tok = tokenizer("llama2", chat_template=CHATML_MARKED)
    rows = [{"messages": CONVERSATIONS[name]}]
    ((ids, labels),) = ours(rows, tok)
    ((trl_ids, trls),) = unshifted(trl_labels(rows, tok, assistant_only=True))
    assert ids == trl_ids
    more = [label for label, trl in zip(labels, trls, strict=True) if label != trl]
    answers = sum(turn["role"] == "assistant" for turn in CONVERSATIONS[name])
    assert (
        tok.convert_ids_to_tokens(more) == ["<0x0A>"] * answers
    )  # after the end-of-turn token; its space is the first


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


def test_raw_text_equals_trls(trl_labels):
    tok = tokenizer()
    rows = [{"text": turn["content"]} for turns in CONVERSATIONS.values() for turn in turns if turn["content"].strip()]
    assert ours(rows, tok) == unshifted(trl_labels(rows, tok))


@pytest.mark.parametrize("family", ["llama3", "gemma", "gemma3", "cohere"])
def test_stock_templates_without_marks_give_the_masks_of_trls_marked_copies(trl_labels, family):
    templates = files("trl").joinpath("chat_templates")
    stock, marked = (templates.joinpath(f"{family}{end}.jinja").read_text("utf-8") for end in ("", "_training"))
    assert "generation %}" not in stock and "generation %}" in marked
    for name in ("single", "multi-turn", "french", "one letter"):
        rows = [{"messages": CONVERSATIONS[name]}]
        labels = trl_labels(rows, tokenizer(chat_template=marked), assistant_only=True)
        assert ours(rows, tokenizer(), template=stock) == unshifted(labels)
