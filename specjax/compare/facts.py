"""`report.json`: the facts from all methods' records; sentences are made from it elsewhere."""

import datetime
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax import __version__, files
from specjax.advise.memory import of_this_machine
from specjax.compare.methods import Method
from specjax.compare.scores import missing

ALIKE = 0.02  # nats per token, within which a method is as good as the best one
SHOWN = 12  # answers of a set


def report(
    workdir: Path,
    methods: Mapping[str, Method],
    records: Mapping[str, Mapping[str, Any]],
    *,
    seconds: float,
    budget: float | None,
    target: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The report as plain JSON values. A value that was not measured is None.

    Args:
      workdir: the comparison's folder.
      methods: by name.
      records: by the methods' names, what each wrote (`record`), or its status and the reason.
      seconds: the total time, including earlier calls.
      budget: the budget in seconds, or None.
      target: the result of `aim.aimed`.
    """
    done = [record for record in records.values() if record["status"] == "done"]
    first, method = (done or [{}])[0], next(iter(methods.values()))
    c = method.config
    machine: dict[str, Any] = {"device": None, "jax": None} | first.get("machine", {})
    return {
        "format": 1,
        "specjax": __version__,
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": seconds,
        "machine": machine | {"memory_bytes": of_this_machine()},
        "base": first.get("base"),
        "data": _data(done, methods),
        "general": [_general(name, method, first) for name in method.forgetting],
        "budget": {
            "steps": max((trial["steps"] for record in done for trial in record["trials"]), default=None),
            "tokens_per_step": c.batch_size * c.data.length,
            "seconds": budget,
            "seeds": [c.seed + number for number in range(c.seeds)],
        },
        "grid": _grid(records),
        "sets": {"domain": method.domain, "forgetting": list(method.forgetting)},
        "methods": [_method(name, records[name], workdir) for name in methods],
        "answers": _answers(records, method.domain),
        "target": target,
        "advice": advice(records, method.domain, method.forgetting),
    }


def _data(done: Sequence[Mapping[str, Any]], methods: Mapping[str, Method]) -> dict[str, Any] | None:
    """Facts about the rows whose answers train, if a method has such rows; methods on text may read other rows."""
    of_answers = [record["data"] for record in done if record["method"] != "full"]
    return (of_answers or [record["data"] for record in done] or [None])[0]


def _general(name: str, method: Method, record: Mapping[str, Any]) -> dict[str, Any]:
    path = method.config.data.eval[name] if name in method.config.data.eval else None
    shipped = name in method.shipped
    rows = record.get("set_rows", {}).get(name)
    return {"name": name, "path": Path(path).name if shipped and path else path, "shipped": shipped, "rows": rows}


def _grid(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records.values():
        for trial in record.get("trials", ()):
            kind = "lora" if "lora" in record["method"] else "full"
            found.setdefault(kind, set()).add(trial["rate"])
    return {kind: sorted(rates) for kind, rates in found.items()} | {"source": "times"}


def _method(name: str, record: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("method", "rank", "alpha", "rate", "trainable", "total", "seconds", "compile_seconds", "tokens_per_s")
    ) | {
        "tokens": None,
        "peak_memory_bytes": None,
        "saved_bytes": None,
        "shared_process": False,
        "measures": {},
        "trials": [],
    }
    kept = {key: record.get(key, value) for key, value in empty.items()}
    made = {"name": name, "status": record["status"], "why": record["why"]} | kept
    if record["status"] != "done":
        return made | {"folder": name, "commands": [], "config": None, "edge": None, "data": None}
    place = record["place"]
    command = f"specjax train --config={shlex.quote(str(workdir / place / 'config.json'))}"
    return made | {
        "folder": place,
        "commands": [
            f"{command} --workdir={shlex.quote(f'runs/{name}')}",
            f"specjax generate --model={shlex.quote(str(workdir / place))} --prompt=...",
        ],
        "config": f"{place}/config.json",
        "edge": edge(record),
        "data": {key: record["data"][key] for key in ("path", "kind", "rows", "tokens", "loss_tokens")},
    }


def _answers(records: Mapping[str, Mapping[str, Any]], domain: str) -> list[dict[str, Any]]:
    """Answers side by side: to the domain's questions, to those of other sets, and to `config.eval.prompts`."""
    rows: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for name, record in records.items():
        asked = record.get("asked", {})
        for label in sorted(asked, key=lambda one: (one != domain, one)):
            for row in asked[label][:SHOWN]:
                key = (label, row["prompt"], row["expected"])
                made = rows.setdefault(key, {"set": label, "prompt": row["prompt"], "expected": row["expected"]})
                made.setdefault("base", row["base"])
                made.setdefault("said", {})[name] = row["said"]
        for prompt, said in record.get("prompts", {}).items():
            made = rows.setdefault(("", prompt, None), {"set": None, "prompt": prompt, "expected": None})
            made.setdefault("base", said["base"])
            made.setdefault("said", {})[name] = said.get("said", said["base"])
    return list(rows.values())


def advice(records: Mapping[str, Mapping[str, Any]], domain: str, forgetting: Sequence[str]) -> dict[str, Any] | None:
    """The advised method: among those with a loss as good as the lowest, the one that trains the fewest parameters.

    "As good" means within 0.02 nats per token, or within the interval of the seeds of the lowest. `forgets_of` compares
    how much worse the general sets became, summed: the advised method's value as a share of that of the method that
    forgets most among those that train more parameters. It is None if that method forgot nothing.

    Returns:
      `best`, `lowest_loss`, `nats_apart` of the two, `forgets_of`; None if no method is better than the base.
    """
    losses = {
        name: record["measures"][domain]["after"]["loss"]
        for name, record in records.items()
        if record["status"] == "done" and _learned(record["measures"][domain])
    }
    if not losses:
        return None
    lowest = min(losses, key=lambda name: losses[name])
    high = records[lowest]["measures"][domain]["high"]
    enough = max(losses[lowest] + ALIKE, high if high is not None else -math.inf)
    good = [name for name in losses if losses[name] <= enough]
    best = min(good, key=lambda name: (records[name]["trainable"], losses[name]))
    forgot = {name: forgotten(records[name], forgetting) for name in losses}
    others = [forgot[name] or 0.0 for name in losses if records[name]["trainable"] > records[best]["trainable"]]
    mine, most = forgot[best], max(others, default=0.0)
    return {
        "best": best,
        "lowest_loss": lowest,
        "nats_apart": losses[best] - losses[lowest],
        "forgets_of": None if mine is None or most <= 0 else max(0.0, mine) / most,
    }


def _learned(measure: Mapping[str, Any]) -> bool:
    """Whether a method's loss is lower than the base's."""
    before, after = measure["before"]["loss"], measure["after"]["loss"]
    return math.isfinite(after) and (before is None or after < before)


def forgotten(record: Mapping[str, Any], forgetting: Sequence[str]) -> float | None:
    """How many nats per token the general sets became worse, summed; None if none was measured.

    An improvement on one set does not offset another: a model can lose its answers while its loss on text falls.
    """
    found = [record["measures"][name] for name in forgetting if name in record["measures"]]
    return sum(max(0.0, one["after"]["loss"] - one["before"]["loss"]) for one in found) if found else None


def edge(record: Mapping[str, Any]) -> str | None:
    """Whether the best rate is the lowest or highest of several tried, so that a better one may lie beyond.

    >>> edge({"rate": 2.0, "trials": [{"rate": 1.0}, {"rate": 2.0}]}), edge({"rate": 2.0, "trials": [{"rate": 2.0}]})
    ('high', None)
    """
    rates = {trial["rate"] for trial in record["trials"]}
    if len(rates) < 2 or min(rates) < record["rate"] < max(rates):
        return None
    return "low" if record["rate"] == min(rates) else "high"


def unscored(report: Mapping[str, Any]) -> list[str]:
    """The libraries that are not installed, for which values in the report are None."""
    scored = [each["after"] for one in report["methods"] for each in one["measures"].values()]
    asked = [one for one in scored if one["exact"] is not None]
    return missing() if any(one["chrf"] is None or one["rouge_l"] is None for one in asked) else []


def write(workdir: Path, made: Mapping[str, Any]) -> Path:
    """Writes `report.json`."""
    files.write_json(workdir / "report.json", made)
    return workdir / "report.json"
