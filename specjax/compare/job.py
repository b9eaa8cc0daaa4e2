"""`specjax compare`: every method in its own process, one after another; one table, one report."""

import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from specjax import files
from specjax.compare import budget as budgets
from specjax.compare import child, facts, methods, scores, table
from specjax.compare.methods import Method
from specjax.config import HOW, differing, plain
from specjax.config.checks import sources
from specjax.data.cache import digest
from specjax.data.read import SHIPPED, SUFFIXES, opened
from specjax.data.remote import is_address
from specjax.errors import UserError
from specjax.lock import Lock
from specjax.report import write

CLOCK = "seconds.json"  # of the calls before
SOURCES = "sources.json"  # digests of the files of rows


def compare(
    config: ConfigDict,
    workdir: str | Path,
    *,
    budget: str = "",
    steps: int | None = None,
    target: str = "",
    prices: Mapping[str, float] | None = None,
    lang: str | None = None,
) -> dict[str, Any]:
    """Trains every method of `config.compare` and says which to take; called again, it resumes.

    A method's runs are in `<workdir>/<method>`. All results are written to `<workdir>/report.json` (and `report.html`),
    and the figures of each method's best run to `<workdir>/comparison.json`. A method that fails or does not fit is
    reported, and the others continue.

    Args:
      config: a config with methods in `config.compare`.
      workdir: a folder of its own.
      budget: the time for all methods together, such as "20m", which sets the steps; "": the config's steps.
      steps: the steps of each run; None: the config's.
      target: a model, for which the report gives each method's smallest hardware.
      prices: per chip and hour there, by family (v5e, h100), in any currency.
      lang: the report's language: en, the default, or fr.

    Returns:
      The report.

    Raises:
      UserError: a mistake in any method's config, before the first run.
      SystemExit: it was stopped (143, 130), or all methods failed (2, or 1 for a bug).
    """
    workdir = Path(workdir)
    if budget and steps:
        raise UserError("--budget and --steps both set the runs' length: give one of them.")
    if prices and not target:
        raise UserError("--price is of the hardware that --for=MODEL looks for: give that too.")
    if prices:
        from specjax.compare.aim import FAMILIES  # heavy, and this module is imported by processes not yet prepared

        for name in prices:
            if name not in FAMILIES.values():
                raise UserError(f"--price={name}: --for looks for {' and '.join(FAMILIES.values())} alone.")
    seconds = budgets.seconds(budget) if budget else None
    made = methods.read(config, steps or (1 if seconds else 0))
    files.claim(workdir, (*methods.OWN, *made))
    with Lock(workdir) as lock:
        files.mark(workdir)
        lock.take()
        clock = _Clock(workdir / CLOCK)
        console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 220)
        _say_sets(console, made)
        aimed = _aimed(made, target, prices or {}, workdir)
        if seconds:
            found = budgets.probed(methods.read(config), workdir / "budget", seconds)
            made = methods.read(config, found)
            console.print(f"--budget={budget}: {found} steps for each run")
        _check(workdir, made)
        _check_sources(workdir, made)
        records = _trained(console, made, workdir, clock)
        report = facts.report(workdir, made, records, seconds=clock.seconds(), budget=seconds, target=aimed)
        return _told(console, report, records, workdir, lang or "en")


def _say_sets(console: Console, made: Mapping[str, Method]) -> None:
    """Prints what is measured where the user named no sets."""
    first = next(iter(made.values()))
    if first.domain not in first.config.data.eval:
        console.print(
            f"{first.config.data.eval_fraction:.0%} of the rows are held out, and measured as {first.domain!r}"
        )
    console.print(f"the loss on {first.domain!r} chooses", markup=False)
    if first.shipped:
        console.print(
            f"what is forgotten is measured on what comes with specjax, {' and '.join(first.shipped)}: small sets, in "
            "English and French; name your own by --config.data.eval.general=FILE"
            + (" --config.data.eval_beside=true" if first.domain not in first.config.data.eval else "")
        )
    files_of = {name: one.config.data.eval.get(one.domain, "") for name, one in made.items()}
    if len(set(files_of.values())) > 1:
        said = ", ".join(f"{name}: {file or 'held-out rows'}" for name, file in files_of.items())
        console.print(f"the methods are measured on different sets, so their losses are not one scale ({said})")


def _aimed(
    made: Mapping[str, Method], target: str, prices: Mapping[str, float], workdir: Path
) -> dict[str, Any] | None:
    """The hardware for the target model, computed in a process that takes no device."""
    if not target:
        return None
    largest = {name: max(one.trials.values(), key=lambda config: config.lora.rank or 0) for name, one in made.items()}
    out = workdir / "target.json"
    settings = {name: plain(one) for name, one in largest.items()}
    status, _, why = child.run(child.aim, settings, target, dict(prices), str(out))
    if status:
        raise UserError(f"--for={target}: {why}")
    return files.read_object(out)


