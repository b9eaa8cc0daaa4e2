"""An export stops where we stop, and its tokenizer's files are the base's."""

import json
import shutil

import pytest
import torch
import transformers
from data_fixtures import tokenizer
from helpers import torch_model
from run_fixtures import as_of_transformers_4
from safetensors.numpy import load_file, save_file

import specjax as sj
from specjax import build
from specjax.data.chat import resolve
from specjax.generation.generate import end_tokens
from specjax.hf.load import load
from specjax.hf.tokenizer import load_tokenizer, save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own

PROMPT = [{"role": "user", "content": "What is two plus two?"}]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that was taught no chat: its eos token is `</s>`, its tokenizer's files are of transformers 4."""
    folder = tmp_path_factory.mktemp("base") / "model"
    torch_model(eos_token_id=2, bos_token_id=1, pad_token_id=0).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer("llama3").save_pretrained(folder)
    as_of_transformers_4(folder)
    return folder


@pytest.fixture(scope="module")
def taught(base, tmp_path_factory):
    """That base as if it had been taught ChatML: its answer to `PROMPT` ends with `<|im_end|>` after five tokens."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("taught") / "model")
    model, tokens = transformers.AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    tokens.chat_template = resolve(tokens, "chatml")
    ids = tokens.apply_chat_template(PROMPT, add_generation_prompt=True)["input_ids"]
    while (answer := greedy(model, ids, 6, eos_token_id=None))[5] in answer[:5]:
        ids = [*ids, 7]
    held = load_file(folder / "model.safetensors")
    head, end = held["lm_head.weight"], tokens.convert_tokens_to_ids("<|im_end|>")
    head[[end, answer[5]]] = head[[answer[5], end]]  # whatever is fed next, the sixth token is the end
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder, ids, answer[:5]


def greedy(model, ids, count, **options):
    found = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, **options)
    return found[0, len(ids) :].tolist()


@pytest.mark.rule(10)
@pytest.mark.parametrize("kind", ["full", "merged", "adapter"])
def test_transformers_stops_where_we_stop(base, taught, tmp_path, kind):
    import peft

    folder, ids, answer = taught
    model, tokens = load(folder, dtype="float32")
    assert model.origin.eos_ids == [2]
    config = sj_config(folder)
    tokens.chat_template = resolve(tokens, "chatml")
    ours = end_tokens(model, tokens, chat=True)
    if kind != "full":
        sj.lora.inject(model, rank=2)
    if kind == "merged":
        sj.lora.merge(model)
    of_one = {"end_of_turn": "<|im_end|>"}
    told = {"sources": {"text.jsonl": {"end_of_turn": None}, "chats.jsonl": of_one}} if kind == "merged" else of_one
    (tmp_path / "data.json").write_text(json.dumps({"train": told}))
    end = build.end_of_answers(tmp_path, tokens, model)
    build.write_export(model, tokens, config, tmp_path / "out", eos_token=end)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    told = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert theirs.eos_token == "<|im_end|>" and told.eos_token_id == [theirs.eos_token_id, 2]
    assert set(told.eos_token_id) == set(ours) and (told.bos_token_id, told.pad_token_id) == (1, 0)
    if kind == "adapter":
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
        reference = peft.PeftModel.from_pretrained(reference, tmp_path / "out")
        reference.generation_config = told  # PEFT's files have no place for it: the user says it
    else:
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert reference.config.eos_token_id == theirs.eos_token_id
    assert greedy(reference, ids, 9) == [*answer, theirs.eos_token_id]


def sj_config(folder):
    from specjax.config import get_config

    config = get_config()
    config.model.path = str(folder)
    return config


def test_what_the_base_declares_stays_as_it_is(base, tmp_path):
    told = {"eos_token_id": [2, 4], "temperature": 0.6, "do_sample": True}  # </s> and <|im_end|>
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps(told))
    model, tokens = load(folder, dtype="float32")
    tokens.chat_template = resolve(tokens, "chatml")
    (tmp_path / "data.json").write_text(json.dumps({"train": {"end_of_turn": "<|im_end|>"}}))
    assert build.end_of_answers(tmp_path, tokens, model) == ""
    assert build.end_of_answers(tmp_path / "none", tokens, model) == ""
    sj.export(model, tokens, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == told
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == model.origin.config_json
    assert load_tokenizer(tmp_path / "out").eos_token == "</s>"


@pytest.mark.rule(10)
def test_a_tokenizers_files_are_those_it_was_loaded_from_but_for_what_was_changed(base, tmp_path):
    tokens = load_tokenizer(base)
    tokens(["a", "a b c"], padding=True, truncation=True, max_length=4)  # the state of a call is no change
    (tmp_path / "same").mkdir()
    save_tokenizer(tokens, tmp_path / "same")
    assert {file.name: file.read_bytes() for file in (tmp_path / "same").iterdir()} == {
        name: (base / name).read_bytes() for name in TOKENIZER
    }
    tokens.chat_template, tokens.pad_token = "{{ messages[0] }}", "</s>"
    (tmp_path / "changed").mkdir()
    save_tokenizer(tokens, tmp_path / "changed", eos_token="<|im_end|>")
    assert tokens.eos_token == "</s>"  # the caller's stays
    changes = {"eos_token": "<|im_end|>", "pad_token": "</s>"}
    for name, more in zip(TOKENIZER[1:], ({"chat_template": "{{ messages[0] }}"}, {}), strict=True):
        was, now = (json.loads((folder / name).read_text()) for folder in (base, tmp_path / "changed"))
        assert now == was | changes | more
    again = load_tokenizer(tmp_path / "changed")
    assert (again.eos_token, again.pad_token, again.chat_template) == ("<|im_end|>", "</s>", "{{ messages[0] }}")
    assert sorted(file.name for file in (tmp_path / "changed").iterdir()) == sorted(TOKENIZER)
    tokens.add_tokens(["<new>"])  # of which the base's files know nothing
    (tmp_path / "more").mkdir()
    save_tokenizer(tokens, tmp_path / "more")
    assert load_tokenizer(tmp_path / "more").convert_tokens_to_ids("<new>") == len(tokens) - 1


def test_a_template_goes_where_the_folder_has_its_own(tmp_path):
    tokens = tokenizer("llama3")
    tokens.chat_template = {"default": "{{ messages }}", "rag": "{{ 1 }}"}
    tokens.save_pretrained(tmp_path / "in")  # as transformers 5 writes it
    for name, template in (("same", tokens.chat_template), ("one", "{{ 2 }}"), ("none", None)):
        loaded = load_tokenizer(tmp_path / "in")
        loaded.chat_template = template
        (tmp_path / name).mkdir()
        save_tokenizer(loaded, tmp_path / name)
        assert load_tokenizer(tmp_path / name).chat_template == template
