"""`specjax families`: what is supported, and how near to transformers and PEFT it was seen to be."""

import json
from importlib.resources import files
from typing import Any

from rich.console import Console
from rich.table import Table

# Published weights that were run too (tests/test_real.py), by the row that speaks for them.
PUBLISHED = {"Llama 3.2; SmolLM (tied)": "SmolLM2-135M-Instruct", "Gemma 3 text": "gemma-3-270m"}

WIDE = 160  # columns of a terminal that has room for the figures

NOTE = """Every row is verified on random weights; the column "published" says which published ones were run too.
Random small models against transformers and PEFT, float32, 493 tokens. logits, packed, adapter, merge: the
greatest difference of a logit; gradients: of five weights' gradients, by the greatest element; bf16: relative error of
the bfloat16 logits; greedy: of 256 tokens, how many are transformers' own; files: loaded and exported again, the same
bytes. `make parity` measures it anew, docs/parity.md says how."""


def rows() -> list[dict[str, Any]]:
    """The figures of `make parity`, one dict per kind of model."""
    return json.loads(files("specjax").joinpath("parity.json").read_text(encoding="utf-8"))


def show() -> None:
    """Prints the table; in a narrow terminal without its figures, which would leave no room for the names."""
    console = Console()
    figures = "logits bf16 gradients packed greedy files adapter merge".split() if console.width >= WIDE else []
    table = Table("models", "architecture", *figures, "published")
    table.columns[1].overflow = "fold"
    for row in rows():
        shown = {name: f"{row[name]:.0e}" for name in ("logits", "gradients", "packed", "adapter", "merge")}
        shown |= {"bf16": f"{row['bf16']:.1%}", "greedy": f"{row['greedy']:.0%}"}
        shown["files"] = "same" if row["round_trip"] else "DIFFER"
        published = PUBLISHED.get(row["models"], "not run")
        table.add_row(row["models"], row["architecture"], *(shown[name] for name in figures), published)
    console.print(table)
    note = NOTE if figures else f"The figures need a terminal of {WIDE} columns; docs/parity.md has them."
    console.print(note, markup=False, highlight=False)
