"""The runs of one method, in its own process: values are tried, and the best are trained again with further seeds."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax import files, run
from specjax.config import copied
from specjax.config.entries import slots_of, swept
from specjax.errors import NotFinite, UserError
from specjax.fleet import job
from specjax.fleet.fit import Failed
from specjax.hf import config as hf_config
from specjax.hf import folder as hf_folder
from specjax.train.result import Result

HALVING = "halving.json"  # which trials went on at each rung


@dataclasses.dataclass
class Trial:
    """A run of a method, complete or stopped early.

    Attributes:
      config: the run's config.
      folder: where its checkpoints are.
      lines: of its metrics.
      stopped: "", "halving" or "failed".
      why: why it failed, in one sentence.
    """

    name: str
    config: ConfigDict
    folder: Path
    lines: list[dict[str, Any]]
    stopped: str = ""
    why: str = ""

    def losses(self) -> dict[int, dict[str, float]]:
        """Step -> set -> loss for each evaluation."""
        return losses(self.lines)

    def best(self, domain: str) -> tuple[int, float]:
        """The step after step 0 with the lowest loss on the domain's set, and that loss; infinity if there is none."""
        found = {step: each[domain] for step, each in self.losses().items() if step and each.get(domain) is not None}
        step = min(found, key=lambda one: found[one], default=0)
        return step, found.get(step, math.inf)

    @property
    def steps(self) -> int:
        """The number of steps done, as far as they were logged."""
        return max((line["step"] for line in self.lines), default=0)


def losses(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Step -> set -> loss, from the lines of `metrics.jsonl` that have evaluations.

    >>> losses([{"step": 0, "eval/a/loss": 2.0}, {"step": 1, "loss": 3.0}])
    {0: {'a': 2.0}}
    """
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        each = {
            key.split("/")[1]: value for key, value in line.items() if key.startswith("eval/") and key.endswith("/loss")
        }
        if each:
            found[line["step"]] = each
    return found


def survivors(there: Mapping[str, float], survive: float) -> list[str]:
    """The trials that continue after a rung: the share with the lower losses, rounded up as in a fleet.

    >>> survivors({"a": 3.0, "b": 1.0, "c": 2.0}, 0.5)
    ['b', 'c']
    """
    return sorted(there, key=lambda name: there[name])[: math.ceil(survive * len(there))]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines that a run logged."""
    path = folder / "metrics.jsonl"
    return [row for _, row in files.read_rows(path)] if path.is_file() else []


def trained(
    config: ConfigDict, trials: Mapping[str, ConfigDict], folder: Path, domain: str
) -> tuple[list[Trial], bool]:
    """All trials of a method, and whether several of them shared each step.

    Raises:
      UserError: the mistake of a single trial; or none of several trials finished.
    """
    if not config.sweep:
        [(name, one)] = trials.items()
        run.train(one, folder)
        return [Trial(name, one, folder, lines_of(folder))], False
    fleet = len(trials) > 1 and not job.alone(config) and not _experts(config)
    made = _fleet(config, trials, folder) if fleet else _turns(config, trials, folder, domain)
    if all(trial.stopped for trial in made):
        raise UserError("; ".join(f"{trial.name}: {trial.why}" for trial in made if trial.why))
    return made, fleet and slots_of(swept(config)) > 1


def _experts(config: ConfigDict) -> bool:
    return bool(hf_config.from_folder(hf_folder.resolve(config.model.path, config.model.revision)).num_experts)


def _fleet(config: ConfigDict, trials: Mapping[str, ConfigDict], folder: Path) -> list[Trial]:
    """Trains the trials as adapters of one fleet; the worse ones stop at the rungs."""
    results: Mapping[str, Result]
    why: Mapping[str, str] = {}
    try:
        results = job.train(config, folder)
    except Failed as error:
        results, why = error.results, error.why
    logged = lines_of(folder)
    made = []
    for name, one in trials.items():
        lines = [
            {key: value for key, value in line.items() if key != "adapter"}
            for line in logged
            if line.get("adapter") == name
        ]
        stopped = "failed" if name in why else {"halved": "halving"}.get(results[name].stopped, "")
        made.append(Trial(name, one, folder / "adapters" / name, lines, stopped, why.get(name, "")))
    return made


def _turns(config: ConfigDict, trials: Mapping[str, ConfigDict], folder: Path, domain: str) -> list[Trial]:
    """Trains one trial after another up to each rung; keeps which continued, so that a later call repeats nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    place = lambda name: folder / "trials" / name  # noqa: E731
    told = files.read_object(folder / HALVING, "delete it") if (folder / HALVING).is_file() else {}
    kept, failed = dict[str, list[str]](told.get("kept", {})), dict[str, str](told.get("failed", {}))
    going = [name for name in trials if name not in failed]
    for share in config.rungs or ():
        if str(share) not in kept:
            there = dict[str, float]()
            for name in going:
                done = _tried(failed, name, lambda: run.train_part(trials[name], place(name), share))  # noqa: B023
                if done is not None:
                    there[name] = losses(lines_of(place(name)))[done.step][domain]
            kept[str(share)] = survivors(there, config.survive)
            files.write_json(folder / HALVING, {"kept": kept, "failed": failed})
            print(f"rung {share}: {', '.join(kept[str(share)]) or 'none'} of {', '.join(trials)} go on")
        for name in set(going).difference(kept[str(share)]):
            shutil.rmtree(place(name) / "checkpoints", ignore_errors=True)  # nobody goes on from there
        going = kept[str(share)]
    for name in going:
        _tried(failed, name, lambda: run.train(trials[name], place(name)))  # noqa: B023
    files.write_json(folder / HALVING, {"kept": kept, "failed": failed})
    made = []
    for name, one in trials.items():
        stopped = "failed" if name in failed else "" if name in going else "halving"
        made.append(Trial(name, one, place(name), lines_of(place(name)), stopped, failed.get(name, "")))
    return made


def _tried(failed: dict[str, str], name: str, train: Callable[[], Result]) -> Result | None:
    """Numbers that are not finite, as with too high a rate, end only the trial; other errors end the method."""
    try:
        return train()
    except NotFinite as error:
        failed[name] = " ".join(str(error).split())
        print(f"{name}: {failed[name]} It stops; the others go on.")
        return None


def seeded(best: Trial, config: ConfigDict, folder: Path) -> list[Trial]:
    """Trains the best values with each further seed, on the same rows and evaluated on the same sets."""
    made = []
    failed = dict[str, str]()
    for number in range(1, config.seeds):
        one = copied(best.config, "data")
        one.data.eval_seed = config.seed if config.data.eval_seed < 0 else config.data.eval_seed
        one.seed, one.export = config.seed + number, False
        name, place = f"seed-{one.seed}", folder / "seeds" / str(one.seed)
        _tried(failed, name, lambda: run.train(one, place))  # noqa: B023
        made.append(Trial(name, one, place, lines_of(place), "failed" if name in failed else "", failed.get(name, "")))
    return made
