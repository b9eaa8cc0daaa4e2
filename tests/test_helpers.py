"""A helper that gives another model than its caller names would make every test of that model one of nothing."""

import pytest
from helpers import KINDS, model, sizes, torch_model

from specjax.hf.families import FAMILIES

# family -> what its mathematics have that a Llama's do not, as our configuration says it
MARKS = {
    "llama": {"windows": (None,), "qk_norm": "", "norm_style": "llama", "num_experts": 0},
    "mistral": {"windows": (4096,)},
    "ministral3": {"query_growth": (0.3, 64)},
    "smollm3": {"layer_kinds": (1, 0), "windows": (None, None)},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "qwen3_5_text": {"output_gate": True, "norm_style": "gemma", "qk_norm": "head"},
    "gemma": {"norm_style": "gemma", "activation": "gelu_tanh", "tied": True},
    "gemma2": {"norms": "sandwich", "attention_softcap": 50.0, "logits_softcap": 30.0, "windows": (None, 70)},
    "gemma3_text": {"norms": "sandwich", "qk_norm": "head", "layer_kinds": (1, 1, 1, 1, 1, 0, 1)},
    "gemma4_text": {"v_norm": True, "layer_scalar": True, "per_layer": (520, 20), "query_scale": 1.0},
    "phi3": {"fused_qkv": True, "gate": "fused"},
    "olmo2": {"norms": "post", "qk_norm": "all"},
    "olmo3": {"norms": "post", "qk_norm": "all", "windows": (None, 70)},
    "granite": {"residual_scale": 0.5, "logits_divisor": 0.6},
    "granitemoehybrid": {"gate": "fused", "mlp_dim": 80, "residual_scale": 0.5},
    "glm4": {"norms": "sandwich", "gate": "fused", "interleaved": True},
    "apertus": {"gate": "", "activation": "xielu", "qk_norm": "head"},
    "mixtral": {"num_experts": 4, "experts_per_token": 2},
    "gpt_oss": {"sinks": True, "clamp": (1.702, 1.0), "norm_style": "olmo2", "windows": (None, 70)},
    "qwen3_moe": {"num_experts": 6, "experts_per_token": 3, "expert_dim": 48, "qk_norm": "head"},
}


def test_every_family_has_a_tiny_model():
    assert set(KINDS) == set(MARKS) == {family.model_type for family in FAMILIES.values()}


@pytest.mark.parametrize("family", KINDS)
def test_a_model_is_of_the_family_that_its_caller_names(family):
    made = model(family).config
    (architecture,) = sizes(family)["architectures"]
    assert made.family == FAMILIES[architecture].name
    assert {key: getattr(made, key) for key in MARKS[family]} == MARKS[family]


def test_a_llama_has_the_mark_of_no_other_family():
    llama = model().config
    for family in set(KINDS) - {"llama"}:
        assert all(getattr(llama, key) != value for key, value in MARKS[family].items()), family


@pytest.mark.parametrize("make", [sizes, model, torch_model])
@pytest.mark.parametrize(
    "changes",
    [{"model_type": "qwen3"}, {"architectures": ["MixtralForCausalLM"]}, {"num_local_experts": 4}, {"hiden_size": 8}],
)
def test_a_key_of_another_family_raises(make, changes):
    (key,) = changes
    with pytest.raises(ValueError, match=rf"\['{key}'\] are no keys of llama"):
        make(**changes)
