"""LoRA is PEFT's, in numbers and in files, in both directions."""

import copy
import json
import math
import re
import shlex
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import BASE, assert_same_bits, data, model, prompts, token_sums, torch_logits, torch_model, weights
from safetensors.numpy import load_file, save_file

import specjax as sj
from specjax import build
from specjax.config import get_config, resolved, validate
from specjax.config import merge as merge_config
from specjax.errors import UserError
from specjax.hf.load import load
from specjax.lora.peft_config import read_config
from specjax.lora.targets import match
from specjax.lora.variants import LoRA
from specjax.models.layers import beside
from specjax.models.stack import Call
from specjax.train.step import merge, split

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own

PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TOKENS = prompts(length=200)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, the transformers model in it); o_proj is not square and keys have fewer heads."""
    reference = torch_model(head_dim=24)
    path = tmp_path_factory.mktemp("base") / "model"
    reference.save_pretrained(path)
    return path, reference


def ours(base, **options):
    return load(base[0], **{"dtype": "float32"} | options)[0]


def shake(of, seed=0):
    """Factors as after some training: B is no longer zero."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.to_flat_state(nnx.state(of, nnx.LoRAParam)):
        leaf[...] = leaf[...] + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32)


def logits(of):
    return np.asarray(of(TOKENS))


def worn(base, seed=0, **options):
    """A model that wears a trained adapter."""
    made = ours(base)
    sj.lora.inject(made, **{"rank": 4, "alpha": 12} | options)
    shake(made, seed)
    return made


@pytest.mark.rule(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_no_bit_of_the_logits(base, dtype):
    made = ours(base, dtype=dtype)
    plain, before = logits(made), weights(made)
    sj.lora.inject(made, rank=4, dropout=0.5, targets=[*PROJECTIONS, "lm_head"])
    np.testing.assert_array_equal(logits(made), plain)
    assert_same_bits(weights(made, BASE), before)


def test_factors_start_as_pefts_do(base):
    made = ours(base)
    sj.lora.inject(made, rank=16, seed=3)
    inputs = {"o_proj": 8 * 24, "down_proj": 112}
    seen = set()
    for name, value in weights(made, sj.LORA).items():
        assert value.dtype == np.float32
        if name.endswith(".b"):
            assert not value.any()
            continue
        bound = 1 / math.sqrt(inputs.get(name.split(".")[3], 64))
        assert 0.95 * bound < np.abs(value).max() <= bound, name
        assert abs(value.std() - bound / math.sqrt(3)) < 0.05 * bound, name
        assert np.abs(value.mean()) < 0.1 * bound
        value = value[:, 0]  # the axis of adapters
        seen |= {layer.tobytes()[:64] for layer in value}
        # What a seed means: JAX's numbers for the map's name (without the first segment's number) and shape, rank last.
        hashed = name.removesuffix(".updates.lora.a").replace("layers.0.", "layers.")
        key = jax.random.fold_in(jax.random.key(3), zlib.crc32(hashed.encode()))
        drawn = jax.random.uniform(key, (2, *value.shape[2:], 16), jnp.float32, -bound, bound)
        np.testing.assert_allclose(np.moveaxis(drawn, -1, 1), value, rtol=1e-6)
    assert len(seen) == 7 * 2  # no two maps, no two layers start alike
    again, other = ours(base), ours(base)
    sj.lora.inject(again, rank=16, seed=3)
    sj.lora.inject(other, rank=16, seed=4)
    assert_same_bits(weights(again, sj.LORA), weights(made, sj.LORA))
    assert not np.array_equal(*(weights(m, sj.LORA)["layers.0.mlp.up_proj.updates.lora.a"] for m in (made, other)))


@pytest.mark.rule(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": ["q_proj", "v_proj"], "alpha": 5},
        {"rslora": True, "alpha": 8},
        {"targets": r".*\.(o_proj|down_proj)", "rank": 3},
        {"targets": ["self_attn.k_proj", "lm_head"]},
    ],
    ids=str,
)
def test_the_adapter_we_write_has_the_same_logits_in_peft(base, tmp_path, options):
    import peft

    made = worn(base, **options)
    sj.lora.save(made, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base[1]), tmp_path / "adapter")
    found, wanted = logits(made), torch_logits(theirs, TOKENS)
    print(f"differs by {np.abs(found - wanted).max():.1e}")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.abs(found - torch_logits(base[1], TOKENS)).max() > 0.05
    trained = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "") for name in trained} == set(load_file(tmp_path / "adapter" / _MODEL))


