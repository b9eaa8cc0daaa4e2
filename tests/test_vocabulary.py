"""Added tokens: in the tokenizer, as rows of the model, in every export, and opened by transformers."""

import json
import shutil

import numpy as np
import pytest
from helpers import prompts, torch_logits, torch_model
from run_fixtures import as_of_transformers_4, flags, specjax, write_base, write_data
from safetensors.numpy import load_file

import specjax as sj
from specjax import build, vocabulary
from specjax.config import get_config, merge
from specjax.errors import UserError
from specjax.hf.config import from_folder
from specjax.hf.load import load
from specjax.hf.tokenizer import load_tokenizer
from specjax.hf.vocabulary import extend, grow, rows_for

TEXT = "What has ada got?<|x|> Ada has 4 cats and zork."
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),  # peft's note
]

NEXT = {
    "lora.rank": None,
    "model.add_tokens": "<|x|>",
    "model.add_words": "figs",
    "lora.trainable_token_indices": "added",
}
TOKENS = prompts(vocab_size=302, length=100)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("untied") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


@pytest.mark.parametrize("name", ["base", "tied"])
def test_rows_are_what_transformers_draws_around_and_an_export_has_them(request, tmp_path, name):
    import transformers

    folder = request.getfixturevalue(name)
    model, tokenizer = load(folder, dtype="float32")
    assert sj.add_tokens(model, tokenizer, ["<|x|>"], ["zork"]) == [300, 301]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.resize_token_embeddings(302, mean_resizing=True)
    ends = {"get_input_embeddings": model.embed_tokens.embedding}
    if name == "base":
        ends["get_output_embeddings"] = model.lm_head.kernel
    for end, ours in ends.items():  # of rows of size 0.15, theirs lie 5e-6 around the mean
        table = np.asarray(ours[...])
        np.testing.assert_allclose(table, getattr(theirs, end)().weight.detach().numpy(), rtol=0, atol=5e-5)
        np.testing.assert_allclose(table[300:], np.tile(table[:300].mean(0), (2, 1)), rtol=0, atol=1e-6)
    sj.export(model, tokenizer, tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.config.vocab_size == 302 and opened.get_input_embeddings().num_embeddings == 302
    np.testing.assert_allclose(np.asarray(model(TOKENS)), torch_logits(opened, TOKENS), rtol=0, atol=1e-4)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = again(TEXT)["input_ids"]
    assert ids == tokenizer(TEXT)["input_ids"] and {300, 301} < set(ids)
    assert again.decode(ids, skip_special_tokens=True) == TEXT.replace("<|x|>", "")
    assert load(tmp_path / "out")[0].config.vocab_size == 302


def test_files_of_transformers_4_get_the_tokens_in_its_dialect(base, tmp_path):
    folder = write_base(tmp_path / "base")
    as_of_transformers_4(folder)
    tokenizer = load_tokenizer(folder)
    extend(tokenizer, ["<|x|>"], ["zork"])
    model, _ = load(folder, dtype="float32")
    grow(model, 302)
    sj.export(model, tokenizer, tmp_path / "out")
    was, now = (json.loads((at / "tokenizer_config.json").read_text()) for at in (folder, tmp_path / "out"))
    new = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    listed = {"300": new | {"content": "<|x|>", "special": True}, "301": new | {"content": "zork", "special": False}}
    assert now == was | {"added_tokens_decoder": was["added_tokens_decoder"] | listed}
    assert load_tokenizer(tmp_path / "out")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    was, now = (json.loads((at / "tokenizer.json").read_text()) for at in (folder, tmp_path / "out"))
    assert [one["content"] for one in now.pop("added_tokens")[-2:]] == ["<|x|>", "zork"]
    assert now == {key: value for key, value in was.items() if key != "added_tokens"}


def test_a_token_of_the_vocabulary_keeps_its_id_and_rows_that_are_there_are_used(base, tmp_path):
    tokenizer = load_tokenizer(base)
    known = tokenizer.get_vocab()["What"]
    assert extend(tokenizer, ["<|im_end|>"], ["What", "zork"]) == [3, known, 300]
    assert tokenizer.added_tokens_decoder[3].special  # as it was
    sizes = from_folder(base)
    assert rows_for([3, known], sizes) == 300
    assert rows_for([300], sizes) == 301
    assert rows_for([300], sizes, 8) == 304
    assert rows_for([3], sizes, 8) == 300  # nothing is needed


def test_a_mesh_splits_the_rows_or_says_that_it_cannot(base):
    plain, _ = load(base, dtype="float32")
    grow(plain, 304)
    model, _ = load(base, mesh=sj.make_mesh(fsdp=4, tensor=2), dtype="float32")
    with pytest.raises(UserError, match="301 rows of the vocabulary .* set pad_to_multiple_of to a multiple of 2"):
        grow(model, 301)
    grow(model, 304)
    assert model.embed_tokens.embedding[...].sharding.spec == model.lm_head.kernel[...].sharding.spec
    np.testing.assert_allclose(np.asarray(model(TOKENS)), np.asarray(plain(TOKENS)), rtol=0, atol=1e-4)


def test_the_language_model_of_a_multimodal_checkpoint_gets_rows(tmp_path):
    import transformers

    reference = torch_model("gemma3", vocab_size=300)
    reference.save_pretrained(tmp_path / "base")
    model, _ = load(tmp_path / "base", dtype="float32")
    grow(model, 302)
    sj.export(model, None, tmp_path / "out")
    opened = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert opened.config.text_config.vocab_size == 302
    np.testing.assert_allclose(np.asarray(model(TOKENS)), torch_logits(opened, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "words", "said"),
    [
        (["<|x|>", ""], [], "add_tokens holds '': a token is a text that is not empty"),
        ([], [" "], "add_words holds ' ': a token is a text"),
        (["<|x|>"], ["<|x|>"], "add_words holds '<|x|>', which is named twice"),
    ],
)
def test_a_token_is_named_once_and_is_a_text(base, tokens, words, said):
    with pytest.raises(UserError) as raised:
        extend(load_tokenizer(base), tokens, words)
    assert said in str(raised.value)


def test_what_cannot_grow_is_refused(base, tmp_path):
    model, tokenizer = load(base, dtype="float32")
    with pytest.raises(UserError, match="the vocabulary has 300 rows, and 299 are asked for"):
        grow(model, 299)
    sj.lora.inject(model, rank=2)
    with pytest.raises(UserError, match="the model wears adapters, which know its vocabulary"):
        sj.add_tokens(model, tokenizer, ["<|x|>"])
    torch_model("gemma4_text").save_pretrained(tmp_path / "gemma4")
    with pytest.raises(UserError, match="per-layer embeddings have a table of their own"):
        rows_for([600], from_folder(tmp_path / "gemma4"))


@pytest.mark.parametrize(
    ("settings", "tied", "left"),
    [
        ({"targets": ["q_proj", "embed_tokens"]}, True, [300]),
        ({"targets": ["q_proj", "embed_tokens"]}, False, [300]),
        ({"targets": ["embed_tokens", "lm_head"]}, False, []),
        ({"targets": ["embed_tokens", "lm_head"]}, True, [300]),  # the head that is tied has no factors
        ({"targets": r".*(q_proj|embed_tokens|lm_head)"}, False, []),
        ({"modules_to_save": ["lm_head"]}, False, [300]),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, False, []),
        ({"modules_to_save": ["embed_tokens"]}, True, [300]),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True, []),
        ({"trainable_token_indices": [300]}, False, []),
        ({"trainable_token_indices": "added"}, True, []),
    ],
)
def test_a_new_token_trains_at_both_ends(base, settings, tied, left):
    tokenizer = load_tokenizer(base)
    assert vocabulary._left(settings, tokenizer, extend(tokenizer, ["<|x|>"]), [300], tied=tied) == left


