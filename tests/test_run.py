"""End to end: the commands a user gives, on a tiny model and one device or 8, and the files that they leave."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import logged, metrics, on_devices, torch_model
from run_fixtures import PAIRS, ROOT, TEXTS, flags, specjax, tree, write_base, write_data, write_rows
from safetensors.numpy import load_file

from specjax import build, flops, resume, run
from specjax.card import LICENCE, _losses, base_licence
from specjax.config import get_config
from specjax.config.source import load_config_file
from specjax.data import Data
from specjax.errors import UserError
from specjax.train import fit

# What peft 0.21 calls is deprecated in transformers 5.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.usefixtures("one_device"),
]

DEVICES = {"full": 8, "sft": 1, "lora": 1}
KINDS = (*DEVICES,)
PROMPT = "What has ada got?"
STEPS = 6


def sets(base: Path) -> dict[str, Path]:
    return {f"data.eval.{name}": base.parent / "data" / f"{name}_eval.jsonl" for name in ("pairs", "text")}


def job(base: Path, workdir: Path, kind: str) -> list[str]:
    """`full` holds some of its rows out; the others are measured on named sets, and answer a prompt."""
    if kind == "full":
        return flags(base, workdir, kind, **{"log.tensorboard": True})
    more = {"eval.prompts": PROMPT, "eval.max_new_tokens": 8} if kind == "sft" else {}
    return flags(
        base, workdir, kind, **sets(base), **more, **{"eval.best": "pairs", "eval.every": 3, "eval.exact": "pairs"}
    )


@pytest.fixture(scope="module")
def runs(base):
    """The workdir of a finished run of each kind; `full` ran on 8 devices, as it is evaluated."""
    found = {kind: base.parent / kind for kind in KINDS}
    for kind, workdir in found.items():
        with on_devices(DEVICES[kind]):
            assert specjax("train", *job(base, workdir, kind)) == 0
    return found


def rows(workdir: Path, which: str) -> list[dict]:
    """The lines of `metrics.jsonl` that hold `which`."""
    return [row for row in logged(workdir) if which in row]


def torch_loss(model, tokenizer, examples: list[dict]) -> float:
    """Mean nll of the answers (pairs) or of all tokens (texts), by transformers alone, each example by itself."""
    nll, count = 0.0, 0
    for example in examples:
        if "text" in example:
            ids, prompt = [*tokenizer(example["text"])["input_ids"], tokenizer.eos_token_id], 1
        else:
            user = {"role": "user", "content": example["instruction"]}
            chat = [user, {"role": "assistant", "content": example["response"]}]
            ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            prompt = len(tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False))
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, prompt - 1 : -1].float().log_softmax(-1)
        targets = torch.tensor(ids[prompt:])
        nll -= scores[torch.arange(len(targets)), targets].sum().item()
        count += len(targets)
    return nll / count


def opened(base: Path, folder: Path):
    """An export as transformers or peft opens it, and its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, folder).eval(), tokenizer
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_its_config_reports_metrics_and_summary(base, runs, kind):
    workdir = runs[kind]
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["trainable"] == ("lora" if kind == "lora" else "all")
    assert (saved["steps"], saved["model"]["path"]) == (STEPS, str(base))
    assert load_config_file(str(workdir / "config.json")).optimizer.learning_rate == (2e-2 if kind == "lora" else 1e-2)
    names = ["heldout"] if kind == "full" else ["pairs", "text"]
    assert list(json.loads((workdir / "data.json").read_text())) == ["train", *names]

    steps = rows(workdir, "loss")
    assert [row["step"] for row in steps] == [1, 2, 4, 6]
    assert all({"loss", "tokens", "tokens_per_s", "grad_norm", "lr"} <= row.keys() for row in steps)
    for name in names:
        evals = rows(workdir, f"eval/{name}/loss")
        assert [row["step"] for row in evals] == ([0, 6] if kind == "full" else [0, 3, 6])
        assert evals[-1][f"eval/{name}/loss"] < evals[0][f"eval/{name}/loss"] - 0.3

    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["step"], summary["best_step"], summary["stopped"]) == (STEPS, STEPS, "")
    assert summary["tokens"] == steps[-1]["tokens"]
    assert summary["saved_bytes"] == sum(file.stat().st_size for file in (workdir / "export").glob("*.safetensors"))
    assert summary["evals"].keys() == set(names)
    assert summary["exact"].keys() == (set() if kind == "full" else {"pairs"})
    assert min(summary[key] for key in ("seconds", "compile_seconds", "tokens_per_s", "peak_memory_bytes")) > 0
    full = sum(value.numel() for value in transformers.AutoModelForCausalLM.from_pretrained(base).parameters())
    assert summary["trainable_parameters"] == full if kind != "lora" else summary["trainable_parameters"] < full

    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(STEPS)]
    assert (workdir / "tensorboard").exists() == (kind == "full")
    said = [json.loads(line) for line in (workdir / "samples.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [(row["step"], row["prompt"]) for row in said] == ([(n, PROMPT) for n in (0, 3, 6)] if kind == "sft" else [])
    assert not [path for path in workdir.rglob("*") if "partial" in path.name or path.name.startswith(".")]


@pytest.mark.rule(1)
@pytest.mark.parametrize("kind", ["sft", "lora"])
def test_transformers_and_peft_open_the_export_and_find_the_losses_that_were_logged(base, runs, kind):
    model, tokenizer = opened(base, runs[kind] / "export")
    for name, examples in (("pairs", PAIRS), ("text", TEXTS)):
        last = rows(runs[kind], f"eval/{name}/loss")[-1][f"eval/{name}/loss"]
        assert torch_loss(model, tokenizer, examples[-16:]) == pytest.approx(last, abs=1e-4)


def test_the_readmes_commands_do_what_it_says_of_them(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_rows(tmp_path / "mine.jsonl", PAIRS[:24])
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "").replace("org/name-or-folder", str(base))
    commands = [shlex.split(line)[1:] for line in re.findall(r"^specjax .* --.*", text, re.MULTILINE)]
    assert [verb for verb, *_ in commands] == ["data", "train", "generate", "export"]
    short = [f"--config.{key}" for key in ("data.length=64", "steps=1", "batch_size=8", "data.eval_fraction=0")]
    short.append("--config.optimizer.warmup_steps=0")
    more = {"data": short, "train": short, "generate": ["--max_new_tokens=4"]}
    for verb, *argv in commands:
        assert specjax(verb, *argv, *more.get(verb, ())) == 0, verb
    assert "loss tokens" in capsys.readouterr().out
    opened(base, tmp_path / "runs" / "mine" / "export")
    assert not list((tmp_path / "mine-merged").glob("adapter*")) and opened(base, tmp_path / "mine-merged")


@pytest.mark.parametrize("kind", ["sft", "lora"])
def test_the_export_has_a_model_card_of_the_hubs_form(base, runs, kind):
    card = huggingface_hub.ModelCard.load(runs[kind] / "export" / "README.md")
    adapter = kind == "lora"
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert (
        card.data.license == "apache-2.0" and "base_model" not in card.data.to_dict()
    )  # a folder is none of the hub's
    assert "specjax" in card.data.tags and card.data.pipeline_tag == "text-generation"
    report = json.loads((runs[kind] / "data.json").read_text())
    for name, part in report.items():
        counts = " | ".join(f"{part[key]:,}" for key in ("rows", "documents", "tokens", "loss_tokens"))
        assert f"| {name} | {Path(part['source']).name} | {counts} |" in card.text
    logged = rows(runs[kind], "eval/pairs/loss")
    assert f"| pairs | loss | {logged[0]['eval/pairs/loss']:.4f} | {logged[-1]['eval/pairs/loss']:.4f} |" in card.text
    assert ("lora.rank: 16" in card.text) == ("PeftModel" in card.text) == adapter
    assert f"step {STEPS}, 8 rows of 64 tokens per step" in card.text and "learning_rate: 0.0" in card.text
    assert str(base.parent) not in card.content  # nothing of the machine's


def test_a_cards_losses_are_of_the_step_that_is_exported():
    evals = [{"step": step, "eval/pairs/loss": 3.0 - step} for step in (0, 1, 2)]
    assert [*_losses(evals, 1)][2:] == ["| pairs | loss | 3.0000 | 2.0000 |"] and not [*_losses(evals, 3)]


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: mit\nlanguage: fr\n---\n# Base\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: x\nlicense_link: y\n---\n", dict.fromkeys(LICENCE) | {"license": "other"}),
        ("# no metadata", {}),
        ("---\nlicense: [a\n---\n", {}),
        ("---\nlicense: {a: b}\n---\n", {}),
        (None, {}),
    ],
)
def test_the_bases_licence_is_read_from_its_own_card(tmp_path, readme, licence):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    found = base_licence(tmp_path)
    assert found.keys() == licence.keys() and found.get("license") == licence.get("license")


