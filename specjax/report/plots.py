"""The curves: loss over steps, loss by rate, learned against forgotten, drawn by matplotlib, which is an extra."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from specjax.report import svg
from specjax.report.marks import clean
from specjax.report.words import Words

# Points, which are the units of the drawing: a column of the page is 1.25 of them wide, a telephone 0.85.
SIZE, MARGINS, GAP = (384, 270), (42, 78, 24, 38), 13  # left, right, top, bottom; between two labels
MARKERS = "sD^ov<>p"
_TENS = [1, 2, 5, 10]
_STYLE = svg.SETTINGS | {
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor"), svg.MUTED),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), svg.RULE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "axes.xmargin"), 0),
    **dict.fromkeys(("xtick.major.pad", "ytick.major.pad"), 6),
    "text.color": svg.INK,
    "axes.ymargin": 0.08,
    "lines.solid_capstyle": "round",
}


class Line(NamedTuple):
    """A method in the figures: its name, its index among the series, its best values, and its trials."""

    label: str
    series: int
    rate: float | None
    rank: int | None
    trials: list[dict[str, Any]]
    before: Mapping[str, float | None]

    def best(self, domain: str) -> list[dict[str, Any]]:
        """The complete trials of its best rate and rank, for each seed the one with the lowest loss on the domain."""
        found: dict[Any, tuple[float, dict[str, Any]]] = {}
        for trial in self.trials:
            least = min((loss for _, loss in self.path(trial, domain)[1:]), default=math.inf)
            own = trial["rate"] == self.rate and trial["rank"] == self.rank and not trial["stopped"]
            if own and trial["curve"] and least < found.get(trial["seed"], (math.inf,))[0]:
                found[trial["seed"]] = least, trial
        return [trial for _, trial in found.values()]

    def path(self, trial: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
        """Steps and losses of a set during a trial, from the base at step 0."""
        points = [(one["step"], one["loss"][name]) for one in trial["curve"] if one["loss"].get(name) is not None]
        before = self.before.get(name)
        return [(0, before), *points] if before is not None and points and points[0][0] else points

    def mean(self, name: str, domain: str) -> np.ndarray:
        """The mean over seeds of a set's losses, with minimum and maximum: [points, 4], steps first."""
        paths = [dict(self.path(trial, name)) for trial in self.best(domain)]
        steps = sorted(set.intersection(*map(set, paths))) if paths else []
        if not steps:
            return np.zeros((0, 4))
        losses = np.array([[path[step] for path in paths] for step in steps])
        return np.stack([np.array(steps, float), losses.mean(1), losses.min(1), losses.max(1)], 1)


class Drawn(NamedTuple):
    """A figure on the page: its title, what it shows, and the drawing."""

    title: str
    caption: str
    drawing: str


def figures(lines: Sequence[Line], domain: str, forgetting: Sequence[str], words: Words) -> list[Drawn]:
    """The figures that have anything to draw, in the page's order."""
    found = []
    for name in (domain, *forgetting):
        caption = words("caption domain" if name == domain else "caption general")
        found.append((words("figure steps", name=name), caption, _draw(_steps, lines, domain, name, words=words)))
    found.append(
        (words("figure rates", name=domain), words("caption rates"), _draw(_rates, lines, domain, words=words))
    )
    for name in forgetting:
        drawing = _draw(_trade, lines, domain, name, words=words)
        found.append((words("figure trade", name=name), words("caption trade"), drawing))
    drawn = [(title, caption, one) for title, caption, one in found if one]
    return [
        Drawn(title, caption, svg.of(figure, f"f{i}", f"{title}. {caption}", titles))
        for i, (title, caption, (figure, titles)) in enumerate(drawn)
    ]


