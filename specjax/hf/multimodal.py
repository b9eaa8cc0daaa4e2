"""A checkpoint with a language model and more, as a vision tower: the first is read and trained, the rest is kept.

The language model's tensors are taken under the names that it has alone; all others, and the files of the processor, go
back into an export byte for byte.
"""

from pathlib import Path
from typing import Any

import numpy as np

from specjax.errors import UserError
from specjax.hf.tensors import Tensors
from specjax.values import shown

# Architecture -> transformers' `model_type` of the whole, and those of the language models that it may have.
ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Mistral3ForConditionalGeneration": ("mistral3", ("mistral", "ministral3")),
    "Gemma3ForConditionalGeneration": ("gemma3", ("gemma3_text",)),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", ("qwen3_5_text",)),
    "Gemma4ForConditionalGeneration": ("gemma4", ("gemma4_text",)),
}

# What stands before the language model's names in a file: as published, and as transformers has its modules.
_PUBLISHED, _MODULES = "language_model.", "model.language_model."

_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def unwrap(tensors: Tensors, folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Renames the language model's tensors in place, and takes the others out.

    Args:
      tensors: of the folder's files.
      folder: to be named in errors.

    Returns:
      (the prefix that the language model has in these files, the other tensors by name).

    Raises:
      UserError: no tensor is a language model's.
    """
    prefix = next((p for p in (_PUBLISHED, _MODULES) if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        raise UserError(
            f"{folder}: no tensor's name begins with {_PUBLISHED} or {_MODULES}: there is no language model."
        )
    kept = {name: tensors.pop(name) for name in list(tensors) if alone(name, prefix) is None}
    for name in list(tensors):
        tensors[str(alone(name, prefix))] = tensors.pop(name)
    return prefix, kept


def alone(name: str, prefix: str) -> str | None:
    """The name that a tensor of such a file has in the language model's own; None: it is none of its tensors.

    >>> alone("language_model.lm_head.weight", "language_model."), alone("vision_tower.w", "language_model.")
    ('lm_head.weight', None)
    """
    if prefix == _PUBLISHED:
        return name.removeprefix(prefix) if name.startswith(prefix) else None
    if name.startswith("lm_head."):
        return name
    return "model." + name.removeprefix(prefix) if name.startswith(prefix) else None


def wrapped(name: str, prefix: str) -> str:
    """The inverse of `alone`; with the prefix "" a name stays as it is.

    >>> wrapped("model.norm.weight", "language_model."), wrapped("model.norm.weight", "model.language_model.")
    ('language_model.model.norm.weight', 'model.language_model.norm.weight')
    """
    if prefix == _MODULES:
        return prefix + name.removeprefix("model.") if name.startswith("model.") else name
    return prefix + name


def module(name: str) -> str:
    """The name that transformers, and so PEFT, has for a module of the language model.

    >>> module("model.layers.0.mlp.up_proj"), module("lm_head")
    ('model.language_model.layers.0.mlp.up_proj', 'lm_head')
    """
    return wrapped(name, _MODULES)


def processor_files(folder: str | Path) -> dict[str, bytes]:
    """What the folder has of a processor, by file name."""
    return {name: (Path(folder) / name).read_bytes() for name in _PROCESSOR if (Path(folder) / name).is_file()}


def language_model(hf: dict[str, Any], whole: Any, file: str) -> dict[str, Any]:
    """The `config.json` that the language model alone would have, without its architecture.

    Args:
      hf: the whole's `config.json`.
      whole: transformers' configuration object of it.
      file: to be named in errors.

    Raises:
      UserError: the language model is of another family than those that are read.
    """
    architecture = hf["architectures"][0]
    supported = ARCHITECTURES[architecture][1]
    text = whole.text_config
    if text.model_type not in supported:
        raise UserError(
            f"{file}: the language model of this {architecture} is of model_type {shown(text.model_type)}, which is "
            f"not supported; supported are {', '.join(supported)}."
        )
    # Whether the embeddings are tied the whole says, else the language model: the whole's own default is no answer.
    tied = hf.get("tie_word_embeddings", text.tie_word_embeddings)
    return text.to_dict() | {"tie_word_embeddings": tied}