def test_mfu_is_counted_where_the_peak_is_known_and_a_trace_is_written_where_it_is_asked_for(
    base, runs, tmp_path, monkeypatch, capsys
):
    for row in rows(runs["full"], "loss"):
        assert row["tokens_per_s_per_device"] == pytest.approx(row["tokens_per_s"] / 8) and "mfu" not in row
    monkeypatch.setattr(flops, "PEAKS", {"cpu": 1e12})
    short = {"steps": 4, "log.every": 1, "data.eval_fraction": 0}
    with on_devices(8):
        assert specjax("train", *flags(base, tmp_path / "run", "lora", **short), "--profile") == 0
    said = capsys.readouterr().out
    assert "FLOPs per token (remat not counted) / (8 x 1e+12 FLOP/s of cpu)" in said and "traced up to step 4" in said
    a_token = float(re.search(r"x (\S+) FLOPs per token", said)[1])
    for row in rows(tmp_path / "run", "loss"):
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * a_token / 8e12, rel=0.01)
    assert [path.suffix for path in (tmp_path / "run" / "profile").rglob("*.pb")] == [".pb"]


def test_without_an_eval_set_rows_are_held_out_and_never_trained_on(base, runs):
    config = load_config_file(str(runs["full"] / "config.json"))
    _, tokenizer = build.tokenizer_of(config)
    train_data, eval_data = build.data_of(config, tokenizer)
    data = {"train": train_data, **eval_data}
    report = json.loads((runs["full"] / "data.json").read_text())
    texts = {}
    for name, part in data.items():
        assert report[name]["fingerprint"] == part.fingerprint
        ids = [part.tokens[start:stop] for start, stop in pairwise(part.offsets)]
        texts[name] = sorted(tokenizer.batch_decode(ids, skip_special_tokens=True))
    assert len(texts["heldout"]) == 2
    assert sorted(texts["train"] + texts["heldout"]) == sorted(row["text"] for row in TEXTS[:-16])
    model, tokenizer = opened(base, runs["full"] / "export")
    [*_, last] = rows(runs["full"], "eval/heldout/loss")
    found = torch_loss(model, tokenizer, [{"text": text} for text in texts["heldout"]])
    assert found == pytest.approx(last["eval/heldout/loss"], abs=1e-4)


