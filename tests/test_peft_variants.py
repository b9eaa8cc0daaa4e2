"""Every variant of LoRA is PEFT's: logits both ways, files, gradients, courses of training, merges."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from courses import assert_same_movement, our_losses, packed, torch_losses
from flax import nnx
from helpers import BASE, assert_same_bits, prompts, token_sums, torch_logits, torch_model, weights
from safetensors.numpy import load_file

import specjax as sj
from specjax.errors import UserError
from specjax.hf.load import load
from specjax.lora import peft as files
from specjax.lora import peft_config
from specjax.lora.adapters import collect, on_host, row_of
from specjax.lora.targets import by_pattern, is_stacked, linears, match, match_saved, modules, parts
from specjax.models.stack import Constant
from specjax.train.step import merge, split, write_back

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # peft's advice
    pytest.mark.filterwarnings("ignore:.*embedding layer:UserWarning"),  # likewise
    pytest.mark.filterwarnings("ignore:.*did not match any:RuntimeWarning"),  # it did: peft's patterns of experts
]

TOKENS = prompts(rows=1)
MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MANY = ["q_proj", "v_proj", "up_proj", "down_proj"]
SAVED = ["embed_tokens", "lm_head", "norm"]

# name -> (what PEFT is told, what we are told, the base); names that are the same in both are not repeated.
VARIANTS = {
    "ranks and alphas": (
        {
            "target_modules": MANY,
            "rank_pattern": {"up_proj": 2, "layers.0.self_attn.q_proj": 7, r"layers\.[12]\.self_attn\.v_proj": 3},
            "alpha_pattern": {"layers.1.mlp.up_proj": 32, "q_proj": 3},
        },
        "plain",
    ),
    "ranks, rsLoRA": (
        {"target_modules": "all-linear", "rank_pattern": {r"^model\.layers\.2.*": 9}, "use_rslora": True},
        "plain",
    ),
    "DoRA": ({"target_modules": [*MANY, "o_proj", "lm_head"], "use_dora": True}, "biased"),
    "DoRA in some layers": (
        {
            "target_modules": MANY,
            "layers_to_transform": [0, 2],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"layers.0.mlp.up_proj": 6},
        },
        "biased",
    ),
    "one layer": ({"target_modules": ["k_proj", "o_proj"], "layers_to_transform": 1}, "plain"),
    "whole modules": ({"target_modules": MANY, "modules_to_save": SAVED}, "plain"),
    "whole modules of some layers": (
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.input_layernorm", "layers.2.mlp", "model.norm"]},
        "biased",
    ),
    "all biases": ({"target_modules": ["q_proj", "down_proj"], "bias": "all"}, "biased"),
    "biases of the targets": (
        {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only", "layers_to_transform": [1]},
        "biased",
    ),
    "a tied input": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "tied"),
    "a tied output": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "tied"),
    "both tied ends": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, "tied"),
    "tied ends kept tied": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "tied",
    ),
    "the embedding": (
        {
            "target_modules": ["q_proj", "embed_tokens", "lm_head"],
            "rank_pattern": {"embed_tokens": 3},
            "alpha_pattern": {"embed_tokens": 12},
            "use_rslora": True,
        },
        "plain",
    ),
    "a tied embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "tied"),
    "rows": ({"target_modules": MANY, "trainable_token_indices": [517, 3, 40]}, "plain"),
    "rows of both ends": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [5, 517]}},
        "plain",
    ),
    "rows beside a whole module": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 40], "modules_to_save": ["lm_head"]},
        "plain",
    ),
    "rows of tied ends": ({"target_modules": MANY, "trainable_token_indices": [517, 3, 40]}, "tied"),
    "other rows of tied ends": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [5, 517]}},
        "tied",
    ),
    "rows of a tied output": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 517]}},
        "tied",
    ),
    "everything": (
        {
            "target_modules": MANY,
            "use_dora": True,
            "rank_pattern": {"layers.0.self_attn.v_proj": 2, "up_proj": 6},
            "alpha_pattern": {"layers.2.*": 24},
            "bias": "all",
            "modules_to_save": ["norm", "embed_tokens"],
        },
        "biased",
    ),
}
OURS = {"target_modules": "targets", "use_dora": "dora", "use_rslora": "rslora"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name -> (folder, the transformers model in it): three layers, o_proj not square."""
    made = {}
    for name, options in {
        "plain": {},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
    }.items():
        reference = torch_model(head_dim=24, num_hidden_layers=3, vocab_size=518, **options)
        path = tmp_path_factory.mktemp("bases") / name
        reference.save_pretrained(path)
        made[name] = path, reference
    return made


