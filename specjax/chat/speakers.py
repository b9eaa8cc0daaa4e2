"""A model and its adapters, each with its tokenizer, which answer in `generate` and `chat`."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax

from specjax import build, lora, sharding
from specjax.cluster import processes
from specjax.errors import UserError
from specjax.generation.generate import generate as generate_texts
from specjax.hf import load as hf_load
from specjax.hf.tokenizer import load_tokenizer
from specjax.hf.vocabulary import grow
from specjax.lora.base_file import base_of, rows_of
from specjax.models import Decoder

Who = str | EllipsisType | None  # an adapter; None: the base alone; `...`: the model as it was loaded


@dataclasses.dataclass
class Speakers:
    """The model and the adapters that can be asked.

    Attributes:
      model: the model with all adapters.
      tokenizers: those of the adapters whose folder has one, with the chat template of their training.
      tokenizer: that of the base and of the other adapters.
    """

    model: Decoder
    tokenizers: dict[str, Any]
    tokenizer: Any

    def tokenizer_of(self, who: Who) -> Any:
        """The tokenizer for prompts to this adapter or the base."""
        return self.tokenizers.get(who, self.tokenizer) if isinstance(who, str) else self.tokenizer

    def answers(
        self, asked: Sequence[tuple[Any, Who]], said: Callable[[int, str], None] | None = None, **how: Any
    ) -> list[str]:
        """The answers to prompts by the adapters that they name; adapters with equal chat templates share batches.

        Args:
          asked: prompts of `specjax.generate`, each with the adapter that answers it.
          said: as in `specjax.generate`, with indices into `asked`.
          **how: other arguments of `specjax.generate`.
        """
        groups: dict[tuple[str, str], list[int]] = {}
        for number, (_, who) in enumerate(asked):
            tokenizer = self.tokenizer_of(who)
            groups.setdefault((str(tokenizer.chat_template), str(tokenizer.eos_token)), []).append(number)
        found = [""] * len(asked)
        for numbers in groups.values():
            names: list[Any] = [asked[number][1] for number in numbers]
            told = None if said is None else _renumbered(said, numbers)
            texts = generate_texts(
                self.model,
                self.tokenizer_of(names[0]),
                [asked[number][0] for number in numbers],
                adapter=names[0] if len(set(names)) == 1 else names,
                said=told,
                **how,
            )
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found


def load(model: str, adapters: Mapping[str, str]) -> Speakers:
    """Loads a Hugging Face folder, a hub name or a run's best checkpoint, with adapters by name.

    Raises:
      UserError: there is no model, or an adapter has another base. The fingerprint of the base's weights decides if the
        adapter's file has it, else the shapes. If only the shapes agree and the adapters name different bases,
        a note on stderr says so.
    """
    mesh, known = sharding.make_mesh(), True
    if (Path(model) / "checkpoints").is_dir():
        decoder, config = build.load_run(model, "best", mesh)
        _, tokenizer = build.tokenizer_of(config)
        known = config.trainable == "lora"  # else its weights are no longer those of its base
    else:
        dtype = "bfloat16" if jax.default_backend() != "cpu" else "float32"
        decoder, tokenizer = hf_load.load(model, mesh=mesh, dtype=dtype)
        if tokenizer is None:
            raise UserError(f"{model} has no tokenizer files: give a folder that has.")
    grow(decoder, _rows(decoder, adapters))
    tokenizers, bases = {}, {}
    for name, folder in adapters.items():
        lora.load(decoder, folder, name=name)
        trained_on, fingerprint = base_of(folder)
        is_it = decoder.origin.fingerprint.partition("+")[0] if known else ""
        if is_it and fingerprint and fingerprint != is_it:
            raise UserError(
                f"adapter {name} ({folder}) was trained on other weights than those of {model}, on {trained_on} "
                f"(fingerprint {fingerprint}, not {is_it}): give --model={trained_on}, or leave the adapter out."
            )
        if not (is_it and fingerprint):
            bases[name] = trained_on
        tokenizer_of_its_own = load_tokenizer(folder)
        if tokenizer_of_its_own is not None:
            tokenizers[name] = tokenizer_of_its_own
    if len(set(bases.values())) > 1 and processes.first():
        named = ", ".join(f"{name} on {base or 'none'}" for name, base in bases.items())
        print(
            f"specjax: the adapters name different bases ({named}); their shapes fit {model}, and nothing else tells.",
            file=sys.stderr,
        )
    return Speakers(decoder, tokenizers, tokenizer)


def _rows(model: Decoder, adapters: Mapping[str, str]) -> int:
    """The rows of the vocabulary that all adapters were trained with: the base's, or more where tokens were added.

    Raises:
      UserError: they were trained with different ones.
    """
    rows = {name: rows_of(folder) or model.config.vocab_size for name, folder in adapters.items()}
    if len(set(rows.values())) > 1:
        named = ", ".join(f"{name} with {count} rows" for name, count in rows.items())
        raise UserError(
            f"the adapters were trained with different vocabularies ({named}): ask each in a call of its own."
        )
    return max(rows.values(), default=model.config.vocab_size)


def _renumbered(said: Callable[[int, str], None], numbers: Sequence[int]) -> Callable[[int, str], None]:
    return lambda number, text: said(numbers[number], text)
