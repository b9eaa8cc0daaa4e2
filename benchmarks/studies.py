"""Published claims about methods, tried here: runs the comparisons of configs/studies, and makes docs/studies.md.

    python benchmarks/studies.py NAME        # trains (configs/studies/NAME.py says how long), keeps what came of it
    python benchmarks/studies.py --write     # docs/studies.md and its figures, from docs/studies/*.json

A study is a comparison (`specjax compare`) in a workdir under runs/studies. Called again it goes on where it was. What
is kept is each trial's curve, nothing of the rows.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from specjax.compare.intervals import interval

ROOT = Path(__file__).parent.parent
KEPT, PAGE, FIGURES = ROOT / "docs" / "studies", ROOT / "docs" / "studies.md", ROOT / "docs" / "assets"
SEEN, NOT_SEEN, OPEN = "seen here", "not seen here", "cannot tell here"
STEP = 3  # neighbours of a grid of rates, as a factor
CUT = 0.7  # nats above the least loss, where a figure ends
TELLING = 0.01  # nats per token, below which one seed tells nothing

Methods = Mapping[str, Mapping[str, Any]]


class Finding(NamedTuple):
    """A claim, what became of it here, and the numbers that say so."""

    claim: str
    source: str
    verdict: str
    numbers: str


def trials(method: Mapping[str, Any], seed: int | None = 0) -> list[Mapping[str, Any]]:
    """Those of a seed, None: of all, that came to an end."""
    return [one for one in method["trials"] if not one["stopped"] and seed in (None, one["seed"])]


def least(trial: Mapping[str, Any], domain: str) -> float:
    """The least loss on the domain after the start."""
    return min(point["loss"][domain] for point in trial["curve"] if point["step"])


def by_rate(method: Mapping[str, Any], domain: str) -> dict[float, float]:
    """Rate -> least loss, of the first seed."""
    return {one["rate"]: least(one, domain) for one in trials(method)}


def best_rate(method: Mapping[str, Any], domain: str) -> float:
    """Of those that were tried with the first seed."""
    found = by_rate(method, domain)
    return min(found, key=found.__getitem__)


def between(method: Mapping[str, Any], domain: str) -> float:
    """The best rate between those tried: the lowest point of the parabola through the best and its neighbours."""
    found = sorted(by_rate(method, domain).items())
    place = min(range(len(found)), key=lambda n: found[n][1])
    if not 0 < place < len(found) - 1:
        return found[place][0]
    (a, fa), (b, fb), (c, fc) = ((math.log(rate), loss) for rate, loss in found[place - 1 : place + 2])
    upper = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    lower = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    return math.exp(b - upper / (2 * lower))


def of_seeds(method: Mapping[str, Any], domain: str) -> dict[int, float]:
    """Seed -> least loss at the method's best rate."""
    rate = best_rate(method, domain)
    return {one["seed"]: least(one, domain) for one in trials(method, None) if one["rate"] == rate}


def apart(one: Mapping[str, Any], other: Mapping[str, Any], domain: str) -> tuple[float, float | None, float | None]:
    """Mean of the first's loss less the second's over the seeds that both have, with its interval."""
    a, b = of_seeds(one, domain), of_seeds(other, domain)
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def forgotten(method: Mapping[str, Any], domain: str, general: str, level: float) -> float | None:
    """The least rise of the general loss at which the domain's loss was no more than `level`; None: never there."""
    found = []
    for one in trials(method):
        before = one["curve"][0]["loss"][general]
        found += [p["loss"][general] - before for p in one["curve"] if p["step"] and p["loss"][domain] <= level]
    return min(found, default=None)


def rates(methods: Methods, domain: str, general: str) -> Iterator[Finding]:
    """Best rates, beside each other."""
    source = '"LoRA Without Regret", Thinking Machines Lab, 2025'
    full = between(methods["full"], domain)
    loras = {name: between(one, domain) for name, one in methods.items() if name != "full"}
    ratios = [rate / full for rate in loras.values()]
    told = ", ".join(f"{name} {rate:.1e}" for name, rate in {"full": full, **loras}.items())
    same = all(10 / STEP <= ratio <= 10 * STEP for ratio in ratios)
    yield Finding(
        "LoRA's best rate is about ten times full fine-tuning's",
        source,
        SEEN if same else NOT_SEEN,
        f"best rates {told}: {min(ratios):.1f} to {max(ratios):.1f} times full's",
    )
    spread = max(loras.values()) / min(loras.values())
    yield Finding(
        "LoRA's best rate does not depend on the rank, at fixed alpha",
        source,
        SEEN if spread < math.sqrt(STEP) else OPEN if spread < STEP else NOT_SEEN,
        f"the largest best rate of three ranks is {spread:.1f} times the smallest, on a grid of factor {STEP}",
    )
    losses = {name: interval([*of_seeds(one, domain).values()])[0] for name, one in methods.items()}
    behind = max(losses[name] for name in loras) - losses["full"]
    yield Finding(
        "LoRA, each rank at its best rate, learns as much as full fine-tuning on a small set",
        source,
        SEEN if behind < TELLING else NOT_SEEN,
        ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()) + " nats, means of the seeds",
    )