def ours(bases, name):
    return load(bases[VARIANTS[name][1]][0], dtype="float32")[0]


def inject(made, name, **options):
    told = {OURS.get(key, key): value for key, value in VARIANTS[name][0].items()}
    sj.lora.inject(made, **{"rank": 4, "alpha": 8, "seed": 1} | told | options)
    return made


def injected(bases, name, **options):
    return inject(ours(bases, name), name, **options)


def shake(of, seed=0):
    """Adapters as after some training; what stands behind a layer's true rank is left."""
    rng = np.random.default_rng(seed)

    def move(leaf, noise):
        leaf[...] = jnp.asarray(np.asarray(leaf[...]) + 0.05 * noise.astype(np.float32))

    for part in parts(of).values():
        for stack in getattr(part, "updates", {}).values():
            (member,) = stack.members
            for leaf, behind in ((stack.a, lambda one, rank: one[rank:]), (stack.b, lambda one, rank: one[..., rank:])):
                noise = rng.standard_normal(leaf.shape)
                for layer, rank in enumerate(member.ranks):
                    behind(noise[layer, 0] if len(member.ranks) > 1 else noise[0], rank)[...] = 0
                move(leaf, noise)
            if "magnitude" in stack.fields:
                move(stack.magnitude, rng.standard_normal(stack.magnitude.shape))
        for own in part.own.values():
            for key in own.parameters:
                move(getattr(own, key), rng.standard_normal(getattr(own, key).shape))


def logits(of):
    return np.asarray(of(TOKENS))


def their_model(bases, name, train=False):
    """`adapted` by a variant over its base."""
    told, base = VARIANTS[name]
    return adapted(bases[base][1], told, train)


def adapted(reference, told, train=False):
    """A fresh PEFT model, with its adapter as after some training."""
    import peft
    import torch

    torch.manual_seed(0)  # of the first values, which PEFT draws
    theirs = peft.get_peft_model(
        copy.deepcopy(reference), peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **copy.deepcopy(told))
    )
    if not train:
        generator = torch.Generator().manual_seed(0)
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return theirs


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """name -> (folder that PEFT wrote, its logits)."""
    made = {}

    def get(name):
        if name not in made:
            theirs = their_model(bases, name)
            path = tmp_path_factory.mktemp("adapters") / "adapter"
            theirs.save_pretrained(path, save_embedding_layers=False)
            made[name] = path, torch_logits(theirs, TOKENS)
        return made[name]

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_adapter_is_the_base_and_the_trained_one_has_its_logits_in_peft(bases, tmp_path, name):
    import peft

    made = ours(bases, name)
    plain = logits(made)
    inject(made, name)
    fresh, before = logits(made), weights(made, BASE)
    if "use_dora" in VARIANTS[name][0]:  # its magnitude over the norm is 1 up to rounding
        np.testing.assert_allclose(fresh, plain, rtol=0, atol=1e-4)
    else:
        np.testing.assert_array_equal(fresh, plain)
    _assert_factors_are_fresh(made)
    shake(made)
    assert sj.lora.save(made, tmp_path / "adapter") == []
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bases[VARIANTS[name][1]][1]), tmp_path / "adapter")
    found, wanted = logits(made), torch_logits(theirs, TOKENS)
    print(f"{name}: {np.abs(found - wanted).max():.1e}; fresh against the base {np.abs(fresh - plain).max():.1e}")
    assert np.abs(found - plain).max() > 0.05
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    again = ours(bases, name)
    sj.lora.load(again, tmp_path / "adapter")
    np.testing.assert_array_equal(logits(again), found)
    assert_same_bits(weights(made, BASE), before)