def test_a_token_on_a_spare_row_is_new_too(base, tmp_path):
    shutil.copytree(base, tmp_path / "spare")
    told = json.loads((base / "config.json").read_text())
    (tmp_path / "spare" / "config.json").write_text(json.dumps(told | {"vocab_size": 320}))
    config = merge(get_config(), {"trainable": "lora", "lora": {"rank": 2}, "model": {"add_tokens": ["<|x|>"]}})
    with pytest.raises(UserError, match=r"make new tokens \(1\), and LoRA does not train the rows of '<|x|>'"):
        vocabulary.extend(config, tmp_path / "spare", load_tokenizer(base))
    config.model.add_tokens = ["<|im_end|>"]  # which is there
    vocabulary.extend(config, tmp_path / "spare", load_tokenizer(base))


def test_rows_that_no_adapter_would_train_are_refused_before_the_data_are_read(base, tmp_path, capsys):
    argv = flags(base, tmp_path / "run", "lora", tmp_path / "none.jsonl") + ["--config.model.add_tokens=<|x|>"]
    assert specjax("train", *argv) == 2
    said = capsys.readouterr().err
    assert "make new tokens (1), and LoRA does not train the rows of '<|x|>'" in said
    argv += ["--config.model.add_words=figs", "--config.lora.trainable_token_indices=<|x|>,5"]
    assert specjax("train", *argv) == 2
    assert "does not train the rows of 'figs'" in capsys.readouterr().err
    argv[-2:] = ["--config.lora.trainable_token_indices=<|y|>"]
    assert specjax("train", *argv) == 2
    said = capsys.readouterr().err
    assert "trainable_token_indices names '<|y|>', which is no token of the tokenizer: add it by config.model" in said