def _draw(draw: Callable[..., dict[str, str]], *facts: Any, words: Words) -> tuple[Figure, dict[str, str]] | None:
    """A figure and its titles; None if there is nothing to draw."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(SIZE[0] / 72, SIZE[1] / 72), facecolor="none")
        left, right, top, bottom = MARGINS
        place = (left / SIZE[0], bottom / SIZE[1], 1 - (left + right) / SIZE[0], 1 - (top + bottom) / SIZE[1])
        axes = figure.add_axes(place, facecolor="none")
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TENS))
        titles = draw(axes, *facts, words)
        axes.yaxis.set_major_formatter(FuncFormatter(_ticks(axes.yaxis, words)))
        return (figure, titles) if titles else None


def _ticks(axis: Axis, words: Words) -> Callable[[float, int], str]:
    """The labels with as many digits as distinguish two neighbours."""
    places = axis.get_major_locator().tick_values(*axis.get_view_interval())
    gap = float(np.min(np.diff(places))) if len(places) > 1 else 1.0
    digits = max(0, min(4, int(np.ceil(-np.log10(gap) - 1e-9)) if gap > 0 else 2))
    if digits and not float(f"{gap * 10**digits:.6f}").is_integer():
        digits += 1
    return lambda value, _: words.decimal(value, digits)


def _look(line: Line, *, small: bool = False, hollow: bool = False) -> dict[str, Any]:
    """A method's colour and marker."""
    colour = svg.SERIES[line.series % len(svg.SERIES)]
    size = 4.8 if hollow else 3.6 if small else 5.8
    look = {"color": colour, "marker": MARKERS[line.series % len(MARKERS)], "markersize": size, "linewidth": 1.8}
    face = {"markerfacecolor": "none" if hollow else colour, "markeredgewidth": 1.0 if hollow else 0.6}
    return look | face | {"clip_on": False}


def _steps(axes: Axes, lines: Sequence[Line], domain: str, name: str, words: Words) -> dict[str, str]:
    titles, ends = {}, []
    for line in lines:
        points = line.mean(name, domain)
        if not len(points):
            continue
        gid = f"line-{line.series}"
        steps, mean, low, high = points.T
        if (high > low).any():
            axes.fill_between(steps, low, high, color=svg.SERIES[line.series % 8], alpha=0.16, linewidth=0)
        axes.plot(steps, mean, gid=gid, markevery=[-1], **_look(line))
        ends.append((float(steps[-1]), float(mean[-1]), line.label))
        value = words.nats(float(mean[-1]))
        titles[gid] = words("said of end", label=line.label, value=value, step=words.count(float(steps[-1])))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_TENS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.count(value)))
    _labels(axes, ends)
    _axes(axes, words("axis steps"), words("axis loss"))
    return titles


def _rates(axes: Axes, lines: Sequence[Line], name: str, words: Words) -> dict[str, str]:
    titles, ends, rates = {}, [], set()
    for line in lines:
        several = len({trial["rank"] for trial in line.trials}) > 1
        for rank, found in _finals(line, name).items():
            if len({rate for rate, _ in found}) < 2:
                continue
            gid = f"rate-{line.series}-{rank}"
            label = f"{line.label}, r{rank}" if several and rank != line.rank else line.label
            ended = sorted((rate, loss) for (rate, stopped), loss in found.items() if not stopped)
            dashed = {"linestyle": "-" if rank == line.rank else (0, (2, 2)), "markersize": 0}
            if ended:
                axes.plot(*zip(*ended, strict=True), gid=gid, **_look(line) | dashed)
            for (rate, stopped), loss in found.items():
                small = rate != line.rate or rank != line.rank or stopped
                mark = f"{gid}-{rate:g}{'-stopped' if stopped else ''}"
                axes.plot([rate], [loss], gid=mark, **_look(line, small=small, hollow=stopped))
                said = words("said of rate", label=label, value=words.nats(loss), rate=words.rate(rate))
                titles[mark] = said
            rates |= {rate for rate, _ in found}
            ends.append((*(ended or sorted((rate, loss) for (rate, _), loss in found.items()))[-1], label))
    if rates:
        axes.set_xscale("log")
        axes.set_xlim(min(rates) / 1.15, max(rates) * 1.15)
        axes.xaxis.set_major_locator(FixedLocator(_spread(sorted(rates))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.rate(value)))
        _labels(axes, ends)
        _axes(axes, words("axis rate"), words("axis loss"))
    return titles


def _finals(line: Line, name: str) -> dict[int | None, dict[tuple[float, bool], float]]:
    """Rank -> (rate, whether it was stopped early) -> the lowest loss, as the mean over seeds.

    A loss above the base's, from a rate that learned nothing, is left out: it would compress all others into one line.
    """
    found: dict[int | None, dict[tuple[float, bool], list[float]]] = {}
    for trial in line.trials:
        path, before = line.path(trial, name), line.before.get(name)
        if len(path) > 1 and trial["rate"] and (before is None or path[-1][1] <= before):
            key = trial["rate"], bool(trial["stopped"])
            found.setdefault(trial["rank"], {}).setdefault(key, []).append(min(loss for _, loss in path[1:]))
    return {rank: {key: float(np.mean(all_)) for key, all_ in each.items()} for rank, each in found.items()}