def _assert_factors_are_fresh(made):
    for path, linear in linears(made).items():
        for stack in linear.updates.values():
            _assert_stack_is_fresh(path, linear, stack)


def _assert_stack_is_fresh(path, linear, stack):
    (member,) = stack.members
    arrays = row_of(stack, member)
    for layer, rank in enumerate(member.ranks):
        at = layer if is_stacked(linear) else ...
        kernel, a, b = (np.asarray(x)[at] for x in (linear.kernel[...], arrays["a"], arrays["b"]))
        filled = np.any(a, axis=tuple(range(1, a.ndim)))
        assert filled[:rank].all() and not filled[rank:].any() and not np.any(b), path
        if "magnitude" in arrays:
            wanted = np.linalg.norm(kernel.reshape(b[..., 0].size, -1), axis=1).reshape(b.shape[:-1])
            np.testing.assert_allclose(arrays["magnitude"][at], wanted, rtol=1e-6)


GRADIENTS = ["ranks and alphas", "DoRA in some layers", "tied ends kept tied", "rows of both ends", "rows of tied ends"]
TRAINED = ["ranks and alphas", "DoRA in some layers", "whole modules", "all biases", "rows of both ends"]
GRADIENTS += ["the embedding", "a tied embedding"]
TRAINED += ["a tied embedding", "rows of tied ends", "other rows of tied ends"]
EXPORTED = ["DoRA", "whole modules", "a tied input", "a tied output", "tied ends kept tied", "everything"]
EXPORTED += ["a tied embedding", "rows of tied ends", "other rows of tied ends"]


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_that_peft_wrote_has_the_same_logits_here_comes_back_and_merges(bases, adapters, tmp_path, name):
    import transformers

    path, wanted = adapters(name)
    made = ours(bases, name)
    plain = logits(made)
    sj.lora.load(made, path)
    found = logits(made)
    print(f"{name}: {np.abs(found - wanted).max():.1e}")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.abs(found - plain).max() > 0.05
    sj.lora.save(made, tmp_path / "again")
    assert_same_bits(load_file(tmp_path / "again" / MODEL), load_file(path / MODEL))
    sj.lora.use(made, None)
    np.testing.assert_array_equal(logits(made), plain)
    sj.lora.merge(made, "default")
    assert sj.lora.names(made) == []
    np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=1e-4)
    if name in EXPORTED:
        sj.export(made, None, tmp_path / "merged")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        np.testing.assert_allclose(torch_logits(theirs, TOKENS), wanted, rtol=0, atol=1e-4)


@pytest.mark.rule(3)
@pytest.mark.parametrize("name", [*GRADIENTS, "everything"])
def test_gradients_are_pefts(bases, adapters, tmp_path, name):
    import torch

    path, _ = adapters(name)
    made, tokens = ours(bases, name), prompts(rows=1, length=200)
    sj.lora.load(made, path)
    graph, params, frozen = split(made, sj.LORA)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones_like(tokens[:, 1:]),
        "positions": np.arange(199, dtype=np.int32)[None],
        "segment_ids": np.ones_like(tokens[:, 1:]),
    }
    grads = jax.jit(jax.grad(lambda p: token_sums(merge(graph, p, frozen), batch)["nll"] / 199))(params)
    for gradient, value in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert gradient.shape == value.shape
    _assert_padding_is_zero(made, grads)
    write_back(made, grads)
    adapter = on_host(collect(made, "default"))
    found = {row.key: files._to_file(made, adapter, row) for row in files._table(made, adapter)}
    theirs = their_model(bases, name)
    theirs(
        input_ids=torch.tensor(tokens, dtype=torch.long), labels=torch.tensor(tokens, dtype=torch.long)
    ).loss.backward()
    wanted = {
        key.replace(".default", "")
        .replace(".modules_to_save", "")
        .replace("magnitude_vector.weight", "magnitude_vector"): w
        for key, w in theirs.named_parameters()
        if w.requires_grad
    }
    assert set(wanted) == set(found) - ({"base_model.model.lm_head.weight"} if "kept" in name else set())
    for key, weight in wanted.items():
        if weight.grad is None:  # what PEFT trains and does not use
            assert not found[key].any(), key
            continue
        scale = np.abs(weight.grad.numpy()).max()
        np.testing.assert_allclose(found[key], weight.grad.numpy(), rtol=0, atol=1e-4 * scale, err_msg=key)


