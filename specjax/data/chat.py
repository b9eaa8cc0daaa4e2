"""From examples to token ids, and which of them the loss counts.

A chat template is a program, so the assistant's tokens are found by running it, never by searching for strings or ids:
the conversation is rendered up to each assistant turn (with the generation prompt) and up to its end, both must be
prefixes of the whole rendering, and what lies between is the assistant's: its words and its end-of-turn token, with the
line break after it where the template writes one (as TRL's own training templates mark it). The whole rendering is
tokenised once, so the ids are those of `tokenizer.apply_chat_template(..., tokenize=True)`, and the spans of characters
become tokens through the offsets that a fast tokenizer gives.
"""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.data.formats import Conversation, Example, Pair, Text
from specjax.errors import UserError, nearest

BUILT_IN = ("alpaca", "chatml", "llama3", "mistral", "zephyr")

# The end-of-turn tokens of built-in templates that do not use the tokenizer's own eos token.
_END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}

# Llama 3.2's template writes today's date unless it is told one. Data must not depend on the day it was made, so it is
# told the template's own fallback.
_DATE = "26 Jul 2024"


class Document(NamedTuple):
    """Token ids int32 [n] and, for each, whether the loss counts it as a target: bool [n]."""

    ids: np.ndarray
    trained: np.ndarray


def resolve(tokenizer: Any, template: str | None = None) -> str:
    """The text of a Jinja chat template.

    Args:
        tokenizer: its own template serves when `template` is empty.
        template: "", a name in `BUILT_IN`, a path to a `.jinja` file, or the template's text itself.

    Raises:
        UserError: nothing of that name, no template at all, or one whose end-of-turn token the tokenizer lacks.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not template:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer '{name}' has no chat template: set data.template to one of "
                f"{', '.join(BUILT_IN)}, or to a .jinja file."
            )
        return tokenizer.get_chat_template()
    if template in BUILT_IN:
        end = _END_OF_TURN.get(template)
        if end and end not in tokenizer.get_vocab():
            raise UserError(
                f"the {template} template ends a turn with '{end}', a token that the tokenizer '{name}' lacks: "
                "use alpaca, mistral or zephyr, which end it with the tokenizer's own."
            )
        return files("specjax.data").joinpath("templates", f"{template}.jinja").read_text(encoding="utf-8")
    if "{%" in template or "{{" in template:
        return template
    if Path(template).is_file():
        return Path(template).read_text(encoding="utf-8")
    raise UserError(
        f"no chat template '{template}': neither a file nor one of {', '.join(BUILT_IN)}.{nearest(template, BUILT_IN)}"
    )


def spans(tokenizer: Any, template: str, chat: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the [start, end) characters of its assistant turns.

    Raises:
        UserError: the template refuses the conversation, or renders its beginning otherwise than the whole has it.
    """
    import jinja2

    extra = {"date_string": _DATE} if "date_string" in template else {}

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            chat.messages[:count],
            tools=chat.tools,
            chat_template=template,
            add_generation_prompt=prompt,
            tokenize=False,
            **extra,
        )

    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i >= chat.first]
    if turns and turns[0] == 0:
        raise UserError(f"{chat.where}: the conversation begins with the assistant, so there is no prompt to render.")
    try:
        whole = render(len(chat.messages), prompt=False)
        found = []
        for turn in turns:
            before = render(turn, prompt=True)
            after = whole if turn + 1 == len(chat.messages) else render(turn + 1, prompt=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"{chat.where}: the chat template renders the conversation up to message {turn + 1} otherwise "
                    "than the whole has it, so the assistant's tokens cannot be told; keep one answer a row, or use "
                    "a template that does not rewrite earlier turns."
                )
            found.append((len(before), len(after)))
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"{chat.where}: the chat template refuses the conversation: {error}.") from error
    return whole, found


def encode(examples: Sequence[Example], tokenizer: Any, template: str | None = None) -> list[Document]:
    """Tokenises a batch of examples; `template` is the text that `resolve` gave, which only conversations need.

    - `Text`: every token trains, and the end-of-text token is appended.
    - `Pair`: prompt and completion joined as they are, end-of-text appended; what the completion adds to the prompt's
      own tokens trains (as TRL's completion-only loss).
    - `Conversation`: the assistant's turns train.

    The end-of-text token trains like any other, even where it doubles as the padding token. Examples of different kinds
    come out in this order of kinds.
    """
    texts = [example for example in examples if isinstance(example, Text)]
    pairs = [example for example in examples if isinstance(example, Pair)]
    chats = [example for example in examples if isinstance(example, Conversation)]
    if (texts or pairs) and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token to end a document with: set tokenizer.eos_token.")
    return [*_texts(texts, tokenizer), *_pairs(pairs, tokenizer), *_conversations(chats, tokenizer, template)]


def _texts(texts: Sequence[Text], tokenizer: Any) -> Iterator[Document]:
    for ids in _plain(tokenizer, [example.text for example in texts]):
        ids = _ended(ids, tokenizer)
        yield Document(ids, np.ones(len(ids), bool))


def _pairs(pairs: Sequence[Pair], tokenizer: Any) -> Iterator[Document]:
    prompts = _plain(tokenizer, [pair.prompt for pair in pairs])
    for ids, prompt in zip(_plain(tokenizer, [p.prompt + p.completion for p in pairs]), prompts, strict=True):
        ids = _ended(ids, tokenizer)
        shared = min(len(ids), len(prompt))
        differ = np.flatnonzero(ids[:shared] != prompt[:shared])  # not empty where tokens merge across the seam
        yield Document(ids, np.arange(len(ids)) >= (differ[0] if len(differ) else shared))


def _plain(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Ids with one begin-of-text token where the tokenizer adds one, and no end-of-text token that it adds."""
    if not texts:
        return []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_eos = tokenizer("a")["input_ids"][-1] == eos
    batch = []
    for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
        begins_twice = len(ids) > 1 and ids[0] == ids[1] == bos  # the text itself began with it
        batch.append(np.asarray(ids[begins_twice : len(ids) - adds_eos], np.int32))
    return batch


def _ended(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Ids with one end-of-text token at the end."""
    eos = tokenizer.eos_token_id
    return ids if len(ids) and ids[-1] == eos else np.append(ids, np.int32(eos))


def _conversations(chats: Sequence[Conversation], tokenizer: Any, template: str | None) -> Iterator[Document]:
    if not chats:
        return
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets: load the tokenizer's fast version.")
    template = template or resolve(tokenizer)
    rendered = [spans(tokenizer, template, chat) for chat in chats]
    encoded = tokenizer(
        [whole for whole, _ in rendered],
        add_special_tokens=False,  # the template has written them
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for (_, found), ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        begin, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
        trained = np.zeros(len(ids), bool)
        for first, last in found:  # a token that straddles the start belongs to the answer, as in TRL
            trained |= (end > first) & (begin < last)
        yield Document(np.asarray(ids, np.int32), trained)


def end_of_turn(document: Document, tokenizer: Any) -> int | None:
    """The id of the token that ends the last trained turn: its last token that is not ordinary text, if it has one."""
    added = [int(token) for token in document.ids[document.trained] if int(token) in tokenizer.added_tokens_decoder]
    return added[-1] if added else None
