"""What the JSON files of a Hugging Face folder say of a model: its sizes and switches, and where it came from."""

import json
import logging
from pathlib import Path
from typing import Any

from specjax.errors import UserError
from specjax.files import read_object
from specjax.hf import multimodal
from specjax.hf.families import FAMILIES
from specjax.hf.ropes import ropes
from specjax.models import ModelConfig, Origin, Segment
from specjax.values import (
    FLAG,
    NAMES,
    OBJECT,
    POSITIVE,
    TEXT,
    Kind,
    check,
    either,
    listed,
    number,
    optional,
    shown,
    whole,
)

_LAYERS = 10_000  # so many layers, or experts of one, no model has
_SIZES = {
    "vocab_size": whole(1),
    "hidden_size": whole(1),
    "intermediate_size": whole(1),
    "num_hidden_layers": whole(1, _LAYERS),
    "num_attention_heads": whole(1),
    "max_position_embeddings": whole(1),
}
_ID = whole()  # of a token
_ENDS = {"eos_token_id": optional(either(_ID, listed(_ID, "a list of such")))}
# What a config.json may say, of what any family is read of; what else it says, transformers' classes check.
_KINDS: dict[str, Kind] = {
    "architectures": optional(NAMES),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation", "transformers_weights"), optional(TEXT)),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "text_config", "vision_config"), optional(OBJECT)),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window", "moe_intermediate_size"), optional(whole(1))),
    **dict.fromkeys(("global_head_dim", "num_global_key_value_heads"), optional(whole(1))),
    **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), optional(whole(0))),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"), optional(whole(1))),
    **dict.fromkeys(("linear_value_head_dim", "full_attention_interval"), optional(whole(1))),
    "linear_conv_kernel_dim": optional(whole(2)),
    "num_kv_shared_layers": optional(whole(0, _LAYERS)),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), optional(whole(0, _LAYERS))),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "norm_topk_prob"), optional(FLAG)),
    **dict.fromkeys(("rope_theta", "query_pre_attn_scalar", "logits_scaling"), optional(POSITIVE)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), optional(POSITIVE)),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "router_aux_loss_coef"),
        optional(number("a finite number")),
    ),
    "rms_norm_eps": optional(number("a number above 0, to 1", lambda v: 0 < v <= 1)),
    "decoder_sparse_step": optional(whole(1)),
    "mlp_only_layers": optional(listed(whole(), "a list of layers' numbers")),
    "layer_types": optional(listed(TEXT, "a list of names, one a layer")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), optional(whole(-1))),
    **_ENDS,
}
_FACTOR = optional(number("a number above 0", lambda v: v > 0))
_FACTORS = optional(listed(POSITIVE, "a list of numbers above 0"))
_ROPE: dict[str, Kind] = {
    **dict.fromkeys(("rope_type", "type"), optional(TEXT)),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), _FACTOR),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), optional(number("a finite number"))),
    **dict.fromkeys(("short_factor", "long_factor"), _FACTORS),
    "partial_rotary_factor": optional(number("a number above 0, to 1", lambda v: 0 < v <= 1)),
    "original_max_position_embeddings": optional(whole(2)),
    "llama_4_scaling_beta": optional(number("a finite number")),
    "truncate": optional(FLAG),
}
# generation_config.json: what is read of it; the range of what draws tokens is asked where it draws.
_NUMBER = optional(number("a finite number"))
_GENERATION: dict[str, Kind] = {
    **_ENDS,
    "do_sample": optional(FLAG),
    "stop_strings": optional(either(TEXT, NAMES)),
    **dict.fromkeys(("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"), _NUMBER),
}
# What transformers makes tables of, as long as it is told, and no language model needs.
_LABELS = ("num_labels", "id2label", "label2id")

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
      UserError: `config.json` or `generation_config.json` is not JSON, or says what makes no sense.
    """
    config, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    told = read_object(config)
    check(told, _ENDS, str(config))
    drawn = read_object(generation) if generation.is_file() else {}
    check(drawn, _GENERATION, str(generation))
    return Origin(
        source=source,
        revision=revision,
        fingerprint=fingerprint,
        config_json=told,
        generation_config=drawn,
        processor=multimodal.processor_files(folder),
    )


def from_hf(hf: dict[str, Any], file: str = "config.json") -> ModelConfig:
    """Reads a `config.json` of a family of `families.FAMILIES`, in the dialects of transformers 4 and 5.

    Of a multimodal checkpoint (`multimodal.ARCHITECTURES`) it is the language model's part.

    Raises:
      UserError: the architecture, activation or rope type is not supported, or a size is missing or odd.
    """
    _check(hf, file)
    architecture = (hf.get("architectures") or ["(none)"])[0]
    inside = architecture in multimodal.ARCHITECTURES
    if inside:
        whole = _transformers_config(hf, multimodal.ARCHITECTURES[architecture][0], file)
        hf = multimodal.language_model(hf, whole, file)
        architecture = next(name for name, family in FAMILIES.items() if family.model_type == hf["model_type"])
    if architecture not in FAMILIES:
        known = ", ".join([*FAMILIES, *multimodal.ARCHITECTURES])
        raise UserError(f"{file}: architecture {architecture[:80]} is not supported; supported are {known}.")
    family = FAMILIES[architecture]
    for key in ("dtype", "torch_dtype"):
        if (dtype := hf.get(key)) is not None and dtype not in DTYPES:
            raise UserError(
                f"{file}: {key} is {shown(dtype)}: set it to what the weights are, one of {', '.join(DTYPES)}."
            )
    if missing := [key for key in _SIZES if hf.get(key) is None]:
        raise UserError(f"{file}: {', '.join(missing)} must be given as whole numbers.")
    check(hf, _SIZES, file)
    heads, kv_heads = hf["num_attention_heads"], hf.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise UserError(f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.")
    c = _transformers_config(hf, family.model_type, file)
    try:
        fields = {"activation": getattr(c, "hidden_act", None), **family.fields(c)}
        if "head_dim" not in fields:  # the same in all layers
            fields |= {"head_dim": getattr(c, "head_dim", None) or c.hidden_size // heads}
            fields |= {"num_kv_heads": c.num_key_value_heads}
        given = [dict(segment.changes) for segment in fields.get("segments", ())]
        for head_dim in {fields["head_dim"], *(change.get("head_dim", 2) for change in given)}:
            if head_dim < 2 or head_dim % 2:
                raise UserError(
                    f"a head has {head_dim} dimensions (head_dim, or hidden_size / num_attention_heads),"
                    + " where a rotary embedding needs an even number."
                )
        kinds = fields.pop("rope_kinds", ())
        fields = fields if "ropes" in fields else fields | {"ropes": ropes(c, fields["head_dim"], kinds)}
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if fields["activation"] not in ACTIVATIONS:
        raise UserError(
            f"{file}: hidden_act {shown(fields['activation'])} is not supported for {family.name}; supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    if fields["activation"] == "xielu" and fields.get("gate", "apart"):
        raise UserError(f"{file}: hidden_act 'xielu' is supported for an MLP without a gate alone, as Apertus has.")
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    if getattr(c, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise UserError(f"{file}: use_bidirectional_attention is not supported: specjax trains causal models.")
    if "num_experts" in fields and not 1 <= fields["experts_per_token"] <= fields["num_experts"]:
        raise UserError(
            f"{file}: num_experts_per_tok is {fields['experts_per_token']} of {fields['num_experts']} experts "
            "(num_local_experts, num_experts): give it from 1 to so many."
        )
    block = "experts" if fields.get("num_experts") else "dense"
    return ModelConfig(
        family=family.name,
        vocab_size=c.vocab_size,
        embed_dim=c.hidden_size,
        num_heads=heads,
        max_positions=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        tied=bool(c.tie_word_embeddings),
        multimodal=inside,
        **{
            "mlp_dim": c.intermediate_size,
            "query_scale": fields["head_dim"] ** -0.5,
            "segments": (Segment(block, c.num_hidden_layers),),
        }
        | fields,
    )


def _check(hf: dict[str, Any], file: str) -> None:
    """Raises `UserError` for a value of another kind than its key has; nested ones too."""
    check(hf, _KINDS, file)
    for key in ("rope_parameters", "rope_scaling"):
        held = hf.get(key) or {}
        check(held, _ROPE, f"{file}: {key}")
        for kind, inner in held.items():  # of each kind of layer
            if isinstance(inner, dict):
                check(inner, _ROPE, f"{file}: {key}: {kind}")
    if (text := hf.get("text_config")) is not None:
        _check(text, f"{file}: text_config")


def _transformers_config(hf: dict[str, Any], model_type: str, file: str) -> Any:
    """The family's configuration object of transformers: its defaults, and both dialects of `config.json`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    told = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # advice on how to write a config, of no use here
    try:
        # A copy, in which what JSON cannot say is the number that transformers wrote: {"__float__": "Infinity"}.
        kept = {key: value for key, value in hf.items() if key not in _LABELS}
        plain = json.loads(json.dumps(kept), object_hook=lambda o: float(o["__float__"]) if "__float__" in o else o)
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file}: transformers refuses it: {' '.join(str(error).split())[:500].rstrip('.')}."
        ) from error
    finally:
        logging.getLogger("transformers").setLevel(told)