@pytest.fixture(scope="module")
def worse(base):
    """A run that gets better, then worse, and stops."""
    workdir = base.parent / "worse"
    rate = {"optimizer.learning_rate": 0.2, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
    argv = flags(base, workdir, "lora", **rate, **{"eval.every": 1, "eval.patience": 1, "optimizer.clip_norm": 0.0})
    assert specjax("train", *argv) == 0
    return workdir, argv


def test_a_run_that_gets_worse_stops_and_its_best_checkpoint_is_what_is_exported(base, worse, tmp_path, capsys):
    workdir, argv = worse
    losses = [row["eval/heldout/loss"] for row in rows(workdir, "eval/heldout/loss")]
    assert losses[1] < losses[0] and losses[2] > losses[1] and len(losses) == 3
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["step"], summary["best_step"], summary["stopped"]) == (2, 1, "patience")
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]
    found = run.evaluate(load_config_file(str(workdir / "config.json")), workdir)
    assert found["heldout"]["loss"] == pytest.approx(losses[1], rel=1e-6)
    for step in (1, 2):
        assert specjax("export", f"--workdir={workdir}", f"--out={tmp_path / str(step)}", f"--step={step}") == 0
    assert tree(tmp_path / "1") == tree(workdir / "export")
    assert tree(tmp_path / "2") != tree(workdir / "export")
    assert specjax("export", f"--workdir={workdir}", f"--out={tmp_path / 'x'}", "--step=3") == 2
    assert "no checkpoint '3': there are 1, 2;" in capsys.readouterr().err
    before = tree(workdir)
    assert specjax("train", *argv) == 0
    assert "the run was complete after 2 steps" in capsys.readouterr().out
    assert tree(workdir) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_says_so_before_anything_is_made_and_changes_nothing(base, runs, kind, capsys, monkeypatch):
    before = tree(runs[kind])
    monkeypatch.setattr(run, "build", None)  # what makes tokenizer, data, model and optimizer
    monkeypatch.setattr(run, "fit", None)
    assert specjax("train", *job(base, runs[kind], kind)) == 0
    assert "the run was complete after 6 steps, nothing was trained" in capsys.readouterr().out
    assert tree(runs[kind]) == before


