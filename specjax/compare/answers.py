"""Answers of the base and of a trained method to held-out questions, made in the method's process."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from specjax import build, files, sharding
from specjax.compare.scores import scores
from specjax.config import settled
from specjax.data import Data
from specjax.data.example import Conversation
from specjax.data.questions import Question, questions
from specjax.data.template import prompts as rendered
from specjax.generation.generate import generate_tokens
from specjax.generation.prompts import decode, end_tokens
from specjax.models import Decoder

BASE = "base.json"  # what the base answered, for all methods

Said = dict[str, list[str]]  # set -> the answers


def answered(
    config: ConfigDict, place: Path, workdir: Path, sets: Mapping[str, Data], tokenizer: Any
) -> dict[str, Any]:
    """The questions of each set with the known answer, the base's answer and the result's, and the scores.

    Args:
      config: the run's config.
      place: the run's folder.
      workdir: the comparison's folder, where the base's answers are kept.
      sets: the run's sets; a set of raw text has no questions.
      tokenizer: the model's tokenizer.

    Returns:
      `asked`: set -> rows {"prompt", "expected", "base", "said"}; `before` and `after`: set -> scores.
    """
    asked = {name: found for name, data in sets.items() if (found := questions(data, config.eval.answers))}
    if not asked:
        return {"asked": {}, "before": {}, "after": {}}
    config = settled(config, jax.default_backend(), jax.device_count())
    folder, _ = build.tokenizer_of(config)
    model = build.model_of(config, folder, sharding.make_mesh(**config.mesh))
    key = hashlib.blake2b(
        json.dumps(
            [model.origin.fingerprint, *config.model.to_dict().items(), config.eval.max_new_tokens, asked]
        ).encode()
    ).hexdigest()
    base = _kept(workdir / BASE, key)
    if base is None:  # before anything is learnt: an adapter's B is zero
        base = _said(model, tokenizer, asked, sets, config.eval.max_new_tokens)
        files.write_json(workdir / BASE, {"key": key, "said": base})
    build.restore(model, config, place, "best")
    said = _said(model, tokenizer, asked, sets, config.eval.max_new_tokens)
    known = {
        name: [decode(tokenizer, one.prompt, one.answer).strip() for one in found] for name, found in asked.items()
    }
    prompts = {name: _asked(tokenizer, sets[name], found) for name, found in asked.items()}
    rows = {
        name: [
            dict(zip(("prompt", "expected", "base", "said"), row, strict=True))
            for row in zip(prompts[name], known[name], base[name], said[name], strict=True)
        ]
        for name in asked
    }
    return {
        "asked": rows,
        "before": {name: scores(base[name], known[name]) for name in asked},
        "after": {name: scores(said[name], known[name]) for name in asked},
    }


def _kept(path: Path, key: str) -> Said | None:
    found = files.read_object(path, "delete it") if path.is_file() else {}
    return found["said"] if found.get("key") == key else None


def _said(
    model: Decoder, tokenizer: Any, asked: Mapping[str, Sequence[Question]], sets: Mapping[str, Data], most: int
) -> Said:
    """Greedy answers of at most `most` tokens, and at most one token more than the longest known answer."""
    found = {}
    for name, ones in asked.items():
        turn = sets[name].end_of_turn
        ends = {*end_tokens(model, tokenizer), *([] if turn is None else [turn])}
        longest = min(most, max(len(one.answer) for one in ones) + 1)
        prompts = [one.prompt for one in ones]
        new = generate_tokens(model, prompts, max_new_tokens=longest, eos_ids=sorted(ends), batch_size=64)
        found[name] = [decode(tokenizer, one.prompt, ids).strip() for one, ids in zip(ones, new, strict=True)]
    return found


def _asked(tokenizer: Any, data: Data, ones: Sequence[Question]) -> list[str]:
    """The questions as text, without what the template writes around a single user turn."""
    texts = [tokenizer.decode(one.prompt, clean_up_tokenization_spaces=False) for one in ones]
    head = tail = ""
    if data.template:
        mark = "specjaxquestion"
        [around] = rendered(
            data.template, tokenizer.special_tokens_map, [Conversation("", [{"role": "user", "content": mark}])]
        )
        head, found, tail = around.partition(mark)
        head, tail = (head, tail) if found else ("", "")
    return [text.removeprefix(head).removesuffix(tail).strip() for text in texts]
