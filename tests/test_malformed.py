"""Hundreds of malformed inputs, each answered by one sentence that says what is wrong (`tests/malformed.py`)."""

import json
import shutil
from pathlib import Path

import datasets
import malformed
import numpy as np
import pytest
from run_fixtures import ROOT, flags

from specjax import cli, lora
from specjax.config import validate
from specjax.config.source import load_config_file
from specjax.data.chat import resolve as template_of
from specjax.data.prepare import load as load_data
from specjax.data.read import read
from specjax.errors import UserError
from specjax.generation.sampling import Sampling
from specjax.hf import config as hf_config
from specjax.hf.folder import resolve, weight_files
from specjax.hf.load import abstract
from specjax.hf.tensors import Tensors
from specjax.hf.tokenizer import load_tokenizer

CASES = list(malformed.cases())
TEXTS = [{"text": "a cat"}, {"text": "a dog"}]
BASE = ROOT / "demo" / "base"  # read alone: what is spoilt is laid beside links to its files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The good inputs that are spoilt: folders of a model, of an adapter and of data, and what they load to."""
    home = tmp_path_factory.mktemp("good")
    sizes = hf_config.from_folder(BASE)
    shapes = {"A": (4, sizes.embed_dim), "B": (sizes.embed_dim, 4)}
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    held = {name.format(i, letter): np.zeros(shapes[letter], "f4") for i in range(sizes.num_layers) for letter in "AB"}
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    files = {"adapter_config.json": told, "adapter_model.safetensors": malformed.tensors(**held)}
    malformed.lay(home / "nothing", home / "adapter", files)
    given = cli.read_config(str(ROOT / "configs" / "lora.py"), flags(BASE, home / "out")[2:])
    malformed.lay(home / "nothing", home / "run", {"config.json": given.to_dict()})
    datasets.Dataset.from_list(TEXTS).save_to_disk(home / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(TEXTS)}).save_to_disk(home / "dict")
    model = abstract(sizes, dtype="float32", param_dtype="float32")
    lora.peft.read(model, home / "adapter")  # what is spoilt is good before
    return {"base": BASE, "home": home, "tokenizer": load_tokenizer(BASE), "model": model}


def config(good, folder, spoilt, family="LlamaForCausalLM", **more):
    """A model's config.json, down to the shapes of its parameters."""
    if not isinstance(spoilt, bytes):
        hf = json.loads((good["base"] / "config.json").read_text())
        spoilt = hf | {"architectures": [family], "model_type": more.pop("model_type", "llama")} | more | spoilt
    malformed.lay(Path("/nowhere"), folder, {"config.json": spoilt})
    hf_config.origin(folder)
    abstract(hf_config.from_folder(folder), dtype="float32", param_dtype="float32")


def qwen(good, folder, spoilt):
    config(good, folder, spoilt, "Qwen3ForCausalLM", model_type="qwen3", use_sliding_window=True, max_window_layers=1)


def mixtral(good, folder, spoilt):
    config(good, folder, spoilt, "MixtralForCausalLM", model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)


def generation(good, folder, spoilt):
    spoilt = spoilt if isinstance(spoilt, bytes) else {"do_sample": True} | spoilt
    malformed.lay(good["base"], folder, {"generation_config.json": spoilt})
    Sampling.of(hf_config.origin(folder).generation_config)


def tokenizer(good, folder, spoilt, file="tokenizer_config.json"):
    template_of(load_tokenizer(malformed.spoil(good["base"], folder, file, spoilt)))


def tokenizer_json(good, folder, spoilt):
    tokenizer(good, folder, spoilt, "tokenizer.json")


def index(good, folder, spoilt):
    one = malformed.tensors(a=np.zeros(4, "f4"))
    content = spoilt if isinstance(spoilt, bytes) else json.dumps(spoilt).encode()
    files = {"model.safetensors": None, "model.safetensors.index.json": content}
    files |= {"copy-1.safetensors": one, "copy-2.safetensors": one}
    malformed.lay(good["base"], folder, files)
    (folder.parent / "x.safetensors").write_bytes(one)  # which no folder may name
    Tensors(weight_files(folder))


def header(good, folder, spoilt):
    malformed.lay(good["home"] / "none", folder, {"model.safetensors": spoilt, "config.json": {}})
    Tensors(weight_files(folder))


def adapter(good, folder, spoilt):
    malformed.spoil(good["home"] / "adapter", folder, "adapter_config.json", spoilt)
    lora.peft.read(good["model"], folder)


def run(good, folder, spoilt):
    malformed.spoil(good["home"] / "run", folder, "config.json", spoilt)
    validate(load_config_file(str(folder / "config.json")), 8)


def flag(good, folder, spoilt):
    ((key, value),) = spoilt.items()
    validate(
        cli.read_config(
            str(ROOT / "configs" / "lora.py"), [*flags(good["base"], folder)[2:], f"--config.{key}={value}"]
        ),
        8,
    )


def state(good, folder, spoilt):
    saved = good["home"] / "saved"
    if spoilt is None or isinstance(spoilt, bytes | list):
        malformed.lay(saved, folder, {"state.json": spoilt if spoilt is not None else b""})
    else:
        malformed.spoil(saved, folder, "state.json", spoilt)
    list(read(folder))


def dict_(good, folder, spoilt):
    shutil.copytree(good["home"] / "dict", folder)
    (folder / "dataset_dict.json").write_text(json.dumps(spoilt))
    list(read(folder))


def rows(good, folder, spoilt, first=malformed.GOOD):
    """A JSONL file whose second row is spoilt."""
    folder.mkdir()
    second = spoilt if isinstance(spoilt, str) else json.dumps(spoilt)
    (folder / "x.jsonl").write_bytes((json.dumps(first) + "\n" + second + "\n").encode("utf-8", "surrogatepass"))
    load_data(folder / "x.jsonl", good["tokenizer"], length=64, batch_size=1, cache=False)


def chats(good, folder, spoilt):
    rows(good, folder, spoilt, malformed.CHAT)


def file(good, folder, spoilt):
    raise AssertionError("it is told by its name")


def template(good, folder, spoilt):
    load_data([malformed.CHAT], good["tokenizer"], template=spoilt, length=64, batch_size=1, cache=False)


def model(good, folder, spoilt):
    resolve(spoilt)


def source(good, folder, spoilt):
    list(read(spoilt))


READERS = {name: globals()[name if name != "dict" else "dict_"] for name in {case.reader for case in CASES}}


def answer(good, folder: Path, case) -> str:
    """The sentence with which an input is refused."""
    with pytest.raises(UserError) as caught:
        if case.reader == "file":
            folder.mkdir()
            (folder / case.name).write_bytes(case.spoilt)
            load_data(folder / case.name, good["tokenizer"], length=64, batch_size=1, cache=False)
        else:
            READERS[case.reader](good, folder, case.spoilt)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.reader}: {case.name}")
def test_malformed(good, tmp_path, case):
    said = answer(good, tmp_path / "spoilt", case)
    assert said.endswith((".", "?")) and "\n" not in said and len(said) < 2000, said
    assert case.said in said and "Traceback" not in said
