"""The tables: costs and results of each method, the hardware that it fits, and the data."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from specjax.report.words import Words

_ADAPTERS = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "qdora": "QDoRA"}
_ADAPTERS |= {f"{kind} dpo": f"DPO, {name}" for kind, name in _ADAPTERS.items()}
# Of six and more: full and SFT, which train every weight, in warm colours, adapters in cold ones.
_WARM, _COLD = (0, 1, 6), (2, 3, 4, 5, 7)

_STATUS = ("failed", "too_large", "skipped")


class Cell(NamedTuple):
    """A large first line, and the lines below it."""

    main: str
    rest: list[str]


class Row(NamedTuple):
    """A method in the table: its key, its label, its colour and marker, and its cells in the order of the columns."""

    name: str
    label: str
    series: int
    best: bool
    settings: list[str]
    cells: list[Cell]


def labels(methods: Sequence[Mapping[str, Any]], words: Words, full: str = "full") -> dict[str, str]:
    """The methods' labels: their kind, or their names where several have the same kind.

    Args:
      methods: the report's methods.
      words: the language.
      full: the key of the words for full fine-tuning: "full short" in a figure, "full in prose" in a sentence.
    """

    def told(method: Mapping[str, Any]) -> str:
        match method["method"]:
            case "full":
                return words(full)
            case "sft":
                return "SFT"
            case "dpo":
                return "DPO"
            case str(kind) if kind in _ADAPTERS:
                rank = f" r{method['rank']}" if method["rank"] else ""
                return f"{_ADAPTERS[kind]}{rank}"
        return method["name"]

    count = Counter(map(told, methods))
    return {one["name"]: told(one) if count[told(one)] == 1 else one["name"] for one in methods}


def series(methods: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Each method's index among the colours and markers."""
    warm, cold, found = list(_WARM), list(_COLD), {}
    for i, method in enumerate(methods):
        first, second = (cold, warm) if method["rank"] else (warm, cold)
        found[method["name"]] = (first or second or [i % 8]).pop(0)
    return found


def rows(report: Mapping[str, Any], words: Words) -> list[Row]:
    """The finished methods, and then the others."""
    names, colours = labels(report["methods"], words), series(report["methods"])
    made = []
    for method in sorted(report["methods"], key=lambda one: one["status"] != "done"):
        settings = [words("rate", rate=words.rate(method["rate"]))] if method["rate"] else []
        if method["rank"] and method["alpha"]:
            settings.append(words("alpha", alpha=f"{method['alpha']:g}"))
        best = method["name"] == report["advice"]["best"]
        name = method["name"]
        made.append(Row(name, names[name], colours[name], best, settings, list(_cells(method, report, words))))
    return made


def _cells(method: Mapping[str, Any], report: Mapping[str, Any], words: Words) -> Iterator[Cell]:
    yield _complexity(method, words)
    yield _data(method, report, words)
    yield _cost(method, words)
    yield _local(method, report, words)
    yield _quality(method, report, words)


def _cell(main: str | None, rest: Sequence[str | None]) -> Cell:
    """A cell from the lines that are present; the first becomes the large one."""
    lines = [line for line in (main, *rest) if line]
    return Cell(lines[0] if lines else "–", lines[1:])


def _tried(runs: int, rates: int, words: Words) -> str | None:
    if runs < 2:
        return words("tried one") if runs else None
    return words("tried", count=runs, rates=rates) if rates > 1 else words("tried seeds", count=runs)


def _complexity(method: Mapping[str, Any], words: Words) -> Cell:
    trainable, total, tried = method["trainable"], method["total"], method["trials"]
    share = trainable / total if trainable is not None and total else None
    rates = len({trial["rate"] for trial in tried})
    lines = [
        words("trained") if trainable is not None else None,
        words("of total", share=words.share(share), total=words.large(total)) if share is not None else None,
        _tried(len(tried), rates, words),
    ]
    return _cell(words.large(trainable) if trainable is not None else None, lines)


def _data(method: Mapping[str, Any], report: Mapping[str, Any], words: Words) -> Cell:
    """The data it learned from: its own rows, if it says which."""
    if method["status"] != "done":
        return _cell(None, [])
    facts = method["data"] if method["data"]["rows"] is not None else report["data"]
    kind = f"rows {facts['kind']}" if f"rows {facts['kind']}" in words else "rows read"
    counted = facts["loss_tokens"]
    seen = method["tokens"]
    lines = [
        words("in the loss", tokens=words.large(counted)) if counted is not None else None,
        words("tokens seen", tokens=words.large(seen)) if seen is not None else None,
    ]
    return _cell(words(kind, rows=words.count(facts["rows"])) if facts["rows"] is not None else None, lines)


def _cost(method: Mapping[str, Any], words: Words) -> Cell:
    seconds, compiled, speed, saved = (
        method[key] for key in ("seconds", "compile_seconds", "tokens_per_s", "saved_bytes")
    )
    lines = [
        words("compile", time=words.time(compiled)) if compiled else None,
        words("in fleet") if seconds is not None and method["shared_process"] else None,
        words("speed", speed=words.count(speed)) if speed else None,
        words("saved", size=words.bytes(saved)) if saved else None,
    ]
    return _cell(words.time(seconds) if seconds is not None else None, lines)


