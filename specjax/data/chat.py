"""From examples to token ids, and which of them the loss counts.

The whole rendering of a conversation is tokenised once, so the ids are those of `tokenizer.apply_chat_template(...,
tokenize=True)`: the template alone writes special tokens, so that one begin-of-text token results where both add it.
The characters that train (see `specjax.data.turns`) become tokens through the offsets that a fast tokenizer gives.
"""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.data import windows
from specjax.data.example import Conversation, Example, Pair, Preference, Text
from specjax.data.turns import all_rows, render
from specjax.data.turns import spans as spans
from specjax.errors import UserError, argument, nearest

# The built-in templates, and the token with which each ends a turn; "": the tokenizer's own eos token.
END_OF_TURN = {
    "alpaca": "",
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "granite": "<|end_of_text|>",
    "llama2": "",
    "llama3": "<|eot_id|>",
    "llama3.1": "<|eot_id|>",
    "mistral": "",
    "mistral-nemo": "",
    "mistral-v3": "",
    "olmo2": "",
    "openchat": "<|end_of_turn|>",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "zephyr": "",
}

BUILT_IN = tuple(END_OF_TURN)


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
                f"the tokenizer '{name}' has no chat template: set {argument('template')} to one of "
                f"{', '.join(BUILT_IN)}, or to a .jinja file."
            )
        return tokenizer.get_chat_template()
    if template in BUILT_IN:
        end = END_OF_TURN[template]
        if end and end not in tokenizer.get_vocab():
            own = ", ".join(other for other, token in END_OF_TURN.items() if not token)
            raise UserError(
                f"the {template} template ends a turn with '{end}', a token that the tokenizer '{name}' lacks: "
                f"use one that ends it with the tokenizer's own ({own}), or add the token ({argument('add_tokens')})."
            )
        if not end and not tokenizer.eos_token:
            raise UserError(
                f"the {template} template ends a turn with the tokenizer's eos token, and the tokenizer '{name}' has "
                "none: set tokenizer.eos_token."
            )
        return files("specjax.data").joinpath("templates", f"{template}.jinja").read_text(encoding="utf-8")
    if "{%" in template or "{{" in template:
        return template
    if Path(template).is_file():
        return Path(template).read_text(encoding="utf-8")
    raise UserError(
        f"no chat template '{template}': neither a file nor one of {', '.join(BUILT_IN)}.{nearest(template, BUILT_IN)}"
    )


def encode(examples: Sequence[Example], tokenizer: Any, template: str | None = None) -> list[Document]:
    """The documents of a batch of examples, end to end; arguments and errors as those of `documents`."""
    return list(chain.from_iterable(documents(examples, tokenizer, template)))


def documents(
    examples: Sequence[Example], tokenizer: Any, template: str | None = None, *, exact: bool = True
) -> list[list[Document]]:
    """Tokenises a batch of examples, each into its documents.

    - `Text`: every token trains, and the end-of-text token is appended.
    - `Pair`: prompt and completion joined as they are, end-of-text appended; what the completion adds to the prompt's
      own tokens trains (as TRL's completion-only loss).
    - `Conversation`: the assistant's turns train. It is one document, or one for each answer, see `turns.rows`.
    - `Preference`: two documents, prompt and chosen, prompt and rejected. All that follows the prompt trains.

    The end-of-text token trains like any other, even where it doubles as the padding token.

    Args:
      examples: of any kinds.
      tokenizer: a fast Hugging Face tokenizer.
      template: the text that `resolve` gave, which only conversations need; None: the tokenizer's own.
      exact: see `turns.rows`.
    """
    made: list[list[Document]] = []
    for kind, group in groupby(examples, type):
        same: list[Any] = list(group)
        plain = kind in (Text, Pair) or (kind is Preference and any(isinstance(p.chosen, Pair) for p in same))
        if plain and tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos token to end a document with: set tokenizer.eos_token.")
        if kind is Conversation:
            made += _conversations(same, tokenizer, template or resolve(tokenizer), exact)
        elif kind is Preference:
            sides = list(_preferences(same, tokenizer, template))
            made += [sides[at : at + 2] for at in range(0, len(sides), 2)]
        else:
            made += [[one] for one in (_texts if kind is Text else _pairs)(same, tokenizer)]
    return made


