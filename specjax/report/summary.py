"""The sentence at the top: which method to take, why, and how certain that is."""

from collections.abc import Iterator, Mapping
from typing import Any

from specjax.report.table import forgotten, labels, scales
from specjax.report.words import Words

PROSE = "full in prose"


def sentence(report: Mapping[str, Any], words: Words) -> str:
    """Which method to take, at which rate, and the reasons."""
    methods = _done(report)
    if not methods:
        return words("none done")
    best = methods.get(report["advice"]["best"] or "")
    if best is None:
        return words("no method")
    name = labels(report["methods"], words, PROSE)[best["name"]]
    reasons = words.listing(list(_reasons(best, report, words)))
    if not reasons:
        return words("take bare", method=name)
    if not best["rate"]:
        return words("take plainly", method=name, reasons=reasons)
    return words("take", method=name, rate=words.rate(best["rate"]), reasons=reasons)


def _done(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {one["name"]: one for one in report["methods"] if one["status"] == "done"}


def _rival(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The method that the advised one is compared with: the one with the lowest loss, if that is another."""
    advice = report["advice"]
    return _done(report).get(advice["lowest_loss"] or "") if advice["lowest_loss"] != advice["best"] else None


def _next(best: Mapping[str, Any], report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The other method with the lowest loss on the domain."""
    measures = {name: one["measures"].get(report["sets"]["domain"] or "") for name, one in _done(report).items()}
    losses = {name: one["after"]["loss"] for name, one in measures.items() if one and name != best["name"]}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return _done(report)[min(known, key=lambda name: known[name])] if known else None


def _reasons(best: Mapping[str, Any], report: Mapping[str, Any], words: Words) -> Iterator[str]:
    advice, rival, names = report["advice"], _rival(report), labels(report["methods"], words, PROSE)
    loss = (best["measures"].get(report["sets"]["domain"] or "") or {"after": {"loss": None}})["after"]["loss"]
    if rival is not None and advice["nats_apart"] is not None:
        apart, other = advice["nats_apart"], names[rival["name"]]
        if abs(apart) < 0.0005:
            yield words("equal", other=other)
        else:
            yield words("within", apart=words.nats(abs(apart)), other=other)
    elif loss is not None:
        yield words("lowest", loss=words.nats(loss))
    yield from _forgetting(best, report, words)
    yield from _room(best, report, words)


def _worst(best: Mapping[str, Any], report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The method that forgets most, over all general sets, among those that train more; `forgets_of` refers to it."""
    sums = []
    for one in _done(report).values():
        changes = [forgotten(one, name) for name in report["sets"]["forgetting"] or ()]
        known = [change for change in changes if change is not None]
        if known and (one["trainable"] or 0) > (best["trainable"] or 0):
            sums.append((sum(max(0.0, change) for change in known), one))
    return max(sums, key=lambda pair: pair[0])[1] if sums else None


def _forgetting(best: Mapping[str, Any], report: Mapping[str, Any], words: Words) -> Iterator[str]:
    part = report["advice"]["forgets_of"]
    worst = _worst(best, report)
    if worst is not None and part is not None and part >= 0.005:
        other = labels(report["methods"], words, PROSE)[worst["name"]]
        if 0.95 <= part <= 1.05:
            yield words("forgets as much", other=other)
        elif part < 1:
            yield words("forgets part", part=words.part(part), other=other)
        else:
            yield words("forgets times", times=words.decimal(part, 1), other=other)
        return
    changes = [(forgotten(best, name), name) for name in report["sets"]["forgetting"] or ()]
    measured = [(change, name) for change, name in changes if change is not None]
    if measured:
        change, name = max(measured)
        if change < 0.0005:
            yield words("forgets nothing", name=words.listing([name for _, name in measured]))
        else:
            yield words("forgets nats", nats=words.nats(change), name=name)


def _room(best: Mapping[str, Any], report: Mapping[str, Any], words: Words) -> Iterator[str]:
    """The target's smallest hardware, or else the memory on this machine."""
    target = report["target"]
    row = next((row for row in (target or {"rows": []})["rows"] if row["method"] == best["name"]), None)
    found = [row[kind] for kind in ("gpu", "tpu") if row[kind]] if row else []
    if found:
        hardware = found[0] if len(found) == 1 else words("either", one=found[0], other=found[1])
        yield words("fits", hardware=hardware, model=target["model"] or words("the target"))
    elif best["peak_memory_bytes"]:
        yield words("needs", memory=words.bytes(best["peak_memory_bytes"]))


def certainty(report: Mapping[str, Any], words: Words) -> list[str]:
    """What the sentence is based on: rows, steps, seeds, and whether the seeds distinguish the two best."""
    budget, data, found = report["budget"], report["data"], []
    facts = {"rows": data["held_out_rows"], "steps": budget["steps"], "tokens": budget["tokens_per_step"]}
    if None not in facts.values():
        found.append(words("measured on", **{key: words.count(value) for key, value in facts.items()}))
    if not scales(report):
        found.append(words("other rows"))
    if data["split"] == "taken":
        found.append(words("split taken"))
    best = _done(report).get(report["advice"]["best"] or "")
    if best is None:
        return found
    rival = _rival(report) or _next(best, report)
    own, other = (_interval(one, report) for one in (best, rival))
    if own is None:
        found.append(words("sure one seed"))
    elif rival is not None and other is not None:
        names = labels(report["methods"], words, PROSE)
        overlap = own[0] <= other[1] and other[0] <= own[1]
        both = {"one": names[best["name"]], "other": names[rival["name"]]}
        seeds = words.count(min(own[2], other[2]))
        found.append(words("sure inside" if overlap else "sure outside", seeds=seeds, **both))
    return found


def _interval(method: Mapping[str, Any] | None, report: Mapping[str, Any]) -> tuple[float, float, int] | None:
    """The interval of a method's seeds on the domain; None with fewer than two."""
    measure = method and method["measures"].get(report["sets"]["domain"] or "")
    if not measure or None in (measure["low"], measure["high"]) or (measure["seeds"] or 0) < 2:
        return None
    return measure["low"], measure["high"], int(measure["seeds"])
