"""What a user gets wrong: one sentence on stderr, exit status 2, and nothing of theirs lost."""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import on_devices
from run_fixtures import PAIRS, ROOT, flags, specjax, tree, write_rows
from safetensors.numpy import load_file, save_file

from specjax.train.checkpoint import Checkpoints

WEIGHTS = "model.safetensors"
PROMPTS = [{"instruction": row["instruction"]} for row in PAIRS]
FILE_LIMIT = 20_000  # bytes: more than the logs of a few hundred steps, less than the weights


@pytest.fixture
def home(base, tmp_path):
    """A folder of one's own with a base and data, to spoil."""
    shutil.copytree(base.parent, tmp_path / "home")
    return tmp_path / "home"


def refused(capfd, home: Path, verb: str, *argv: object) -> str:
    """The one sentence that a command ends with; whatever lay in `home` before is as it was."""
    before = tree(home)
    capfd.readouterr()
    status = specjax(verb, *argv)
    out, err = capfd.readouterr()
    assert status == 2, out + err
    assert err.startswith("specjax: ") and err.endswith((".\n", "?\n")), err
    assert err.count("\n") == 1, err
    after = tree(home)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if "checkpoints/" in path or "export/" in path or "partial" in path]
    return err.removeprefix("specjax: ")


def train_refused(capfd, home: Path, kind: str = "sft", **overrides: object) -> str:
    return refused(capfd, home, "train", *flags(home / "base", home / "out", kind, **overrides))


