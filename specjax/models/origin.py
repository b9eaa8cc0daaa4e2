"""Where a model's weights came from: what its sizes do not say, and an export, a resume or a tokenizer asks for."""

import dataclasses
from typing import Any

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
      quantisation: what quantising the base did to it, None for a base in floats.
    """

    source: str = dataclasses.field(default="", compare=False)
    revision: str = dataclasses.field(default="", compare=False)
    fingerprint: str = dataclasses.field(default="", compare=False)
    config_json: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    generation_config: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    quantisation: Report | None = dataclasses.field(default=None, compare=False)

    @property
    def stored_dtype(self) -> str:
        """The dtype of the checkpoint's files ("float32" where `config.json` is silent)."""
        return self.config_json.get("dtype") or self.config_json.get("torch_dtype") or "float32"

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text: `generation_config.json`'s, or else `config.json`'s, as in transformers."""
        ids = self.generation_config.get("eos_token_id")
        ids = self.config_json.get("eos_token_id") if ids is None else ids
        return [int(token) for token in (ids if isinstance(ids, (list, tuple)) else [ids]) if token is not None]
