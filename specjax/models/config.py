"""The sizes of a decoder and the switches of its mathematics, read from a Hugging Face `config.json`."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from specjax.errors import UserError
from specjax.models.families import FAMILIES, ropes
from specjax.models.rope import Rope

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

# gelu is the exact one here; Gemma's config, whose "gelu" means the tanh form, is put right by transformers.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs to know.

    Attributes:
      windows: the sliding window of each kind of attention layer, None for all keys; most models have one kind.
      ropes: the rotary frequencies, one for every kind of layer or one for all.
      layer_kinds: which kind each layer is; None where there is one kind.
      norms: where a layer's norms stand: "pre" (before each block), "post" (after it, OLMo-2) or "sandwich" (both).
      norm_style: "llama" (w * cast(x)), "olmo2" (cast(w * x)) or "gemma" (cast((1 + w) * x)).
      qk_norm: "" (none), "head" (each head of q and k is normed, Qwen3) or "all" (all heads as one vector, OLMo-2).
      fused: q, k, v are one linear map, and gate, up are another (Phi-3).
      query_scale: of the attention scores.
      attention_softcap: c of c * tanh(scores / c); None: none. So is `logits_softcap`.
      embed_scale: multiplies embeddings, in the compute dtype; `residual_scale` what each block adds; the logits are
        divided by `logits_divisor`.
      num_experts: 0 for a dense MLP; `expert_dim` is an expert's inner size, and the next two are those of `MoE`.
      router_aux_coef: of the balancing loss, 0 unless the config's `output_router_logits` asks for it, as transformers.
      source: the folder or hub name that it was loaded from, and `fingerprint` a hash of the weights there.
      hf: the folder's `config.json`, and `generation` its `generation_config.json`: written back on export.
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
    ropes: tuple[Rope, ...]
    query_scale: float
    windows: tuple[int | None, ...] = (None,)
    layer_kinds: tuple[int, ...] | None = None
    activation: str = "silu"
    norms: str = "pre"
    norm_style: str = "llama"
    qk_norm: str = ""
    fused: bool = False
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_dim: int = 0
    normalise_experts: bool = True
    round_expert_weights: bool = False
    router_aux_coef: float = 0.0
    source: str = dataclasses.field(default="", hash=False, compare=False)
    revision: str = dataclasses.field(default="", hash=False, compare=False)
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
        """Reads a `config.json` of a family of `families.FAMILIES`, in the dialects of transformers 4 and 5.

        Raises:
          UserError: the architecture, activation or rope type is not supported, or a size is missing or odd.
        """
        architecture = (hf.get("architectures") or ["(none)"])[0]
        if architecture == "Gemma3ForConditionalGeneration":
            raise UserError(
                f"{where}: {architecture} has a vision tower, which specjax does not train: save its language model "
                "alone, transformers.AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), and load that."
            )
        if architecture not in FAMILIES:
            raise UserError(
                f"{where}: architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}."
            )
        family = FAMILIES[architecture]
        missing = [key for key in _SIZES if not isinstance(hf.get(key), int)]
        if missing:
            raise UserError(f"{where}: {', '.join(missing)} must be given as whole numbers.")
        heads, kv_heads = hf["num_attention_heads"], hf.get("num_key_value_heads")
        if kv_heads and heads % kv_heads:
            raise UserError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        c = _transformers_config(hf, family.model_type, where)
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        try:
            fields = {"activation": getattr(c, "hidden_act", None), **family.fields(c)}
            found = ropes(c, head_dim, fields.pop("rope_kinds", ()))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if fields["activation"] not in ACTIVATIONS:
            raise UserError(
                f"{where}: hidden_act {fields['activation']!r} is not supported for {family.name}; supported are "
                f"{', '.join(ACTIVATIONS)}."
            )
        fields["activation"] = ACTIVATIONS[fields["activation"]]
        if getattr(c, "use_bidirectional_attention", False):
            raise UserError(f"{where}: use_bidirectional_attention is not supported: specjax trains causal models.")
        return cls(
            family=family.name,
            vocab_size=c.vocab_size,
            embed_dim=c.hidden_size,
            mlp_dim=c.intermediate_size,
            num_layers=c.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=c.num_key_value_heads,
            head_dim=head_dim,
            max_positions=c.max_position_embeddings,
            norm_eps=c.rms_norm_eps,
            ropes=found,
            tied=bool(c.tie_word_embeddings),
            hf=hf,
            **{"query_scale": head_dim**-0.5} | fields,
        )


def _transformers_config(hf: dict[str, Any], model_type: str, where: str) -> Any:
    """The family's configuration object of transformers: its defaults, and both dialects of `config.json`."""
    import copy

    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    told = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # advice on how to write a config, of no use here
    try:
        return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(hf))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: transformers refuses it: {' '.join(str(error).split())}.") from error
    finally:
        logging.getLogger("transformers").setLevel(told)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore the file.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object: restore the file.")
    return found
