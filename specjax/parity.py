"""`specjax families`: what is supported, and how near to transformers and PEFT it was seen to be."""

import json
from importlib.resources import files
from typing import Any

from rich.console import Console
from rich.table import Table

# Published weights that were run too (tests/test_real.py), by the row that speaks for them.
PUBLISHED = {"Llama 3.2; SmolLM (tied)": "SmolLM2-135M-Instruct", "Gemma 3 text": "gemma-3-270m"}

NOTE = """Every row is verified on random weights; the column "published" says which published ones were run too.
Random small models against transformers and PEFT, float32, 493 tokens. logits, packed, adapter, merge: the
greatest difference of a logit; gradients: of five weights' gradients, by the greatest element; bf16: relative error of
the bfloat16 logits; greedy: of 256 tokens, how many are transformers' own; files: loaded and exported again, the same
bytes. `make parity` measures it anew, docs/parity.md says how."""


def rows() -> list[dict[str, Any]]:
    """The figures of `make parity`, one dict per kind of model."""
    return json.loads(files("specjax").joinpath("parity.json").read_text(encoding="utf-8"))


def show() -> None:
    """Prints the table."""
    table = Table(
        "models",
        "architecture",
        "logits",
        "bf16",
        "gradients",
        "packed",
        "greedy",
        "files",
        "adapter",
        "merge",
        "published",
    )
    for row in rows():
        numbers = [f"{row[name]:.0e}" for name in ("gradients", "packed")]
        last = [f"{row[name]:.0e}" for name in ("adapter", "merge")]
        files_same = "same" if row["round_trip"] else "DIFFER"
        head = (row["models"], row["architecture"], f"{row['logits']:.0e}", f"{row['bf16']:.1%}")
        table.add_row(
            *head, *numbers, f"{row['greedy']:.0%}", files_same, *last, PUBLISHED.get(row["models"], "not run")
        )
    console = Console()
    console.print(table)
    console.print(NOTE, markup=False, highlight=False)