def _check(workdir: Path, made: Mapping[str, Method]) -> None:
    """Refuses methods that were begun with another config, and writes the current configs."""
    path = workdir / "methods.json"
    now = {name: plain(one.config) for name, one in made.items()}
    was = files.read_object(path, "restore it, or choose another workdir") if path.is_file() else {}
    for name in (one for one in now if one in was):
        changed = [key for key in differing(was[name], now[name]) if not HOW.match(key)]
        if changed and (workdir / name).exists():
            raise UserError(
                f"{workdir} holds the method {name} with another {', '.join(changed)}: undo that, give the method "
                "another name, or choose another workdir."
            )
    files.write_json(path, was | now)


def _check_sources(workdir: Path, made: Mapping[str, Method]) -> None:
    """Refuses files of rows that are not what they were when the first method began, and keeps what new ones are."""
    path = workdir / SOURCES
    was = files.read_object(path, "restore it, or choose another workdir") if path.is_file() else {}
    now: dict[str, str] = {}
    for one in made.values():
        for source in (*(source for source, _ in sources(one.config).values()), *one.config.data.eval.values()):
            if source not in now:
                now[source] = _digest(source, one.config.data.split)
    if changed := [source for source in now if was.get(source, now[source]) != now[source]]:
        raise UserError(
            f"{changed[0]} is not what it was when {workdir} was begun, and its methods would not have the same rows: "
            "restore it, or choose another workdir."
        )
    files.write_json(path, was | now)


def _digest(source: str, split: str) -> str:
    """Of the files here that hold a source's rows; of a dataset of the hub, or behind an address, of nothing."""
    path, parts = Path(source), list[str]()
    if not is_address(source) and (path.exists() or path.suffix in SUFFIXES or source.startswith(SHIPPED)):
        for one in opened(source, split).files or ():
            with one.open("rb") as file:
                parts.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digest(*parts)


def _trained(console: Console, made: Mapping[str, Method], workdir: Path, clock: "_Clock") -> dict[str, dict[str, Any]]:
    """Each method's record; for a method that did not finish, its status and the reason."""
    works = {name: budgets.work(one)[0] for name, one in made.items()}
    records: dict[str, dict[str, Any]] = {}
    spent = done = 0.0
    for number, (name, one) in enumerate(made.items(), 1):
        left = sum(work for other, work in works.items() if other not in records)
        about = f", about {_minutes(spent / done * left)} left" if done else ""
        console.rule(f"{name}: {number} of {len(made)}{about}")
        path = workdir / name / "method.json"
        if path.is_file() and (was := files.read_object(path, "delete it")).get("seeds") in (None, one.config.seeds):
            records[name] = was
            console.print(f"{name} was complete, nothing was trained")
            continue
        twin = next(
            (other for other, two in made.items() if other != name and methods.twins(one.config, two.config)), ""
        )
        since = time.monotonic()
        try:
            status, kind, why = child.run(child.train, plain(one.config), str(workdir), name, twin)
        finally:
            clock.write()
        if status:
            console.print(f"{name}: {why}", markup=False)
            records[name] = {"status": kind, "why": why, "exit": status}
        else:
            records[name] = files.read_object(path, "delete it")
            spent, done = spent + time.monotonic() - since, done + works[name]
            if number < len(made):
                so_far = [{"name": other} | record for other, record in records.items()]
                sets = {"domain": one.domain, "forgetting": one.forgetting}
                console.print(table.figures({"methods": so_far, "sets": sets}))
    return records


def _told(
    console: Console, report: dict[str, Any], records: Mapping[str, Mapping[str, Any]], workdir: Path, lang: str
) -> dict[str, Any]:
    """Writes and prints the results; exits with a failure's status if no method finished."""
    path = facts.write(workdir, report)
    done = {name: record for name, record in records.items() if record["status"] == "done"}
    summaries = {
        name: files.read_object(workdir / one["place"] / "summary.json", "delete it") for name, one in done.items()
    }
    files.write_json(workdir / "comparison.json", summaries)
    console.rule("comparison")
    table.show(console, report)
    for line in table.answers(report):
        console.print(line)
    if absent := facts.unscored(report):
        what = " and ".join(scores.LIBRARIES[one] for one in absent)
        how = "`pip install -e '.[report]'` in specjax's folder"
        console.print(f"{what}: not measured, for {', '.join(absent)} is not installed: {how}", markup=False)
    if done:
        write(report, workdir / "report.html", lang)
        console.print(f"{path} and report.html have all of it", markup=False)
    if failed := [record for record in records.values() if "exit" in record]:
        console.print(f"{len(failed)} of {len(records)} methods did not come to their end; the reasons stand above")
        if len(failed) == len(records):
            raise SystemExit(2 if all(record["exit"] == 2 for record in failed) else 1)
    return report


class _Clock:
    """The seconds of this call and of earlier ones."""

    def __init__(self, path: Path):
        self._path, self._began = path, time.monotonic()
        self._before = float(files.read_object(path, "delete it")["seconds"]) if path.is_file() else 0.0

    def seconds(self) -> float:
        """So far."""
        return self._before + time.monotonic() - self._began

    def write(self) -> None:
        """For a later call."""
        files.write_json(self._path, {"seconds": self.seconds()})


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