def test_another_config_is_refused_and_the_keys_are_named(base, runs, capsys):
    before = tree(runs["lora"])
    changed = ("--config.optimizer.learning_rate=0.5", "--config.lora.rank=4")
    assert specjax("train", *job(base, runs["lora"], "lora"), *changed) == 2
    said = capsys.readouterr().err
    assert "optimizer.learning_rate (was 0.02, now 0.5)" in said
    assert "lora.rank (was 16, now 4), lora.alpha (was 32.0, now 8.0)" in said
    assert tree(runs["lora"]) == before
    # What cannot change the result may change.
    assert specjax("train", *job(base, runs["lora"], "lora"), "--config.log.every=1") == 0


@pytest.fixture(scope="module")
def stopped(base):
    """The LoRA run in a process that got SIGTERM after its first steps: (exit status, its output, workdir)."""
    workdir = base.parent / "stopped"
    command = [sys.executable, "-u", "-m", "specjax", "train", *job(base, workdir, "lora"), "--config.log.every=1"]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGTERM)
    return process.returncode, "".join(lines), workdir


def test_sigterm_saves_and_ends_with_143(stopped):
    status, out, workdir = stopped
    assert status == 143, out
    assert "stopped by a signal at step" in out
    assert "Traceback" not in out
    assert any((workdir / "checkpoints").iterdir())
    assert not (workdir / "summary.json").exists()
    assert not (workdir / "export").exists()


def test_a_stopped_run_goes_on_with_its_own_base_alone_and_ends_as_if_never_stopped(base, stopped, runs, capsys):
    workdir, kept = stopped[2], base.parent / "kept"
    again = [*job(base, workdir, "lora"), "--config.log.every=1"]
    before = tree(workdir)
    base.rename(kept)
    try:
        write_base(base, seed=1)
        for verb, argv in (("train", again), ("export", [f"--workdir={workdir}", f"--out={base.parent / 'no'}"])):
            assert specjax(verb, *argv) == 2
            said = capsys.readouterr().err.strip()
            assert said.count("\n") == 0
            assert "base" in said and "fingerprint" in said and "restore" in said
    finally:
        shutil.rmtree(base)
        kept.rename(base)
    assert not (base.parent / "no").exists()
    assert {path: tree(workdir)[path] for path in before} == before

    assert specjax("train", *again) == 0
    assert "resumed at step" in capsys.readouterr().out
    whole = metrics(runs["lora"])
    assert [row for row in metrics(workdir) if "eval/pairs/loss" in row] == [r for r in whole if "eval/pairs/loss" in r]
    assert metrics(workdir)[-2]["loss"] == whole[-2]["loss"]
    export = "export/adapter_model.safetensors"
    assert (workdir / export).read_bytes() == (runs["lora"] / export).read_bytes()


