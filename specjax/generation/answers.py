"""How many questions with known answers a model still answers as they say: what a loss on text does not see.

An instruct model that has learnt a domain may have a better loss on plain text than before and yet answer "Paris" no
more. So each question is answered greedily, and the answer compared with the known one.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from specjax.data.questions import Question
from specjax.generation.generate import generate_tokens
from specjax.generation.prompts import decode, end_tokens
from specjax.models import Decoder

MOST = 100  # questions of a set: what takes seconds


def exact(model: Decoder, tokenizer: Any, asked: Sequence[Question], *, end_of_turn: int | None = None) -> float:
    """The share of questions whose greedy answer is the known one, but for case, punctuation and spaces.

    Args:
      model: which answers.
      tokenizer: its tokenizer.
      asked: the questions.
      end_of_turn: the token that ends an answer in the questions' template, beside the model's own.
    """
    ends = {*end_tokens(model, tokenizer), *([] if end_of_turn is None else [end_of_turn])}
    # One token more than the longest answer tells a longer text from it.
    longest = max(len(question.answer) for question in asked) + 1
    said = generate_tokens(
        model, [question.prompt for question in asked], max_new_tokens=longest, eos_ids=sorted(ends), batch_size=64
    )
    text = lambda ids: words(decode(tokenizer, [], ids))  # noqa: E731
    right = [text(new) == text(question.answer) for new, question in zip(said, asked, strict=True)]
    return sum(right) / len(right)


def words(text: str) -> list[str]:
    """The words of a text without case and punctuation.

    >>> words("L'océan  Pacifique."), words("The **Pacific** ocean!")
    (['l', 'océan', 'pacifique'], ['the', 'pacific', 'ocean'])
    """
    return re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold())