def _assert_padding_is_zero(made, values):
    for path, part in parts(made).items():
        for variant, stack in getattr(part, "updates", {}).items():
            (member,) = stack.members
            a, b = (np.asarray(values[*path, "updates", variant, letter]) for letter in "ab")
            for layer, rank in enumerate(member.ranks):
                one_a, one_b = (a[layer, 0], b[layer, 0]) if len(member.ranks) > 1 else (a[0], b[0])
                assert not one_a[rank:].any() and not one_b[..., rank:].any(), path


@pytest.mark.rule(3)
@pytest.mark.parametrize("name", TRAINED)
def test_training_follows_peft(bases, tmp_path, name):
    theirs, rows = their_model(bases, name, train=True), packed()
    theirs.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    made = ours(bases, name)
    plain, before = logits(made), weights(made)
    sj.lora.load(made, tmp_path / "start")
    found, wanted = our_losses(made, sj.LORA, rows), torch_losses(theirs, rows)
    print(f"{name}: losses differ by {np.abs(found[:, 0] / wanted[:, 0] - 1).max():.1e} of themselves")
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert_same_bits(weights(made, BASE), before)
    _assert_padding_is_zero(made, split(made, sj.LORA)[1])
    assert sj.lora.save(made, tmp_path / "end") == []
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    found, wanted, start = (load_file(tmp_path / side / MODEL) for side in ("end", "theirs", "start"))
    assert_same_movement(found, wanted, start)
    sj.lora.use(made, None)
    np.testing.assert_array_equal(logits(made), plain)


@pytest.mark.rule(3)
@pytest.mark.parametrize("name", ["DoRA in some layers", "all biases", "a tied input"])
def test_updates_of_lora_plus_are_pefts(bases, tmp_path, name):
    import torch
    from peft.optimizers import create_loraplus_optimizer

    theirs, made = their_model(bases, name), ours(bases, name)
    theirs.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    sj.lora.load(made, tmp_path / "start")
    weights = {key: weight for key, weight in theirs.named_parameters() if weight.requires_grad}
    rates = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)
    rule = sj.lora_plus(sj.adamw(1e-3, weight_decay=0.1, clip_norm=0), 16.0)
    params = split(made, sj.LORA)[1]
    state, generator = rule.init(params), torch.Generator().manual_seed(0)
    for step in range(3):
        # Gradients go the way of weights, through PEFT's files, into our layout.
        moved = {key: weight.detach().clone() for key, weight in weights.items()}
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
            weight.data = weight.grad.clone()
        theirs.save_pretrained(tmp_path / f"gradient{step}", save_embedding_layers=False)
        for key, weight in weights.items():
            weight.data = moved[key]
        carrier = ours(bases, name)
        sj.lora.load(carrier, tmp_path / f"gradient{step}")
        updates, state = rule.update(split(carrier, sj.LORA)[1], state, params)
        params = jax.tree.map(jnp.add, params, updates)
        optimizer.step()
    write_back(made, params)
    sj.lora.save(made, tmp_path / "end")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    found, wanted, start = (load_file(tmp_path / side / MODEL) for side in ("end", "theirs", "start"))
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-5, err_msg=key)
        assert np.abs(value - start[key]).max() > (0.03 if "lora_B" in key else 1e-3), key
    with pytest.raises(UserError, match=r"LoRA\+ is for LoRA's factors, and none of them trains"):
        rule.init({("norm", "scale"): jnp.ones(3)})