def test_a_run_goes_on_with_the_same_batches_computed_otherwise(base, runs, tmp_path, capsys, monkeypatch):
    workdir, how = tmp_path / "run", {"mesh.tensor": 2, "accumulate": 2, "model.remat": "full"}
    with monkeypatch.context() as patch:
        patch.setattr(fit._Stop, "__call__", lambda self, done: done == 3)
        assert specjax("train", *job(base, workdir, "lora")) == 143
    argv = [*job(base, workdir, "lora"), *(f"--config.{key}={value}" for key, value in how.items())]
    before = tree(workdir)
    for key, value in (("batch_size", 16), ("lora.dropout", 0.1), ("eval.batches", 1)):
        with on_devices(8):
            assert specjax("train", *argv, f"--config.{key}={value}") == 2
        said = capsys.readouterr().err
        assert f"holds a run with another config: {key} (was " in said or f", {key} (was" in said
        assert ("accumulate" in said) == (key != "batch_size") and "remat" not in said
    assert tree(workdir) == before
    with on_devices(8):
        assert specjax("train", *argv) == 0
    said = capsys.readouterr().out
    assert "goes on with another accumulate, mesh.tensor, model.remat: the same batches" in said
    devices = "on 8 devices (fsdp=4, tensor=2); before it was 1 device"
    assert f"resumed at step 3, {devices}" in " ".join(said.split())
    for row, whole in zip(metrics(workdir), metrics(runs["lora"]), strict=True):
        assert row == pytest.approx(whole, rel=1e-4)


def test_a_run_keeps_the_steps_that_it_was_started_with(tmp_path):
    config, rows = get_config(), Data(*[np.zeros(15, kind) for kind in (np.int32, bool)], np.arange(16), tokenizer=None,
                                      length=1, batch_size=8)  # fmt: skip
    config.epochs = 3.0
    assert resume.steps(tmp_path, config, rows) == 6
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    for report, wanted in (({}, 3), ({"steps": 6}, 6), ({"steps": 5}, 5)):  # the first, of specjax 0.1, says none
        (tmp_path / "data.json").write_text(json.dumps({"train": report}))
        assert resume.steps(tmp_path, config, rows) == wanted
    (tmp_path / "data.json").unlink()
    with pytest.raises(UserError, match=r"data.json cannot be read .*restore it"):
        resume.steps(tmp_path, config, rows)


def test_micro_batches_of_experts_are_part_of_the_result(tmp_path):
    config = get_config()
    resume.check_model(tmp_path, {}, tmp_path, config)
    changed = {"accumulate": (1, 2)}
    for family, given, refused in (("mixtral", 0.1, True), ("mixtral", 0.0, False), ("llama", None, False)):
        made = torch_model(family=family)
        made.config.architectures = [type(made).__name__]
        made.config.save_pretrained(tmp_path)
        config.model.router_aux_coef = given
        with pytest.raises(UserError, match="accumulate 1, now 2") if refused else nullcontext():
            resume.check_model(tmp_path, changed, tmp_path, config)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_eval_finds_what_the_run_logged_last(base, runs, kind, capsys):
    with on_devices(DEVICES[kind]):
        found = run.evaluate(load_config_file(str(runs[kind] / "config.json")), runs[kind])
    printed = capsys.readouterr().out
    for name, values in found.items():
        [*_, last] = rows(runs[kind], f"eval/{name}/loss")
        for key, value in values.items():
            assert value == pytest.approx(last[f"eval/{name}/{key}"], rel=1e-6)
        assert name in printed and f"{values['loss']:.4f}" in printed


def test_export_writes_the_adapter_or_the_merged_model(base, runs, tmp_path, capsys):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert specjax("export", f"--workdir={runs['lora']}", f"--out={adapter}") == 0
    assert tree(adapter) == tree(runs["lora"] / "export")
    with on_devices(8):
        assert specjax("export", f"--workdir={runs['lora']}", f"--out={merged}", "--merge") == 0
    assert not (merged / "adapter_config.json").exists()
    whole, tokenizer = opened(base, merged)
    worn, _ = opened(base, adapter)
    tokens = torch.tensor([tokenizer(PROMPT * 4)["input_ids"]])
    with torch.no_grad():
        found, wanted = whole(tokens).logits.numpy(), worn(tokens).logits.numpy()
        bare = transformers.AutoModelForCausalLM.from_pretrained(base)(tokens).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found - bare).max() > 0.1
    assert specjax("export", f"--workdir={runs['sft']}", f"--out={tmp_path / 'x'}", "--merge") == 2
    assert "there is no adapter to merge" in capsys.readouterr().err
    half = tmp_path / "half"
    assert specjax("export", f"--workdir={runs['lora']}", f"--out={half}", "--merge", "--dtype=bfloat16") == 0
    for name, value in load_file(half / "model.safetensors").items():
        np.testing.assert_array_equal(value, load_file(merged / "model.safetensors")[name].astype("bfloat16"))
    assert specjax("export", f"--workdir={runs['lora']}", f"--out={tmp_path / 'x'}", "--dtype=bfloat16") == 2
    assert "which is written in float32: leave --dtype out, or give --merge" in capsys.readouterr().err


