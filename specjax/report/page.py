"""From report.json to report.html: Jinja2 with every value escaped, inline styles, nothing fetched, no script."""

import functools
import importlib.util
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from specjax.errors import UserError, argument, keys
from specjax.files import write_text
from specjax.report import marks, summary, table
from specjax.report.read import checked, read
from specjax.report.texts import LANGUAGES
from specjax.report.words import Words

HOME = Path(__file__).parent
PAGE = "report.html"
MARK = '<meta name="generator" content="specjax report">'
ANSWERS, FIRST = 60, 3  # prompts that are shown, and those of each set that are shown unfolded


class Asked(NamedTuple):
    """A prompt on the page: its set, the answers to it, and whether it is shown unfolded."""

    prompt: str
    set: str | None
    told: list["Said"]
    first: bool


class Said(NamedTuple):
    """An answer on the page: its method, with colour and marker, and its text."""

    label: str
    series: int | None
    shown: marks.Shown


@keys({"out": "--out"})
def report(workdir: str | Path, *, lang: str = "en", out: str = "") -> None:
    """Writes the page of a comparison's folder again.

    Args:
      workdir: the folder of `specjax compare`, with its report.json.
      lang: en or fr.
      out: the file to write; default: report.html in the folder.

    Raises:
      UserError: report.json is missing or is not a report, or a file at `out` is not a report.
    """
    path = Path(out or Path(workdir) / PAGE)
    _check(path)
    write(read(workdir), path, lang)
    print(f"{path} is written.")
    if not _draws():
        print(Words("en")("no matplotlib"))


def write(report: Mapping[str, Any], path: str | Path, lang: str = "en") -> None:
    """Writes report.html: one file, which needs no network.

    Args:
      report: the content of report.json.
      path: the file; its folder is created.
      lang: en or fr.

    Raises:
      UserError: the report has another format or a value of the wrong type, or the language is unknown.
    """
    if lang not in LANGUAGES:
        raise UserError(f"{argument('lang')} is {lang!r}: it is one of {', '.join(LANGUAGES)}.")
    path = Path(path)
    text = html(checked(report), lang)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def html(report: Mapping[str, Any], lang: str) -> str:
    """The page of a checked report."""
    words = Words(lang)
    general = report["sets"]["forgetting"] or ()
    facts = {
        "mark": MARK,
        "style": (HOME / "page.css").read_text(encoding="utf-8"),
        "t": words,
        "report": report,
        "sentence": summary.sentence(report, words),
        "certainty": summary.certainty(report, words),
        "rows": table.rows(report, words),
        "figures": _figures(report, words) if _draws() else None,
        "rise": words("rise", names=words.listing(list(general))) if general else "",
        "answers": _answers(report, words),
        "data": table.data(report, words),
        "hardware": table.hardware(report, words),
        "commands": _commands(report),
        "failed": [one for one in report["methods"] if one["status"] not in ("done", None) or one["why"]],
        "drawn": {one["name"] for one in report["methods"] if any(trial["curve"] for trial in one["trials"])},
        "labels": table.labels(report["methods"], words),
        "series": table.series(report["methods"]),
        "foot": _foot(report, words),
    }
    return _template().render(facts, more=len(report["answers"]) - ANSWERS)


@functools.cache
def _template() -> Any:
    world = Environment(
        loader=FileSystemLoader(HOME),
        autoescape=True,
        finalize=marks.clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return world.get_template("page.jinja")


def _check(path: Path) -> None:
    """Raises `UserError` if the page would replace a file that is not a report."""
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"{argument('out')}={path} is no page: give a name that ends in .html.")
    if path.exists() and not (path.is_file() and _is_report(path)):
        raise UserError(f"{argument('out')}={path} is there and is no report of specjax's: give another name.")


def _is_report(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(2000)


def _draws() -> bool:
    """Whether matplotlib, of the extra `report`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figures(report: Mapping[str, Any], words: Words) -> list[Any]:
    from specjax.report import plots

    names, colours = table.labels(report["methods"], words, "full short"), table.series(report["methods"])
    lines = [
        plots.Line(
            names[one["name"]],
            colours[one["name"]],
            one["rate"],
            one["rank"],
            one["trials"],
            {name: measure["before"]["loss"] for name, measure in one["measures"].items()},
        )
        for one in report["methods"]
    ]
    return plots.figures(lines, report["sets"]["domain"] or "", report["sets"]["forgetting"] or (), words)


def _answers(report: Mapping[str, Any], words: Words) -> list[Asked]:
    """Each prompt with the expected answer, the base's answer and the methods' answers."""
    names, colours = table.labels(report["methods"], words), table.series(report["methods"])
    found: list[Asked] = []
    for one in report["answers"][:ANSWERS]:
        expected, base = one["expected"], one["base"]
        reference = expected if expected is not None else base
        told = []
        if expected is not None:
            told.append(Said(words("expected"), None, marks.plain(expected)))
        if base is not None:
            told.append(Said(words("the base"), None, marks.plain(base)))
        for name, text in (one["said"] or {}).items():
            if text is not None:
                shown = marks.plain(text) if reference is None else marks.differences(text, reference)
                told.append(Said(names.get(name, name), colours.get(name), shown))
        prompt, _ = marks.cut(one["prompt"])
        before = sum(asked.set == one["set"] for asked in found)
        found.append(Asked(prompt, one["set"], told, before < FIRST))
    return found


def _commands(report: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], list[str]]]:
    """The commands that repeat each method's run, the advised one first, one flag per line if there are many."""
    told = [one for one in report["methods"] if one["commands"] or one["config"]]
    told.sort(key=lambda one: one["name"] != report["advice"]["best"])
    return [(one, [_folded(command) for command in one["commands"] or ()]) for one in told]


def _folded(command: str) -> str:
    """A long command with one flag per line, if a shell reads that as the same command."""
    folded = command.replace(" --", " \\\n    --")
    if len(command) < 100:
        return command
    try:
        return folded if shlex.split(folded) == shlex.split(command) else command
    except ValueError:  # no command of a shell
        return command


def _foot(report: Mapping[str, Any], words: Words) -> list[str]:
    """Where and with what this was made."""
    machine, base, budget = report["machine"], report["base"], report["budget"]
    versions = [
        f"specjax {report['specjax']}" if report["specjax"] else "",
        f"JAX {machine['jax']}" if machine["jax"] else "",
    ]
    size = words.large(base["parameters"]) if base["parameters"] else ""
    memory = words.bytes(machine["memory_bytes"]) if machine["memory_bytes"] else ""
    made = words.date(report["made"]) if report["made"] else ""
    seeds = ", ".join(f"{seed:g}" for seed in budget["seeds"] or ())
    groups = (
        [made, words.time(report["seconds"]) if report["seconds"] else ""],
        [machine["device"], memory],
        [base["path"], base["family"], size, base["dtype"]],
        versions,
        [words("seeds", seeds=seeds) if seeds else ""],
        [words("grid", source=report["grid"]["source"]) if report["grid"]["source"] else ""],
    )
    lines = (", ".join(part for part in group if part) for group in groups)
    return [line for line in lines if line]