DATA = {
    "no such file": ({"absent.jsonl": None}, {}, "no such data file or folder: {file}"),
    "no such folder": ({"absent/": None}, {}, "no such data file or folder: {file}"),
    "a line that is not JSON": ({"x.jsonl": [PAIRS[0], "{broken", PAIRS[1]]}, {}, "{file}:2 is not JSON"),
    "a line that is no object": ({"x.jsonl": [PAIRS[0], "3"]}, {}, "{file}:2 is a JSON int"),
    "a row lacking the response": (
        {"x.jsonl": [*PAIRS[:2], {"instruction": "Why?"}]},
        {},
        "{file}:3 lacks 'response' (it has instruction)",
    ),
    "a response that is no text": (
        {"x.jsonl": [PAIRS[0], {"instruction": "Why?", "response": 3}]},
        {},
        "{file}:2: 'response' is a int, and must be a str",
    ),
    "columns of no known format": (
        {"x.jsonl": [{"question": "Why?", "answer": text} for text in ("So.", "No.")]},
        {},
        "the data's columns (question, answer) make up no known format",
    ),
    "a column that is not there": (
        {"x.jsonl": PAIRS},
        {"data.columns.response": "respnse"},
        "config.data.columns.response is 'respnse', a column that is not there; the data has instruction, response. "
        "Did you mean 'response'?",
    ),
    "empty data": ({"x.jsonl": []}, {}, "{file} is empty"),
    "an empty folder": ({"x/y.log": []}, {}, "holds no data"),
    "a file of no known kind": ({"x.xml": PAIRS}, {}, "{file} is of no known kind: use one of .jsonl"),
    "a file that is not text": ({"x.jsonl": b"\xff\xfe\x00"}, {}, "{file} is not UTF-8 text"),
    "a broken Parquet file": ({"x.parquet": b"PAR1 and then nothing"}, {}, "{file} is not a whole Parquet file"),
    "all rows over length": (
        {"x.jsonl": PAIRS},
        {"data.length": 16},
        "rows of {file} are over the length of 16 tokens (the shortest has",
    ),
    "nothing to learn": ({"x.jsonl": [{"instruction": "Why?", "response": " "}] * 9}, {"data.eval_fraction": 0}, "9"),
    "too few rows to hold some out": ({"x.jsonl": PAIRS[:1]}, {}, "{file} has too few different rows to hold some out"),
    "a template whose token is lacking": (
        {"x.jsonl": PAIRS},
        {"data.template": "llama3"},
        "the llama3 template ends a turn with '<|eot_id|>', a token that the tokenizer",
    ),
    "a template that does not exist": (
        {"x.jsonl": PAIRS},
        {"data.template": "chatlm"},
        "qwen2.5, qwen3, zephyr. Did you mean 'chatml'?",
    ),
    "a template that is no Jinja": ({"x.jsonl": PAIRS}, {"data.template": "{% if %}"}, "the chat template refuses"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(capfd, home, case):
    files, overrides, said = DATA[case]
    [(name, content)] = files.items()
    path = home / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            lines = (row if isinstance(row, str) else json.dumps(row) for row in content)
            path.write_text("".join(f"{line}\n" for line in lines))
    source = path.parent if name.startswith("x/") else path
    assert said.format(file=path) in train_refused(capfd, home, train=source, **overrides)
    assert not (home / "out").exists()


def test_a_file_of_an_eval_set_is_looked_for_too(capfd, home):
    said = train_refused(capfd, home, **{"data.eval.domain": home / "absent.jsonl"})
    assert f"no such data file or folder: {home / 'absent.jsonl'}" in said


def test_the_verb_data_says_the_same(capfd, home):
    argv = flags(home / "base", home / "out", "sft", train=write_rows(home / "x.jsonl", PROMPTS))
    assert "(instruction) make up no known format" in refused(capfd, home, "data", argv[0], *argv[2:])


def spoil_shape(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**tensors, name: np.zeros((3, 32), np.float32)}, base / WEIGHTS)


def spoil_names(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    tensors["model.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, base / WEIGHTS)


def set_key(base: Path, **changes: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def without_tokenizer(base: Path) -> None:
    for file in base.glob("token*"):
        file.unlink()


BASE = {
    "truncated": (lambda base: cut(base / WEIGHTS, 5000), WEIGHTS, "is corrupt or cut short"),
    "cut inside the header": (lambda base: cut(base / WEIGHTS, 50), WEIGHTS, "is corrupt or cut short"),
    "empty": (lambda base: cut(base / WEIGHTS, 0), WEIGHTS, "is corrupt or cut short"),
    "corrupt": (lambda base: (base / WEIGHTS).write_bytes(b"\x00" * 4096), WEIGHTS, "is corrupt or cut short"),
    "no weights": (lambda base: (base / WEIGHTS).unlink(), "base has no model.safetensors"),
    "pickled weights": (
        lambda base: (base / WEIGHTS).rename(base / "pytorch_model.bin"),
        "only pickled weights (.bin)",
    ),
    "a shard is absent": (
        lambda base: (
            (base / WEIGHTS)
            .rename(base / f"{WEIGHTS}.index.json")
            .write_text('{"weight_map": {"x": "part-9.safetensors"}}')
        ),
        "index.json names files that are not there: part-9.safetensors",
    ),
    "a tensor of the wrong shape": (
        spoil_shape,
        "1 mis-shaped: model.layers.1.self_attn.k_proj.weight is [3, 32] where config.json says [16, 32]",
    ),
    "tensors of other names": (spoil_names, "1 missing: model.norm.weight; 1 unexpected: model.extra"),
    "an unsupported architecture": (
        lambda base: set_key(base, architectures=["MambaForCausalLM"]),
        "architecture MambaForCausalLM is not supported; supported are LlamaForCausalLM, MistralForCausalLM",
    ),
    "a dtype that is none": (
        lambda base: set_key(base, dtype="bf16"),
        "dtype is 'bf16': set it to what the weights are",
    ),
    "an adapter's folder": (
        lambda base: (base / "adapter_config.json").write_text('{"base_model_name_or_path": "org/x"}'),
        "is the folder of an adapter (adapter_config.json): give its base model 'org/x'",
        "or take adapter_config.json out of it",
    ),
    "an unsupported activation": (
        lambda base: set_key(base, hidden_act="quick_gelu"),
        "hidden_act 'quick_gelu' is not supported",
    ),
    "no config": (lambda base: (base / "config.json").unlink(), "base has no config.json"),
    "a config that is not JSON": (lambda base: cut(base / "config.json", 50), "config.json is not JSON"),
    "no tokenizer": (without_tokenizer, "has no tokenizer files"),
    "a tokenizer that is not JSON": (lambda base: cut(base / "tokenizer.json", 50), "its tokenizer does not load"),
    "no chat template": (
        lambda base: (base / "chat_template.jinja").unlink(),
        "has no chat template: set config.data.template to one of alpaca, chatml",
    ),
    "no such folder": (shutil.rmtree, "base': no such folder"),
}


@pytest.mark.parametrize("case", BASE)
def test_model_folder(capfd, home, case):
    spoil, *said = BASE[case]
    spoil(home / "base")
    sentence = train_refused(capfd, home)
    for part in said:
        assert part in sentence
    if WEIGHTS in said:
        assert str(home / "base" / WEIGHTS) in sentence


CONFIG = {
    "an unknown key": (
        "sft",
        {"data.lenght": 3},
        "--config.data.lenght is no key of the config. Did you mean 'config.data.length'?",
    ),
    "a wrong type": ("sft", {"steps": "many"}, "--config.steps takes an integer, not 'many'."),
    "an unknown choice": (
        "sft",
        {"optimizer.name": "adam"},
        "config.optimizer.name is 'adam': choose one of 'adamw', 'lion'. Did you mean 'adamw'?",
    ),
    "a batch that accumulation does not divide": (
        "sft",
        {"accumulate": 3},
        "config.batch_size is 8, which config.accumulate=3 does not divide",
    ),
    "a batch that the devices do not divide": (
        "sft",
        {"batch_size": 12},
        "micro-batches has 12 rows for 8 groups of devices (config.mesh.data x fsdp x expert): make the batch size",
    ),
    "a mesh of other devices": (
        "sft",
        {"mesh.fsdp": 3},
        "mesh data 1 x fsdp 3 x expert 1 x context 1 x tensor 1 does not fit 8 devices",
    ),
    "a mesh that does not split the model": (
        "sft",
        {"mesh.fsdp": 2, "mesh.tensor": 4},
        "cannot be split 4 ways over mesh axis tensor: choose a size of config.mesh.tensor that divides 2",
    ),
    "rows longer than the positions": (
        "sft",
        {"data.length": 129},
        "config.data.length is 129, but the model has 128 positions: set config.data.length to at most 128.",
    ),
    "LoRA's keys without LoRA": (
        "sft",
        {"lora.rank": 4},
        "config.lora.rank is 4, but config.trainable is 'all': set config.trainable='lora'",
    ),
    "LoRA without its rank": ("sft", {"trainable": "lora"}, "config.lora.rank is not set, but config.trainable is"),
    "LoRA targets that match nothing": (
        "lora",
        {"lora.targets": "['q_porj']"},
        "config.lora.targets 'q_porj' matches no linear map; there are down_proj, embed_tokens, gate_proj, k_proj, "
        "lm_head, o_proj, q_proj, up_proj, v_proj. Did you mean 'q_proj'?",
    ),
    "a LoRA pattern that matches nothing": ("lora", {"lora.targets": ".*attention.*"}, "match no linear map"),
    "W&B that is not installed": ("lora", {"log.wandb": "mine"}, "W&B is not installed"),
}


@pytest.mark.parametrize("case", CONFIG)
def test_config(capfd, home, case):
    kind, overrides, said = CONFIG[case]
    assert said in train_refused(capfd, home, kind, **overrides)


def test_a_missing_workdir(capfd, home):
    argv = [flag for flag in flags(home / "base", home / "out") if not flag.startswith("--workdir")]
    assert "`specjax train` needs --workdir" in refused(capfd, home, "train", *argv)


def test_compare_without_methods_or_with_a_wrong_one(capfd, home):
    argv = flags(home / "base", home / "out", "sft")
    assert "config.compare is empty" in refused(capfd, home, "compare", *argv)
    config = home / "wrong.py"
    config.write_text(
        "from specjax.config import get_config as defaults\n\n\n"
        "def get_config():\n"
        "    config = defaults()\n"
        "    config.compare.good = {}\n"
        "    config.compare.bad = {'data': {'lenght': 3}}\n"
        "    return config\n"
    )
    said = refused(capfd, home, "compare", f"--config={config}", *argv[1:])
    assert "config.compare.bad.data.lenght is not a key. Did you mean 'config.data.length'?" in said
    assert not (home / "out").exists()


def test_a_workdir_with_other_files(capfd, home):
    (home / "out").mkdir()
    (home / "out" / "thesis.txt").write_text("years of work")
    assert "out is not empty and holds no run" in train_refused(capfd, home)
    (home / "out" / "thesis.txt").unlink()
    (home / "out" / "export").mkdir()
    (home / "out" / "export" / "config.json").write_text("{}")
    assert "out is not empty and holds no run" in train_refused_with_export(capfd, home)


def train_refused_with_export(capfd, home: Path) -> str:
    before = tree(home)
    assert specjax("train", *flags(home / "base", home / "out", "sft")) == 2
    assert tree(home) == before
    return capfd.readouterr().err


def test_a_workdir_that_is_a_file(capfd, home):
    (home / "out").write_text("years of work")
    assert "out is a file: choose another workdir" in train_refused(capfd, home)


def test_a_folder_that_is_no_run(capfd, home):
    for verb, more in (("export", [f"--out={home / 'x'}"]), ("eval", flags(home / "base", home / "out")[:1])):
        said = refused(capfd, home, verb, f"--workdir={home / 'data'}", *more, *_job(home, verb))
        assert "data is not a run: it has no config.json" in said


def _job(home: Path, verb: str) -> list[str]:
    return flags(home / "base", home / "out")[2:] if verb == "eval" else []


def test_generate_with_what_is_no_model_or_adapter(capfd, home):
    prompt = "--prompt=Why?"
    assert "data has no config.json" in refused(capfd, home, "generate", f"--model={home / 'data'}", prompt)
    said = refused(capfd, home, "generate", f"--model={home / 'base'}", f"--adapter={home / 'data'}", prompt)
    assert "data is not a PEFT adapter folder: it has no adapter_config.json" in said
    long = f"--prompt={'why ' * 200}"
    assert "more than the model's 128 positions" in refused(capfd, home, "generate", f"--model={home / 'base'}", long)


@on_devices(1)
def test_a_run_that_stopped_before_its_first_checkpoint_can_be_mended_and_run(capfd, home):
    train_refused(capfd, home, "lora", **{"lora.targets": "['q_porj']"})
    assert (home / "out" / "config.json").exists()
    assert specjax("train", *flags(home / "base", home / "out", "lora", **{"lora.targets": "['q_proj']"})) == 0


@on_devices(1)
def test_an_output_folder_that_is_not_empty_stays_unless_told_otherwise(capfd, home):
    run, out = home.parent / "run", home / "out"
    assert specjax("train", *flags(home / "base", run, "lora", steps=1, optimizer__warmup_steps=0)) == 0
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for more in ((), ("--merge",)):
        said = refused(capfd, home, "export", f"--workdir={run}", f"--out={out}", *more)
        assert "out exists and is not empty: choose another output folder" in said
    assert specjax("export", f"--workdir={run}", f"--out={out}", "--overwrite") == 0
    assert (out / "thesis.txt").read_text() == "years of work"
    assert (out / "adapter_model.safetensors").exists()
    # What a finished run exported is not written over either, and its config can be read or is named.
    (run / "config.json").write_text("{")
    said = refused(capfd, home, "export", f"--workdir={run}", f"--out={home / 'new'}")
    assert "config.json is not JSON" in said and "line 1" in said


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can limit another process's files")
@on_devices(1)
def test_a_full_disk_ends_the_run_and_the_checkpoint_before_survives(home):
    workdir = home / "out"
    argv = flags(home / "base", workdir, "full", steps=5000, checkpoint__every=5, log__every=1000)
    command = [sys.executable, "-m", "specjax", "train", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        while not (workdir / "checkpoints" / "5").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
        out, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert err.count("\n") == 1, err
    assert "a checkpoint could not be written (File too large); the checkpoint of step" in err
    last = Checkpoints(workdir / "checkpoints", read_only=True).latest()
    assert f"the checkpoint of step {last} is whole" in err
    assert specjax("export", f"--workdir={workdir}", f"--out={home / 'saved'}") == 0
    saved, base = load_file(home / "saved" / WEIGHTS), load_file(home / "base" / WEIGHTS)
    assert all(np.isfinite(value).all() and (value != base[name]).any() for name, value in saved.items())