def answers(capsys, *argv: object) -> list[str]:
    capsys.readouterr()
    assert specjax("generate", f"--prompt={PROMPT}", "--max_new_tokens=8", *argv) == 0
    return capsys.readouterr().out.splitlines()


def test_generate_answers_from_a_run_a_folder_and_a_base_with_adapters(base, runs, worse, capsys):
    adapters = (f"--adapter=hr={runs['lora'] / 'export'}", f"--adapter=worse={worse[0] / 'export'}")
    with on_devices(8):
        from_run = answers(capsys, f"--model={runs['lora']}")
    from_base = answers(capsys, f"--model={base}", *adapters)
    heads = [f"--- [{name}] {PROMPT}" for name in ("hr", "worse")]
    place = from_base.index(heads[1])
    assert [from_base[0], from_base[place]] == heads
    assert from_base[1:place] == from_run != from_base[place + 1 :]
    asked = ("--prompt=@worse What?", "--prompt=@base What?", *adapters)
    addressed = answers(capsys, f"--model={base}", *asked)
    assert [line for line in addressed if line.startswith("--- ")] == [*heads, "--- [worse] What?", "--- [base] What?"]
    assert addressed[: len(from_base)] == from_base
    # What another run logged: the base's answer before the first step, its own after the last.
    said = [
        json.loads(line)["text"].splitlines()
        for line in (runs["sft"] / "samples.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    assert from_run != said[0] != said[-1]
    assert answers(capsys, f"--model={runs['sft'] / 'export'}") == said[-1]


def test_adapters_of_another_base_are_refused_by_its_fingerprint_else_told(base, runs, tmp_path, capsys):
    def copied(name, fingerprint, config):
        shutil.copytree(runs["lora"] / "export", tmp_path / name)
        (tmp_path / name / "base.json").write_text(json.dumps(fingerprint))
        told = tmp_path / name / "adapter_config.json"
        told.write_text(json.dumps(json.loads(told.read_text()) | config))
        return f"--adapter={tmp_path / name}"

    flags = (f"--model={base}", f"--prompt={PROMPT}", "--max_new_tokens=1")
    other = copied("other", {"fingerprint": "0" * 32}, {"base_model_name_or_path": "org/other"})
    assert specjax("generate", other, *flags) == 2
    assert "was trained on other weights than those of" in (said := capsys.readouterr().err)
    assert "on org/other (fingerprint 000" in said and "give --model=org/other" in said
    unknown = copied("unknown", {}, {}), copied("third", {}, {"base_model_name_or_path": "org/third"})
    assert specjax("generate", *unknown, *flags) == 0
    said = capsys.readouterr().err
    assert f"name different bases (unknown on {base}, third on org/third); their shapes fit" in said


def test_data_prints_counts_and_what_is_trained(base, capsys):
    argv = [flag for flag in flags(base, base, "sft", **sets(base)) if not flag.startswith("--workdir")]
    assert specjax("data", *argv) == 0
    out = capsys.readouterr().out
    counts = " ".join(out.split())
    for text in ("rows read 80", "documents 80", "loss tokens", "packed rows", "a turn ends with <|im_end|>"):
        assert text in counts
    assert "instruction=instruction response=response" in out
    question, answer = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n", "⟦{response}<|im_end|>\n⟧"
    assert any((question + answer).format(**row) in out for row in PAIRS[:-16])
    assert out.count("rows read") == 3 and "warmup" not in out
    assert specjax("data", *argv, "--config.steps=0", "--config.optimizer.warmup_steps=50") == 0
    assert "does not get past its warmup of 50 steps" in " ".join(capsys.readouterr().out.split())


def test_data_shows_the_rows_that_are_asked_for(base, capsys):
    argv = [f"--config={ROOT}/configs/lora.py", f"--config.model.path={base}", "--config.data.length=64"]
    argv.append(f"--config.data.train={base.parent / 'data' / 'pairs.jsonl'}")
    assert specjax("data", *argv, "--rows=5,0") == 0
    out = capsys.readouterr().out
    assert [line.split(",")[0] for line in out.splitlines() if line.startswith("row ") and " 1 of" in line] == [
        "row 5",
        "row 0",
    ]
    assert "rows read" not in out and "⟦" in out
    for rows, said in (("5;6", "--rows=5;6: give numbers"), ("99999", "--rows=99999: the rows are 0 to ")):
        assert specjax("data", *argv, f"--rows={rows}") == 2
        assert said in capsys.readouterr().err


def test_compare_trains_each_method_as_train_does_and_prints_one_table(base, runs, tmp_path, capfd):
    config = tmp_path / "both.py"
    config.write_text(
        "from specjax.config import get_config as defaults\n\n\n"
        "def get_config():\n"
        "    config = defaults()\n"
        "    config.compare.sft = {'optimizer': {'learning_rate': 1e-2, 'weight_decay': 0.01}}\n"
        "    config.compare.lora = {'trainable': 'lora', 'lora': {'rank': 16}, 'optimizer': {'learning_rate': 2e-2}}\n"
        "    return config\n"
    )
    [_, workdir, *rest] = job(base, tmp_path / "out", "sft")
    rest = [flag for flag in rest if "learning_rate" not in flag]
    assert specjax("compare", f"--config={config}", workdir, *rest, "--config.eval.answers=1") == 0
    out = capfd.readouterr().out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(found) == ["sft", "lora"]
    for name, summary in found.items():
        assert summary == json.loads((tmp_path / "out" / name / "summary.json").read_text())
        assert f"{summary['trainable_parameters']:,}" in out
        loss = summary["evals"]["pairs"]
        assert f"{loss['before']:.3f} -> {loss['after']:.3f}" in out
        # Another process, on another day: the same numbers and the same bytes.
        assert metrics(tmp_path / "out" / name) == metrics(runs[name])
        for file in (tmp_path / "out" / name / "export").glob("*.safetensors"):
            assert file.read_bytes() == (runs[name] / "export" / file.name).read_bytes()
    assert found["lora"]["saved_bytes"] < found["sft"]["saved_bytes"]
    [*_, answer] = out.rpartition(f"\n{PROMPT}\n")
    assert [line.split()[0] for line in answer.splitlines() if line.startswith("  ")] == ["base", "sft", "lora"]


def test_a_mixture_of_experts_is_trained_with_its_balancing_loss_and_opens_in_transformers(tmp_path, capsys):
    write_data(tmp_path / "data")
    base = write_base(tmp_path / "base", family="mixtral")
    wanted = {"model.router_aux_coef": 0.1, "mesh.expert": 2, **sets(base), "eval.best": "pairs"}
    workdir = tmp_path / "run"
    with on_devices(4):
        assert specjax("train", *flags(base, workdir, "sft", **wanted)) == 0
    balance = [row["router_loss"] for row in rows(workdir, "router_loss")]
    assert balance and all(2 <= value < 4 for value in balance)  # 2 experts of 4: evenly chosen, it is 2
    assert "router_loss" not in rows(workdir, "eval/pairs/loss")[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(workdir / "export")
    found = torch_loss(model, tokenizer, PAIRS[-16:])
    best = min(row["eval/pairs/loss"] for row in rows(workdir, "eval/pairs/loss"))
    np.testing.assert_allclose(found, best, rtol=1e-4)


def test_a_dense_model_has_no_experts_to_balance(base, tmp_path, capsys):
    given = flags(base, tmp_path / "run", "sft", **{"model.router_aux_coef": 0.1})
    assert specjax("train", *given) == 2
    assert "config.model.router_aux_coef is set, but" in capsys.readouterr().err
