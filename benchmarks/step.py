"""The training step at the demo's size: speed, compilation, the data loader's share, memory.

    python benchmarks/step.py [--steps=60] [--json] [METHOD ...]

Each method of configs/demo.py is trained by `specjax.run.train` in a process of its own, on the demo's data where
`make demo` has written it, else on made-up rows of the same shape. `compilations` counts what XLA really compiled under
the step's name; `data` is the part of the training time in which the step waited for its batch, and `ms per batch` what
putting one together takes, in a thread beside the step.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
METHODS = ("full", "sft", "lora")
BATCHES = 50  # put together to time it
MOST_DATA = 0.02  # of the step's time
COLUMNS = {
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "ms per step": lambda row: f"{1000 * row['seconds'] / row['steps']:.1f}",
    "compile s": lambda row: f"{row['compile_seconds']:.1f}",
    "compilations": lambda row: str(row["compilations"]),
    "ms per batch": lambda row: f"{1000 * row['batch_seconds']:.2f}",
    "data": lambda row: f"{row['data_share']:.2%}",
    "peak memory": lambda row: f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
    "trainable": lambda row: f"{row['trainable_parameters']:,}",
}


def measure(method: str, steps: int) -> dict[str, Any]:
    """Trains one method for so many steps, logging seldom and evaluating never, and returns its figures."""
    sys.path.insert(0, str(ROOT))
    from jax import monitoring

    from specjax import build, process, run
    from specjax.config.entries import methods
    from specjax.config.source import load_config_file

    compiled: list[str] = []

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(about["fun_name"]))

    monitoring.register_event_duration_secs_listener(note)
    config = methods(load_config_file(str(ROOT / "configs" / "demo.py")))[method]
    config.steps, config.log.every = steps, steps
    config.export, config.data.eval_fraction, config.eval.prompts, config.eval.best = False, 0.0, (), ""
    for name in [*config.data.eval]:
        del config.data.eval[name]
    config.model.path = str(ROOT / "demo" / "base")
    with tempfile.TemporaryDirectory() as folder:
        rows = ROOT / config.data.train
        config.data.train = str(rows if rows.exists() else made_up(Path(folder) / rows.name))
        with contextlib.redirect_stdout(io.StringIO()):
            result = run.train(config, Path(folder) / method)
        data = build.train_data_of(config, build.tokenizer_of(config)[1])
    began = time.perf_counter()
    for step in range(BATCHES):
        data.batch(step)
    batch_seconds = (time.perf_counter() - began) / BATCHES
    return {
        "method": method,
        "steps": steps,
        "tokens_per_s": result.tokens / result.seconds,
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "compilations": sum("train_step" in name for name in compiled),
        "batch_seconds": batch_seconds,
        "data_share": result.data_seconds / result.seconds,
        "peak_memory_bytes": process.peak_memory(),
        "trainable_parameters": result.trainable_parameters,
    }


def made_up(path: Path) -> Path:
    """Rows about as long as the demo's, as texts or as pairs by the file's name."""
    words = "the module returns a list of all names that match the given pattern or raises an error".split()
    with path.open("w") as file:
        for row in range(4000):
            text = " ".join(words[(row * step) % len(words)] for step in range(7, 50))
            pair = {"instruction": f"What does `name{row}` do?", "response": text}
            file.write(json.dumps({"text": f"{text}. " * 6} if path.name.startswith("text") else pair) + "\n")
    return path


def main() -> None:
    """Prints the table (or JSON) and ends with status 1 where the step compiled twice or waited for data."""
    parser = argparse.ArgumentParser(description="The training step at the demo's size.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; default all")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="a JSON object per line")
    arguments = parser.parse_args()
    rows = []
    for method in arguments.methods or METHODS:  # in a fresh interpreter each: its peak memory is its own
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, method, arguments.steps).result())
    if arguments.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("method", *COLUMNS)
        for row in rows:
            table.add_row(row["method"], *(show(row) for show in COLUMNS.values()))
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    bad = [row["method"] for row in rows if row["compilations"] != 1 or row["data_share"] > MOST_DATA]
    if bad:
        sys.exit(f"{', '.join(bad)}: the step must compile once, and wait for data less than {MOST_DATA:.0%} of it")


if __name__ == "__main__":
    main()
