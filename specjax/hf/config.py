"""What the JSON files of a Hugging Face folder say of a model: its sizes and switches, and where it came from."""

import json
import logging
from pathlib import Path
from typing import Any

from specjax.errors import UserError
from specjax.files import read_object
from specjax.hf import multimodal
from specjax.hf.families import FAMILIES, ropes
from specjax.models import ModelConfig, Origin, Segment

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

DTYPES = ("bfloat16", "float16", "float32", "float64")  # of the files, in which an export is written too

# gelu is the exact one here; Gemma's config, whose "gelu" means the tanh form, is put right by transformers.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "xielu": "xielu",
}


def from_folder(folder: str | Path) -> ModelConfig:
    """Reads `folder/config.json`.

    Raises:
      UserError: there is none, it is not JSON, or it describes something unsupported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: give a Hugging Face model folder or a hub name.")
    return from_hf(read_object(path), file=str(path))


def origin(folder: str | Path, *, source: str = "", revision: str = "", fingerprint: str = "") -> Origin:
    """What the folder of a model says of it beside its sizes.

    Raises:
      UserError: `config.json` or `generation_config.json` is not JSON.
    """
    generation = Path(folder) / "generation_config.json"
    return Origin(
        source=source,
        revision=revision,
        fingerprint=fingerprint,
        config_json=read_object(Path(folder) / "config.json"),
        generation_config=read_object(generation) if generation.is_file() else {},
        processor=multimodal.processor_files(folder),
    )


def from_hf(hf: dict[str, Any], file: str = "config.json") -> ModelConfig:
    """Reads a `config.json` of a family of `families.FAMILIES`, in the dialects of transformers 4 and 5.

    Of a multimodal checkpoint (`multimodal.ARCHITECTURES`) it is the language model's part.

    Raises:
      UserError: the architecture, activation or rope type is not supported, or a size is missing or odd.
    """
    architecture = (hf.get("architectures") or ["(none)"])[0]
    inside = architecture in multimodal.ARCHITECTURES
    if inside:
        whole = _transformers_config(hf, multimodal.ARCHITECTURES[architecture][0], file)
        hf = multimodal.language_model(hf, whole, file)
        architecture = next(name for name, family in FAMILIES.items() if family.model_type == hf["model_type"])
    if architecture not in FAMILIES:
        known = ", ".join([*FAMILIES, *multimodal.ARCHITECTURES])
        raise UserError(f"{file}: architecture {architecture} is not supported; supported are {known}.")
    family = FAMILIES[architecture]
    for key in ("dtype", "torch_dtype"):
        if (dtype := hf.get(key)) is not None and dtype not in DTYPES:
            raise UserError(f"{file}: {key} is {dtype!r}: set it to what the weights are, one of {', '.join(DTYPES)}.")
    missing = [key for key in _SIZES if not isinstance(hf.get(key), int)]
    if missing:
        raise UserError(f"{file}: {', '.join(missing)} must be given as whole numbers.")
    heads, kv_heads = hf["num_attention_heads"], hf.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise UserError(f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.")
    c = _transformers_config(hf, family.model_type, file)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    try:
        fields = {"activation": getattr(c, "hidden_act", None), **family.fields(c)}
        found = ropes(c, head_dim, fields.pop("rope_kinds", ()))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if fields["activation"] not in ACTIVATIONS:
        raise UserError(
            f"{file}: hidden_act {fields['activation']!r} is not supported for {family.name}; supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    if fields["activation"] == "xielu" and fields.get("gate", "apart"):
        raise UserError(f"{file}: hidden_act 'xielu' is supported for an MLP without a gate alone, as Apertus has.")
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    if getattr(c, "use_bidirectional_attention", False):
        raise UserError(f"{file}: use_bidirectional_attention is not supported: specjax trains causal models.")
    block = "experts" if fields.get("num_experts") else "dense"
    return ModelConfig(
        family=family.name,
        vocab_size=c.vocab_size,
        embed_dim=c.hidden_size,
        num_heads=heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        max_positions=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        ropes=found,
        tied=bool(c.tie_word_embeddings),
        multimodal=inside,
        **{
            "mlp_dim": c.intermediate_size,
            "query_scale": head_dim**-0.5,
            "segments": (Segment(block, c.num_hidden_layers),),
        }
        | fields,
    )


def _transformers_config(hf: dict[str, Any], model_type: str, file: str) -> Any:
    """The family's configuration object of transformers: its defaults, and both dialects of `config.json`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    told = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # advice on how to write a config, of no use here
    try:
        # A copy, in which what JSON cannot say is the number that transformers wrote: {"__float__": "Infinity"}.
        plain = json.loads(json.dumps(hf), object_hook=lambda o: float(o["__float__"]) if "__float__" in o else o)
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: transformers refuses it: {' '.join(str(error).split())}.") from error
    finally:
        logging.getLogger("transformers").setLevel(told)
