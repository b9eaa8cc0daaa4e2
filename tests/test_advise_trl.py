"""The script that `specjax advise --write=trl` writes: specjax's course, step by step, without specjax."""

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import metrics

from specjax import build, fit, lora
from specjax.advise import trl
from specjax.advise.report import advise
from specjax.cli import main
from specjax.data.batches import shuffled
from specjax.data.pack import plan
from specjax.errors import UserError

BASE = str(Path(__file__).parent.parent / "demo" / "base")
STEPS = 10
ASKED = {"instruction": "What is {n}?", "response": "The number {n}, which comes after {before}."}
ROWS = {
    "instruct": [{**ASKED, "input": "Be short." if n % 2 else ""} for n in range(40)],
    "messages": [
        {"messages": [{"role": who, "content": f"{{n}} {who}."} for who in ("system", *("user", "assistant") * 2)]}
        for _ in range(40)
    ],
    "conversations": [{"conversations": [{"from": "human", "value": "{n}?"}, {"from": "gpt", "value": "{n}."}]}] * 20,
    "prompt": [{"prompt": "{n} and one is", "completion": " more than {n}."}] * 20,
    "text": [{"text": "The number {n} is a number. " * (200 if n == 7 else 20)} for n in range(20)],
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Rows of every kind, and no cache of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for kind, rows in ROWS.items():
        lines = [json.dumps(row).replace("{n}", str(n)).replace("{before}", str(n - 1)) for n, row in enumerate(rows)]
        Path(f"{kind}.jsonl").write_text("\n".join(lines) + "\n")


def advised(kind):
    """The advice for rows of a kind: the config, and the names of the script, whose `main` was not run."""
    config = advise(f"{kind}.jsonl", BASE, write="trl")
    script = {"__name__": "script"}
    exec(Path("advised_trl.py").read_text(), script)
    return config, script


@pytest.mark.parametrize("kind", ROWS)
def test_the_script_has_specjaxs_rows_in_specjaxs_order(kind):
    config, script = advised(kind)
    _, tokenizer = build.tokenizer_of(config)
    train, sets = build.data_of(config, tokenizer)
    rows, steps, held_out = script["data"](tokenizer)
    assert steps == train.steps(config.epochs) and len(rows) == steps * config.batch_size

    def spoken(batch):
        """(tokens of a row, targets that count of these) as the script has them."""
        for tokens, counts, segments in zip(batch["tokens"], batch["loss_mask"], batch["segment_ids"], strict=True):
            inside = segments > 0
            yield tokens[inside].tolist(), int(counts.sum()), np.bincount(segments[inside])[1:].tolist()

    def theirs(row):
        starts = np.cumsum([0, *row["seq_lengths"]])
        counts = sum(label >= 0 for at, label in enumerate(row["labels"]) if at not in starts)
        if kind == "text":  # a piece that goes on elsewhere has the next piece's first token too
            pieces = [row["input_ids"][a:b][: config.data.length] for a, b in zip(starts[:-1], starts[1:], strict=True)]
            return [token for piece in pieces for token in piece], counts, [len(piece) for piece in pieces]
        return row["input_ids"], counts, row["seq_lengths"]

    ours = [row for step in range(steps) for row in spoken(train.batch(step))]
    assert [theirs(row) for row in rows] == ours
    once = [row for batch in sets["heldout"].once() for row in spoken(batch)][: sets["heldout"].num_rows]
    assert [theirs(row) for row in held_out["heldout"]] == once


def test_the_script_reads_files_as_specjax_does(tmp_path):
    _, script = advised("instruct")
    odd = {"instruction": "a\u2028b\x85c", "response": "x" * (1 << 18)}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "odd.csv").write_text(f"instruction,response\na\u2028b,{odd['response']}\n", encoding="utf-8")
    limit = csv.field_size_limit()
    for name in ("odd.jsonl", "odd.csv"):
        trl._compare_reading(script["read"], str(tmp_path / name))
        assert csv.field_size_limit() == limit  # of the whole process
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UserError, match="lines.json by the plain code of the script"):
        trl._compare_reading(script["read"], str(tmp_path / "lines.json"))
    (tmp_path / "two.json").write_text('{"names": ["x"], "rows": [{"a": 1}]}')
    with pytest.raises(UserError, match="is other rows by the plain code of the script, from row 1 on"):
        trl._compare_reading(script["read"], str(tmp_path / "two.json"))


