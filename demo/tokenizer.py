"""The demo's tokenizer: byte-level BPE with a chat template, trained on the demo's own corpus.

    python demo/tokenizer.py --corpus DIR --out DIR

Layout of the vocabulary: 256 bytes, merges, and four special tokens. `<s>` begins every text and conversation (once:
the tokenizer adds it to plain text, the template writes it in conversations); `<|im_end|>` ends a turn and, as the eos
token, a text, so that generation stops at either. Padding has its own token, which is never a target.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

VOCABULARY = 4096
PAD, BOS, START, END = "<pad>", "<s>", "<|im_start|>", "<|im_end|>"

TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], out: Path, vocabulary: int = VOCABULARY, length: int = 1024) -> None:
    """Trains on `texts` and writes a folder that `AutoTokenizer.from_pretrained` opens.

    Digits stand alone, and a run of spaces (indentation) may be one token, but no token spans words or lines.

    Args:
        texts: the training texts.
        out: the folder.
        vocabulary: exact number of tokens, special ones included.
        length: `model_max_length` written into the folder.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    # GPT-4's pattern (as Llama 3 has it), with single digits.
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    pattern = words + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocabulary:
        raise ValueError(f"the texts give {backend.get_vocab_size()} tokens, not {vocabulary}: train on more text")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=length,
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(str(out))


def main() -> None:
    """Trains on the base model's texts and prints how well they compress."""
    parser = argparse.ArgumentParser(description="Trains the demo's tokenizer.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that demo/corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    arguments = parser.parse_args()
    with (arguments.corpus / "base_train.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    train_tokenizer(texts, arguments.out)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(arguments.out))
    tokens = sum(map(len, tokenizer(texts, verbose=False)["input_ids"]))
    characters = sum(map(len, texts))
    print(f"{len(tokenizer)} tokens in the vocabulary; {tokens:,} tokens for {characters:,} characters, ", end="")
    print(f"{tokens / characters:.3f} tokens a character")


if __name__ == "__main__":
    main()