def _texts(texts: Sequence[Text], tokenizer: Any) -> Iterator[Document]:
    for ids in plain_ids(tokenizer, [example.text for example in texts]):
        ids = _ended(ids, tokenizer)
        yield Document(ids, np.ones(len(ids), bool))


def _pairs(pairs: Sequence[Pair], tokenizer: Any) -> Iterator[Document]:
    prompts = plain_ids(tokenizer, [pair.prompt for pair in pairs])
    for ids, prompt in zip(plain_ids(tokenizer, [p.prompt + p.completion for p in pairs]), prompts, strict=True):
        ids = _ended(ids, tokenizer)
        yield Document(ids, np.arange(len(ids)) >= _shared(prompt, ids))


def _preferences(preferences: Sequence[Preference], tokenizer: Any, template: str | None) -> Iterator[Document]:
    """Chosen and rejected of each, as TRL's DPOTrainer has them: what trains begins at the same place in both."""
    for kind, group in groupby(preferences, lambda p: type(p.chosen)):
        rows = list(group)
        sides: list[list[Any]] = [[p.chosen for p in rows], [p.rejected for p in rows]]
        if kind is Pair:
            eos = tokenizer.eos_token
            texts = [pair.prompt for pair in sides[0]]
            texts += [pair.prompt + pair.completion.removesuffix(eos) + eos for pair in chain(*sides)]
            ids = plain_ids(tokenizer, texts)
        else:
            template = template or resolve(tokenizer)
            asked = [chat._replace(messages=chat.messages[: chat.first]) for chat in sides[0]]
            texts = render(tokenizer, template, asked, prompt=True)
            texts += render(tokenizer, template, list(chain(*sides)))
            ids = [np.asarray(one, np.int32) for one in windows.ids(tokenizer, texts, add_special_tokens=False)]
        prompts, chosen, rejected = (ids[at : at + len(rows)] for at in range(0, len(ids), len(rows)))
        for prompt, *answers in zip(prompts, chosen, rejected, strict=True):
            start = min(_shared(prompt, answer) for answer in answers)
            yield from (Document(answer, np.arange(len(answer)) >= start) for answer in answers)


def _shared(prompt: np.ndarray, ids: np.ndarray) -> int:
    """How many first tokens two texts share; fewer than the prompt has where tokens merge across the seam."""
    least = min(len(prompt), len(ids))
    differ = np.flatnonzero(prompt[:least] != ids[:least])
    return int(differ[0]) if len(differ) else least


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of texts that no template renders, int32 [n] each.

    They have one begin-of-text token where the tokenizer adds one, also where the text itself began with it, and no
    end-of-text token that the tokenizer adds.
    """
    if not texts:
        return []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_eos = tokenizer("a")["input_ids"][-1] == eos
    batch = []
    for ids in windows.ids(tokenizer, list(texts)):
        begins_twice = bool(len(ids) > 1 and ids[0] == ids[1] == bos)
        batch.append(np.asarray(ids[begins_twice : len(ids) - adds_eos], np.int32))
    return batch


def _ended(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Ids with one end-of-text token at the end."""
    eos = tokenizer.eos_token_id
    return ids if len(ids) and ids[-1] == eos else np.append(ids, np.int32(eos))


def _conversations(chats: Sequence[Conversation], tokenizer: Any, template: str, exact: bool) -> list[list[Document]]:
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets: load the tokenizer's fast version.")
    rendered = all_rows(tokenizer, template, chats, exact=exact)
    flat = list(chain.from_iterable(rendered))
    encoded = windows.encoded(tokenizer, [text for text, _ in flat])  # the template has written special tokens
    made = []
    for (_, found), (ids, begin, end) in zip(flat, encoded, strict=True):
        trained = np.zeros(len(ids), bool)
        for first, last in found:  # a token that straddles the start belongs to the answer, as in TRL
            trained |= (end > first) & (begin < last)
        made.append(Document(ids, trained))
    each = iter(made)
    return [list(islice(each, len(some))) for some in rendered]


def end_of_turn(document: Document, tokenizer: Any) -> int | None:
    """The id of the token that ends the last trained turn, if a special one does.

    It is the first of the special tokens at the end: Phi-3 writes `<|end|>`, a line break and `<|endoftext|>`.
    """
    end = None
    for token in document.ids[document.trained][::-1].tolist():
        added = tokenizer.added_tokens_decoder.get(token)
        if added is not None and (added.special or end is None):
            end = token
        elif added is not None or tokenizer.decode([token]).strip():
            break
    return end
