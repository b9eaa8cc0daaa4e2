"""Several adapters made into one are PEFT's `add_weighted_adapter`, and what a person gets wrong is a sentence."""

import importlib
import json

import numpy as np
import pytest
from helpers import model, torch_model
from safetensors.numpy import load_file

import specjax as sj
from specjax import cli
from specjax.errors import UserError
from specjax.files import mark
from specjax.hf.load import load

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to create a zero-d tensor:UserWarning"),
]
ways = importlib.import_module("specjax.lora.combine")  # its function has the same name in the package
WEIGHTS = {"hr": 0.7, "tax": -0.4, "law": 1.2}


def shaken(of, name, **settings):
    """An adapter whose factors are random, on a model of ours."""
    sj.lora.inject(of, name=name, **{"rank": 4, "seed": len(name)} | settings)
    adapter = sj.lora.adapters.on_host(sj.lora.adapters.collect(of, name))
    rng = np.random.default_rng(sum(name.encode()))
    for factors in adapter.factors.values():
        factors.values = {key: rng.normal(0, 0.3, value.shape).astype("f4") for key, value in factors.values.items()}
    sj.lora.unload(of, name)
    sj.lora.adapters.attach(of, name, adapter)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a base of transformers, `hr`, `tax` and `law` of rank 4, and `wide` of rank 6."""
    folder = tmp_path_factory.mktemp("combine")
    torch_model(hidden_size=32, intermediate_size=40, num_attention_heads=4, vocab_size=100).save_pretrained(
        folder / "base"
    )
    ours, _ = load(folder / "base", dtype="float32")
    shaken(ours, "hr", targets=["q_proj", "o_proj"])
    shaken(ours, "tax", targets=["q_proj", "up_proj"], alpha=3)
    shaken(ours, "law", targets=["q_proj", "o_proj", "up_proj"], layers_to_transform=[1])
    shaken(ours, "wide", rank=6, targets=["q_proj"], rslora=True)
    for name in sj.lora.names(ours):
        sj.lora.save(ours, folder / name, name=name)
    return folder


@pytest.fixture
def ours(base):
    made, _ = load(base / "base", dtype="float32")
    for name in (*WEIGHTS, "wide"):
        sj.lora.load(made, base / name, name=name)
    return made


@pytest.fixture(scope="module")
def theirs(base):
    """PEFT's model with the three."""
    import peft
    import transformers

    made = transformers.AutoModelForCausalLM.from_pretrained(base / "base")
    made = peft.PeftModel.from_pretrained(made, base / "hr", adapter_name="hr")
    for name in ("tax", "law"):
        made.load_adapter(base / name, adapter_name=name)
    return made


def updates(folder):
    """module -> its update of the weights, as PEFT reads the files in a folder."""
    from peft.utils.other import get_pattern_key

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not config["use_rslora"] or folder.name == "wide"
    found = {}
    for key in (key for key in tensors if key.endswith("lora_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, alpha = (
            config[pattern].get(get_pattern_key(config[pattern], module), config[usual])
            for pattern, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert a.shape[0] == b.shape[1] == rank
        found[module] = alpha / rank * b @ a
    return found


def by_place(values, density):
    """Numbers kept by their place alone, as both sides can."""
    flat = np.arange(np.prod(values.shape)) * 2654435761 % 997 / 997 < density
    return flat.reshape(values.shape) / density


SIGNS = [(how, sign) for how in ways.HOW for sign in ("total", "frequency") if sign == "total" or "ties" in how]


@pytest.mark.parametrize(("how", "sign"), SIGNS)
def test_an_adapter_made_of_several_is_pefts(theirs, ours, tmp_path, monkeypatch, how, sign):
    import torch
    from peft.utils import merge_utils

    monkeypatch.setattr(ways, "_drawn", lambda values, density, _: (values * by_place(values, density)).astype("f4"))
    places = lambda tensor, density, rescale: tensor * torch.tensor(by_place(tensor, density), dtype=torch.float32)  # noqa: E731
    monkeypatch.setattr(merge_utils, "random_pruning", places)
    density = None if how in ("cat", "svd", "linear") else 0.6
    sj.lora.combine(ours, WEIGHTS, how=how, density=density, majority_sign=sign)
    assert sj.lora.names(ours) == [*WEIGHTS, "wide", "combined"]
    sj.lora.save(ours, tmp_path / "ours")
    found = updates(tmp_path / "ours")
    name = f"{how}_{sign}"
    theirs.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], name, how, density=density, majority_sign_method=sign)
    wanted = {
        path: module.get_delta_weight(name).detach().numpy()
        for path, module in theirs.base_model.model.named_modules()
        if name in getattr(module, "lora_A", {})
    }
    assert found.keys() == wanted.keys() and len(found) == 6
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=path)