def test_a_run_on_added_tokens_resumes_and_exports_them(base, tmp_path, capsys):
    import transformers

    write_data(base.parent / "data")
    run = tmp_path / "run"
    argv = flags(base, run, "sft", **{"checkpoint.every": 4, "model.pad_to_multiple_of": 8, "export": "false"})
    argv += ["--config.model.add_tokens=<|x|>", "--config.model.add_words=figs", "--config.model.add_words=hens"]
    assert specjax("train", *argv) == 0
    assert specjax("train", *argv[:-1]) == 2
    assert "model.add_words (was ['figs', 'hens'], now ['figs'])" in capsys.readouterr().err
    assert specjax("export", f"--workdir={run}", f"--out={tmp_path / 'out'}") == 0
    model, _ = build.load_run(run, "best", sj.make_mesh())
    assert model.config.vocab_size == 304
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(np.asarray(model(TOKENS)), torch_logits(theirs, TOKENS), rtol=0, atol=1e-4)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("<|x|>hens")["input_ids"]
    assert ids[-2:] == [300, 302]


@pytest.mark.parametrize("name", ["base", "tied"])
def test_rows_of_added_tokens_train_beside_factors_and_open_in_peft(request, tmp_path, capsys, name):
    import peft
    import transformers

    folder, run = request.getfixturevalue(name), tmp_path / "run"
    write_data(folder.parent / "data")
    argv = flags(folder, run, "lora", **{"lora.trainable_token_indices": "added", "lora.targets": "q_proj,up_proj"})
    argv += ["--config.model.add_tokens=<|x|>", "--config.model.add_words=figs"]
    assert specjax("train", *argv) == 0
    assert specjax("train", *argv) == 0  # it is done, and says so
    model, _ = build.load_run(run, "best", sj.make_mesh())
    trained = np.asarray(model(TOKENS))
    table = np.asarray(model.embed_tokens.embedding[...])
    rows = np.asarray(model.embed_tokens.own["0"].embedding[...])
    assert np.abs(rows[1] - table[301]).max() > 1e-3  # of `figs`, which the data have
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    opened.resize_token_embeddings(302)
    opened = peft.PeftModel.from_pretrained(opened, run / "export")
    np.testing.assert_allclose(torch_logits(opened, TOKENS), trained, rtol=0, atol=1e-4)
    card = (run / "export" / "README.md").read_text()
    assert "    base.resize_token_embeddings(len(tokenizer))\nmodel = PeftModel" in card
    assert specjax("export", f"--workdir={run}", f"--out={tmp_path / 'merged'}", "--merge") == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 302 and merged.config.tie_word_embeddings == (name == "tied")
    np.testing.assert_allclose(torch_logits(merged, TOKENS), trained, rtol=0, atol=1e-4)
    capsys.readouterr()
    ask = ["--prompt=What has ada got?", "--max_new_tokens=8"]
    assert specjax("generate", f"--model={run}", *ask) == 0
    ours = capsys.readouterr().out
    assert specjax("generate", f"--model={folder}", f"--adapter=it={run / 'export'}", *ask) == 0
    assert capsys.readouterr().out.endswith(ours)  # the base got its rows
    if name == "tied":
        argv = flags(
            folder, tmp_path / "next", **NEXT | {"lora.rank": None, "lora.init_from": run / "export", "steps": 3}
        )
        assert specjax("train", *argv) == 0
    with pytest.raises(UserError, match=r"trainable_token_indices has 30\d, and the model has rows for 0 to 299"):
        sj.lora.load(load(folder, dtype="float32")[0], run / "export")


def test_an_adapter_that_peft_trained_on_a_resized_base_is_read(base, tmp_path):
    """Where rows were added, PEFT writes the whole tables beside the trained rows."""
    import peft
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(302)
    told = {"embed_tokens": [300, 301], "lm_head": [300, 301]}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=told, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(0)
    for weight in theirs.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    model, _ = load(base, dtype="float32")
    grow(model, 302)
    sj.lora.load(model, tmp_path / "adapter")
    np.testing.assert_allclose(np.asarray(model(TOKENS)), torch_logits(theirs, TOKENS), rtol=0, atol=1e-4)
    other, _ = load(base, dtype="float32")
    grow(other, 302)
    other.lm_head.kernel[...] = other.lm_head.kernel[...].at[7].add(1.0)
    with pytest.raises(UserError, match="lm_head.token_adapter.base_layer.weight is another table than the base's"):
        sj.lora.load(other, tmp_path / "adapter")
