"""A language model inside a multimodal checkpoint: what is not its own is kept. Its numbers are in test_parity.py."""

import json

import ml_dtypes
import numpy as np
import pytest
from helpers import contents, torch_model
from safetensors.numpy import save_file

import specjax as sj
from specjax.errors import UserError
from specjax.hf.config import from_folder, origin
from specjax.hf.load import abstract, load
from specjax.hf.multimodal import wrapped

PROCESSOR = b'{"processor_class":  "PixtralProcessor"}\n'  # spaced as no program of ours would


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("multimodal")
    torch_model("mistral3").save_pretrained(made)
    (made / "processor_config.json").write_bytes(PROCESSOR)
    return made


def is_kept(name):
    return "vision_tower" in name or "projector" in name


def as_modules(name):
    """The name in a file that has transformers' own names for the modules."""
    return f"model.{name}" if is_kept(name) else wrapped(name.removeprefix("language_model."), "model.language_model.")


@pytest.mark.parametrize("named", ["as published", "as modules"])
def test_an_export_in_another_dtype_keeps_the_rest_byte_for_byte(folder, tmp_path, named):
    (tmp_path / "in").mkdir()
    tensors = contents(folder)
    if named == "as modules":
        tensors = {as_modules(name): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "processor_config.json"):
        (tmp_path / "in" / file).write_bytes((folder / file).read_bytes())
    sj.export(load(tmp_path / "in", dtype="float32")[0], None, tmp_path / "out", dtype="bfloat16", shard_bytes=30_000)
    found = contents(tmp_path / "out")
    assert found.keys() == tensors.keys() and any(map(is_kept, found))
    for name, value in tensors.items():
        wanted = value if is_kept(name) else value.astype(ml_dtypes.bfloat16)
        assert found[name].dtype == wanted.dtype and found[name].tobytes() == wanted.tobytes(), name
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == PROCESSOR


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_an_adapter_of_the_vision_tower_is_refused_and_ours_names_none_of_it(folder, tmp_path):
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(torch_model("mistral3"), config).save_pretrained(tmp_path / "theirs")
    model = load(folder, dtype="float32")[0]
    with pytest.raises(UserError, match="of no part of the language model, the first .*multi_modal"):
        sj.lora.load(model, tmp_path / "theirs")
    sj.lora.inject(model, rank=2, modules_to_save=["lm_head"])
    sj.lora.save(model, tmp_path / "ours")
    told = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert told["modules_to_save"] == ["lm_head"]
    assert len(told["target_modules"]) == 14  # in two layers
    assert all(name.startswith("model.language_model.layers.") for name in told["target_modules"])


def test_a_language_model_alone_is_not_exported_as_the_whole(folder, tmp_path):
    model = abstract(from_folder(folder), dtype="float32", param_dtype="float32")
    model.origin = origin(folder)
    with pytest.raises(UserError, match="no file to take all but its language model from"):
        sj.export(model, None, tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({"vision_tower.x": np.zeros(2, np.float32)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match="there is no language model"):
        load(tmp_path / "in")
