"""The built-in templates render what the models' own do; what is different is said."""

import re
from importlib.resources import files

import jinja2
import pytest
from data_fixtures import CONVERSATIONS, TOOL_ROWS, TOOLS, tokenizer

from specjax.data.chat import BUILT_IN, resolve, spans
from specjax.data.example import Conversation
from specjax.errors import UserError

ASKS = [*CONVERSATIONS["system"], {"role": "user", "content": " And? "}]


def text(template, turns, tools=None, prompt=False, **names):
    """A rendering, or what the template says against it."""
    tok = tokenizer(**names)
    try:
        return tok.apply_chat_template(
            turns, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except jinja2.TemplateError as error:
        return f"refused: {error}"


# Those that TRL ships are the originals, byte for byte (it knows a model by comparing them).
ORIGINALS = {
    "gemma": "gemma",
    "gemma3": "gemma3",
    "llama3": "llama3",
    "llama3.1": "llama3_1",
    "phi3": "phi3",
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
}


@pytest.mark.rule(7)
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_built_in_template_renders_as_the_original_that_trl_ships(name):
    original = files("trl").joinpath("chat_templates", f"{ORIGINALS[name]}.jinja").read_text("utf-8")
    ours = resolve(tokenizer(), name)
    cases = [(turns, None) for turns in (*CONVERSATIONS.values(), ASKS, [*ASKS, *ASKS])]
    if name in ("llama3.1", "qwen2.5", "qwen3"):  # the others know no tools
        cases += [(turns, tools) for turns in TOOL_ROWS.values() for tools in (TOOLS, TOOLS * 2, None)]
    for turns, tools in cases:
        for prompt in (False, True):
            assert text(ours, turns, tools, prompt) == text(original, turns, tools, prompt)


# Where none is at hand, the text as the model card has it: the system prompt, two questions, and the prompt for a third
# answer. <s> and </s> stand for the tokenizer's own tokens.
TURNS = [*CONVERSATIONS["system"], {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
NEXT = [*TURNS, {"role": "user", "content": "And?"}]
PINNED = {
    # meta-llama/Llama-2-7b-chat-hf
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Yes! </s><s>[INST] Why? [/INST] So. </s>",
        "<s>[INST] And? [/INST]",
    ),
    # mistralai/Mistral-7B-Instruct-v0.1 and v0.2, Mixtral-8x7B-Instruct-v0.1
    "mistral": (
        "<s> [INST] Be brief.\n\nHello [/INST] Yes!</s> [INST] Why? [/INST] So.</s>",
        " [INST] And? [/INST]",
    ),
    # mistralai/Mistral-7B-Instruct-v0.3; the original writes the system prompt before the last question, and leaves it
    # out where an answer follows: here it stands before the first
    "mistral-v3": (
        "<s>[INST] Be brief.\n\nHello[/INST] Yes!</s>[INST] Why?[/INST] So.</s>",
        "[INST] And?[/INST]",
    ),
    # mistralai/Mistral-Nemo-Instruct-2407; the system prompt as above
    "mistral-nemo": (
        "<s>[INST]Be brief.\n\nHello[/INST]Yes!</s>[INST]Why?[/INST]So.</s>",
        "[INST]And?[/INST]",
    ),
    # HuggingFaceH4/zephyr-7b-beta
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\nYes!</s>\n"
        "<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>\n",
        "<|user|>\nAnd?</s>\n<|assistant|>\n",
    ),
    # openchat/openchat-3.5-0106
    "openchat": (
        "<s>GPT4 Correct System: Be brief.<|end_of_turn|>GPT4 Correct User: Hello<|end_of_turn|>"
        "GPT4 Correct Assistant: Yes!<|end_of_turn|>GPT4 Correct User: Why?<|end_of_turn|>"
        "GPT4 Correct Assistant: So.<|end_of_turn|>",
        "GPT4 Correct User: And?<|end_of_turn|>GPT4 Correct Assistant:",
    ),
    # teknium/OpenHermes-2.5-Mistral-7B, Qwen/Qwen2-7B-Instruct (whose begin-of-text token is none)
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nYes!<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n",
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
    ),
    # microsoft/phi-4
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Yes!<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>So.<|im_end|>",
        "<|im_start|>user<|im_sep|>And?<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
    # allenai/OLMo-2-1124-7B-Instruct; the line break after an answer is written once something follows
    "olmo2": (
        "<s><|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\nYes!</s>\n<|user|>\nWhy?\n<|assistant|>\nSo.</s>",
        "\n<|user|>\nAnd?\n<|assistant|>\n",
    ),
    # ibm-granite/granite-3.0-8b-instruct; 3.1 and later write a system prompt with today's date where there is none
    "granite": (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hello<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Yes!<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>So.<|end_of_text|>\n",
        "<|start_of_role|>user<|end_of_role|>And?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_a_built_in_template_renders_as_the_model_card_has_it(name):
    special = {"bos_token": None} if name == "chatml" else {}
    template, (whole, asked) = resolve(tokenizer(), name), PINNED[name]
    assert text(template, TURNS, **special) == whole
    assert text(template, NEXT, prompt=True, **special) == whole + asked


def test_every_built_in_template_is_compared_with_its_original_and_has_a_file():
    assert {*ORIGINALS, *PINNED, "alpaca"} == set(BUILT_IN)
    shipped = {file.name for file in files("specjax.data").joinpath("templates").iterdir()}
    assert shipped == {f"{name}.jinja" for name in BUILT_IN}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_loses_no_message_and_depends_on_no_date(name):
    tok = tokenizer()
    template = resolve(tok, name)
    assert "strftime" not in template
    for turns in TOOL_ROWS.values():
        try:
            whole, found = spans(tok, template, Conversation("row 1", turns, TOOLS))
        except UserError as error:
            assert re.match(
                "row 1: the chat template (refuses the conversation: |leaves out the (call|words))", str(error)
            )
            continue
        assert len(found) == sum(turn["role"] == "assistant" for turn in turns)
        for turn in turns:
            assert turn["content"] in whole or (turn["role"], name) == ("tool", "llama3.1")


@pytest.mark.parametrize("name", ["gemma"])
def test_a_template_that_rejects_a_system_prompt_is_refused_with_the_row(name):
    tok = tokenizer()
    with pytest.raises(UserError, match=r"^row 1: the chat template refuses .*: System role not supported"):
        spans(tok, resolve(tok, name), Conversation("row 1", CONVERSATIONS["system"]))


@pytest.mark.parametrize("name", ["gemma3", "llama2", "mistral", "mistral-v3", "mistral-nemo"])
def test_a_template_without_a_system_turn_merges_the_system_prompt_into_the_first_question(name):
    tok = tokenizer()
    whole, [(start, end)] = spans(tok, resolve(tok, name), Conversation("row 1", CONVERSATIONS["system"]))
    assert whole.index("Be brief.") < whole.index("Hello") < start
    assert whole[start:end].lstrip().startswith("Yes!")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_template_whose_end_of_turn_token_the_tokenizer_lacks_is_refused(name):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>")
    bare.get_vocab = lambda: {"a": 0}
    with pytest.raises(UserError, match=rf"^the {name} template ends a turn with '?(<|the tokenizer's eos)"):
        resolve(bare, name)