@pytest.mark.rule(3)
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_and_is_saved_as_pefts(bases, tmp_path, rslora):
    import peft
    import torch

    told = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    theirs = copy.deepcopy(bases["biased"][1])
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(init_lora_weights="pissa", task_type="CAUSAL_LM", **told))
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's example of the conversion has it
    theirs.save_pretrained(tmp_path / "start")
    made = load(bases["biased"][0], dtype="float32")[0]
    plain, before = logits(made), weights(made)
    sj.lora.inject(made, rank=4, alpha=6, rslora=rslora, targets=told["target_modules"], init="pissa")
    np.testing.assert_allclose(logits(made), plain, rtol=0, atol=1e-5)
    assert_same_bits(weights(made, BASE), before)

    def factors(folder):
        """Those that PEFT saved, by the paths of ours."""
        carrier = load(bases["biased"][0], dtype="float32")[0]
        sj.lora.load(carrier, folder)
        held = split(carrier, sj.LORA)[1].items()
        return {tuple("pissa" if one == "lora" else one for one in path): value for path, value in held}

    # Singular vectors have no sign: ours are turned to theirs, all that follows is then equal.
    turned = factors(tmp_path / "start")
    ours_start = split(made, sj.LORA)[1]
    assert ours_start.keys() == turned.keys()
    for path, value in ours_start.items():
        wanted = turned[path]
        np.testing.assert_allclose(np.abs(value), np.abs(wanted), rtol=0, atol=2e-4, err_msg=str(path))
    write_back(made, turned)
    for path, part in linears(made).items():
        for stack in part.updates.values():
            stack.a0[...], stack.b0[...] = (
                turned[*path, "updates", "pissa", "a"],
                turned[*path, "updates", "pissa", "b"],
            )
    generator = torch.Generator().manual_seed(0)
    for weight in theirs.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "end")
    write_back(made, factors(tmp_path / "end"))
    moved = torch_logits(theirs, TOKENS)
    np.testing.assert_allclose(logits(made), moved, rtol=0, atol=1e-4)
    assert np.abs(moved - plain).max() > 0.05
    sj.lora.save(made, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    found, wanted = (load_file(tmp_path / side / MODEL) for side in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-6, err_msg=key)
    ours_config, theirs_config = (json.loads((tmp_path / side / CONFIG).read_text()) for side in ("ours", "theirs"))
    for key in ("r", "lora_alpha", "use_rslora"):
        assert ours_config[key] == theirs_config[key], key
    sj.lora.merge(made)
    np.testing.assert_allclose(logits(made), moved, rtol=0, atol=1e-4)


MATCHED = [
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR", "exclude_modules": ["down_proj", "self_attn.k_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.layers\.0\..*"},
    {"target_modules": r"model\.layers\.[02]\.(mlp\.gate|self_attn\.o)_proj|lm_head"},
    {"target_modules": ["model.layers.2.mlp.down_proj", "layers.0.self_attn.q_proj", "lm_head"]},
    {"target_modules": ["model.layers.2.mlp.down_proj", "q_proj"], "layers_to_transform": [0, 1]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": 1},
    {"target_modules": r".*\.(q_proj|embed_tokens)"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp", "norm", "layers.0"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["1.mlp.up_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layernorm", "embed_tokens"]},
]
PATTERNS = {"layers.1": 1, "q_proj|v_proj": 2, r"^model\.layers\.2\..*": 3, "self_attn.*": 4, "layers.0.mlp.up_pro": 5}


@pytest.mark.rule(3)
@pytest.mark.parametrize("told", MATCHED, ids=str)
def test_names_and_patterns_match_what_they_match_in_peft(bases, told):
    import peft
    from peft.utils.other import ModulesToSaveWrapper, get_pattern_key

    theirs = peft.get_peft_model(copy.deepcopy(bases["plain"][1]), peft.LoraConfig(**copy.deepcopy(told)))
    inner = dict(theirs.get_base_model().named_modules())
    wanted = {name for name, module in inner.items() if hasattr(module, "lora_A")}
    kept = {name for name, module in inner.items() if isinstance(module, ModulesToSaveWrapper)}
    made = load(bases["plain"][0], dtype="float32")[0]
    more = {"layers": "layers_to_transform", "exclude": "exclude_modules", "layers_pattern": "layers_pattern"}
    options = {key: told[name] for key, name in more.items() if name in told}
    saved = told.get("modules_to_save", [])
    found = match(made, told["target_modules"], saved=saved, **options)
    assert named(made, found) == wanted
    leaves = {
        n
        for n in {k for path in parts(made) for k in modules(made, path)}
        if f"{n}.".startswith(tuple(f"{k}." for k in kept))
    }
    assert named(made, match_saved(made, saved)) == leaves
    for name in wanted:
        assert by_pattern(PATTERNS, 0, "rank_pattern")(name) == PATTERNS.get(get_pattern_key(PATTERNS, name), 0), name


def named(made, found):
    """The modules of a match, as PEFT names them."""
    return {n for path, flags in found.items() for n, on in zip(modules(made, path), flags, strict=True) if on}


FAMILIES = {
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj"], "rank_pattern": {"layers.1.mlp.gate_up_proj": 2}},
    "gemma2": {"target_modules": "all-linear", "modules_to_save": ["norm", "embed_tokens"]},
    "qwen3": {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "modules_to_save": ["q_norm", "k_norm"]},
    "olmo2": {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["norm"]},
    "qwen2": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "mixtral": {"target_modules": "all-linear", "use_rslora": True},
    "qwen3_moe": {
        "target_modules": ["v_proj"],
        "target_parameters": ["experts.down_proj"],
        "modules_to_save": ["norm"],
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_variants_in_other_families(tmp_path, family):
    import peft
    import transformers

    reference = torch_model(family)
    reference.save_pretrained(tmp_path / "base")
    theirs = adapted(reference, FAMILIES[family])
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    wanted = torch_logits(theirs, TOKENS)
    made = load(tmp_path / "base", dtype="float32")[0]
    sj.lora.load(made, tmp_path / "theirs")
    found = logits(made)
    print(f"{family}: {np.abs(found - wanted).max():.1e}")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.abs(found - torch_logits(reference, TOKENS)).max() > 0.01
    sj.lora.save(made, tmp_path / "ours")
    assert_same_bits(load_file(tmp_path / "ours" / MODEL), load_file(tmp_path / "theirs" / MODEL))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again, TOKENS), wanted, rtol=0, atol=1e-6)
    sj.lora.merge(made)
    sj.export(made, None, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    np.testing.assert_allclose(torch_logits(merged, TOKENS), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "options", "trained"),
    [
        ("all-linear", {"rslora": True}, 5),
        (["down_proj"], {}, 1),
        (["gate_proj", "up_proj", "q_proj"], {"rank_pattern": {"q_proj": 3, "experts.*": 2}}, 2),
        (["mlp.gate", "q_proj"], {"layers_to_transform": [1]}, 0),
    ],
)
def test_adapters_of_experts_come_back_and_open_in_peft(experts, tmp_path, targets, options, trained):
    import peft

    folder, reference = experts
    made = load(folder, dtype="float32")[0]
    plain = logits(made)
    sj.lora.inject(made, rank=4, alpha=8, targets=targets, **options)
    np.testing.assert_array_equal(logits(made), plain)
    shake(made)
    sj.lora.save(made, tmp_path / "adapter")
    found = logits(made)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(theirs, TOKENS), found, rtol=0, atol=1e-4)
    assert np.abs(found - plain).max() > 0.02
    again = load(folder, dtype="float32")[0]
    sj.lora.load(again, tmp_path / "adapter")
    assert_same_bits(weights(again), weights(made))
    held = load_file(tmp_path / "adapter" / MODEL)
    assert len({name.split(".lora_")[0].split("layers.0.")[1] for name in held if "layers.0." in name}) >= trained


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """(folder, the transformers model in it) of a mixture of experts."""
    reference = torch_model("mixtral")
    path = tmp_path_factory.mktemp("experts") / "base"
    reference.save_pretrained(path)
    return path, reference


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ["gate_proj"]}, "gate_proj and up_proj of the experts must be targeted together, in every layer"),
        ({"targets": ["down_proj"], "layers_to_transform": [0]}, "must be targeted together, in every layer"),
        ({"targets": ["down_proj"], "dropout": 0.1}, "where PEFT has neither dropout nor DoRA"),
        ({"targets": ["mlp.gate"], "dora": True}, "layers.0.mlp.gate is part of a mixture of experts"),
        ({"targets": ["q_proj"], "modules_to_save": ["gate"]}, "modules_to_save 'gate' matches no module"),
    ],
)
def test_what_pefts_files_cannot_hold_of_experts_is_refused(experts, options, said):
    made = load(experts[0], dtype="float32")[0]
    with pytest.raises(UserError, match=said):
        sj.lora.inject(made, rank=2, **options)
    assert sj.lora.names(made) == []


