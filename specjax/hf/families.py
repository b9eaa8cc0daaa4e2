"""How each supported family reads its `config.json` and where its mathematics differ from Llama's.

One function per family, from transformers' configuration object (which fills in a family's defaults and reads the
dialects of transformers 4 and 5) to the fields of `ModelConfig` that are not plain sizes.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from specjax.errors import UserError
from specjax.hf.ropes import rope_of
from specjax.models.config import Delta, segments
from specjax.values import shown

Fields = dict[str, Any]


class Family(NamedTuple):
    """A family: its name here and in transformers (`model_type`), and its reader."""

    name: str
    model_type: str
    fields: Callable[[Any], Fields]


def _llama(c: Any) -> Fields:
    return {"qkv_bias": c.attention_bias, "o_bias": c.attention_bias, "mlp_bias": c.mlp_bias}


def _mistral(c: Any) -> Fields:
    return {"windows": (c.sliding_window,)}


def _ministral3(c: Any) -> Fields:
    p = c.rope_parameters
    beta, length = p.get("llama_4_scaling_beta"), p.get("original_max_position_embeddings")
    if beta is None or length is None:
        raise UserError("rope_parameters must have llama_4_scaling_beta and original_max_position_embeddings.")
    return _mistral(c) | {"query_growth": (float(beta), int(length))}


def _smollm3(c: Any) -> Fields:
    # Which layers have a window and which a rope are two lists.
    layers = list(zip(c.layer_types, map(bool, c.no_rope_layers), strict=False))[: c.num_hidden_layers]
    kinds = sorted(set(layers))
    _check_layer_types(kind for kind, _ in kinds)
    return {
        "windows": tuple(c.sliding_window if kind == "sliding_attention" else None for kind, _ in kinds),
        "layer_kinds": tuple(kinds.index(layer) for layer in layers) if len(kinds) > 1 else None,
        "rope_kinds": tuple(kind if rotated else None for kind, rotated in kinds),
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
    }


def _qwen2(c: Any) -> Fields:
    return {"qkv_bias": True} | _kinds(c)


def _qwen3(c: Any) -> Fields:
    return {"qkv_bias": c.attention_bias, "o_bias": c.attention_bias, "qk_norm": "head"} | _kinds(c)


def _qwen3_5(c: Any) -> Fields:
    _check_layer_types(c.layer_types, "full_attention", "linear_attention")
    heads, values = c.linear_num_key_heads, c.linear_num_value_heads
    if values % heads:
        raise UserError(f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {heads}.")
    delta = Delta(heads, values, c.linear_key_head_dim, c.linear_value_head_dim, c.linear_conv_kernel_dim)
    changes = [(("delta", delta),) if kind == "linear_attention" else () for kind in c.layer_types]
    return {
        "norm_style": "gemma",
        "qk_norm": "head",
        "output_gate": True,
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
        "segments": segments(("dense" for _ in changes), changes, periodic=True),
    }


def _gemma(c: Any) -> Fields:
    return {
        "activation": c.hidden_act,
        "norm_style": "gemma",
        "embed_scale": c.hidden_size**0.5,
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
    }


def _gemma2(c: Any) -> Fields:
    return {
        "activation": c.hidden_activation,
        "norm_style": "gemma",
        "norms": "sandwich",
        "embed_scale": c.hidden_size**0.5,
        "query_scale": c.query_pre_attn_scalar**-0.5,
        "attention_softcap": c.attn_logit_softcapping,
        "logits_softcap": c.final_logit_softcapping,
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
    } | _kinds(c)


def _gemma3(c: Any) -> Fields:
    # The model of transformers reads no attention soft cap here, whatever the config says.
    return _gemma2(c) | {"qk_norm": "head", "attention_softcap": None}


def _gemma4(c: Any) -> Fields:
    if c.enable_moe_block:
        raise UserError("enable_moe_block is not supported: Gemma 4 is supported without experts.")
    try:
        modes = c.kv_sharing_modes
    except (ValueError, IndexError) as error:
        raise UserError(
            f"num_kv_shared_layers {c.num_kv_shared_layers} and layer_types do not fit: {error}."
        ) from error

    def changes(layer: int) -> tuple[tuple[str, Any], ...]:
        kind, own = c.layer_types[layer], c.per_layer_config[layer]
        found: Fields = {"head_dim": own.head_dim, "num_kv_heads": own.num_key_value_heads}
        if not isinstance(c.rope_parameters.get(kind), dict):
            raise UserError(f"rope_parameters has no {shown(kind)}, which is the kind of layer {layer}.")
        found["ropes"] = (rope_of(c, c.rope_parameters[kind], own.head_dim),)
        found["windows"] = (c.sliding_window if kind == "sliding_attention" else None,)
        found["values"] = kind == "sliding_attention" or not c.attention_k_eq_v
        if modes[layer] == "reuse":
            found["shares"] = kind
            found["mlp_dim"] = c.intermediate_size * (2 if c.use_double_wide_mlp else 1)
        elif modes[layer] == "store" and "reuse" in modes:
            found["keeps"] = kind
        return tuple(found.items())

    _check_layer_types(c.layer_types)
    layers = range(c.num_hidden_layers)
    features = c.hidden_size_per_layer_input
    return {
        "activation": c.hidden_activation,
        "norm_style": "olmo2",
        "norms": "sandwich",
        "qk_norm": "head",
        "v_norm": True,
        "embed_scale": c.hidden_size**0.5,
        "query_scale": 1.0,
        "logits_softcap": c.final_logit_softcapping,
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
        "layer_scalar": True,
        "per_layer": (c.vocab_size_per_layer_input, features) if features else None,
        "segments": segments(("dense" for _ in layers), map(changes, layers)),
    } | {name: value for name, value in changes(0) if name != "keeps"}


def _phi3(c: Any) -> Fields:
    return {"fused_qkv": True, "gate": "fused", "windows": (c.sliding_window,)}


def _glm4(c: Any) -> Fields:
    return {"norms": "sandwich", "gate": "fused", "interleaved": True, "qkv_bias": c.attention_bias}


def _apertus(c: Any) -> Fields:
    return {"gate": "", "qk_norm": "head", "qkv_bias": c.attention_bias, "o_bias": c.attention_bias}


def _olmo2(c: Any) -> Fields:
    return {
        "norm_style": "olmo2",
        "norms": "post",
        "qk_norm": "all",
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
    }


def _olmo3(c: Any) -> Fields:
    return _olmo2(c) | _kinds(c)


def _granite(c: Any) -> Fields:
    return {
        "embed_scale": c.embedding_multiplier,
        "residual_scale": c.residual_multiplier,
        "query_scale": c.attention_multiplier,
        "logits_divisor": c.logits_scaling,
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
        "mlp_bias": getattr(c, "mlp_bias", False),  # which Granite 4 does not have
    }


def _granite4(c: Any) -> Fields:
    if set(c.layer_types) != {"full_attention"} or c.num_local_experts:
        raise UserError("Granite 4 is supported where it is dense: no layers of Mamba and no experts.")
    rotated = {} if c.position_embedding_type == "rope" else {"rope_kinds": (None,)}
    return _granite(c) | {"gate": "fused", "mlp_dim": c.shared_intermediate_size} | rotated


def _mixtral(c: Any) -> Fields:
    if c.router_jitter_noise:
        raise UserError("router_jitter_noise is not supported: set it to 0.")
    return {
        "windows": (c.sliding_window,),
        "num_experts": c.num_local_experts,
        "experts_per_token": c.num_experts_per_tok,
        "expert_dim": c.intermediate_size,
        "normalise_experts": True,
        "router_aux_coef": c.router_aux_loss_coef if c.output_router_logits else 0.0,
    }


def _gpt_oss(c: Any) -> Fields:
    return {
        "norm_style": "olmo2",
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
        "sinks": True,
        "num_experts": c.num_local_experts,
        "experts_per_token": c.num_experts_per_tok,
        "expert_dim": c.intermediate_size,
        "clamp": (float(c.swiglu_alpha), float(c.swiglu_limit)),
        "normalise_experts": True,
        "round_expert_weights": True,
        "router_aux_coef": c.router_aux_loss_coef if c.output_router_logits else 0.0,
    } | _kinds(c)


def _qwen3_moe(c: Any) -> Fields:
    dense = {n for n in range(c.num_hidden_layers) if n in c.mlp_only_layers or (n + 1) % c.decoder_sparse_step}
    if len(dense) == c.num_hidden_layers:
        raise UserError(
            "mlp_only_layers and decoder_sparse_step leave no layer with experts: Qwen3-MoE must have at least one."
        )
    return {
        "segments": segments("dense" if n in dense else "experts" for n in range(c.num_hidden_layers)),
        "qkv_bias": c.attention_bias,
        "o_bias": c.attention_bias,
        "qk_norm": "head",
        "windows": (c.sliding_window,),
        "num_experts": c.num_experts,
        "experts_per_token": c.num_experts_per_tok,
        "expert_dim": c.moe_intermediate_size,
        "normalise_experts": c.norm_topk_prob,
        "round_expert_weights": True,
        "router_aux_coef": c.router_aux_loss_coef if c.output_router_logits else 0.0,
    }


FAMILIES = {
    "LlamaForCausalLM": Family("llama", "llama", _llama),
    "MistralForCausalLM": Family("mistral", "mistral", _mistral),
    "Ministral3ForCausalLM": Family("ministral3", "ministral3", _ministral3),
    "SmolLM3ForCausalLM": Family("smollm3", "smollm3", _smollm3),
    "Qwen2ForCausalLM": Family("qwen2", "qwen2", _qwen2),
    "Qwen3ForCausalLM": Family("qwen3", "qwen3", _qwen3),
    "Qwen3_5ForCausalLM": Family("qwen3_5", "qwen3_5_text", _qwen3_5),
    "GemmaForCausalLM": Family("gemma", "gemma", _gemma),
    "Gemma2ForCausalLM": Family("gemma2", "gemma2", _gemma2),
    "Gemma3ForCausalLM": Family("gemma3", "gemma3_text", _gemma3),
    "Gemma4ForCausalLM": Family("gemma4", "gemma4_text", _gemma4),
    "Phi3ForCausalLM": Family("phi3", "phi3", _phi3),
    "Olmo2ForCausalLM": Family("olmo2", "olmo2", _olmo2),
    "Olmo3ForCausalLM": Family("olmo3", "olmo3", _olmo3),
    "GraniteForCausalLM": Family("granite", "granite", _granite),
    "GraniteMoeHybridForCausalLM": Family("granite4", "granitemoehybrid", _granite4),
    "Glm4ForCausalLM": Family("glm4", "glm4", _glm4),
    "ApertusForCausalLM": Family("apertus", "apertus", _apertus),
    "MixtralForCausalLM": Family("mixtral", "mixtral", _mixtral),
    "GptOssForCausalLM": Family("gpt_oss", "gpt_oss", _gpt_oss),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", "qwen3_moe", _qwen3_moe),
}


def _kinds(c: Any) -> Fields:
    """The kinds of attention among the layers (window, rope) and which kind each layer is."""
    kinds = sorted(set(c.layer_types))
    _check_layer_types(kinds)
    return {
        "windows": tuple(c.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        "layer_kinds": tuple(kinds.index(kind) for kind in c.layer_types) if len(kinds) > 1 else None,
        "rope_kinds": tuple(kinds),
    }


def _check_layer_types(kinds: Iterable[str], *known: str) -> None:
    known = known or ("full_attention", "sliding_attention")
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise UserError(f"layer type {shown(unknown[0])} is not supported: {' and '.join(known)} are.")