def _local(method: Mapping[str, Any], report: Mapping[str, Any], words: Words) -> Cell:
    """Whether it ran on this machine or did not fit; empty for a method that failed otherwise."""
    peak, memory = method["peak_memory_bytes"], report["machine"]["memory_bytes"]
    if method["status"] == "too_large":
        return _cell(words("no"), [])
    if method["status"] != "done":
        return _cell(None, [])
    amount = None
    if peak and memory:
        amount = words("of memory", peak=words.bytes(peak, memory), memory=words.bytes(memory))
    elif peak:
        amount = words("peak", peak=words.bytes(peak))
    return _cell(words("yes"), [amount, words("fleet memory") if amount and method["shared_process"] else None])


def _quality(method: Mapping[str, Any], report: Mapping[str, Any], words: Words) -> Cell:
    if method["status"] != "done":
        return _cell(words(f"status {method['status']}") if method["status"] in _STATUS else words("status failed"), [])
    measure = method["measures"].get(report["sets"]["domain"] or "")
    if measure is None or measure["after"]["loss"] is None:
        return _cell(words("not measured"), [])
    before, after = measure["before"], measure["after"]
    start = words("loss from", before=words.decimal(before["loss"])) if before["loss"] is not None else words("loss")
    lines = [start]
    if None not in (measure["low"], measure["high"]) and (measure["seeds"] or 0) > 1:
        low, high = words.decimal(measure["low"]), words.decimal(measure["high"])
        lines += [words("interval", low=low, high=high), words("of seeds", seeds=words.count(measure["seeds"]))]
    lines += list(_answered(before, after, words))
    for name in report["sets"]["forgetting"] or ():
        if (change := forgotten(method, name)) is not None:
            lines.append(words("forgets", name=name, change=words.decimal(change, sign=True)))
    return _cell(words.decimal(after["loss"]), lines)


def _answered(before: Mapping[str, Any], after: Mapping[str, Any], words: Words) -> Iterator[str]:
    """Accuracy and scores of answers, each before -> after."""
    kinds = {"token_accuracy": words.share, "exact": words.share, "chrf": lambda value: words.decimal(100 * value, 1)}
    for key, told in (kinds | {"rouge_l": lambda value: words.decimal(value, 2)}).items():
        if after[key] is None:
            continue
        value = told(after[key]) if before[key] is None else f"{told(before[key])} → {told(after[key])}"
        yield words("accuracy" if key == "token_accuracy" else key, value=value)


def scales(report: Mapping[str, Any]) -> bool:
    """Whether the methods' losses on the domain start at the same value, that of the base on the same rows."""
    measures = [one["measures"].get(report["sets"]["domain"] or "") for one in report["methods"]]
    found = [one["before"]["loss"] for one in measures if one and one["before"]["loss"] is not None]
    return not found or max(found) - min(found) <= 0.01 * max(found)


def forgotten(method: Mapping[str, Any], name: str) -> float | None:
    """How much a method's loss on a general set increased, in nats."""
    measure = method["measures"].get(name)
    if measure is None or None in (measure["before"]["loss"], measure["after"]["loss"]):
        return None
    return measure["after"]["loss"] - measure["before"]["loss"]


def hardware(report: Mapping[str, Any], words: Words) -> list[tuple[str, list[tuple[str, str]]]]:
    """The hardware for the target model: each method's name, then a cell per kind of hardware with its memory."""
    names = labels(report["methods"], words)
    found = []
    for row in (report["target"] or {"rows": []})["rows"]:
        cells = []
        for kind in ("tpu", "gpu"):
            size = (row["bytes_per_chip"] or {}).get(kind)
            per = words("per chip", size=words.bytes(size)) if row[kind] and size else ""
            least = (row["seconds_per_million_tokens"] or {}).get(kind)
            least = words("least time", time=words.time(least)) if row[kind] and least else ""
            cost = (row["cost_per_million_tokens"] or {}).get(kind)
            cost = words("least cost", cost=words.decimal(cost, 2 if cost >= 0.1 else 4)) if row[kind] and cost else ""
            cells.append((row[kind] or words("fits none"), "; ".join(filter(None, (per, least, cost)))))
        found.append((names.get(row["method"], row["method"]), cells))
    return found


def data(report: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    """What is known about the data, one line each."""
    facts, found = report["data"], []

    def add(key: str, value: str | None) -> None:
        if value:
            found.append((words(key), value))

    kind = f"kind {facts['kind']}"
    add("source", facts["path"])
    add("kind", words(kind) if kind in words else facts["kind"])
    add("rows", words.count(facts["rows"]) if facts["rows"] is not None else None)
    if facts["held_out_rows"] is not None:
        held = words.count(facts["held_out_rows"])
        add("held out", words(facts["split"], rows=held) if facts["split"] in ("given", "taken") else held)
    add("loss tokens", words.count(facts["loss_tokens"]) if facts["loss_tokens"] is not None else None)
    longest = facts["max_length"]
    add("length", words("tokens", count=words.count(longest)) if longest is not None else None)
    add("cut share", words.share(facts["cut_share"]) if facts["cut_share"] is not None else None)
    add("general", "; ".join(_general(one, words) for one in report["general"]))
    return found


def _general(one: Mapping[str, Any], words: Words) -> str:
    told = one["name"] if one["rows"] is None else words("general set", name=one["name"], rows=words.count(one["rows"]))
    return f"{told} ({words('shipped')})" if one["shipped"] else told
