import json
import os
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
from helpers import on_devices, sizes, torch_logits, xla_flags
from nbclient import NotebookClient

import specjax as sj
from demo.tokenizer import train_tokenizer
from specjax.compare import child, record
from specjax.config import get_config, merge
from specjax.hf.config import from_hf
from specjax.hf.load import random
from specjax.hf.tokenizer import load_tokenizer
from specjax.models import Origin

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
VOCABULARY = 400


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny random Hugging Face folder with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("base")
    lines = [line for path in sorted((ROOT / "specjax").glob("*.py")) for line in path.read_text().splitlines()]
    train_tokenizer(lines, folder / "tokenizer", vocabulary=VOCABULARY)
    config_json = sizes(vocab_size=VOCABULARY, max_position_embeddings=512)
    model = random(from_hf(config_json), seed=0)
    model.origin = Origin(config_json=config_json)
    sj.export(model, load_tokenizer(folder / "tokenizer"), folder / "base")
    return folder / "base"


def printed(notebook, cell: str) -> str:
    outputs = next(c for c in notebook.cells if c.id == cell).outputs
    return "".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_colab_opens_it_without_outputs_and_installs_as_the_first_does(path, notebook):
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    assert found.nbformat == 4
    assert found.metadata.kernelspec.name == "python3"
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert len(code) > 5 and all(not cell.outputs and cell.execution_count is None for cell in code)
    [install] = [cell.source for cell in code if cell.id == "install"]
    assert install == next(cell.source for cell in notebook.cells if cell.id == "install")
    assert any("plt.show()" in cell.source for cell in code)
    if path != NOTEBOOK:
        assert len(found.cells) <= 16 and any("## What to see" in cell.source for cell in found.cells)


def executed(name, base, folder, monkeypatch, **settings):
    """What a notebook's code cells leave, run here one after the other on the tiny base; plots are drawn, not shown."""
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(folder)
    for key, value in ({"MODEL": base, "STEPS": 4, "LENGTH": 128} | settings).items():
        monkeypatch.setenv(f"SPECJAX_NOTEBOOK_{key}", str(value))
    found = {"__name__": name}
    for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch's and PEFT's, of each other
                exec(compile(cell.source, f"{name}.ipynb:{cell.id}", "exec"), found)
    assert found["axis"].has_data()
    return found


def test_many_adapters_are_trained_in_one_run_and_answer_in_one_batch(base, tmp_path, monkeypatch):
    found = executed("many_adapters", base, tmp_path, monkeypatch)
    assert len(found["axis"].lines) == 3 and len(found["texts"]) == 4
    assert all(len(line.get_xdata()) == 4 for line in found["axis"].lines)
    saved = {path.parent.name for path in tmp_path.glob("runs/many_adapters/adapter/*/adapter_model.safetensors")}
    assert saved == set(found["domains"])


def test_what_is_converted_is_the_same_in_transformers_and_peft(base, tmp_path, monkeypatch):
    found = executed("convert_to_hf", base, tmp_path, monkeypatch)
    assert found["same"] and found["before"].keys() == found["after"].keys()
    changed = found["differences"].pop("what the adapter changes")
    assert len(found["differences"]) == 3 and changed.max() > 1e-2
    assert max(values.max() for values in found["differences"].values()) < 1e-4


def test_methods_are_compared_each_at_its_own_best_rate(base, tmp_path, monkeypatch):
    def here(target, settings, workdir, name, twin):  # each in this process, which has imported everything
        record.record(merge(get_config(), settings), Path(workdir), name, twin)
        return 0, "done", ""

    monkeypatch.setattr(child, "run", here)
    with on_devices(1):
        found = executed("compare_methods", base, tmp_path, monkeypatch)
    assert [one["status"] for one in found["report"]["methods"]] == ["done", "done"]
    assert all(len(one["trials"]) == 2 for one in found["report"]["methods"])
    assert [len(line.get_xdata()) for line in found["axis"].lines[:2]] == [5, 5]
    assert (tmp_path / "runs" / "compare_methods" / "report.html").is_file()


def test_a_pod_is_planned_from_shapes_alone(base, tmp_path, monkeypatch):
    found = executed("plan_a_pod", base, tmp_path, monkeypatch, TARGETS="cpu:1,cpu:2")
    alone, two = (plan["bytes_per_device"]["frozen"] for plan in found["plans"])
    assert two < 0.6 * alone and len(found["axis"].patches) == 10


def test_the_notebook_runs_from_a_base_to_an_export_that_transformers_opens(notebook, base, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setenv("SPECJAX_NOTEBOOK_MODEL", str(base))
    monkeypatch.setenv("SPECJAX_NOTEBOOK_STEPS", "6")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))  # one device, as on most machines that run notebooks
    work = tmp_path / "work"
    work.mkdir()
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}})
    client.execute()

    assert "the same bits: True" in printed(notebook, "load")
    assert "image/png" in next(c for c in notebook.cells if c.id == "plot").outputs[-1].data
    run = work / "runs" / "quickstart"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/heldout/loss"] for row in rows if "eval/heldout/loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (run / "adapter").iterdir()}

    tokens = np.arange(60, dtype=np.int32)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "merged", dtype="float32")
    base_model, _ = sj.load(base, dtype="float32")
    ours, tokenizer = sj.load(run / "merged", dtype="float32")
    np.testing.assert_allclose(torch_logits(theirs, tokens), ours(tokens), atol=1e-4)
    assert np.abs(np.asarray(ours(tokens)) - np.asarray(base_model(tokens))).max() > 1e-3, "the merge changed nothing"
    assert tokenizer.chat_template
