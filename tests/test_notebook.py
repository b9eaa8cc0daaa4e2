import json
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from helpers import sizes, torch_logits, xla_flags
from nbclient import NotebookClient

import specjax as sj
from demo.tokenizer import train_tokenizer
from specjax.hf.config import from_hf
from specjax.hf.load import random
from specjax.hf.tokenizer import load_tokenizer
from specjax.models import Origin

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
VOCABULARY = 400


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def base(tmp_path) -> Path:
    """A tiny random Hugging Face folder with a tokenizer and a chat template."""
    lines = [line for path in sorted((ROOT / "specjax").glob("*.py")) for line in path.read_text().splitlines()]
    train_tokenizer(lines, tmp_path / "tokenizer", vocabulary=VOCABULARY)
    config_json = sizes(vocab_size=VOCABULARY, max_position_embeddings=512)
    model = random(from_hf(config_json), seed=0)
    model.origin = Origin(config_json=config_json)
    sj.export(model, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "base")
    return tmp_path / "base"


def printed(notebook, cell: str) -> str:
    outputs = next(c for c in notebook.cells if c.id == cell).outputs
    return "".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)


def test_the_notebook_is_committed_as_colab_opens_it_and_without_outputs(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


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