def targets(methods: Methods, domain: str, general: str) -> Iterator[Finding]:
    """Two choices of maps, by seeds."""
    mean, low, high = apart(methods["attention"], methods["all_maps"], domain)
    assert low is not None and high is not None
    yield Finding(
        "All linear maps are better than the attention's alone, at equal parameters",
        'QLoRA, arXiv:2305.14314; "LoRA Without Regret", 2025',
        SEEN if low > 0 else NOT_SEEN if high < 0 else OPEN,
        f"attention alone: {mean:+.3f} nats ({low:+.3f} to {high:+.3f}, three seeds)",
    )


def forgetting(methods: Methods, domain: str, general: str) -> Iterator[Finding]:
    """What is forgotten at one loss on the domain."""
    reached = {name: by_rate(one, domain)[best_rate(one, domain)] for name, one in methods.items()}
    level = max(reached.values())  # which all reach
    found = {name: forgotten(one, domain, general, level) for name, one in methods.items()}
    told = ", ".join(f"{name} {value:+.3f}" for name, value in found.items())

    def verdict(less: str, more: str) -> str:
        gap = found[more] - found[less]  # type: ignore[operator]
        return OPEN if abs(gap) < TELLING else SEEN if gap > 0 else NOT_SEEN

    yield Finding(
        "LoRA forgets less than full fine-tuning where both have learned as much",
        "arXiv:2405.09673",
        verdict("lora", "full"),
        f"nats forgotten where the domain's loss is {level:.3f}: {told}",
    )
    for name in ("full", "lora"):
        yield Finding(
            f"A fifth of general rows holds forgetting down ({name})",
            "arXiv:2205.12393",
            verdict(f"{name}_replay", name),
            f"{found[f'{name}_replay']:+.3f} nats with them, {found[name]:+.3f} without",
        )


def variants(methods: Methods, domain: str, general: str) -> Iterator[Finding]:
    """Each variant beside plain LoRA, by seeds."""
    sources = {"rslora": "2312.03732", "dora": "2402.09353", "pissa": "2404.02948", "loraplus": "2402.12354"}
    for name, paper in sources.items():
        mean, low, high = apart(methods[name], methods["lora"], domain)
        assert low is not None and high is not None
        yield Finding(
            f"{name} is better than LoRA, each at its best rate",
            f'arXiv:{paper}; "LoRA Without Regret" says it is not',
            SEEN if high < 0 else NOT_SEEN if low > 0 else OPEN,
            f"{mean:+.3f} nats ({low:+.3f} to {high:+.3f}, three seeds)",
        )


STUDIES: dict[str, Callable[[Methods, str, str], Iterator[Finding]]] = {
    "rates": rates,
    "targets": targets,
    "forgetting": forgetting,
    "variants": variants,
}


def kept(workdir: Path) -> dict[str, Any]:
    """What a study's comparison found, without rows, answers and places."""
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    names = ("name", "method", "rank", "alpha", "trainable", "total", "trials")
    methods = [{name: one[name] for name in names} for one in report["methods"]]
    undone = [one["name"] for one in report["methods"] if one["status"] != "done"]
    if undone:
        raise SystemExit(f"{workdir}: {', '.join(undone)} did not come to its end")
    keys = ("specjax", "made", "seconds", "machine", "base", "budget", "sets")
    return {key: report[key] for key in keys} | {"methods": methods}