def _spread(rates: Sequence[float]) -> list[float]:
    """The rates of a logarithmic axis that are far enough apart to be labelled."""
    room = np.log(rates[-1] / rates[0]) / 7 if len(rates) > 1 else 0.0
    kept: list[float] = []
    for rate in rates:
        if not kept or np.log(rate / kept[-1]) >= room:
            kept.append(rate)
    return kept


def _trade(axes: Axes, lines: Sequence[Line], domain: str, name: str, words: Words) -> dict[str, str]:
    titles, ends, others = {}, [], []
    for line in lines:
        points = _both(line.mean(domain, domain), line.mean(name, domain))
        if len(points) < 2:
            continue
        gid = f"trade-{line.series}"
        kept = int(points[:, 0].argmax())
        axes.plot(*points.T, gid=gid, markevery=[kept], **_look(line))
        others += [(point, line) for point in _others(line, domain, name)]
        learned, forgotten = map(float, points[kept])
        ends.append((learned, forgotten, line.label))
        said = {"learned": words.nats(learned), "forgot": words.nats(forgotten)}
        titles[gid] = words("said of trade", label=line.label, **said)
    reach = [0.0, *(forgotten for _, forgotten, _ in ends)]
    for (learned, forgotten), line in others:
        if learned >= 0 and forgotten <= 2 * max(reach) - min(reach):
            axes.plot([learned], [forgotten], **_look(line, small=True) | {"alpha": 0.5})
    if titles:
        axes.spines["bottom"].set_visible(False)
        axes.axhline(0, color=svg.MUTED, linewidth=0.8)
        axes.plot([0], [0], "o", color=svg.INK, markersize=4)
        axes.annotate(words("base"), (0, 0), (0, -13), textcoords="offset points", ha="center", color=svg.MUTED)
        axes.margins(x=0.06, y=0.14)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TENS))
        _labels(axes, ends)
        axes.xaxis.set_major_formatter(FuncFormatter(_ticks(axes.xaxis, words)))
        _axes(axes, words("axis learned"), words("axis forgotten"))
    return titles


def _both(domain: np.ndarray, general: np.ndarray) -> np.ndarray:
    """How much was learned and forgotten at the steps that have both values, from the first: [points, 2]."""
    _, ours, theirs = np.intersect1d(domain[:, 0], general[:, 0], return_indices=True)
    if not len(ours):
        return np.zeros((0, 2))
    learned, forgotten = domain[ours, 1], general[theirs, 1]
    return np.stack([learned[0] - learned, forgotten - forgotten[0]], 1)


def _others(line: Line, domain: str, name: str) -> Iterator[tuple[float, float]]:
    """The ends of complete trials with other rates and ranks."""
    for trial in line.trials:
        ours, general = line.path(trial, domain), line.path(trial, name)
        other = (trial["rate"], trial["rank"]) != (line.rate, line.rank) and not trial["stopped"]
        if other and len(ours) > 1 and len(general) > 1:
            yield ours[0][1] - ours[-1][1], general[-1][1] - general[0][1]


def _labels(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Writes a name at the end of each line; names that would overlap are moved apart."""
    if not ends:
        return
    axes.autoscale_view()
    to_points = 72 / axes.figure.dpi
    placed = []
    for x, y, label in sorted(ends, key=lambda one: one[1]):
        across, up = axes.transData.transform((x, y)) * to_points
        placed.append([across, up, up, label])
    edge = axes.get_position().x1 * SIZE[0]
    for _ in range(200):  # neighbours push each other until all have room
        for lower, upper in zip(placed, placed[1:], strict=False):
            if (missing := GAP - (upper[2] - lower[2])) > 0.01:
                lower[2] -= missing / 2
                upper[2] += missing / 2
    for across, up, at, label in placed:
        axes.annotate(
            _short(label),
            (across, up),
            (edge + 12, at),
            xycoords="figure points",
            textcoords="figure points",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": svg.RULE, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 4},
        )


def _short(label: str) -> str:
    label = clean(label)  # XML has no control characters
    return label if len(label) <= 12 else f"{label[:11]}…"


def _axes(axes: Axes, x: str, y: str) -> None:
    """Labels the axes; the vertical label is horizontal, above the axis."""
    axes.set_xlabel(x, labelpad=6)
    axes.annotate(
        y, (0, 1), (-MARGINS[0] + 2, 4), xycoords="axes fraction", textcoords="offset points", color=svg.MUTED
    )
