"""Layers that are not alike: dense layers among layers with experts, against transformers and PEFT."""

import jax.numpy as jnp
import numpy as np
import parity
import peft
import pytest
import torch
import transformers
from flax import nnx
from helpers import sizes, torch_model
from safetensors.numpy import load_file, save_file

import specjax as sj
from specjax.errors import UserError
from specjax.hf.config import from_hf
from specjax.hf.load import load
from specjax.models import Segment
from specjax.models.experts import ExpertLinear
from specjax.models.layers import Linear
from specjax.models.moe import Router, load_balancing_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:.*did not match any:RuntimeWarning"),  # peft's: it asks modules alone
]
DENSE_FIRST = {"num_hidden_layers": 3, "mlp_only_layers": [0]}
ALTERNATING = {"num_hidden_layers": 3, "decoder_sparse_step": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A dense layer, two with experts, and a dense one again."""
    return parity.Pair(
        tmp_path_factory.mktemp("segments"), "qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 3]}
    )


def test_segments_are_the_runs_of_equal_layers():
    config = from_hf(sizes("qwen3_moe", **DENSE_FIRST))
    assert config.segments == (Segment("dense", 1), Segment("experts", 2))
    assert (config.spans, config.num_layers) == ((range(1), range(1, 3)), 3)
    alternating = from_hf(sizes("qwen3_moe", **ALTERNATING))
    assert alternating.segments == (Segment("dense", 1), Segment("experts", 1), Segment("dense", 1))
    assert from_hf(sizes("qwen3_moe")).segments == (Segment("experts", 2),)
    assert from_hf(sizes()).segments == (Segment("dense", 2),)
    with pytest.raises(UserError, match="leave no layer with experts"):
        from_hf(sizes("qwen3_moe", mlp_only_layers=[0, 1]))


@pytest.mark.rule(1)
def test_logits_files_and_packed_rows_are_those_of_one_segment_after_another(pair):
    assert 0.5 < pair.wanted.std() < 20  # or a tolerance says nothing
    assert parity.logits(pair)["logits"] < 1e-4
    assert parity.packed(pair)["packed"] < 1e-4
    assert parity.round_trip(pair)["round_trip"]


@pytest.mark.rule(1)
def test_gradients_of_every_segment(pair):
    assert parity.gradients(pair)["gradients"] < 1e-4


def test_decoding_writes_each_segments_own_part_of_the_cache(pair):
    assert parity.greedy(pair, 32)["greedy"] == 1


@pytest.mark.rule(1)
def test_adapters_go_both_ways_and_merge(pair):
    figures = parity.adapters(pair)
    assert max(figures["adapter"], figures["merge"]) < 1e-4


def test_an_adapters_names_are_those_of_the_files_layers(pair, tmp_path):
    made = pair.ours()
    sj.lora.inject(made, rank=2, targets="all-linear")
    sj.lora.save(made, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    start, end = "base_model.model.model.layers.", ".lora_A.weight"
    names = {name[len(start) : -len(end)] for name in held if name.endswith(end)}
    for segment, span in zip(made.config.segments, made.config.spans, strict=True):
        for layer in span:
            inside = {name.partition(".")[2] for name in names if name.startswith(f"{layer}.mlp.")}
            dense = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
            experts = {"mlp.experts", "mlp.experts.base_layer"}
            assert inside - {"mlp.gate"} == (dense if segment.block == "dense" else experts)
            assert f"{layer}.self_attn.q_proj" in names


@pytest.mark.rule(1)
def test_peft_builds_an_adapter_on_dense_maps_alone(pair, tmp_path):
    """PEFT takes target_modules of these names for the experts', in every layer."""
    made = pair.ours()
    maps = {"targets": ["gate_proj", "up_proj", "down_proj"], "layers_to_transform": [0]}
    with pytest.raises(UserError, match="dense layer in a model with experts, where PEFT has neither dropout nor DoRA"):
        sj.lora.inject(made, rank=2, dropout=0.1, **maps)
    sj.lora.inject(made, rank=2, rank_pattern={"up_proj": 3}, **maps)
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.LoRAParam)):
        if path[-1] == "b":
            leaf[...] = 0.05 * rng.standard_normal(leaf.shape).astype(np.float32)
    wanted = np.asarray(made(pair.tokens))
    sj.lora.save(made, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(pair.folder / "in", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    built = {name: weight.shape[0] for name, weight in theirs.named_parameters() if "lora_A" in name}
    start, end = "base_model.model.model.layers.0.mlp.", ".lora_A.default.weight"
    assert built == {f"{start}{name}_proj{end}": rank for name, rank in (("gate", 2), ("up", 3), ("down", 2))}
    assert np.abs(wanted - pair.wanted).max() > 1e-2
    assert np.abs(parity.torch_logits(theirs, pair.tokens) - wanted).max() < 1e-4


def test_the_balancing_loss_is_of_the_layers_with_experts(pair):
    made = pair.ours()
    _, stats = made.hidden_and_stats(jnp.asarray(pair.tokens))
    routed = sum(segment.layers for segment in made.config.segments if segment.block == "experts")
    assert stats["chosen"].shape == (routed, made.config.num_experts)
    with torch.no_grad():
        theirs = pair.theirs(torch.tensor(pair.tokens, dtype=torch.long), output_router_logits=True)
    np.testing.assert_allclose(load_balancing_loss(stats), theirs.aux_loss, rtol=1e-5)


def test_quantising_takes_the_maps_of_every_segment(pair):
    made = pair.ours()
    maps = [part for _, part in nnx.iter_modules(made.layers) if isinstance(part, Linear | ExpertLinear)]
    wanted = sum(part.kernel.size for part in maps if not isinstance(part, Router))
    quantised = pair.ours(quantise="int8")
    report = quantised.origin.quantisation
    assert report.parameters == wanted
    relative = np.linalg.norm(np.asarray(quantised(pair.tokens)) - pair.wanted) / np.linalg.norm(pair.wanted)
    assert relative < 0.2 and {name for name, _ in report.relative} >= {"q_proj", "gate_proj", "down_proj"}


def test_a_layer_that_shares_keys_and_values_may_have_some_in_the_file(tmp_path):
    torch_model("gemma4_text").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.{}.self_attn.k_proj.weight"
    assert name.format(4) not in held
    save_file(held | {name.format(4): held[name.format(0)].copy()}, tmp_path / "model.safetensors", {"format": "pt"})
    ours, _ = load(tmp_path, dtype="float32")
    shares = [ours.config.of(segment).shares for segment in ours.config.segments]
    assert shares == ["", "", "", "sliding_attention", "full_attention"]
    assert ours.config.cache_shapes == ((3, 2, 24), (1, 2, 32)) and ours.config.homes[-2:] == ((0, 2), (1, 0))
    save_file(held | {name.format(6): held[name.format(0)].copy()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="unexpected"):
        load(tmp_path)