def page(studies: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/studies.md."""
    found = {name: list(findings(name, study)) for name, study in studies.items()}
    parts = [
        "# Studies",
        "What papers say of the methods, tried here on a small base: the demo's, 4 million parameters, on pairs about "
        "this Python's library. A claim that is not seen at this size may hold at a larger one, and conversely. "
        "Each study is a comparison, one command; this page is made from what they left, `docs/studies/*.json`, by "
        "`python benchmarks/studies.py --write`.",
        "| claim | source | here | numbers |\n|---|---|---|---|\n"
        + "\n".join(f"| {f.claim} | {f.source} | **{f.verdict}** | {f.numbers} |" for fs in found.values() for f in fs),
    ]
    if rest := [name for name in STUDIES if name not in studies]:
        told = "\n".join(f"- `{name}`: {title(name)}." for name in rest)
        parts.append(f"Prepared in `configs/studies`, and not run yet:\n\n{told}")
    for name, study in studies.items():
        budget, seeds = study["budget"], len(study["budget"]["seeds"])
        how_many = f"{seeds} seeds of each best rate" if seeds > 1 else "one seed"
        parts += [
            f"## {title(name)}",
            f"*Needs the minutes below.*\n\n```\npython benchmarks/studies.py {name}\n```",
            f"{budget['steps']} steps of {budget['tokens_per_step']:,} tokens, "
            f"{how_many}; {study['seconds'] / 60:.0f} minutes on 2 cores with other work beside it, "
            f"{study['made'][:10]}. `configs/studies/{name}.py` has the rest.",
            f"![{title(name)}](assets/study_{name}.svg)",
            *(
                []
                if name == "forgetting"
                else [f"The figure ends {CUT:g} nats above the least loss; the table does not."]
            ),
            table(study),
        ]
    return "\n\n".join(parts) + "\n"


def findings(name: str, study: Mapping[str, Any]) -> Iterator[Finding]:
    """What a study says of its claims."""
    methods = {one["name"]: one for one in study["methods"]}
    return STUDIES[name](methods, study["sets"]["domain"], study["sets"]["forgetting"][0])


def title(name: str) -> str:
    """The first line of a study's config, without its number."""
    first = (ROOT / "configs" / "studies" / f"{name}.py").read_text(encoding="utf-8").splitlines()[0]
    return first.strip('"').partition(": ")[2].rstrip(".")


def table(study: Mapping[str, Any]) -> str:
    """Each method's losses by rate: the least on the domain, and how much the general loss had risen there."""
    domain, general = study["sets"]["domain"], study["sets"]["forgetting"][0]
    rows = []
    for method in study["methods"]:
        for one in sorted(trials(method), key=lambda one: one["rate"]):
            best = min((p for p in one["curve"] if p["step"]), key=lambda p: p["loss"][domain])
            rise = best["loss"][general] - one["curve"][0]["loss"][general]
            mark = "**" if one["rate"] == best_rate(method, domain) else ""
            cells = (method["name"], f"{one['rate']:g}", f"{mark}{best['loss'][domain]:.3f}{mark}", f"{rise:+.3f}")
            rows.append(f"| {' | '.join(cells)} |")
    head = f"| method | rate | least loss on {domain}, nats | rise of the loss on {general} there |\n"
    head += "|---|---|---|---|\n"
    return head + "\n".join(rows)


def draw(name: str, study: Mapping[str, Any]) -> None:
    """A study's figure, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    domain, general = study["sets"]["domain"], study["sets"]["forgetting"][0]
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for method, marker in zip(study["methods"], "osD^v<>p", strict=False):
            if name == "forgetting":
                for number, one in enumerate(trials(method)):
                    points = [(p["loss"][domain], p["loss"][general]) for p in one["curve"]]
                    axes.plot(
                        *zip(*points, strict=True),
                        marker=marker,
                        markersize=3,
                        linewidth=1,
                        color=axes.lines[-1].get_color() if number else None,
                        label=None if number else method["name"],
                    )
            else:
                found = sorted(by_rate(method, domain).items())
                axes.plot(*zip(*found, strict=True), marker=marker, markersize=4, linewidth=1.2, label=method["name"])
                more = [loss for seed, loss in of_seeds(method, domain).items() if seed]
                rate = best_rate(method, domain)
                axes.plot([rate] * len(more), more, marker, markersize=3, color=axes.lines[-1].get_color(), alpha=0.5)
        if name == "forgetting":
            axes.set_xlabel(f"loss on {domain}, nats per token")
            axes.set_ylabel(f"loss on {general}")
        else:
            axes.set_xscale("log")
            lowest = min(least(one, domain) for method in study["methods"] for one in trials(method, None))
            axes.set_ylim(lowest - 0.03, lowest + CUT)
            axes.set_xlabel("learning rate")
            axes.set_ylabel(f"least loss on {domain}, nats per token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(FIGURES / f"study_{name}.svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=STUDIES)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(argv)
    if not given.name and not given.write:
        parser.error("name a study, or give --write")
    if given.name:
        workdir = ROOT / "runs" / "studies" / given.name
        if not (workdir / "report.json").is_file():
            if not (ROOT / "runs" / "demo" / "data").is_dir():
                corpus = [sys.executable, "demo/corpus.py", "--out", "runs/demo/data"]
                subprocess.run(corpus, cwd=ROOT, check=True)
            config = f"--config=configs/studies/{given.name}.py"
            subprocess.run(
                [sys.executable, "-m", "specjax", "compare", config, f"--workdir={workdir}"], cwd=ROOT, check=True
            )
        KEPT.mkdir(exist_ok=True)
        text = json.dumps(kept(workdir), indent=1)
        (KEPT / f"{given.name}.json").write_text(text + "\n", encoding="utf-8")
    if given.write:
        there = read()
        PAGE.write_text(page(there), encoding="utf-8")
        for name, study in there.items():
            draw(name, study)


def read() -> dict[str, dict[str, Any]]:
    """What is kept of each study that was run."""
    paths = {name: KEPT / f"{name}.json" for name in STUDIES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


if __name__ == "__main__":
    main()
