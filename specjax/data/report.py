"""The data report as a person reads it: counts, and the first rows with what is trained made visible."""

import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Runs = Sequence[tuple[str, bool]]  # a document: (text, whether it is trained)


def lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, how much) of a report (`Data.report`); what is nought is left out.

    >>> dropped = {"over length": {"rows": 1, "tokens": 70}}
    >>> dict(lines({"rows": 9, "tokens": 2000, "loss_tokens": 500, "dropped": dropped}))
    {'rows read': '9', 'dropped, over length': '1 row, 70 tokens', 'tokens': '2,000', 'loss tokens': '500 (25.0 %)'}
    """
    result = []

    def add(what: str, value: Any) -> None:
        if value:
            result.append((what, f"{value:,}" if isinstance(value, int) else str(value)))

    add("source", report.get("source"))
    columns = report.get("columns", {})
    add(
        "format",
        " ".join([report.get("format", ""), *(f"{role}={column}" for role, column in columns.items())]).strip(),
    )
    add("ignored columns", ", ".join(report.get("ignored_columns", ())))
    if report.get("holdout"):
        fraction, part = report["holdout"]
        add("part", f"{part} ({fraction:.1%} of the rows are held out)")
    add("rows read", report.get("rows"))
    for reason, count in report.get("dropped", {}).items():
        add(f"dropped, {reason}", _amount(count))
    if report.get("truncated", {}).get("rows"):
        kept = "keeping the answer's end" if report.get("overlong") == "keep_end" else "keeping the start"
        add(f"cut, {kept}", f"{_amount(report['truncated'])} lost")
    if report.get("split", {}).get("rows"):
        rows, documents, left = (report["split"][key] for key in ("rows", "documents", "tokens_left_out"))
        lost = f"; {left:,} tokens of pieces without an answer left out" if left else ""
        add("split", f"{_amount({'rows': rows, 'tokens': 0})} into {documents:,} documents{lost}")
    add("answers without a word", report.get("empty_answers") and f"{report['empty_answers']:,}, which do not train")
    if (report.get("branched") or {}).get("rows"):
        rows, documents = report["branched"]["rows"], report["branched"]["documents"]
        chats = f"{rows:,} chat{'' if rows == 1 else 's'} into {documents:,} documents"
        add("a row for each answer", f"{chats}, for the template rewrites earlier turns")
    if report.get("format") == "preference":
        add("pairs of answers", report["documents"] // 2)
    add("documents", report.get("documents"))
    add("documents cut into pieces", report.get("split_documents"))
    add("tokens", report.get("tokens"))
    if report.get("loss_tokens"):
        add(
            "loss tokens",
            f"{report['loss_tokens']:,} ({report['loss_tokens'] / report['tokens']:.1%})".replace("%", " %"),
        )
    ends = report.get("format") in ("messages", "conversations", "instruct") and "end_of_turn" in report
    add(
        "a turn ends with", report.get("end_of_turn") or (ends and "no token of its own: the model won't learn to stop")
    )
    if report.get("packed_rows"):
        kind = "packed rows" if report["packing"] else "rows, one document each"
        add(kind, f"{report['packed_rows']:,} of {report['length']:,} tokens, {report['packing_efficiency']:.1%} full")
    for name, part in report.get("sources", {}).items():
        passes = f", {report['passes_of'][name]} passes" if "passes_of" in report else ""
        rows = f"{part['tokens']:,} tokens in {part['packed_rows']:,} rows"
        add(f"source {name}", f"{part['share']:.1%} of the {report['shares']}: {rows}{passes}".replace("%", " %"))
    if report.get("steps"):
        add("steps", f"{report['steps']:,}, {report['passes']} passes over the rows")
    add("fingerprint", report.get("fingerprint"))
    return result


def show(
    report: Mapping[str, Any],
    previews: Sequence[Sequence[Runs]] = (),
    console: Console | None = None,
    numbers: Sequence[int] = (),
) -> None:
    """Prints a report and decoded rows (`Data.preview`).

    Trained text is green on a terminal, and stands between double brackets wherever colour would be lost.

    Args:
      report: `Data.report`.
      previews: rows of documents of runs.
      console: where to; standard output by default.
      numbers: of these rows in the data; default the first ones, from 1 on.
    """
    console = console or Console()
    counts = lines(report)
    width = max((len(what) for what, _ in counts), default=0)
    for what, value in counts:
        console.print(Text.assemble((what.ljust(width), "bold"), "  ", value), soft_wrap=True)
    colour = console.is_terminal and console.color_system is not None
    if previews:
        trained = Text("green", "bold green") if colour else Text("⟦in brackets⟧")
        which = "These" if numbers else "First"
        console.print(Text.assemble(f"\n{which} rows as the model sees them; what is trained is ", trained, "."))
    for number, documents in zip(numbers or range(1, 1 + len(previews)), previews, strict=True):
        for place, runs in enumerate(documents, 1):
            console.print(Text(f"\nrow {number}, {_place(place, len(documents), report)}", "bold"))
            console.print(_marked(runs, colour), soft_wrap=True)


def _place(document: int, count: int, report: Mapping[str, Any]) -> str:
    """Which of a row's documents it is."""
    if report.get("format") != "preference":
        return f"document {document} of {count}"
    return f"pair {(document + 1) // 2} of {count // 2}, {'chosen' if document % 2 else 'rejected'}"


@contextmanager
def watched(
    name: str, console: Console | None = None, *, every: float = 10.0
) -> Iterator[Callable[[int, int | None], None] | None]:
    """Gives a `progress` for `specjax.data.load` that shows how far it is.

    Args:
      name: of the source.
      console: on a terminal a bar, which goes when the block ends; elsewhere a line now and then; None: nothing.
      every: seconds between two lines.
    """
    if console is None:
        yield None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(f"tokenising {name}", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        said = time.monotonic()

        def line(done: int, total: int | None) -> None:
            nonlocal said
            if time.monotonic() - said >= every:
                said = time.monotonic()
                rows = f"{done:,} rows" if total is None else f"{done:,} of {total:,} rows"
                console.print(f"tokenising {name}: {rows}", markup=False, highlight=False, soft_wrap=True)

        yield line


def _marked(runs: Runs, colour: bool) -> Text:
    text = Text()  # of parts, not of markup: brackets in the data stay brackets
    for part, trained in runs:
        part = "".join(
            c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in part
        )
        if trained:
            text.append(part if colour else f"⟦{part}⟧", "bold green" if colour else "")
        else:
            text.append(part, "dim" if colour else "")
    return text


def _amount(count: Mapping[str, int]) -> str:
    rows = f"{count['rows']:,} row{'' if count['rows'] == 1 else 's'}"
    return f"{rows}, {count['tokens']:,} tokens" if count["tokens"] else rows
