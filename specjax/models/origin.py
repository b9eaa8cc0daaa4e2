"""Where a model's weights came from: what its sizes do not say, and an export, a resume or a tokenizer asks for."""

import dataclasses
from typing import Any

import numpy as np

from specjax.models.quantised import Report


@dataclasses.dataclass(frozen=True)
class Origin:
    """Stands beside a model's sizes, in `Decoder.origin`.

    All origins are equal and have one hash: they belong to the model's graph, which programs are compiled for, and a
    program is the same wherever the weights came from.

    Attributes:
      source: the folder or hub name that was loaded, "" for a model that was not.
      revision: of a hub name.
      fingerprint: a hash of the weights there.
      config_json: the folder's `config.json`, written back on export.
      generation_config: its `generation_config.json`, likewise; {} where it has none.
      prefix: of a language model inside a multimodal checkpoint: what its tensors' names begin with in the files.
      kept: the other tensors of such a checkpoint by name, memory-mapped, written back on export.
      dtypes: of tensors that may have others there than `stored_dtype`, which an export then gives them again.
      processor: the files of such a checkpoint's processor by name, likewise.
      quantisation: what quantising the base did to it, None for a base in floats.
    """

    source: str = dataclasses.field(default="", compare=False)
    revision: str = dataclasses.field(default="", compare=False)
    fingerprint: str = dataclasses.field(default="", compare=False)
    config_json: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    generation_config: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    prefix: str = dataclasses.field(default="", compare=False)
    kept: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    dtypes: dict[str, np.dtype] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    processor: dict[str, bytes] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    quantisation: Report | None = dataclasses.field(default=None, compare=False)

    @property
    def stored_dtype(self) -> str:
        """The dtype of the checkpoint's files ("float32" where `config.json` is silent)."""
        return self.told("dtype") or self.told("torch_dtype") or "float32"

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text: `generation_config.json`'s, or else `config.json`'s, as in transformers."""
        ids = self.generation_config.get("eos_token_id")
        ids = self.told("eos_token_id") if ids is None else ids
        return [int(token) for token in (ids if isinstance(ids, (list, tuple)) else [ids]) if token is not None]

    def told(self, key: str) -> Any:
        """What `config.json` says, or its `text_config` where a multimodal checkpoint has the key there; else None."""
        inner = self.config_json.get("text_config") or {}
        return self.config_json[key] if self.config_json.get(key) is not None else inner.get(key)
