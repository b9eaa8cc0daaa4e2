"""How many steps of each method a budget of seconds allows, by the speed of each method's first steps."""

import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from specjax import files
from specjax.compare import child
from specjax.compare.methods import Method
from specjax.config import copied, plain
from specjax.errors import UserError

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
PROBED = 3  # steps that tell a method's speed


class Speed(NamedTuple):
    """A method's seconds per step, per evaluation, and for the rest of a run (start, compilation)."""

    step: float
    evaluation: float
    around: float


def seconds(text: str) -> float:
    """The seconds of a budget as the user types it.

    >>> seconds("20m"), seconds("1.5h"), seconds("90")
    (1200.0, 5400.0, 90.0)

    Raises:
      UserError: it is not a duration.
    """
    hit = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if hit is None or not float(hit[1]):
        raise UserError(f"--budget={text} is no time: give one such as 20m, 90s or 1.5h.")
    return float(hit[1]) * UNITS[hit[2]]


def work(method: Method) -> tuple[float, int]:
    """(full runs' worth of steps, runs started) of a method: trials stop at rungs, runs of seeds are full.

    >>> from specjax.config import get_config
    >>> config = get_config()
    >>> config.rungs, config.seeds = (0.25, 0.5), 2
    >>> work(Method("a", config, {"1": config, "2": config, "3": config, "4": config}, "d", (), ()))
    (3.0, 8)
    """
    left, before, whole, begun = len(method.trials), 0.0, 0.0, 0
    for share in (*(method.config.rungs or ()), 1.0):
        whole, begun = whole + left * (share - before), begun + left
        left, before = math.ceil(method.config.survive * left), share
    return whole + method.config.seeds - 1, begun + method.config.seeds - 1


def steps(
    budget: float, spent: float, methods: Mapping[str, Method], speeds: Mapping[str, Speed], rest: Sequence[str] = ()
) -> int:
    """How many steps each run may have, the same for all.

    Args:
      budget: in seconds.
      spent: seconds of it that measuring the speeds took.
      methods: by name.
      speeds: by the methods' names.
      rest: methods whose speed is not known yet.

    Raises:
      UserError: the budget does not allow one step each; the error gives the seconds needed.
    """
    works = {name: work(method) for name, method in methods.items()}
    around = spent
    for name, (whole, runs) in works.items():
        c = methods[name].config
        measured = runs + whole * (
            c.steps // c.eval.every if c.steps and c.eval.every else 1
        )  # `scaled` keeps how often
        around += speeds[name].around * runs + speeds[name].evaluation * measured
    step = sum(speeds[name].step * whole for name, (whole, _) in works.items())
    found = int((budget - around) / step)
    if found < 1:
        more = f", and {', '.join(rest)} come on top" if rest else ""
        raise UserError(
            f"--budget={budget:.0f}s is too small for one step of each method: starting, compiling and measuring "
            f"{sum(runs for _, runs in works.values())} runs takes about {around:.0f} seconds, so give at least "
            f"--budget={math.ceil(around + step)}s{more}."
        )
    return found


def probed(methods: Mapping[str, Method], folder: Path, budget: float) -> int:
    """`steps` from a few measured steps of each method; kept in the folder, so that later calls agree.

    Raises:
      UserError: as for `steps`, as soon as it is certain; a method's own mistake; a budget other than the folder's.
    """
    path = folder / "steps.json"
    if path.is_file():
        was = files.read_object(path, "delete it")
        if was["seconds"] != budget:
            raise UserError(
                f"{folder.parent} was begun with --budget={was['seconds']:g}s, by which its methods have "
                f"{was['steps']} steps each: give that one, not {budget:g}s, or choose another workdir."
            )
        return int(was["steps"])
    began, speeds = time.monotonic(), dict[str, Speed]()
    for name, method in methods.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        since = time.monotonic()
        status, kind, why = child.run(
            child.probe, plain(_probe(next(iter(method.trials.values())))), str(folder / name)
        )
        if kind == "too_large":
            continue  # which is said where it trains
        if status:
            raise (UserError if status == 2 else RuntimeError)(f"config.compare.{name}: {why}")
        taken = time.monotonic() - since
        told = files.read_object(folder / name / "summary.json")
        speeds[name] = Speed(
            told["seconds"] / PROBED, told["eval_seconds"], taken - told["seconds"] - told["eval_seconds"]
        )
        shutil.rmtree(folder / name)
        known = {one: methods[one] for one in speeds}
        rest = list(methods)[list(methods).index(name) + 1 :]
        found = steps(budget, time.monotonic() - began, known, speeds, rest)
    if not speeds:
        raise UserError("no method of config.compare fits in this machine's memory: take a smaller model or batch.")
    files.write_json(
        path, {"steps": found, "seconds": budget, "speeds": {name: one._asdict() for name, one in speeds.items()}}
    )
    return found


def _probe(config: ConfigDict) -> ConfigDict:
    made: Any = copied(config, "optimizer", "eval", "log", "checkpoint")
    made.steps, made.epochs, made.export = PROBED, 1.0, False
    made.optimizer.warmup_steps, made.eval.every, made.eval.patience, made.checkpoint.every = 0, 0, 0, 0
    made.log.every, made.log.wandb, made.log.tensorboard = 1, "", False
    return made
