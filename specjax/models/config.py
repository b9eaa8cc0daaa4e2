"""The sizes of a decoder, read from a Hugging Face `config.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from specjax.errors import UserError

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Long-context scaling of the rotary frequencies, as `transformers.modeling_rope_utils` defines it.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides the low ones, keeps the high ones and
    blends between, measured in wavelengths against `original_max_positions`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs to know.

    `source` is the folder or hub name that it was loaded from and `fingerprint` a hash of the weights there; `hf` and
    `generation` are the folder's JSON files, written back on export.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    source: str = dataclasses.field(default="", hash=False, compare=False)
    fingerprint: str = dataclasses.field(default="", hash=False, compare=False, repr=False)
    hf: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False, compare=False, repr=False)
    generation: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def stored_dtype(self) -> str:
        """The dtype of the checkpoint's files ("float32" where `config.json` is silent)."""
        return self.hf.get("dtype") or self.hf.get("torch_dtype") or "float32"

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Reads `folder/config.json`.

        Raises:
          UserError: there is none, it is not JSON, or it describes something unsupported.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(f"{folder} has no config.json: give a Hugging Face model folder or a hub name.")
        generation = Path(folder) / "generation_config.json"
        config = cls.from_hf(_read_json(path), where=str(path))
        return dataclasses.replace(config, generation=_read_json(generation) if generation.is_file() else {})

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Reads a `config.json` of Llama or Mistral, in the dialects of transformers 4 and 5.

        Raises:
          UserError: the architecture, activation or rope type is not supported, or a size is missing or odd.
        """
        architectures = hf.get("architectures") or ["(none)"]
        if architectures[0] not in FAMILIES:
            raise UserError(
                f"{where}: architecture {architectures[0]} is not supported; supported are {', '.join(FAMILIES)}."
            )
        family = FAMILIES[architectures[0]]
        missing = [
            key
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
            )
            if not isinstance(hf.get(key), int)
        ]
        if missing:
            raise UserError(f"{where}: {', '.join(missing)} must be given as whole numbers.")
        if hf.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UserError(
                f"{where}: hidden_act {hf['hidden_act']!r} is not supported for {family}; supported is silu."
            )
        heads = hf["num_attention_heads"]
        kv_heads = hf.get("num_key_value_heads") or (8 if family == "mistral" else heads)
        if heads % kv_heads:
            raise UserError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        theta, scaling = _rope(hf, where)
        return cls(
            family=family,
            vocab_size=hf["vocab_size"],
            embed_dim=hf["hidden_size"],
            mlp_dim=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            max_positions=hf["max_position_embeddings"],
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=(hf.get("sliding_window", 4096) if family == "mistral" else None),
            tied=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=bool(hf.get("attention_bias", False)) and family == "llama",
            mlp_bias=bool(hf.get("mlp_bias", False)) and family == "llama",
            hf=hf,
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore the file.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object: restore the file.")
    return found


def _rope(hf: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling: transformers 5 keeps both in `rope_parameters`, transformers 4 in two keys."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if (rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported for this architecture.")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported are default, linear, llama3.")
    keys = ["factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    absent = [key for key in keys if not isinstance(rope.get(key), (int, float))]
    if absent:
        raise UserError(f"{where}: rope scaling {kind!r} lacks {', '.join(absent)}.")
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    return theta, RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )
