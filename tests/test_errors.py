"""A library function speaks of the argument that its caller passed; the command, of its user's key or flag."""

import ast
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest

import specjax as sj
from specjax import cli, run
from specjax.chat.prompts import Prompt
from specjax.config import get_config
from specjax.config.checks import ARGUMENTS, flat
from specjax.errors import UserError, argument, keys
from specjax.train import step

ROOT = Path(__file__).parent.parent
BASE = ROOT / "demo" / "base"
LIBRARY = ("data", "models", "hf", "lora", "train", "generation", "plan", "sharding.py")
PAIRS = [{"instruction": f"What is {n}?", "response": f"The number {n}."} for n in range(40)]
KEY = re.compile(r"\bconfig\.(?!json)[a-z]|\b(?:data|mesh|model|optimizer|eval|log)\.[a-z_]+(?:=|$)|(?<![\w-])--[a-z]")


def literals(node: ast.AST) -> list[str]:
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def test_no_sentence_of_the_library_names_a_key_or_a_flag():
    seen = 0
    for room in LIBRARY:
        path = ROOT / "specjax" / room
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                    seen += 1
                    text = " ".join(literals(node))
                    assert not KEY.search(text), f"{file.name}:{node.lineno}: {text}"
    assert seen > 100


def test_every_argument_is_called_by_a_key_that_there_is():
    known = [key for key, _ in flat(get_config().to_dict())] + ["data.columns"]
    assert {key.removeprefix("config.") for key in ARGUMENTS.values()} <= set(known)


def test_an_error_is_named_by_who_is_nearest_and_outlives_a_pickle():
    error = UserError(f"{argument('columns.text')} of {argument('rank')} and {argument('chat=False')}.")
    assert str(error) == "columns['text'] of rank and chat=False."
    with pytest.raises(UserError) as raised, keys({"rank": "outer", "columns": "c"}), keys({"rank": "inner"}):
        raise error
    assert str(raised.value) == "c.text of inner and chat=False."
    assert str(pickle.loads(pickle.dumps(raised.value))) == "c.text of inner and chat=False."


@pytest.fixture(scope="module")
def tokenizer():
    _, found = sj.load(BASE)
    return found


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def refused(capsys, *argv: str) -> str:
    assert cli.main(argv) == 2
    return capsys.readouterr().err


MISTAKES = {
    "columns": ({"columns": {"response": "answr"}}, {"columns.response": "answr"}, "columns['response']"),
    "format": ({"format": "messages"}, {"format": "messages"}, "columns"),
    "length": ({"length": 4}, {"length": 4}, "length"),
    "overlong": ({"length": 4}, {"length": 4}, "overlong"),
    "template": ({"template": ""}, {}, "template"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_called_as_the_caller_calls_it(capsys, pairs, tmp_path, tokenizer, name):
    given, changes, said = MISTAKES[name]
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    if name == "template":
        (base / "chat_template.jinja").unlink()
        _, tokenizer = sj.load(base)
    with pytest.raises(UserError) as raised:
        sj.data.load(pairs, tokenizer, **{"length": 128, "batch_size": 8} | given)
    assert said in str(raised.value) and "config." not in str(raised.value)
    asked = {"model.path": base, "data.train": pairs, "data.length": 128, "data.eval_fraction": 0.0}
    asked |= {f"data.{key}": value for key, value in changes.items()}
    key = f"config.data.{said.replace(chr(91) + chr(39), '.').rstrip(chr(39) + chr(93))}"
    flags = [f"--config.{key}={value}" for key, value in asked.items()]
    assert key in refused(capsys, "data", f"--config={ROOT}/configs/sft.py", *flags)


def test_rows_that_cannot_be_held_out_name_the_argument(capsys, tmp_path, tokenizer):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(PAIRS[0]) + "\n")
    with pytest.raises(UserError, match=r"to hold some out, holdout: name a set"):
        sj.data.load(one, tokenizer, length=128, batch_size=1, holdout=(0.5, "train"))
    flags = (f"--config.data.train={one}", f"--config.model.path={BASE}", "--config.data.length=128")
    said = refused(capsys, "data", f"--config={ROOT}/configs/sft.py", *flags)
    assert "to hold some out, config.data.eval_fraction: name a set" in said


def test_a_mesh_is_called_as_the_caller_calls_it(capsys):
    with pytest.raises(UserError, match=r"does not fit 8 devices: change fsdp, tensor\.$"):
        sj.make_mesh(fsdp=3, tensor=5)
    flags = ("--config.mesh.fsdp=3", "--config.mesh.tensor=5", f"--config.model.path={BASE}", "--target=cpu:8")
    said = refused(capsys, "plan", f"--config={ROOT}/configs/lora.py", "--config.data.train=x", *flags)
    assert "change config.mesh.fsdp, config.mesh.tensor." in said


def test_what_a_cpu_lacks_is_called_as_the_caller_calls_it(capsys):
    for optimizer, remat, said in ((sj.adamw(1e-3), "offload", "remat"), (sj.adamw(1e-3, offload=True), "", "offload")):
        with pytest.raises(UserError, match=f"^{said}="):
            step.check_host_memory("cpu", remat, optimizer)
    flags = ("--config.model.remat=offload", f"--config.model.path={BASE}", "--target=cpu:8")
    said = refused(capsys, "plan", f"--config={ROOT}/configs/lora.py", "--config.data.length=128", *flags)
    assert "config.model.remat=offload: a CPU has no memory" in said


def test_flags_of_generate_stand_for_its_arguments(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    (base / "generation_config.json").write_text('{"num_beams": 4}')
    with pytest.raises(UserError, match=r"give --generation_config=false to leave"):
        run.generate(str(base), [Prompt("x")], max_new_tokens=1)
    model, tokenizer = sj.load(base)
    with pytest.raises(UserError, match=r"give generation_config=\{\} to leave"):
        sj.generate(model, tokenizer, ["x"], max_new_tokens=1)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"plain text \(--raw\)"):
        run.generate(str(base), [Prompt("x")], max_new_tokens=1, generation_config=False)
