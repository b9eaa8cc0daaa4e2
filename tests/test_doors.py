"""No way in: endless programs, pipes, the hub, secrets, the network; code in folders is in tests/test_workdir.py."""

import json
import os
from pathlib import Path

import jax
import malformed
import ml_dtypes
import numpy as np
import pytest
from run_fixtures import ROOT
from safetensors.numpy import load_file, save_file

from specjax import sandbox
from specjax.cluster import processes
from specjax.config.source import load_config_file
from specjax.data.prepare import load as load_data
from specjax.data.read import read
from specjax.errors import UserError
from specjax.files import read_object
from specjax.hf import folder as hf_folder
from specjax.hf.load import load
from specjax.hf.strided import is_finite
from specjax.hf.tokenizer import load_tokenizer
from specjax.lora.targets import by_pattern

BASE = ROOT / "demo" / "base"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)


def test_what_has_no_end_is_ended_and_the_next_is_answered(impatient):
    tokenizer = load_tokenizer(BASE)
    settings = {"length": 64, "batch_size": 1, "cache": False}
    with pytest.raises(UserError, match=r"row 1: the chat template cannot be used \(it takes more than 0.5 seconds or"):
        load_data([malformed.CHAT], tokenizer, template=malformed.ENDLESS["a power"], **settings)
    with pytest.raises(UserError, match=r"rank_pattern '\(.*' cannot be matched \(it takes more than 0.5 seconds or"):
        by_pattern({"(a+)+b": 4}, 8, "rank_pattern")("model.layers.0." + "a" * 60)
    assert by_pattern({"(a+)+b": 4}, 8, "rank_pattern")("layers.aab") == 4
    made = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    made += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert load_data([malformed.CHAT], tokenizer, template=made, **settings).num_rows == 1


def test_a_text_that_is_too_long_is_refused_before_it_is_here(monkeypatch):
    monkeypatch.setattr(sandbox, "OUTPUT", 1 << 20)
    how = {"conversations": [[{"role": "user", "content": "x"}]]}
    with pytest.raises(sandbox.Exceeded, match="1 MiB of text"):
        sandbox.render("{{ 'x' * 2000000 }}", [how])
    (made,) = sandbox.render("{{ 'x' * 1000000 }}", [how])
    assert made[0] == "x" * 1_000_000


def test_a_template_gets_what_transformers_renders_and_no_secret(monkeypatch):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{% for m in messages %}{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
    how = {"conversations": [[{"role": "user", "content": "à \ud800"}]], "return_assistant_tokens_mask": True}
    texts, marks = render_jinja_template(chat_template=template, **how)
    (made,) = sandbox.render(template, [how])
    assert made[0] == texts[0] and [tuple(mark) for mark in made[1]] == marks[0]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    worker = sandbox._Worker()
    environment = Path(f"/proc/{worker.process.pid}/environ")
    assert next(worker.answers("match", "a+", ["aa"])) == [True, []]
    assert not environment.exists() or b"hf_secret" not in environment.read_bytes()
    worker.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_seen_wherever_it_stands(dtype):
    largest = np.finfo(dtype).max if dtype is not ml_dtypes.bfloat16 else ml_dtypes.finfo(dtype).max
    whole = np.array([[0.0, -0.0, 1.0], [largest, -largest, -1e-30]], dtype)
    assert is_finite(whole) and is_finite(whole.T) and is_finite(whole[:0]) and is_finite(whole[0, 0].reshape(()))
    for wrong in (np.nan, -np.nan, np.inf, -np.inf):
        for at in np.ndindex(whole.shape):
            spoilt = whole.copy()
            spoilt[at] = wrong
            assert not is_finite(spoilt), (wrong, at)


@pytest.mark.parametrize("quantise", ["", "int8"])
def test_a_number_that_is_none_in_a_models_file_is_named(tmp_path, quantise):
    held = load_file(BASE / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    held[name] = held[name].copy()
    held[name][-1, -1] = np.nan
    home = malformed.lay(BASE, tmp_path / "model", {"model.safetensors": None})
    save_file(held, home / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor {name} holds NaN or an infinity"):
        load(home, dtype="float32", quantise=quantise)


def test_a_pipe_is_not_waited_for_and_a_device_not_read(tmp_path):
    home = malformed.lay(BASE, tmp_path / "model", {"config.json": None})
    os.mkfifo(home / "config.json")
    os.mkfifo(tmp_path / "x.jsonl")
    (tmp_path / "zeros.jsonl").symlink_to("/dev/zero")
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 2**31)  # which takes no room
    with pytest.raises(UserError, match="has no config.json"):
        load(home)
    for name in ("x.jsonl", "zeros.jsonl"):
        with pytest.raises(UserError, match="is neither a file nor a folder"):
            list(read(tmp_path / name))
        with pytest.raises(UserError, match="is no plain file"):
            read_object(tmp_path / name)
    for action in (list, lambda rows: read_object(tmp_path / "large.json")):
        with pytest.raises(UserError, match="has 2,147,483,648 bytes, and at most"):
            action(read(tmp_path / "large.json"))


def test_a_row_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("specjax.data.read.ROW", 1000)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "a" * 1000}) + "\n")
    with pytest.raises(UserError, match=r"x.jsonl:2 is longer than 1,000 characters"):
        list(read(tmp_path / "x.jsonl"))
    (tmp_path / "x.csv").write_text("text\na\n" + "a" * 1001 + "\n")
    with pytest.raises(UserError, match=r"x.csv:3 is not CSV that can be read: field larger than"):
        list(read(tmp_path / "x.csv"))


def test_bad_utf8_is_said_where_it_is(tmp_path):
    lines = b'{"text": "\xc3\xa0 and more"}\n' * 20_000
    (tmp_path / "x.jsonl").write_bytes(lines + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=f"at byte {len(lines) + 10}, in line 20001"):
        list(read(tmp_path / "x.jsonl"))


def test_the_hub_is_asked_for_hub_names_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(hf_folder, "_download", lambda name, *rest: asked.append(name) or tmp_path)
    for name in ("modles/llama", "models/lama", "./models/x", "model", "a/b/c", "/models/x"):
        with pytest.raises(UserError, match="no such folder"):
            hf_folder.resolve(name)
    assert asked == []
    (tmp_path / "models" / "llama-3.1").mkdir()
    for name in ("meta/llama", "model/llama-3.2", "model/llama-instruct"):  # near a folder here, and meant
        hf_folder.resolve(name)
    assert asked == ["meta/llama", "model/llama-3.2", "model/llama-instruct"]


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(UserError) as refused:
        list(read("https://me:s3cr3t@host/x.jsonl"))
    assert "password" in str(refused.value) and "s3cr3t" not in str(refused.value)


def test_a_local_launch_listens_on_the_loopback(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: given.update(kwargs))
    for address, bound in (("127.0.0.1:1234", "127.0.0.1:1234"), ("host:1234", None)):
        given.clear()
        for name, value in zip(
            (processes.COORDINATOR, processes.COUNT, processes.INDEX), (address, "2", "0"), strict=True
        ):
            monkeypatch.setenv(name, value)
        processes.join()
        assert given.get("coordinator_bind_address") == bound


@pytest.mark.parametrize("ends", ["import sys; sys.exit(0)", "raise SystemExit", "exit('no')"])
def test_a_config_file_that_ends_the_interpreter_is_a_mistake(tmp_path, ends):
    (tmp_path / "x.py").write_text(f"def get_config():\n    {ends}\n")
    with pytest.raises(UserError, match=r"x.py:2: SystemExit"):
        load_config_file(str(tmp_path / "x.py"))
