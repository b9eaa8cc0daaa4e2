"""Small tokenizers of the kinds that real models have, and awkward conversations."""

from functools import cache

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specjax.errors import UserError

SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|im_sep|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
]

CHATML_MARKED = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TEXTS = [
    "The cat sat on the mat, and the other cat sat on the other mat. What is two plus two? It is four.",
    "Qu'est-ce que la taxe sur la valeur ajoutée ? C'est un impôt, perçu à chaque étape — même à Noël.",
    "付加価値税とは何ですか？ 消費に対する税金です。 增值税是什么？",
    "Yes! 🎉👩‍👩‍👧 No… 🙂",
]


def _turns(*contents, system=None):
    turns = [{"role": "system", "content": system}] if system is not None else []
    return turns + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS = {
    "single": _turns("What is two plus two?", "It is four."),
    "multi-turn": _turns("Hello", "Yes?", "What is the cat?", "The cat sat.", "And the other?", "On the mat."),
    "system": _turns("Hello", "Yes!", system="Be brief."),
    "empty system": _turns("Hello", "Yes!", system=""),
    "trailing spaces": _turns("Hello  ", "  Yes \n\n ", " and? \n", "\n\nNo. "),
    "french": _turns("Qu'est-ce que la taxe ?", "C'est un impôt — à Noël, même.", "Merci !", "À bientôt…"),
    "cjk": _turns("付加価値税とは何ですか？", "消費に対する税金です。", "谢谢", "不客气！"),
    "emoji": _turns("👩‍👩‍👧?", "🎉🙂", "🙂", "👩‍👩‍👧🎉"),
    "ends with the user": _turns("Hello", "Yes!", "Thanks"),
    "one letter": _turns("a", "b", "c", "d"),
    "special tokens in the words": _turns(
        "What is <|im_end|>?", "It is <|eot_id|>, and </s>.", "<s>", "No <end_of_turn>"
    ),
    "reasoning": _turns(
        "Two plus two?", "<think>\nTwo and two.\n</think>\n\nFour.", "Sure?", "<think>\nYes.\n</think>\n\nYes."
    ),
    "system and trailing spaces": _turns(" Hello ", " Yes ", "And? ", " No\n", system=" Be brief. \n"),
    "numbers and line breaks": _turns("1\n\n2", "1\n2\n\n\n3", "\t4", "5\r\n6"),
}


def _call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "cats",
            "description": "Counts the cats on a mat — même à Noël.",
            "parameters": {"type": "object", "properties": {"mat": {"type": "string"}}, "required": ["mat"]},
        },
    }
]

# Rows with tools: a call and its answer, within a longer conversation, with words beside the call.
TOOL_ROWS = {
    "one call": [
        {"role": "user", "content": "How many cats?"},
        {"role": "assistant", "content": "", "tool_calls": [_call("cats", mat="other")]},
        {"role": "tool", "name": "cats", "content": "4"},
        {"role": "assistant", "content": "It is four."},
    ],
    "a call with a system prompt, words and a second question": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Combien de chats ?"},
        {"role": "assistant", "content": "I count.", "tool_calls": [_call("cats", mat="à Noël")]},
        {"role": "tool", "name": "cats", "content": '{"cats": 4}'},
        {"role": "assistant", "content": "Quatre 🎉"},
        {"role": "user", "content": "And the other?"},
        {"role": "assistant", "content": "No cat."},
    ],
}


def refuse(action, match):
    """What is called raises the user's mistake, one sentence that has `match`."""
    with pytest.raises(UserError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


@cache
def tokenizer(kind="llama3", adds_bos=True, adds_eos=False, **special):
    """A fast tokenizer.

    "llama3" works on bytes; so does "gpt2", whose offsets leave spaces out; "llama2" on words with their space, with
    bytes for the rest, and it puts a space after each special token.
    """
    vocabulary = {"vocab_size": 592 + len(SPECIAL), "special_tokens": SPECIAL, "show_progress": False}
    if kind == "llama2":
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bytes_ = [AddedToken(f"<0x{byte:02X}>", special=False) for byte in range(256)]
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(**vocabulary | {"vocab_size": 892 + len(SPECIAL), "limit_alphabet": 60})
        backend.train_from_iterator([TEXTS[0]] * 2, trainer)
        backend = _with_bytes(backend, bytes_)
    else:
        backend = Tokenizer(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(initial_alphabet=alphabet, **vocabulary))
    steps = []
    if kind == "gpt2":
        steps.append(processors.ByteLevel(trim_offsets=True))
    if adds_bos or adds_eos:
        single = " ".join(["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos)
        tokens = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=tokens))
    if steps:
        backend.post_processor = processors.Sequence(steps)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def _with_bytes(backend, bytes_):
    """The same BPE with the 256 byte tokens that byte fallback needs in its vocabulary."""
    import json

    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    for token in bytes_:
        vocabulary[token.content] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(state))
