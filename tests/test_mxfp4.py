"""gpt-oss' experts in MXFP4 are read as transformers reads them, whole and by slices."""

import json

import numpy as np
import pytest
from helpers import contents, prompts, torch_logits, torch_model
from safetensors.numpy import load_file, save_file

import specjax as sj
from specjax.errors import UserError
from specjax.hf.load import load

CHANGES = {"vocab_size": 520, "intermediate_size": 96, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A gpt-oss whose files hold its experts as the published ones do."""
    import torch

    folder = tmp_path_factory.mktemp("packed")
    torch_model("gpt_oss", dtype=torch.bfloat16, **CHANGES).save_pretrained(folder)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (count, outputs, inputs // 32, 16), np.uint8)
        tensors[f"{name}_scales"] = rng.integers(121, 126, (count, outputs, inputs // 32), np.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    told |= {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_the_floats_are_those_of_transformers_and_are_exported(packed, tmp_path):
    import torch
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    ours, _ = load(packed, dtype="float32")
    sj.export(ours, None, tmp_path / "out")
    held, floats = contents(packed), contents(tmp_path / "out")
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{name}"
        pair = (torch.from_numpy(held.pop(name + end)) for end in ("_blocks", "_scales"))
        wanted = convert_moe_packed_tensors(*pair, dtype=torch.float32).numpy()
        assert np.array_equal(floats.pop(name).astype(np.float32), wanted)
    assert floats.keys() == held.keys()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = prompts(520, rows=1, length=40)
    np.testing.assert_allclose(np.asarray(ours(tokens)), torch_logits(theirs, tokens), rtol=0, atol=1e-4)


def test_a_mesh_reads_the_slices(packed):
    alone, spread = load(packed)[0], load(packed, mesh=sj.make_mesh(fsdp=2, tensor=2, expert=2))[0]
    for name in ("gate_up_proj", "down_proj"):
        kernels = (np.asarray(getattr(of.layers[0].mlp.experts, name).kernel[...]) for of in (alone, spread))
        assert np.array_equal(*kernels)


def test_half_of_a_tensor_and_other_blocks_are_one_sentence(packed, tmp_path):
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    tensors = load_file(packed / "model.safetensors")
    scales = tensors.pop("model.layers.0.mlp.experts.down_proj_scales")
    for more, said in (({}, "one is missing"), ({"down_proj_scales": scales[:, 1:]}, "not MXFP4")):
        save_file(
            tensors | {f"model.layers.0.mlp.experts.{k}": v.copy() for k, v in more.items()},
            tmp_path / "model.safetensors",
        )
        with pytest.raises(UserError, match=said):
            load(tmp_path)
    with pytest.raises(UserError, match="quantise"):
        load(packed, quantise="int8")