def test_different_variants_lie_side_by_side(bases, adapters):
    several = ["all biases", "DoRA", "everything"]
    made = ours(bases, "everything")
    for name in several:
        sj.lora.load(made, adapters(name)[0], name=name)
    assert set(sj.lora.names(made)) == set(several)
    for name in several:
        sj.lora.use(made, name)
        np.testing.assert_allclose(logits(made), adapters(name)[1], rtol=0, atol=1e-4)
    for name in several[:-1]:
        sj.lora.unload(made, name)
    np.testing.assert_allclose(logits(made), adapters(several[-1])[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["everything", "rows of both ends", "rows of tied ends"])
def test_a_variant_lies_on_a_mesh_and_gives_the_same_logits(bases, adapters, name):
    path, wanted = adapters(name)
    made = load(bases[VARIANTS[name][1]][0], mesh=sj.make_mesh(fsdp=4, tensor=2), dtype="float32")[0]
    sj.lora.load(made, path)
    np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=1e-4)
    own, base = (of.embedding[...].sharding.spec for of in (made.embed_tokens.own["0"], made.embed_tokens))
    assert tuple(own)[1:] == tuple(base)[1:] and (name != "everything" or own == base)
    sj.lora.merge(made)
    np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=1e-4)


def test_nothing_differs_by_layer_where_layers_are_alike(bases):
    made = injected(bases, "DoRA", rank_pattern={"q_proj": 2})
    assert not nnx.to_flat_state(nnx.state(made, Constant))
    assert nnx.to_flat_state(nnx.state(injected(bases, "one layer"), Constant))


