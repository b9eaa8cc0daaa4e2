"""The methods side by side on one's own data: each trained in its own process, so that each peak memory is its own."""

import multiprocessing
import signal
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from specjax import process
from specjax.config import get_config, merge, resolved, validate
from specjax.config.entries import methods, refuse_fleet
from specjax.errors import UserError
from specjax.files import read_object, read_rows, write_json


def compare(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains every method of `config.compare` and prints one table; called again, it resumes the ones not finished.

    Each run lies in `<workdir>/<method>`; the table's figures are also written to `<workdir>/comparison.json`.

    Raises:
      UserError: a wrong config (all are checked before the first run), or one method's own mistake.
    """
    refuse_fleet(config, "specjax compare")
    workdir = Path(workdir)
    runs = methods(config)
    for made in runs.values():
        validate(made, None)
    # Off a terminal Rich assumes 80 columns, in which the table would be folded.
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)
    for name, made in runs.items():
        console.rule(f"{name}")
        _run(resolved(made), workdir / name)
    summaries = {name: read_object(workdir / name / "summary.json", "delete it") for name in runs}
    write_json(workdir / "comparison.json", summaries)
    console.rule("comparison")
    console.print(table(summaries))
    for prompt in config.eval.prompts:
        _answers(console, prompt, {name: workdir / name for name in runs})
    return summaries


def table(summaries: dict[str, dict[str, Any]]) -> Table:
    """One row per method; every set's loss before -> after, in nats per token, and its exact answers where it asks."""
    sets, asked = (
        list(dict.fromkeys(name for summary in summaries.values() for name in summary.get(kind, ())))
        for kind in ("evals", "exact")
    )
    heads = [*(f"{name} loss" for name in sets), *(f"{name} exact" for name in asked)]
    result = Table("method", "trainable", "seconds", "tokens/s", "peak memory", *heads, "saved")
    for name, summary in summaries.items():
        losses = [summary["evals"].get(which) for which in sets]
        answers = [summary.get("exact", {}).get(which) for which in asked]
        result.add_row(
            name,
            f"{summary['trainable_parameters']:,}",
            f"{summary['seconds']:.0f} (+{summary['compile_seconds']:.0f} compile)",
            f"{summary['tokens_per_s']:,.0f}" if summary["tokens_per_s"] else "",
            f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB",
            *(f"{loss['before']:.3f} -> {loss['after']:.3f}" if loss else "" for loss in losses),
            *(f"{share['before']:.0%} -> {share['after']:.0%}" if share else "" for share in answers),
            f"{summary['saved_bytes'] / 1e6:.1f} MB",
        )
    return result


def _run(settings: dict[str, Any], workdir: Path) -> None:
    context = multiprocessing.get_context("spawn")  # a fresh interpreter: no JAX state, a memory peak of its own
    process = context.Process(target=_train, args=(settings, str(workdir)))
    process.start()
    stops = (signal.SIGTERM, signal.SIGINT)
    # It saves, and ends with 143; a second Ctrl-C it has from the terminal itself, and ends at once.
    before = {number: signal.signal(number, lambda number, frame: process.terminate()) for number in stops}
    try:
        process.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if process.exitcode == 2:
        raise SystemExit(2)  # the child has said why
    if process.exitcode in (130, 143):
        raise SystemExit(process.exitcode)
    if process.exitcode:
        raise RuntimeError(f"the run in {workdir} ended with status {process.exitcode}")


def _train(settings: dict[str, Any], workdir: str) -> None:
    process.prepare()  # this process begins anew, without what its parent's command did
    process.keep_compiled()
    from specjax import run

    try:
        run.train(merge(get_config(), settings), workdir)
    except UserError as error:
        print("specjax:", str(error).replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("specjax: interrupted", file=sys.stderr)
        process.leave(130)


def _answers(console: Console, prompt: str, runs: dict[str, Path]) -> None:
    """What the base said before the first step, and each result after its last."""
    console.print(f"\n[bold]{_escaped(prompt)}[/bold]")
    for number, (name, folder) in enumerate(runs.items()):
        rows = [row for _, row in read_rows(folder / "samples.jsonl")]
        said = [row["text"] for row in rows if row["prompt"] == prompt]
        if said and number == 0:
            console.print(f"  [cyan]base[/cyan]  {_one_line(said[0])}")
        if said:
            console.print(f"  [cyan]{name}[/cyan]  {_one_line(said[-1])}")


def _one_line(text: str) -> str:
    return _escaped(" ".join(text.split())) or "[dim](ends at once)[/dim]"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
