"""The decoder equals transformers' Llama and Mistral, whatever route its computation takes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import PROMPT, data, model, prompts, sizes, token_sums, torch_logits, torch_model
from parity import LLAMA3

import specjax as sj
from specjax.errors import UserError
from specjax.hf.config import from_folder, from_hf, origin
from specjax.hf.load import abstract, load
from specjax.models import Origin, attention, rope
from specjax.train.step import merge, split

CASES = {
    "llama": ("llama", {}),
    "llama, every head its own keys": ("llama", {"num_key_value_heads": 8}),
    "llama3 rope scaling": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "another rope base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "a norm eps that shows": ("llama", {"rms_norm_eps": 1e-2}),
    "qwen 3.5": ("qwen3_5_text", {}),
    "mistral, window shorter than the prompt": ("mistral", {"sliding_window": 50, "head_dim": 24}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """case -> (a folder that transformers wrote, its logits over the prompts)."""
    made = {}

    def get(case):
        if case not in made:
            family, changes = CASES[case]
            reference = torch_model(family, **changes)
            path = tmp_path_factory.mktemp("model")
            reference.save_pretrained(path)
            made[case] = path, torch_logits(reference, prompts())
        return made[case]

    return get


# What no row of parity.py has.
ALONE = [
    "llama, every head its own keys",
    "linear rope scaling",
    "another rope base",
    "biases",
    "a norm eps that shows",
]


@pytest.mark.rule(1)
@pytest.mark.parametrize("case", ALONE)
def test_logits_equal_those_of_transformers(folder, case):
    path, wanted = folder(case)
    ours, tokenizer = load(path, dtype="float32")
    assert tokenizer is None
    found = np.asarray(ours(prompts()))
    assert found.dtype == np.float32 and found.shape == (2, PROMPT, 517)
    assert 0.5 < wanted.std() < 5  # or a tolerance of 1e-4 says nothing
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    print(f"{case}: differs by {np.abs(found - wanted).max():.1e}, logits up to {np.abs(wanted).max():.1f}")


@pytest.mark.rule(1)
@pytest.mark.parametrize("head_dim", [24, 64, 80, 128])
@pytest.mark.parametrize("case", ["llama", "linear rope scaling", "llama3 rope scaling"])
def test_rotary_frequencies_are_those_of_transformers_to_the_last_bit(case, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**sizes(head_dim=head_dim) | CASES[case][1])
    wanted = LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = from_hf(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    found = rope.frequencies(ours.ropes[0])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


def test_a_config_in_the_dialect_of_transformers_4_is_the_same_model(folder, tmp_path):
    path, _ = folder("llama3 rope scaling")
    new = json.loads((path / "config.json").read_text())
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": new.pop("dtype")}
    assert from_hf(old) == from_folder(path)
    assert Origin(config_json=old).stored_dtype == origin(path).stored_dtype == "float32"
    older = old | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert from_hf(older).ropes[0].kind == "linear"


def test_sizes_that_a_config_leaves_out_are_those_of_transformers():
    given = sizes()
    for key in ("num_key_value_heads", "rms_norm_eps", "dtype"):
        del given[key]
    config = from_hf(given)
    assert (config.num_kv_heads, config.head_dim, config.ropes[0].theta) == (4, 8, 10000.0)
    assert (config.norm_eps, config.tied, config.windows) == (1e-6, False, (None,))
    assert Origin(config_json=given).stored_dtype == "float32"
    mistral = from_hf(sizes("mistral", num_attention_heads=8, hidden_size=64))
    assert mistral.windows == (4096,)


def read(architecture, **changes):
    return from_hf(sizes() | {"architectures": [architecture], "model_type": ""} | changes)


def test_what_a_config_says_is_what_transformers_makes_of_it():
    # Gemma's "gelu" means the tanh form, another family's the exact one.
    assert read("GemmaForCausalLM", hidden_act="gelu").activation == "gelu_tanh"
    assert read("LlamaForCausalLM", hidden_act="gelu").activation == "gelu"
    # A window that is given counts only where it is used, and from the layer that is said.
    qwen = {"sliding_window": 64, "max_window_layers": 1}
    assert read("Qwen2ForCausalLM", **qwen).windows == (None,)
    used = read("Qwen2ForCausalLM", **qwen, use_sliding_window=True)
    assert [used.windows[kind] for kind in used.layer_kinds] == [None, 64]
    assert read("Qwen3MoeForCausalLM", sliding_window=64).windows == (None,)
    # Attention is scaled by query_pre_attn_scalar, not by head_dim; Gemma 3 has no soft cap on its scores.
    gemma = {"head_dim": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0}
    assert read("Gemma2ForCausalLM", **gemma).query_scale == read("Gemma3ForCausalLM", **gemma).query_scale == 0.25
    assert read("Gemma2ForCausalLM", **gemma).attention_softcap == 50.0
    assert read("Gemma3ForCausalLM", **gemma).attention_softcap is None
    # Tied unless it says otherwise, and the other way round.
    assert read("GemmaForCausalLM").tied and not read("GemmaForCausalLM", tie_word_embeddings=False).tied
    assert not read("Qwen2ForCausalLM").tied
    # The number of experts has one name in files of transformers 4, another in those of 5.
    assert read("Qwen3MoeForCausalLM", num_experts=16).num_experts == 16
    assert read("Qwen3MoeForCausalLM", num_local_experts=16).num_experts == 16
    # Qwen3 rounds the experts' weights to the compute dtype and normalises them only if told; Mixtral the other way.
    mixtral, qwen = read("MixtralForCausalLM"), read("Qwen3MoeForCausalLM")
    assert (mixtral.normalise_experts, mixtral.round_expert_weights) == (True, False)
    assert (qwen.normalise_experts, qwen.round_expert_weights) == (False, True)


def test_gemma_3_in_both_dialects_is_one_model():
    common = {"num_hidden_layers": 7, "sliding_window": 30}
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling, "sliding_window_pattern": 3}
    new = {
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        "layer_types": ["full_attention" if i in (2, 5) else "sliding_attention" for i in range(7)],
    }
    found = read("Gemma3ForCausalLM", **common, **old)
    assert found == read("Gemma3ForCausalLM", **common, **new)
    kinds = [(found.windows[kind], found.ropes[kind].theta, found.ropes[kind].factor) for kind in found.layer_kinds]
    assert kinds == [(None, 5e5, 8.0) if i in (2, 5) else (30, 2e4, 1.0) for i in range(7)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, ("GPTNeoXForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")),
        ({"architectures": None}, ("(none)", "LlamaForCausalLM")),
        ({"hidden_act": "quick_gelu"}, ("hidden_act 'quick_gelu'", "silu, swish, gelu")),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ("'dynamic'", "default, linear, llama3, yarn, longrope"),
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ("Missing required keys", "'low_freq_factor'")),
        ({"rope_scaling": {"type": "linear"}}, ("Missing required keys", "'factor'")),
        ({"rope_scaling": {"type": "yarn"}}, ("Missing required keys", "'factor'")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"architectures": ["MixtralForCausalLM"], "router_jitter_noise": 0.1}, ("router_jitter_noise",)),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0, 1]}, ("mlp_only_layers",)),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "llama"}},
            ("'llama'", "mistral, ministral3"),
        ),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ("num_attention_heads 4", "num_key_value_heads 3")),
        ({"vocab_size": None, "hidden_size": None}, ("vocab_size, hidden_size",)),
        ({"hidden_size": "32"}, ("hidden_size", "32")),
    ],
)
def test_a_config_that_is_not_supported_says_what_and_what_is(changes, said):
    with pytest.raises(UserError) as refused:
        from_hf(sizes() | changes, file="there/config.json")
    for part in ("there/config.json", *said):
        assert part in str(refused.value)


@pytest.mark.parametrize("case", ["llama3 rope scaling", "mistral, window shorter than the prompt", "qwen 3.5"])
def test_extending_a_cache_equals_the_whole_prompt(folder, case):
    ours, _ = load(folder(case)[0], dtype="float32")
    tokens, size, pad = prompts(length=150), 170, np.array([0, 9])
    whole = np.asarray(ours(tokens))
    # The second row begins 9 slots later, after padding on its left.
    slots, padded = np.arange(size)[None] - pad[:, None], list(zip(tokens, pad, strict=True))
    places, held = np.maximum(slots, 0).astype(np.int32), np.zeros((2, size), np.int32)
    cache, parts, slot = ours.empty_cache(2, size), [], 0
    extend = nnx.jit(lambda m, *given: m.extend(*given))
    for count in (100, 30, 1, 1, 18):
        held[:, slot : slot + count] = slots[:, slot : slot + count] >= 0
        fed = np.stack([np.append(np.zeros(p, np.int32), row)[slot : slot + count] for row, p in padded])
        hidden, cache = extend(ours, fed, places[:, slot : slot + count], cache, places, held, jnp.int32(slot))
        parts.append(np.asarray(ours.unembed(hidden)))
        slot += count
    found = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(found[0], whole[0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(found[1, 9:], whole[1, : 150 - 9], rtol=0, atol=2e-5)


def loss_and_gradient(of, batch):
    """The summed loss and its gradient by every parameter."""
    graph, params, rest = split(of, nnx.Param)
    assert not rest

    def loss(params):
        return token_sums(merge(graph, params), batch)["nll"]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return np.asarray(value), {name: np.asarray(value) for name, value in gradient.items()}


def assert_same_gradients(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    for name, value in wanted[1].items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


@pytest.fixture(scope="module")
def batch():
    return data(batch_size=4).batch(0)


def jaxpr(of, batch):
    graph, params, _ = split(of, nnx.Param)
    return str(jax.make_jaxpr(jax.grad(lambda params: token_sums(merge(graph, params), batch)["nll"]))(params))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_layer_keeps_each_input_once(batch, method):
    """Of width 48: its input and that of attention's maps, the MLP's residual and input; of width 80 gate and up."""
    made = model(hidden_size=48, intermediate_size=80, head_dim=10)
    if method == "lora":
        sj.lora.inject(made, rank=3, targets="all-linear", seed=0)
    graph, params, frozen = split(made, sj.LORA if method == "lora" else sj.ALL)
    run = lambda params: token_sums(merge(graph, params, frozen), batch)["nll"]  # noqa: E731
    program = jax.make_jaxpr(jax.grad(run))(params).jaxpr
    forward = next(each for each in program.eqns if each.primitive.name == "scan" and not each.params["reverse"])
    kept = [out.aval for out in forward.outvars[forward.params["num_carry"] :]]
    tokens = made.config.num_layers * batch["tokens"].size
    assert {width: sum(each.size == tokens * width for each in kept) for width in (48, 80)} == {48: 4, 80: 2}


def test_rematerialised_layers_have_the_gradients_of_kept_ones(batch):
    kept, again = model(), model()
    again.remat = "full"
    products = [jaxpr(one, batch).count("dot_general") for one in (again, kept)]
    assert products[0] > products[1]
    assert_same_gradients(loss_and_gradient(again, batch), loss_and_gradient(kept, batch))


def test_attention_by_chunks_of_queries_equals_it_whole(monkeypatch, batch):
    ours = model("mistral", sliding_window=20)
    wanted = loss_and_gradient(ours, batch)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 16)
    shapes = jaxpr(ours, batch)
    assert "f32[4,2,2,16,64]" in shapes and "f32[4,2,2,64,64]" not in shapes  # the scores of 16 queries at a time
    assert_same_gradients(loss_and_gradient(ours, batch), wanted)


@pytest.mark.rule(2)
def test_float32_parameters_under_bfloat16_compute_are_cast_where_used():
    ours = model(dtype="bfloat16", param_dtype="float32")
    stored = model(dtype="bfloat16", param_dtype="bfloat16")
    tokens = prompts(128, length=40)
    np.testing.assert_array_equal(ours(tokens), stored(tokens))


def test_a_graph_compares_by_what_the_model_computes():
    shapes = abstract(from_hf(sizes()), dtype="float32", param_dtype="float32")
    graph = nnx.graphdef(shapes)
    shapes.origin = Origin(source="here", fingerprint="x", config_json=sizes())
    assert nnx.graphdef(shapes) == graph and hash(nnx.graphdef(shapes)) == hash(graph)
    shapes.config = dataclasses.replace(shapes.config, norm_eps=1e-3)
    assert nnx.graphdef(shapes) != graph
