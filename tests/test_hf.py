"""Hugging Face folders in and out: the same bytes, on one device and on a mesh, and every damage said."""

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from data_fixtures import CHATML_MARKED, tokenizer
from helpers import assert_same_bits, contents, model, prompts, torch_logits, torch_model, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import specjax as sj
from specjax.errors import UserError
from specjax.hf import names
from specjax.hf.export import tensors
from specjax.hf.folder import fingerprint, weight_files
from specjax.hf.load import load
from specjax.models import Origin
from specjax.sharding import partition_spec

CASES = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases, a head_dim of its own": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": 100, "num_hidden_layers": 3}),
}


@pytest.fixture
def copy(llama, tmp_path):
    """One that may be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.mark.rule(1)
@pytest.mark.parametrize("shard", ["10GB", "60KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama", "tied"])
def test_load_and_export_give_back_the_same_bits(tmp_path, case, dtype, shard):
    import torch

    family, changes = CASES[case]
    torch_model(family, dtype=getattr(torch, dtype), **changes).save_pretrained(tmp_path / "in", max_shard_size=shard)
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == (shard == "60KB")
    ours, _ = load(tmp_path / "in", dtype=dtype)
    assert all(value.dtype == dtype for value in weights(ours).values())
    sj.export(ours, None, tmp_path / "out")
    assert_same_bits(contents(tmp_path / "out"), contents(tmp_path / "in"))
    told = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out")]
    assert told[0] == told[1]


@pytest.mark.parametrize("case", CASES)
def test_what_we_export_is_the_same_model_in_transformers(tmp_path, case):
    import transformers

    family, changes = CASES[case]
    reference = torch_model(family, **changes)
    reference.save_pretrained(tmp_path / "in")
    sj.export(load(tmp_path / "in", dtype="float32")[0], None, tmp_path / "out", shard_bytes=100_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    found, wanted = torch_logits(again, prompts(length=100)), torch_logits(reference, prompts(length=100))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_weights_are_cut_into_files_of_at_most_the_size_asked(llama, tmp_path):
    ours, _ = load(llama, dtype="float32")
    sj.export(ours, None, tmp_path / "out", shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    largest = max(value.nbytes for value in contents(llama).values())
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert sum(value.nbytes for value in held.values()) <= max(100_000, largest)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(held)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in contents(llama).values())
    assert_same_bits(contents(tmp_path / "out"), contents(llama))


def test_the_files_may_have_another_dtype_than_the_model(llama, tmp_path):
    sj.export(load(llama, dtype="float32")[0], None, tmp_path / "out", dtype="bfloat16")
    wanted = contents(llama)
    for name, value in contents(tmp_path / "out").items():
        np.testing.assert_array_equal(value, wanted[name].astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["llama", "biases, a head_dim of its own"])
def test_a_mesh_holds_the_same_bytes_in_the_places_asked_for(tmp_path, case):
    family, changes = CASES[case]
    torch_model(family, **changes | {"vocab_size": 520}).save_pretrained(tmp_path / "in", max_shard_size="60KB")
    single, _ = load(tmp_path / "in", dtype="float32")
    mesh = sj.make_mesh(fsdp=4, tensor=2)
    spread, _ = load(tmp_path / "in", mesh=mesh, dtype="float32")
    axes = {
        "embed_tokens.embedding": ("tensor", "fsdp"),
        "layers.0.self_attn.q_proj.kernel": (None, "tensor", None, "fsdp"),
        "layers.0.self_attn.k_proj.kernel": (None, "tensor", None, "fsdp"),
        "layers.0.self_attn.o_proj.kernel": (None, "fsdp", "tensor", None),
        "layers.0.mlp.up_proj.kernel": (None, "tensor", "fsdp"),
        "layers.0.mlp.down_proj.kernel": (None, "fsdp", "tensor"),
        "layers.0.input_layernorm.scale": (None, "fsdp"),
        "lm_head.kernel": ("tensor", "fsdp"),
    }
    from flax import nnx

    state = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(spread))}
    for name, wanted in weights(single).items():
        array = state[name][...]
        assert array.sharding.mesh == mesh
        assert array.sharding.spec == partition_spec(state[name].get_metadata("axes")), name
        assert tuple(array.sharding.spec) == axes.get(name, tuple(array.sharding.spec)), name
        np.testing.assert_array_equal(np.asarray(array), wanted, err_msg=name)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index], err_msg=name)
    sj.export(spread, None, tmp_path / "out")
    assert_same_bits(contents(tmp_path / "out"), contents(tmp_path / "in"))


def test_missing_unexpected_and_misshaped_tensors_are_listed_together(copy):
    held = load_file(copy / "model.safetensors")
    del held["model.norm.weight"], held["model.layers.1.mlp.up_proj.weight"]
    held["model.extra"] = np.zeros(3, np.float32)
    held["lm_head.weight"] = np.zeros((500, 64), np.float32)
    save_file(held, copy / "model.safetensors")
    with pytest.raises(UserError) as refused:
        load(copy)
    for part in (
        str(copy),
        "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "1 unexpected: model.extra",
        "1 mis-shaped: lm_head.weight is [500, 64] where config.json says [517, 64]",
    ):
        assert part in str(refused.value)


def test_a_tied_model_may_carry_its_head_and_an_old_one_its_frequencies(tmp_path):
    torch_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(held, tmp_path / "model.safetensors")
    assert load(tmp_path)[0].lm_head is None


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def overwrite_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def as_index(path: Path, text: str) -> None:
    (path / "model.safetensors").rename(path / "model.safetensors.index.json").write_text(text)


def set_weights(path: Path, name: str) -> None:
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | {"transformers_weights": name}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: cut(p / "model.safetensors", 0.7), "model.safetensors is corrupt or cut short"),
        (lambda p: cut(p / "model.safetensors", 0.001), "model.safetensors is corrupt or cut short"),
        (lambda p: cut(p / "model.safetensors", 0), "model.safetensors is corrupt or cut short"),
        (lambda p: overwrite_header(p / "model.safetensors"), "model.safetensors is corrupt or cut short"),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors and no"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "has only pickled weights (.bin)"),
        (lambda p: as_index(p, "{"), "index.json is not JSON"),
        (lambda p: as_index(p, "[]"), "index.json does not hold a JSON object"),
        (
            lambda p: as_index(p, '{"weight_map": {"a": "gone.safetensors"}}'),
            "names files that are not there: gone.safetensors",
        ),
        (lambda p: set_weights(p, "gone.safetensors"), "transformers_weights is 'gone.safetensors', which is no"),
        (lambda p: set_weights(p, "../copy/config.json"), "transformers_weights is '../copy/config.json', which is no"),
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "config.json").write_text("{,"), "config.json is not JSON"),
        (lambda p: (p / "config.json").write_text("[1]"), "config.json does not hold a JSON object"),
        (lambda p: (p / "tokenizer.json").write_text("{"), "its tokenizer does not load"),
    ],
)
def test_a_damaged_folder_is_one_sentence(copy, damage, said):
    damage(copy)
    with pytest.raises(UserError) as refused:
        load(copy)
    assert said in str(refused.value) and str(copy) in str(refused.value)
    assert "\n" not in str(refused.value)


def whole(path: Path) -> None:
    """A whole file beside the shards, with other weights."""
    save_file({name: value + 1 for name, value in contents(path).items()}, path / "model.safetensors", FORMAT)


def head_alone(path: Path) -> None:
    held = contents(path)
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(held, path / "model.safetensors", FORMAT)


FORMAT = {"format": "pt"}
FILES = {
    "a whole file beside complete shards": whole,
    "shards": lambda path: None,
    "shards that config.json names": lambda path: (
        whole(path),
        set_weights(path, (path / "model.safetensors.index.json").rename(path / "x.safetensors.index.json").name),
    ),
    "a whole file that config.json names": lambda path: (
        whole(path),
        set_weights(path, (path / "model.safetensors").rename(path / "x.safetensors").name),
    ),
    "a tied model with its head alone": head_alone,
}


@pytest.mark.rule(10)
@pytest.mark.parametrize("case", FILES)
def test_the_files_that_are_read_are_those_that_transformers_reads(tmp_path, case):
    import transformers

    torch_model(tie_word_embeddings=True).save_pretrained(tmp_path / "in", max_shard_size="60KB")
    FILES[case](tmp_path / "in")
    assert len(weight_files(tmp_path / "in")) == (1 if case.startswith("a ") else 6)
    sj.export(load(tmp_path / "in", dtype="float32")[0], None, tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "theirs")
    assert_same_bits(contents(tmp_path / "out"), contents(tmp_path / "theirs"))
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_misspelt_path_of_two_parts_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"'runs/modle': the folder runs is here .* Did you mean 'runs/model'\?"):
        load("runs/modle")
    with pytest.raises(UserError, match=r"no such data file .* runs/modle; the folder runs .* mean 'runs/model'\?"):
        sj.data.load("runs/modle", tokenizer(), length=8, batch_size=1)


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "nowhere"])
def test_a_path_that_is_not_there_is_one_sentence(name):
    with pytest.raises(UserError, match="no such folder, and not a hub name of the form org/name"):
        load(name)


def test_a_model_that_says_no_config_json_is_not_exported_without_one(tmp_path):
    ours = model()
    ours.origin = Origin()
    with pytest.raises(UserError, match=r"model.origin.config_json is empty"):
        sj.export(ours, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_with_files_is_not_written_over(llama, tmp_path):
    ours, _ = load(llama, dtype="float32")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        sj.export(ours, None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is a file"):
        sj.export(ours, None, tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    sj.export(ours, None, tmp_path / "empty")
    assert_same_bits(contents(tmp_path / "empty"), contents(llama))


def test_overwriting_replaces_weights_of_any_number_of_files_and_keeps_the_rest(llama, tmp_path):
    ours, _ = load(llama, dtype="float32")
    sj.export(ours, None, tmp_path / "out", shard_bytes=100_000)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")  # left there, transformers would load its base
    sj.export(ours, None, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert_same_bits(contents(tmp_path / "out"), contents(llama))


def test_an_export_that_fails_leaves_nothing(llama, tmp_path, monkeypatch):
    ours, _ = load(llama, dtype="float32")
    calls, write = [], os.pwrite

    def full(*given):
        calls.append(given)
        if len(calls) >= 3:
            raise OSError(28, "No space left on device")
        return write(*given)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        sj.export(ours, None, tmp_path / "out", shard_bytes=100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_wears_adapters_is_not_exported(tmp_path):
    ours = model()
    sj.lora.inject(ours, rank=2)
    with pytest.raises(UserError, match="merge them before export"):
        sj.export(ours, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_chat_template_and_generation_config_travel(tmp_path):
    import transformers

    reference = torch_model()
    reference.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 4], temperature=0.6, top_p=0.9, do_sample=True
    )
    reference.save_pretrained(tmp_path / "in")
    given = tokenizer("llama3")
    given.chat_template = CHATML_MARKED
    given.save_pretrained(tmp_path / "in")
    ours, ours_tokenizer = load(tmp_path / "in", dtype="float32")
    sj.export(ours, ours_tokenizer, tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "Qu'est-ce que la taxe ?"}, {"role": "assistant", "content": "🎉"}]
    assert again.get_chat_template() == CHATML_MARKED
    for text in ("The cat sat  on\nthe mat. 付加価値税", ""):
        assert again(text)["input_ids"] == given(text)["input_ids"]
    assert again.apply_chat_template(talk, tokenize=False) == given.apply_chat_template(talk, tokenize=False)
    assert (again.pad_token, again.bos_token, again.eos_token) == ("<pad>", "<s>", "</s>")
    told = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (told.eos_token_id, told.temperature, told.top_p, told.do_sample) == ([2, 4], 0.6, 0.9, True)


def test_the_fingerprint_changes_with_any_tensor_and_with_nothing_else(llama, tmp_path):
    first = fingerprint(llama)
    ours, _ = load(llama, dtype="float32")
    assert ours.origin.fingerprint == first
    sj.export(ours, tokenizer(), tmp_path / "same")
    shutil.copytree(llama, tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == first
    held, seen = load_file(llama / "model.safetensors"), set()
    for name, value in held.items():
        trained = value + 1e-3 * np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)
        save_file(held | {name: trained}, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
        seen.add(fingerprint(tmp_path / "moved"))
    assert len(seen | {first}) == len(held) + 1


def test_every_parameter_and_every_tensor_of_a_model_stands_once_in_the_table():
    ours = model(attention_bias=True, mlp_bias=True)
    found = dict(tensors(ours, np.float32))
    assert len(found) == 3 + 2 * (9 + 7)
    assert sum(value.size for value in found.values()) == sum(value.size for value in weights(ours).values())


@st.composite
def slices(draw):
    """A row of the table, an array of it, and any slice of that array."""
    kind = draw(st.sampled_from(["kernel/1", "kernel/2", "flat", "table"]))
    stacked = draw(st.integers(0, 2))
    least = 3 if kind == "kernel/2" else 2 if kind in ("kernel/1", "table") else 1
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=stacked + least, max_size=stacked + 4)))
    index = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        index.append(draw(st.sampled_from([slice(None), slice(start, draw(st.integers(start + 1, size)))])))
    entry = names.Entry(("w",), "w" + ".{}" * stacked, kind)
    return entry, np.arange(np.prod(shape)).reshape(shape), tuple(index)


@pytest.mark.rule(1)
@given(slices())
@settings(max_examples=300, deadline=None)
def test_the_table_is_a_bijection_of_whole_tensors_and_of_slices(drawn):
    entry, array, index = drawn
    hf = {
        name: np.ascontiguousarray(names.to_hf(array[place], entry.kind)) for place, name in entry.tensors(array.shape)
    }
    assert sum(value.size for value in hf.values()) == array.size
    assert {value.shape for value in hf.values()} == {entry.hf_shape(array.shape)}
    for place, name in entry.tensors(array.shape):
        seen = names.view(hf[name], array.shape[entry.stacked :])
        assert np.shares_memory(seen, hf[name])
        np.testing.assert_array_equal(seen, array[place])


def test_random_weights_are_the_same_on_every_mesh():
    from specjax.hf.load import random

    config = model().config
    single, spread = random(config, seed=4), random(config, seed=4, mesh=sj.make_mesh(fsdp=4, tensor=2))
    for name, value in weights(single).items():
        np.testing.assert_array_equal(weights(spread)[name], value, err_msg=name)
    assert all(np.std(value) > 0 for name, value in weights(single).items() if "scale" not in name)
    assert jax.tree.leaves(spread)[0].sharding.mesh.size == 8