def test_the_scripts_packing_and_order_are_specjaxs(tmp_path):
    _, script = advised("prompt")
    sizes = np.random.default_rng(0).integers(1, 65, 500)
    ours = plan(np.append(0, np.cumsum(sizes)), 64)
    starts = np.cumsum(sizes) - sizes
    theirs = [[int(starts[piece]) for piece in row] for row in script["packed"](sizes.tolist(), 64, True)]
    assert theirs == [ours.starts[slice(*ours.rows[row : row + 2])].tolist() for row in range(len(theirs))]
    for seed, epoch in ((0, 0), (3, 2)):
        assert script["shuffled"](97, seed, epoch) == shuffled(97, seed, epoch).tolist()


@pytest.mark.parametrize("kind, trainable", [("instruct", "lora"), ("text", "all")])
def test_ten_steps_of_the_script_have_specjaxs_losses(kind, trainable, tmp_path):
    import torch
    import transformers

    config, script = advised(kind)
    config.batch_size, config.model.dtype, config.data.length = 2, "float32", 96
    wanted = {"STEPS": STEPS, "BATCH_SIZE": 2, "LENGTH": 96, "LOG_EVERY": 1, "EVAL_EVERY": 0}
    if trainable == "all":
        for key in ("rank", "alpha", "targets"):
            config.lora[key] = None
        config.trainable, config.optimizer.learning_rate = "all", 1e-3
        wanted |= {"RANK": 0, "LEARNING_RATE": 1e-3}
    folder, tokenizer = build.tokenizer_of(config)
    data, model = build.train_data_of(config, tokenizer), build.model_of(config, folder, None)
    if trainable == "lora":  # both from one draw of the factors
        lora.save(model, tmp_path / "start")
        wanted["START_FROM"] = str(tmp_path / "start")
    script.update(wanted)
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = script["main"]()
    finally:
        torch.set_num_threads(threads)
    fitted = {"steps": STEPS, "trainable": build.filter_of(config), "accumulate": 2, "log_every": 1}
    fit(model, data, build.optimizer_of(config, STEPS), workdir=tmp_path / "ours", tensorboard=False, **fitted)
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    ours = [row for row in metrics(tmp_path / "ours") if "loss" in row]
    losses = np.array([[row["loss"] for row in rows] for rows in (ours, theirs)])
    print(f"losses differ by {np.abs(losses[0] / losses[1] - 1).max():.1e}")
    assert losses.shape == (2, STEPS) and losses[0, -1] < losses[0, 0] - 0.3
    np.testing.assert_allclose(*losses, rtol=1e-4)
    rates = [[row["lr"] for row in ours], [row["learning_rate"] for row in theirs]]
    np.testing.assert_allclose(*rates, rtol=1e-6)
    saved = "adapter_model.safetensors" if trainable == "lora" else "model.safetensors"
    assert Path("runs/advised_trl", saved).exists()


PREFERENCES = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(9)]
HISTORY = [{"prompt": "a", "completion": "b", "history": [["c", "d"]]}] * 9
SETS = ("--config.data.eval.own=rows.jsonl", "--config.data.eval.other=text.jsonl")


@pytest.mark.parametrize(
    "rows, more, said",
    [
        (PREFERENCES, (), "the data are preference pairs"),
        (ROWS["text"], ("--hardware=v5e:2x2",), "--hardware=v5e:2x2 is a TPU"),
        (ROWS["prompt"], ("--config.data.overlong=truncate",), "config.data.overlong is 'truncate'"),
        (ROWS["prompt"], SETS, "eval.other has"),
        (HISTORY, ("--config.data.template=zephyr",), "rows.jsonl:1"),
    ],
)  # fmt: skip
def test_what_trl_cannot_do_is_a_sentence_and_nothing_is_written(rows, more, said, capsys):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(("advise", "--data=rows.jsonl", f"--model={BASE}", "--write=trl", *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("specjax: --write=trl can't be: ") and err.count("\n") == 1
    assert said in err and not Path("advised_trl.py").exists()