def test_the_scale_of_each_is_its_own_and_a_cut_sum_is_the_nearest_one(ours, tmp_path):
    for how, rank in (("cat", None), ("svd", 10), ("svd", 3)):
        sj.lora.combine(ours, {"wide": 0.5, "hr": 2.0}, how=how, rank=rank, name=f"{how}{rank}")
        sj.lora.save(ours, tmp_path / f"{how}{rank}")
    sj.lora.save(ours, tmp_path / "wide", name="wide")
    whole, same, cut = (updates(tmp_path / name) for name in ("catNone", "svd10", "svd3"))
    name = "model.layers.0.self_attn.q_proj"
    wide = load_file(tmp_path / "wide" / "adapter_model.safetensors")
    a, b = (wide[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert np.linalg.matrix_rank(whole[name], tol=1e-4) == 10 and np.linalg.matrix_rank(cut[name], tol=1e-4) == 3
    np.testing.assert_allclose(same[name], whole[name], atol=1e-5)
    values = np.linalg.svd(whole[name], compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(whole[name] - cut[name]), np.linalg.norm(values[3:]), rtol=1e-4)
    assert np.abs(whole["model.layers.0.self_attn.o_proj"]).max() > 0.1  # which hr alone has
    rest = {path: value for path, value in whole.items() if "q_proj" in path}
    sj.lora.combine(ours, {"hr": 2.0}, how="cat", name="hr alone")
    sj.lora.save(ours, tmp_path / "alone")
    for path, value in updates(tmp_path / "alone").items():
        if path == name:
            np.testing.assert_allclose(rest[path] - value, 0.5 * 12 / 6**0.5 * b @ a, atol=1e-5)


def test_what_is_drawn_is_a_share_of_the_numbers_and_keeps_their_mean():
    ones = np.ones((300, 300), np.float32)
    first, again, other = (ways._drawn(ones, 0.4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert set(np.unique(first)) == {0, np.float32(2.5)} and abs(first.mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        ({"hr": 1, "taxes": 1}, {}, "no adapter 'taxes' is loaded"),
        ({"hr": 1, "wide": 1}, {"how": "linear"}, "the adapters' ranks differ (4, 6)"),
        ({"hr": 1}, {"how": "tie"}, "how is 'tie'"),
        ({"hr": float("nan")}, {}, "the weight of adapter 'hr' is nan"),
        ({"hr": 1}, {"how": "ties"}, "ties needs density"),
        ({"hr": 1}, {"how": "ties", "density": 1.5}, "density is 1.5"),
        ({"hr": 1}, {"how": "cat", "density": 0.5}, "density is of ties"),
        ({"hr": 1}, {"how": "linear", "rank": 2}, "rank is of svd"),
        ({"hr": 1}, {"name": "tax"}, "already has an adapter 'tax'"),
        ({"hr": 1}, {"how": "ties", "density": 0.5, "majority_sign": "most"}, "majority_sign is 'most'"),
        ({"saves": 1, "hr": 1}, {}, "adapter 'saves' has copies of whole modules"),
        ({"dora": 1, "hr": 1}, {}, "adapter 'dora' has factors of another kind (dora)"),
        ({}, {}, "no adapter is named"),
    ],
)
def test_what_cannot_be_combined_is_a_sentence(weights, options, said):
    made = model()
    for name, settings in {
        "hr": {"rank": 4},
        "tax": {"rank": 4},
        "wide": {"rank": 6},
        "saves": {"rank": 4, "modules_to_save": ["lm_head"]},
        "dora": {"rank": 4, "dora": True},
    }.items():
        sj.lora.inject(made, name=name, targets=["q_proj"], **settings)
    with pytest.raises(UserError) as refused:
        sj.lora.combine(made, weights, **options)
    assert said in str(refused.value)


def test_the_command_writes_what_the_library_makes(base, ours, tmp_path, capsys):
    argv = ["combine", f"--model={base / 'base'}", f"--adapter={base / 'hr'}", f"--adapter=l={base / 'law'}"]
    assert cli.main([*argv, "--weight=hr=0.5", "--weight=l=2", "--how=cat", f"--out={tmp_path / 'out'}"]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    mark(tmp_path / "run")
    assert cli.main([argv[0], f"--model={tmp_path / 'run'}", argv[2], "--weight=hr=1", f"--out={tmp_path / 'no'}"]) == 2
    assert "is the folder of a run: give the base" in capsys.readouterr().err
    sj.lora.combine(ours, {"hr": 0.5, "law": 2}, how="cat")
    sj.lora.save(ours, tmp_path / "same")
    found, wanted = (updates(tmp_path / name) for name in ("out", "same"))
    assert found.keys() == wanted.keys()
    assert all((found[name] == wanted[name]).all() for name in wanted)
    for more, said in {
        ("--weight=hr=0.5",): "adapter l has no weight",
        ("--weight=hr=0.5", "--weight=x=1"): "--weight=x=1: give each adapter one weight",
        ("--weight=hr=a", "--weight=l=1"): "'a' is no number",
        ("--weight=hr=1", "--weight=l=1", "--how=ties"): "ties needs --density",
    }.items():
        assert cli.main([*argv, *more, f"--out={tmp_path / 'no'}"]) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1 and not (tmp_path / "no").exists()