_MODEL, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_the_adapters_config_says_what_it_is(base, tmp_path):
    sj.lora.save(worn(base, dropout=0.25, rslora=True, alpha=7), tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / _CONFIG).read_text())
    assert told["target_modules"] == PROJECTIONS
    assert told["base_model_name_or_path"] == str(base[0])
    assert (told["r"], told["lora_alpha"], told["lora_dropout"], told["use_rslora"]) == (4, 7, 0.25, True)
    assert (told["peft_type"], told["task_type"], told["bias"]) == ("LORA", "CAUSAL_LM", "none")
    sj.lora.save(worn(base, targets=".*self_attn.*", alpha=None), tmp_path / "other", base="org/name")
    told = json.loads((tmp_path / "other" / _CONFIG).read_text())
    assert told["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (told["base_model_name_or_path"], told["lora_alpha"]) == ("org/name", 8)


PEFT = {
    "list": {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 6},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(k_proj|o_proj|down_proj)", "lora_alpha": 16},
    "rslora": {"target_modules": ["v_proj", "o_proj"], "use_rslora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """name -> (folder that peft wrote, its logits), B random."""
    made = {}

    def get(name):
        import peft
        import torch

        if name not in made:
            torch.manual_seed(len(name))
            config = peft.LoraConfig(r=5, init_lora_weights=False, task_type="CAUSAL_LM", **PEFT[name])
            theirs = peft.get_peft_model(copy.deepcopy(base[1]), config)
            path = tmp_path_factory.mktemp("adapter") / name
            theirs.save_pretrained(path, save_embedding_layers=False)
            made[name] = path, torch_logits(theirs, TOKENS)
        return made[name]

    return get


@pytest.mark.rule(3)
@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_that_peft_wrote_has_the_same_logits_here(base, adapter, name):
    path, wanted = adapter(name)
    made = ours(base)
    sj.lora.load(made, path)
    found = logits(made)
    print(f"differs by {np.abs(found - wanted).max():.1e}")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.abs(found - torch_logits(base[1], TOKENS)).max() > 0.05


def test_an_adapter_survives_load_and_save(base, adapter, tmp_path):
    path, _ = adapter("rslora")
    made = ours(base)
    sj.lora.load(made, path, name="mine")
    sj.lora.save(made, tmp_path / "again", name="mine")
    assert_same_bits(load_file(tmp_path / "again" / _MODEL), load_file(path / _MODEL))
    old, new = (json.loads((p / _CONFIG).read_text()) for p in (path, tmp_path / "again"))
    assert sorted(old.pop("target_modules")) == new.pop("target_modules")
    assert {key: new[key] for key in ("r", "lora_alpha", "use_rslora")} == {
        key: old[key] for key in ("r", "lora_alpha", "use_rslora")
    }


@pytest.mark.rule(3)
def test_a_merged_model_has_the_adapters_logits_in_transformers(base, tmp_path):
    import transformers

    made = worn(base)
    wanted = logits(made)
    with pytest.raises(UserError, match="merge them before export"):
        sj.export(made, None, tmp_path / "merged")
    sj.lora.merge(made)
    assert sj.lora.names(made) == []
    np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=1e-4)
    sj.export(made, None, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(theirs, TOKENS), wanted, rtol=0, atol=1e-4)


def test_merging_into_a_bfloat16_base_rounds_once(base):
    made = ours(base, dtype="bfloat16")
    sj.lora.inject(made, rank=4, alpha=12)
    shake(made)
    before, factors = weights(made, BASE), weights(made, sj.LORA)
    sj.lora.merge(made)
    after = weights(made)
    for name, value in before.items():
        path = name.removesuffix(".kernel")
        if f"{path}.updates.lora.a" not in factors:
            assert after[name].tobytes() == value.tobytes()
            continue
        a, b = (factors[f"{path}.updates.lora.{letter}"][:, 0].astype(np.float64) for letter in "ab")
        exact = value.astype(np.float64) + 3.0 * np.stack([np.tensordot(y, x, 1) for x, y in zip(a, b, strict=True)])
        assert after[name].dtype == jnp.bfloat16
        # Half a unit in the last place of bfloat16 is at most 2^-8 of the value; nothing is lost before that.
        assert np.all(np.abs(after[name].astype(np.float64) - exact) <= np.abs(exact) * 2.0**-8 * 1.001 + 1e-7), name


def test_several_adapters_are_worn_side_by_side_and_switched(base, adapter):
    plain = logits(ours(base))
    made = ours(base)
    sj.lora.load(made, adapter("list")[0], name="hr")
    sj.lora.load(made, adapter("regex")[0], name="law")
    assert sorted(sj.lora.names(made)) == ["hr", "law"]
    np.testing.assert_allclose(logits(made), adapter("regex")[1], rtol=0, atol=1e-4)
    sj.lora.use(made, "hr")
    np.testing.assert_allclose(logits(made), adapter("list")[1], rtol=0, atol=1e-4)
    sj.lora.use(made, None)
    np.testing.assert_array_equal(logits(made), plain)
    sj.lora.use(made, "law")
    sj.lora.unload(made, "hr")
    np.testing.assert_allclose(logits(made), adapter("regex")[1], rtol=0, atol=1e-4)
    sj.lora.unload(made, "law")
    np.testing.assert_array_equal(logits(made), plain)


def test_an_adapters_name_must_be_there_or_be_free(base):
    made = worn(base, rank=2, targets=["q_proj"], name="hr")
    for wrong in (
        lambda: sj.lora.use(made, "hrr"),
        lambda: sj.lora.unload(made, "hrr"),
        lambda: sj.lora.merge(made, "hrr"),
    ):
        with pytest.raises(UserError, match="no adapter 'hrr' is loaded; loaded are: hr. Did you mean 'hr'?"):
            wrong()
    with pytest.raises(UserError, match="already has an adapter 'hr'"):
        sj.lora.inject(made, rank=2, name="hr")
    sj.lora.use(made, None)
    with pytest.raises(UserError, match="no adapter is in use: nothing to merge"):
        sj.lora.merge(made)
    with pytest.raises(UserError, match="no adapter is in use: nothing to save"):
        sj.lora.save(made, "nowhere")


def test_targets_name_linear_maps_as_pefts_do():
    made = model()
    everything = match(made, "all-linear")
    assert sorted(path[-1] for path in everything) == PROJECTIONS  # and not lm_head
    assert all(found == (True, True) for found in everything.values())
    assert match(made, ["q_proj"]) == match(made, ["self_attn.q_proj"]) == match(made, r".*\.q_proj")
    assert match(made, ["lm_head"]) == match(made, "lm_head") == {("lm_head",): (True,)}
    assert set(match(made, ["up_proj", "k_proj"])) == {
        ("layers", 0, "mlp", "up_proj"),
        ("layers", 0, "self_attn", "k_proj"),
    }
    assert match(made, r"model\.layers\.[01]\.mlp\.up_proj") == {("layers", 0, "mlp", "up_proj"): (True, True)}
    first = {("layers", 0, "self_attn", "q_proj"): (True, False)}
    assert match(made, r"model\.layers\.0\..*q_proj") == match(made, ["q_proj"], layers=0) == first
    assert match(made, ["layers.0.self_attn.q_proj"]) == first
    assert ("layers", 0, "mlp", "up_proj") not in match(made, "all-linear", exclude=["mlp.up_proj"])


@pytest.mark.rule(5)
@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_porj"], r"targets 'q_porj' matches no linear map; there are down_proj.*v_proj.*Did you mean 'q_proj'"),
        (["q_proj", "proj"], "targets 'proj' matches no linear map"),
        ("q_proj", "match no linear map; there are .*'all-linear', or a regular expression that matches a full name"),
        ([], "match no linear map"),
        ("(", "is not a regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets, said):
    made = model()
    with pytest.raises(UserError, match=said):
        sj.lora.inject(made, rank=2, targets=targets)
    assert sj.lora.names(made) == []


def test_a_rank_below_one_is_refused():
    with pytest.raises(UserError, match="rank is 0: it must be at least 1"):
        sj.lora.inject(model(), rank=0)


def edit(path, **changes):
    config = json.loads((path / _CONFIG).read_text())
    (path / _CONFIG).write_text(json.dumps(config | changes))


def change(path, do):
    held = load_file(path / _MODEL)
    do(held)
    save_file(held, path / _MODEL)


def rename(held, old, new):
    for name in [name for name in held if old in name]:
        held[name.replace(old, new)] = held.pop(name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: edit(p, peft_type="LOHA"), "peft_type 'LOHA' is not supported"),
        (lambda p: edit(p, use_dora=True), "lora_magnitude_vector is missing, though adapter_config.json targets"),
        (lambda p: edit(p, bias=1), "bias must be 'none', 'all' or 'lora_only', not 1"),
        (lambda p: edit(p, modules_to_save=["lm_head"]), "tensor base_model.model.lm_head.weight is missing"),
        (lambda p: edit(p, rank_pattern={"q_proj": 2}), "is [5, 64] where [2, 64] is needed"),
        (lambda p: edit(p, rank_pattern={"q_proj": 0}), "rank_pattern must be patterns with whole numbers of at least"),
        (lambda p: edit(p, alpha_pattern={"q_proj": 0}), "alpha_pattern must be patterns with numbers other than 0"),
        (lambda p: edit(p, layers_to_transform=[0]), "tensors fit no linear map of the model that adapter_config.json"),
        (lambda p: edit(p, exclude_modules=["up_proj"]), "tensors fit no linear map of the model that adapter_config"),
        (lambda p: edit(p, target_modules=["q_proj", "v_proj", "up_proj"]), "v_proj.lora_A.weight is missing"),
        (lambda p: edit(p, target_modules=["c_attn"]), "target_modules ['c_attn'] match no linear map"),
        (lambda p: edit(p, target_modules=None), "target_modules must be a list of names or a pattern, not None"),
        (
            lambda p: edit(p, target_parameters=["experts.gate_up_proj"]),
            "target_parameters 'experts.gate_up_proj' names",
        ),
        (
            lambda p: edit(p, use_dorra=True),
            "'use_dorra' is no key of PEFT's LoRA that is known here. Did you",
        ),
        (lambda p: edit(p, fan_in_fan_out=0), "fan_in_fan_out = 0 is not supported"),
        (lambda p: edit(p, layer_replication=[[0, 2]]), "layer_replication"),
        (lambda p: edit(p, fan_in_fan_out=True), "fan_in_fan_out"),
        (lambda p: edit(p, lora_bias=True), "lora_bias"),
        (lambda p: edit(p, trainable_token_indices=[1]), "token_adapter.trainable_tokens_delta is missing, though"),
        (lambda p: edit(p, trainable_token_indices="1"), "trainable_token_indices must be a list of ids or"),
        (lambda p: edit(p, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (lambda p: edit(p, kasa_config={}), "kasa_config"),
        (lambda p: edit(p, init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4' is not supported"),
        (lambda p: edit(p, r=0), "r must be a whole number"),
        (lambda p: edit(p, r=4), "is [5, 64] where [4, 64] is needed"),
        (lambda p: (p / _CONFIG).write_text("{"), "is not JSON"),
        (lambda p: (p / _CONFIG).unlink(), f"it has no {_CONFIG}"),
        (lambda p: (p / _MODEL).unlink(), f"it has no {_MODEL}"),
        (
            lambda p: [(p / "hr").mkdir(), (p / _CONFIG).rename(p / "hr" / _CONFIG)],
            f"it has no {_CONFIG}; give one of its folders hr.",
        ),
        (lambda p: (p / _MODEL).write_bytes((p / _MODEL).read_bytes()[:500]), "corrupt or cut short"),
        (lambda p: change(p, dict.clear), "is empty"),
        (lambda p: change(p, lambda held: held.popitem()), "is missing, though adapter_config.json targets its module"),
        (lambda p: change(p, lambda h: rename(h, "layers.1.", "layers.7.")), "tensors fit no linear map of the model"),
        (
            lambda p: change(p, lambda h: rename(h, "lora_A", "lora_magnitude")),
            "tensors fit no linear map of the model",
        ),
        (lambda p: change(p, lambda h: rename(h, "base_model.model.", "")), "tensors fit no linear map of the model"),
    ],
)
def test_an_adapter_folder_that_does_not_fit_is_one_sentence(adapter, tmp_path, damage, said):
    import shutil

    path = shutil.copytree(adapter("list")[0], tmp_path / "adapter")
    damage(path)
    made = model(vocab_size=517, hidden_size=64, intermediate_size=112, num_attention_heads=8, head_dim=24)
    before = weights(made)
    with pytest.raises(UserError) as refused:
        sj.lora.load(made, path)
    assert said in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert sj.lora.names(made) == []
    assert_same_bits(weights(made), before)


def test_a_key_of_a_later_peft_that_asks_for_nothing_is_passed_over_with_a_warning(base, adapter, tmp_path):
    import shutil

    import peft

    path = shutil.copytree(adapter("list")[0], tmp_path / "adapter")
    edit(path, zeta_config=None, use_zeta=False, zeta_layers=[], zeta_map={}, zeta_name="")
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*zeta_config"):
        peft.PeftConfig.from_pretrained(path)
    with pytest.warns(UserWarning, match="passed over.* zeta_config = None, use_zeta = False, zeta_layers = ") as told:
        found = read_config(path)
    assert len(told) == 1 and found == read_config(adapter("list")[0])


def test_pickled_weights_come_with_the_command_that_converts_them(adapter, tmp_path):
    import shutil

    import torch

    path = shutil.copytree(adapter("list")[0], tmp_path / "adapter")
    wanted = load_file(path / _MODEL)
    torch.save({key: torch.tensor(value) for key, value in wanted.items()}, path / "adapter_model.bin")
    (path / _MODEL).unlink()
    with pytest.raises(UserError, match=r"only pickled weights \(adapter_model\.bin\)") as refused:
        sj.lora.load(model(), path)
    (command,) = re.findall("`(python .*)`", str(refused.value))
    exec(shlex.split(command)[2], {})
    assert_same_bits(load_file(path / _MODEL), wanted)


def starting(base, path, **keys):
    config = get_config()
    config.trainable, config.model.path, config.data.train = "lora", str(base[0]), "x.jsonl"
    config.model.dtype, config.lora.init_from = "float32", str(path)
    for key, value in keys.items():
        config.lora[key] = value
    validate(config)
    assert merge_config(get_config(), resolved(config)).lora == config.lora  # as a run's config.json is read back
    return config


def test_a_run_starts_from_an_adapter_and_takes_its_settings(base, adapter):
    path, wanted = adapter("list")
    made = build.model_of(starting(base, path), base[0], None)
    np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=1e-4)
    loaded = ours(base)
    sj.lora.load(loaded, path)
    assert_same_bits(weights(made, sj.LORA), weights(loaded, sj.LORA))  # which train as PEFT's, see test_peft_variants
    assert made.origin.fingerprint.startswith(f"{loaded.origin.fingerprint}+")
    agreeing = {"rank": 5, "alpha": 6.0, "targets": PEFT["list"]["target_modules"], "bias": "none", "dropout": 0.0}
    shapes = build.model_of(starting(base, path, **agreeing), base[0], None, abstract=True)
    leaves = nnx.to_flat_state(nnx.state(shapes, nnx.LoRAParam))
    assert {leaf.shape for _, leaf in leaves} == {value.shape for value in weights(loaded, sj.LORA).values()}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 4),
        ("alpha", 10.0),
        ("dropout", 0.1),
        ("rslora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("targets", "all-linear"),
        ("exclude_modules", ["q_proj"]),
        ("layers_to_transform", [0]),
        ("modules_to_save", ["lm_head"]),
    ],
)
def test_a_setting_that_contradicts_the_adapter_to_start_from_is_refused(base, adapter, key, value):
    config = starting(base, adapter("list")[0], **{key: value})
    with pytest.raises(UserError, match=rf"config\.lora\.{key} is .*, but the adapter in .* has .*: leave it out"):
        build.model_of(config, base[0], None)


def test_an_adapter_of_another_model_is_refused(adapter):
    with pytest.raises(UserError, match="is .* where .* is needed|fit no linear map"):
        sj.lora.load(model(), adapter("list")[0])


def test_saving_over_a_folder_with_files_is_refused(base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        sj.lora.save(worn(base), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_dropout_drops_inputs_of_a_and_scales_the_rest():
    eye = jnp.eye(64)
    factors = {"a": eye, "b": eye}
    x = jnp.ones((4, 50, 64))
    out = np.asarray(LoRA().apply(factors, 1.0, 0.25, Call(x, key=jax.random.key(0))))
    dropped = out == 0
    np.testing.assert_allclose(out[~dropped], 1 / 0.75, rtol=1e-6)
    assert abs(dropped.mean() - 0.25) < 0.02
    np.testing.assert_array_equal(np.asarray(LoRA().apply(factors, 1.0, 0.25, Call(x))), x)


def test_dropout_acts_in_training_alone():
    batch = data(batch_size=2).batch(0)
    found = {}
    for dropout in (0.0, 0.9):
        made = model()
        sj.lora.inject(made, rank=4, dropout=dropout, seed=1)
        shake(made)
        nll = jax.jit(lambda key, made=made: token_sums(made, batch, key)["nll"])
        found[dropout] = [float(nll(key)) for key in (None, jax.random.key(0), jax.random.key(1))]
    np.testing.assert_allclose(found[0.0], found[0.9][0], rtol=1e-6)
    assert len(set(found[0.9])) == 3


@pytest.mark.parametrize(
    ("targets", "products"),
    [("all-linear", 4), (["q_proj", "v_proj", "up_proj"], 2), (["q_proj", "o_proj"], 2)],
    ids=["five maps that share two inputs, and two", "two that share one, and one", "none that share"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_factors_of_maps_that_share_an_input_are_multiplied_together(targets, products, dropout):
    made = model(hidden_size=48)
    ranks = {"k_proj": 2, "up_proj": 5} if targets == "all-linear" else {}
    sj.lora.inject(made, rank=3, targets=targets, dropout=dropout, rank_pattern=ranks, seed=1)
    shake(made)
    layer = nnx.merge(*jax.tree.map(lambda x: x[0] if isinstance(x, jax.Array) else x, nnx.split(made.layers[0])))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 48)), jnp.float32)
    for maps in (
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.mlp.gate_proj, layer.mlp.up_proj),
    ):
        for key in (None, jax.random.key(0)):
            keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
            found = beside(x, maps, keys)
            wanted = [each(x, key) for each, key in zip(maps, keys, strict=False)]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, wanted)
    graph, params, frozen = split(made, sj.LORA)
    batch = data(batch_size=2).batch(0)
    run = lambda p: token_sums(merge(graph, p, frozen), batch)["nll"]  # noqa: E731
    text = str(jax.make_jaxpr(run)(params))
    narrow = [shape for shape in re.findall(r"f32\[\d+,(\d+)\] = dot_general", text) if int(shape) < 16]
    assert len(narrow) == products, narrow


def test_factors_lie_on_the_mesh_of_their_map_and_give_the_same_logits(base, adapter):
    path, wanted = adapter("all-linear")
    made = load(base[0], mesh=sj.make_mesh(fsdp=8, tensor=1), dtype="float32")[0]
    sj.lora.load(made, path)
    for _, leaf in nnx.to_flat_state(nnx.state(made, nnx.LoRAParam)):
        assert leaf[...].sharding.mesh.size == 8 and leaf[...].is_fully_replicated
    np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=1e-4)
    sj.lora.merge(made)
    assert tuple(made.layers[0].mlp.up_proj.kernel[...].sharding.spec) == (None, "tensor", "fsdp")
    np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_in_mlx_lms_form_is_the_same_as_in_pefts(base, tmp_path, dora):
    made = worn(base, targets=["q_proj", "o_proj", "down_proj"], layers_to_transform=[1], dora=dora)
    sj.lora.save(made, tmp_path / "peft")
    theirs, last = (
        tmp_path / "mlx",
        {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"},
    )
    theirs.mkdir()
    tensors = {}
    for key, value in load_file(tmp_path / "peft" / "adapter_model.safetensors").items():
        module, end = next((key.removesuffix(f".{end}"), end) for end in last if key.endswith(end))
        tensors[f"{module.removeprefix('base_model.model.')}.{last[end]}"] = np.ascontiguousarray(value.T)
    save_file(tensors, theirs / "adapters.safetensors")

    def settings(**changes):
        told = {
            "fine_tune_type": "dora" if dora else "lora",
            "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.0},
        }
        (theirs / "adapter_config.json").write_text(json.dumps(told | changes))

    settings()
    again = ours(base)
    sj.lora.load(again, theirs)
    np.testing.assert_array_equal(logits(again), logits(made))
    for changes, said in (
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full': an adapter of mlx-lm is read where it is lora or dora"),
        ({"lora_parameters": {"rank": 4, "dropout": 0.0}}, "lora_parameters.scale must be a number other than 0"),
        ({"lora_parameters": {"rank": 5, "scale": 3.0, "dropout": 0.0}}, r"lora_a is \[\d+, 4\], not \[\d+, 5\]"),
    ):
        settings(**changes)
        with pytest.raises(UserError, match=said):
            sj.lora.load(ours(base), theirs)
    settings()
    save_file({"model.embed_tokens.lora_a": np.ones((2, 4), "f4")}, theirs / "adapters.safetensors")
    with pytest.raises(UserError, match="tensor model.embed_tokens.lora_a is of no linear map of this model"):
        sj.lora.load(ours(base), theirs)
