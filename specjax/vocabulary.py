"""What a config adds to a model's vocabulary, and whether the rows of it train."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax.config import lora_settings
from specjax.config.checks import ADDED, ARGUMENTS
from specjax.errors import UserError, keys
from specjax.hf import config as hf_config
from specjax.hf import vocabulary
from specjax.hf.tokenizer import load_tokenizer
from specjax.lora import mlx
from specjax.lora.peft_config import read_config
from specjax.models import ModelConfig

Named = str | Sequence[int | str] | Mapping[str, Sequence[int | str]]
ENDS = ("embed_tokens", "lm_head")


@keys(ARGUMENTS)
def sizes_of(config: ConfigDict, folder: Path) -> ModelConfig:
    """The sizes of a config's model, with rows for the tokens that it adds."""
    sizes = hf_config.from_folder(folder)
    if not adds(config):
        return sizes
    ids = _extended(config, folder)[1]
    return dataclasses.replace(sizes, vocab_size=vocabulary.rows_for(ids, sizes, config.model.pad_to_multiple_of))


@keys(ARGUMENTS)
def extend(config: ConfigDict, folder: Path, tokenizer: Any) -> None:
    """Gives the folder's tokenizer the tokens that a config adds.

    Raises:
      UserError: see `hf.vocabulary.extend`; or a LoRA run would leave new rows untrained.
    """
    known, sizes = set(tokenizer.get_vocab().values()), hf_config.from_folder(folder)
    ids = vocabulary.extend(tokenizer, config.model.add_tokens, config.model.add_words)
    new = [token for token in ids if token not in known or token >= sizes.vocab_size]  # a spare row is new too
    if not new or config.trainable != "lora":
        return
    left = _left(lora_settings(config), tokenizer, ids, new, tied=sizes.tied)
    if left:
        raise UserError(
            f"config.model.add_tokens and config.model.add_words make new tokens ({len(new)}), and LoRA does not train "
            f"the rows of {tokenizer.convert_ids_to_tokens(left[0])!r} in the embedding and the output layer: set "
            f"config.lora.trainable_token_indices=added, and leave {' and '.join(ENDS)} out of config.lora.targets."
        )


@keys(ARGUMENTS)
def trained_rows(config: ConfigDict, folder: Path, named: Named) -> Sequence[int] | dict[str, list[int]]:
    """The ids that `lora.trainable_token_indices` names, as `lora.inject` takes them."""
    return _ids(named, *_extended(config, folder))


def _ids(named: Named, tokenizer: Any, added: list[int]) -> Sequence[int] | dict[str, list[int]]:
    if named == ADDED:
        if not added:
            raise UserError(
                "config.lora.trainable_token_indices is 'added', but config.model.add_tokens and "
                "config.model.add_words are empty: name tokens there, or here."
            )
        return {end: added for end in ENDS}
    if isinstance(named, Mapping):
        return {name: vocabulary.ids_of(tokenizer, of) for name, of in named.items()}
    return vocabulary.ids_of(tokenizer, named)


def _left(settings: Mapping[str, Any], tokenizer: Any, added: list[int], new: list[int], *, tied: bool) -> list[int]:
    """The new tokens of which an adapter trains no row that is named, nor both tables.

    Factors of an embedding leave an output layer that is tied to it alone, as PEFT's do.
    """
    start = settings.get("init_from")
    held = read_config(Path(start)) if start and not mlx.is_mlx(Path(start)) else {}
    named = settings.get("trainable_token_indices") or held.get("trainable_token_indices")
    found = _ids(named, tokenizer, added) if named else []
    ids = {one for of in (found.values() if isinstance(found, dict) else [found]) for one in of}
    saved = settings.get("modules_to_save") or held.get("modules_to_save", [])
    targets = settings.get("targets") or held.get("target_modules") or ()
    whole = {end for end in ENDS if any(name.endswith(end) for name in saved)}
    if tied and settings.get("ensure_weight_tying", held.get("ensure_weight_tying")) and whole:
        whole = set(ENDS)
    if not tied:  # of a pattern it is enough that it names the module
        names = [targets] if isinstance(targets, str) else targets
        whole |= {end for end in ENDS if any(end in name for name in names)}
    return [] if whole == set(ENDS) else [one for one in new if one not in ids]


def adds(config: ConfigDict) -> bool:
    """Whether a config adds any."""
    return bool(config.model.add_tokens or config.model.add_words)


def _extended(config: ConfigDict, folder: Path) -> tuple[Any, list[int]]:
    """The tokenizer of a folder with the tokens that a config adds, and their ids."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"config.model.path: {config.model.path} has no tokenizer files: give a folder that has.")
    return tokenizer, vocabulary.extend(tokenizer, config.model.add_tokens, config.model.add_words)
