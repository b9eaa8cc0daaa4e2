"""What a config adds to a model's vocabulary, and whether the rows of it train."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax.config import lora_settings
from specjax.config.checks import ARGUMENTS
from specjax.errors import UserError, keys
from specjax.hf import config as hf_config
from specjax.hf import vocabulary
from specjax.hf.tokenizer import load_tokenizer
from specjax.lora.peft_config import read_config
from specjax.models import ModelConfig

ENDS = ("embed_tokens", "lm_head")


@keys(ARGUMENTS)
def sizes_of(config: ConfigDict, folder: Path) -> ModelConfig:
    """The sizes of a config's model, with rows for the tokens that it adds."""
    sizes = hf_config.from_folder(folder)
    if not _adds(config):
        return sizes
    ids = _extended(config, folder)[1]
    return dataclasses.replace(sizes, vocab_size=vocabulary.rows_for(ids, sizes, config.model.pad_to_multiple_of))


@keys(ARGUMENTS)
def extend(config: ConfigDict, folder: Path, tokenizer: Any) -> None:
    """Gives the folder's tokenizer the tokens that a config adds.

    Raises:
      UserError: see `hf.vocabulary.extend`; or a LoRA run would leave all of the new rows untrained.
    """
    ids = vocabulary.extend(tokenizer, config.model.add_tokens, config.model.add_words)
    rows = hf_config.from_folder(folder).vocab_size
    new = [token for token in ids if token >= rows]
    if new and config.trainable == "lora" and not _trained(lora_settings(config)):
        first = tokenizer.convert_ids_to_tokens(new[0])
        raise UserError(
            f"config.model.add_tokens and config.model.add_words need {len(new)} rows beyond the model's {rows}, the "
            f"first for {first!r}, which LoRA's factors do not train: set "
            "config.lora.modules_to_save=embed_tokens,lm_head."
        )


def _trained(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter trains rows of the embedding or the output layer."""
    start = settings.get("init_from")
    held = read_config(Path(start)) if start else {}
    named = settings.get("modules_to_save") or held.get("modules_to_save", [])
    return any(name.endswith(ENDS) for name in named)


def _adds(config: ConfigDict) -> bool:
    return bool(config.model.add_tokens or config.model.add_words)


def _extended(config: ConfigDict, folder: Path) -> tuple[Any, list[int]]:
    """The tokenizer of a folder with the tokens that a config adds, and their ids."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"config.model.path: {config.model.path} has no tokenizer files: give a folder that has.")
    return tokenizer, vocabulary.extend(tokenizer, config.model.add_tokens, config.model.add_words)