def test_every_key_of_pefts_config_is_known(bases, tmp_path):
    import dataclasses

    import peft

    known = {*peft_config._READ, *peft_config._NEUTRAL, *peft_config._ANY}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
    sj.lora.save(injected(bases, "everything"), tmp_path / "adapter", base="org/name", revision="v2")
    told = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (told["base_model_name_or_path"], told["revision"]) == ("org/name", "v2")
    read = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert read.use_dora and read.bias == "all" and sorted(read.modules_to_save) == sorted(told["modules_to_save"])
    assert read.rank_pattern == {r"layers\.0\.self_attn\.v_proj": 2, "up_proj": 6}


def test_modules_without_an_update_are_named(bases, tmp_path):
    made = injected(bases, "one layer")
    both = ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.o_proj"]
    assert sorted(sj.lora.save(made, tmp_path / "fresh")) == both
    made.layers[0].self_attn.k_proj.updates["lora"].b[...] += 1.0
    with pytest.raises(UserError, match="lora_A.weight came back otherwise than it was written: nothing is saved"):
        _save_wrongly(made, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def _save_wrongly(made, out):
    """As a disk that loses a bit would."""
    from safetensors.numpy import save_file

    def spoilt(tensors, path, metadata):
        first = next(iter(tensors))
        save_file(tensors | {first: -tensors[first]}, path, metadata=metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "save_file", spoilt)
        sj.lora.save(made, out)


@pytest.mark.rule(5)
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("plain", {"rank_pattern": {"q_porj": 2}}, "rank_pattern 'q_porj' matches no targeted linear map; there are"),
        ("plain", {"alpha_pattern": {"v_proj": 2}}, "alpha_pattern 'v_proj' matches no targeted linear map"),
        ("plain", {"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0: it must be at least 1"),
        ("plain", {"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\] is 0: it must be above 0"),
        ("plain", {"rank_pattern": {"(": 2}}, "is not a regular expression"),
        (
            "plain",
            {"modules_to_save": ["embed"]},
            "modules_to_save 'embed' matches no module; there are .*embed_tokens",
        ),
        ("plain", {"modules_to_save": ["self_attn.q_proj"]}, "match no linear map"),
        ("plain", {"exclude_modules": ["gate"]}, "exclude_modules 'gate' matches no linear map"),
        ("plain", {"layers_to_transform": [3]}, "the model has layers 0 to 2"),
        ("plain", {"layers_to_transform": 0, "targets": ".*q_proj"}, "goes with a list of targets, not"),
        (
            "plain",
            {"trainable_token_indices": [518]},
            "has 518, and the model has rows for 0 to 517: where tokens",
        ),
        ("plain", {"trainable_token_indices": [3, 4, 3]}, "trainable_token_indices has 3 twice"),
        ("plain", {"trainable_token_indices": {"norm": [3]}}, "names 'norm': name embed_tokens or lm_head, or both"),
        ("plain", {"trainable_token_indices": {"lm_head": []}}, "trainable_token_indices is empty: name ids"),
        (
            "plain",
            {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]},
            "trains rows of embed_tokens, or of what is tied to it, and so do targets or modules_to_save",
        ),
        (
            "tied",
            {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]},
            "trains rows of lm_head, or of",
        ),
        (
            "plain",
            {"targets": ["embed_tokens"], "dora": True},
            "dora does not go on an embedding: leave it out of targ",
        ),
        ("plain", {"targets": ["embed_tokens"], "init": "pissa"}, "embed_tokens is of experts or an embedding: name"),
        (
            "tied",
            {"targets": ["embed_tokens"], "trainable_token_indices": [3]},
            "trains rows of embed_tokens, or of what is tied to it, and so do targets",
        ),
        ("plain", {"bias": "all"}, "linear maps of this model have none"),
        ("plain", {"bias": "some"}, "bias 'some': choose one of none, all, lora_only"),
        ("plain", {"ensure_weight_tying": True}, "is for a model whose embeddings are tied"),
        ("plain", {"modules_to_save": ["proj"]}, "is both in targets and in modules_to_save"),
        ("biased", {"modules_to_save": ["up_proj"], "bias": "all"}, "which trains its bias too"),
    ],
)
def test_what_contradicts_itself_or_matches_nothing_is_refused(bases, name, options, said):
    made = load(bases[name][0], dtype="float32")[0]
    with pytest.raises(UserError, match=said):
        sj.lora.inject(made, **{"rank": 2, "targets": ["q_proj"]} | options)
    assert sj.lora.names(made) == []


def test_one_update_at_both_ends_and_a_rate_of_its_own_for_the_embedding_are_refused(bases, tmp_path):
    made = load(bases["tied"][0], dtype="float32")[0]
    sj.lora.inject(made, rank=2, targets=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match="LoRA.* has a rate of its own for an embedding's factors in PEFT"):
        sj.lora_plus(sj.adamw(1e-3), 16.0).init(split(made, sj.LORA)[1])
    sj.lora.save(made, tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ensure_weight_tying": True}))
    with pytest.raises(UserError, match="ensure_weight_tying with embed_tokens in target_modules, one update at both"):
        sj.lora.load(made, tmp_path / "adapter", name="tied")


def test_merging_into_a_quantised_base_is_refused(bases):
    made = injected(bases, "one layer")
    made.layers[0].self_attn.o_proj.kernel = nnx.Param(
        jnp.zeros((3, 8, 24, 64), jnp.int8), axes=("layers", "heads", "head_dim", "embed")
    )
    with pytest.raises(UserError, match="layers.0.self_attn.o_proj.kernel is stored as int8, a quantised base"):
        sj.lora.merge(made)
    assert sj.lora.names(made) == ["default"]
