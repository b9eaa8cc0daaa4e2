"""A comparison in the terminal: tables of criteria and figures, one sentence of advice, answers side by side."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from specjax.compare.facts import forgotten

GIB = 2**30
NAMES = {
    "full": "full fine-tuning, every token",
    "sft": "SFT, every weight on answers",
    "lora": "LoRA on answers",
    "qlora": "LoRA over a quantised base",
    "dora": "DoRA on answers",
}


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Prints the parts of a report that fit a terminal."""
    console.print(choice(report))
    console.print(figures(report))
    for one in report["methods"]:
        if one["status"] != "done":
            console.print(f"{one['name']}: {one['status'].replace('_', ' ')}: {one['why']}", markup=False)
        elif one["why"]:
            console.print(f"{one['name']}: {one['why']}", markup=False)
        if one.get("edge"):
            word = {"low": "smallest", "high": "largest"}[one["edge"]]
            console.print(
                f"{one['name']}: its best rate, {one['rate']:g}, is the {word} that was tried: widen its sweep"
            )
    if report["advice"]:
        console.print(sentence(report), markup=False)
    elif any(one["status"] == "done" for one in report["methods"]):
        console.print("None of the methods made the loss less than the base's: none is advised.")


def choice(report: Mapping[str, Any]) -> Table:
    """The criteria per method: complexity, training data, cost, where it runs, quality, what is forgotten."""
    domain, sets = report["sets"]["domain"], report["sets"]["forgetting"]
    aimed = {row["method"]: row for row in (report["target"] or {"rows": ()})["rows"]}
    local = f"fits {report['target']['model']}" if report["target"] else "usable locally"
    table = Table("method", "complexity", "learned from", "cost", local, f"quality ({domain})", "forgets")
    for one in report["methods"]:
        if one["status"] != "done":
            table.add_row(one["name"], *("",) * 5, one["status"].replace("_", " "))
            continue
        data, measure, lost = one["data"], one["measures"][domain], forgotten(one, sets)
        table.add_row(
            f"{one['name']}: {NAMES.get(one['method'], one['method'])}",
            f"{one['trainable']:,} of {one['total']:,} ({one['trainable'] / one['total']:.1%})",
            f"{data['rows']:,} {'texts' if data['kind'] == 'text' else data['kind']}, {data['loss_tokens']:,} tokens",
            f"{one['seconds'] or 0:.0f} s, {(one['peak_memory_bytes'] or 0) / GIB:.2f} GiB",
            _fits(aimed[one["name"]]) if one["name"] in aimed else _local(one, report["machine"]),
            f"{_loss(measure)}{_chrf(measure)}",
            "" if lost is None else f"{lost:+.3f} nats",
        )
    return table


def figures(report: Mapping[str, Any]) -> Table:
    """One row per method: each set's loss before -> after, in nats per token, and exact answers to its questions."""
    done = [one for one in report["methods"] if one["status"] == "done"]
    sets = [report["sets"]["domain"], *report["sets"]["forgetting"]]
    asked = [name for name in sets if any(one["measures"][name]["after"]["exact"] is not None for one in done)]
    heads = [*(f"{name} loss" for name in sets), *(f"{name} exact" for name in asked)]
    table = Table("method", "rate", "trainable", "seconds", "tokens/s", "peak memory", *heads, "saved")
    for one in done:
        measures = one["measures"]
        table.add_row(
            one["name"],
            f"{one['rate']:g}",
            f"{one['trainable']:,}",
            f"{one['seconds'] or 0:.0f} (+{one['compile_seconds'] or 0:.0f} compile)",
            f"{one['tokens_per_s']:,.0f}" if one["tokens_per_s"] else "",
            f"{one['peak_memory_bytes'] / GIB:.2f} GiB" if one["peak_memory_bytes"] else "",
            *(_loss(measures[name]) for name in sets),
            *(_share(measures[name]) for name in asked),
            f"{one['saved_bytes'] / 1e6:.1f} MB",
        )
    return table


def sentence(report: Mapping[str, Any]) -> str:
    """Which method to take, and why, from a report with an advice."""
    advice = report["advice"]
    best = next(one for one in report["methods"] if one["name"] == advice["best"])
    parts = []
    if advice["best"] == advice["lowest_loss"]:
        parts.append(f"the least loss on {report['sets']['domain']}")
    else:
        parts.append(f"within {advice['nats_apart']:.3f} nats per token of {advice['lowest_loss']}")
    parts.append(f"{best['trainable'] / best['total']:.1%} of the parameters train")
    if advice["forgets_of"] is not None:
        parts.append(f"forgets {advice['forgets_of']:.2f} times as much as the larger method that forgets most")
    lone = len([one for one in report["methods"] if one["status"] == "done"]) == 1
    seeds = len(report["budget"]["seeds"])
    sure = "" if seeds > 1 else " One seed: a difference of hundredths may be luck (--config.seeds=3)."
    alone = ", the only one that was done" if lone else ""
    return f"Take {best['name']} at {best['rate']:g}{alone}: {'; '.join(parts)}.{sure}"


def answers(report: Mapping[str, Any], most: int = 3) -> Iterator[str]:
    """Answers of the base and of each method to the config's prompts, or else to the domain's first questions."""
    own = [row for row in report["answers"] if row["set"] is None] or report["answers"][:most]
    for row in own:
        yield f"\n[bold]{_escaped(row['prompt'])}[/bold]"
        if row["expected"] is not None:
            yield f"  [cyan]known[/cyan]  {_one_line(row['expected'])}"
        for name, text in {"base": row["base"], **row["said"]}.items():
            yield f"  [cyan]{name}[/cyan]  {_one_line(text)}"


def _fits(row: Mapping[str, Any]) -> str:
    """The hardware, and what a million tokens cost there at least, where there is a price."""
    cost = row["cost_per_million_tokens"]
    places = [place for place in ("tpu", "gpu") if row[place]]
    return (
        " or ".join(
            f"{row[place]} ({cost[place]:.3g} per million tokens)" if place in cost else row[place] for place in places
        )
        or "none that was tried"
    )


def _local(one: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    return f"yes, here: {one['peak_memory_bytes'] / GIB:.1f} of {machine['memory_bytes'] / GIB:.0f} GiB"


def _loss(measure: Mapping[str, Any]) -> str:
    spread = "" if measure["low"] is None else f" ± {measure['high'] - measure['after']['loss']:.3f}"
    return f"{measure['before']['loss']:.3f} -> {measure['after']['loss']:.3f}{spread}"


def _chrf(measure: Mapping[str, Any]) -> str:
    before, after = (measure[when]["chrf"] for when in ("before", "after"))
    return "" if after is None else f"; chrF {before:.2f} -> {after:.2f}"


def _share(measure: Mapping[str, Any]) -> str:
    before, after = (measure[when]["exact"] for when in ("before", "after"))
    return "" if after is None else f"{before:.0%} -> {after:.0%}"


def _one_line(text: str) -> str:
    return _escaped(" ".join(text.split())) or "[dim](ends at once)[/dim]"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
