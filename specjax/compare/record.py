"""`method.json`, which a method writes at its end: its runs, their costs and their results."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from specjax import build, files, process
from specjax.compare import answers, course, methods
from specjax.compare.course import Trial
from specjax.compare.intervals import interval
from specjax.config import copied, lora_settings
from specjax.data.report import Runs

RECORD = "method.json"
KINDS = {"text": "text", "instruct": "pairs", "prompt": "pairs", "preference": "preference"}


def record(config: ConfigDict, workdir: Path, name: str, twin: str) -> None:
    """Trains, measures and writes. `twin` is a method that would be the same on raw text; "": none."""
    method = methods.of(name, config)
    folder = workdir / name
    if twin and _is_text(method.config):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / RECORD, {"status": "skipped", "why": f"raw text has no answers: {twin} is the same"})
        return
    trials, shared = course.trained(method.config, method.trials, folder, method.domain)
    peak = process.peak_memory()  # before anything answers
    best = min((trial for trial in trials if not trial.stopped), key=lambda trial: trial.best(method.domain)[1])
    seeds = course.seeded(best, method.config, folder)
    files.write_json(folder / RECORD, _facts(method, best, trials, seeds, workdir, shared, peak))


def _is_text(config: ConfigDict) -> bool:
    _, tokenizer = build.tokenizer_of(config)
    return all(corpus.format == "text" for corpus in build.corpora_of(config, tokenizer).values())


def _facts(
    method: methods.Method,
    best: Trial,
    trials: list[Trial],
    seeds: list[Trial],
    workdir: Path,
    shared: bool,
    peak: int,
) -> dict[str, Any]:
    """The facts about one method that the report combines."""
    config = build.config_of(best.folder)
    _, tokenizer = build.tokenizer_of(config)
    data, sets = build.data_of(config, tokenizer)
    said = answers.answered(config, best.folder, workdir, sets, tokenizer)
    own = files.read_object(best.folder / "summary.json", "delete the method's folder")
    text = data.report.get("format") == "text"
    lora = lora_settings(config) if config.trainable == "lora" else {}
    base = _base(config)
    adapter = own["trainable_parameters"] if lora else 0
    return {
        "status": "done",
        "why": "; ".join(f"{trial.name}: {trial.why}" for trial in (*trials, *seeds) if trial.why),
        "method": methods.kind(config, text=text),
        "rank": lora.get("rank"),
        "alpha": lora.get("alpha"),
        "rate": config.optimizer.learning_rate,
        "trainable": own["trainable_parameters"],
        "total": base["parameters"] + adapter,
        **_cost(best, own, peak),
        "shared_process": shared,
        "measures": {name: _measure(name, method, best, seeds, said) for name in sets},
        "seeds": method.config.seeds,
        "trials": [_told(trial) for trial in (*trials, *seeds)],
        "place": str(best.folder.relative_to(workdir)),
        "set_rows": {name: one.report["rows"] for name, one in sets.items()},
        "data": _data(data.report, sets[method.domain].report, data.preview(1), whole=not config.eval.batches),
        "base": base,
        "machine": {"device": f"{jax.devices()[0].device_kind.lower()} x {jax.device_count()}", "jax": jax.__version__},
        "asked": said["asked"],
        "prompts": _prompts(best, folder=workdir / method.name),
    }


def _cost(best: Trial, own: Mapping[str, Any], peak: int) -> dict[str, Any]:
    """Seconds, speed, memory and bytes of the best trial only, however often it was stopped and resumed.

    The speed of a fleet's adapter is that of the whole fleet, so that its seconds are its share of the fleet's.
    """
    tokens = next((line["tokens"] for line in reversed(best.lines) if "tokens" in line), 0)
    rates = [line["tokens_per_s"] for line in best.lines if "tokens_per_s" in line]
    rate = own.get("tokens_per_s") or (statistics.median(rates) if rates else None)
    fleet = best.folder.parent.parent / "summary.json"  # of an adapter; not there where another one failed
    whole = own if "seconds" in own else files.read_object(fleet, "delete it") if fleet.is_file() else {}
    return {
        "seconds": tokens / rate if rate else None,
        "compile_seconds": whole.get("compile_seconds"),
        "tokens": tokens,
        "tokens_per_s": rate,
        "peak_memory_bytes": whole.get("peak_memory_bytes", peak),
        "saved_bytes": sum(file.stat().st_size for file in (best.folder / "export").glob("*.safetensors")),
    }


def _prompts(best: Trial, folder: Path) -> dict[str, dict[str, str]]:
    """Prompt of `config.eval.prompts` -> answers of the base and of the last evaluation; `folder`: a fleet's folder."""
    path = best.folder / "samples.jsonl"
    path = path if path.is_file() else folder / "samples.jsonl"
    rows = [row for _, row in files.read_rows(path)] if path.is_file() else []
    made: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.get("adapter", best.name) == best.name:
            made.setdefault(row["prompt"], {"base": row["text"]})["said"] = row["text"]
    return made


def _measure(
    name: str, method: methods.Method, best: Trial, seeds: list[Trial], said: Mapping[str, Any]
) -> dict[str, Any]:
    """A set's numbers before the first step and at the best step; for several seeds the loss's mean and interval."""
    evals = {line["step"]: line for line in best.lines if f"eval/{name}/loss" in line}
    chosen = best.best(method.domain)[0]
    made: dict[str, Any] = {}
    for when, line in (("before", evals.get(0, {})), ("after", evals.get(chosen, {}))):
        numbers = {"loss": line.get(f"eval/{name}/loss"), "token_accuracy": line.get(f"eval/{name}/accuracy")}
        numbers |= {"exact": None, "chrf": None, "rouge_l": None} | said[when].get(name, {})
        # `config.eval.exact` asks more questions of its sets.
        made[when] = numbers | {"exact": line.get(f"eval/{name}/exact", numbers["exact"])}
    of_seeds = [each.losses()[each.best(method.domain)[0]][name] for each in (best, *seeds) if not each.why]
    mean, low, high = interval(of_seeds)
    made["after"]["loss"] = mean
    return made | {"low": low, "high": high, "seeds": len(of_seeds)}


def _told(trial: Trial) -> dict[str, Any]:
    c = trial.config
    return {
        "name": trial.name,
        "rate": c.optimizer.learning_rate,
        "rank": c.lora.rank if c.trainable == "lora" else None,
        "seed": c.seed,
        "steps": trial.steps,
        "stopped": trial.stopped,
        "why": trial.why,
        "curve": [{"step": step, "loss": loss} for step, loss in sorted(trial.losses().items())],
    }


def _data(
    report: Mapping[str, Any], held: Mapping[str, Any], rows: Sequence[Sequence[Runs]], *, whole: bool
) -> dict[str, Any]:
    """Facts about the training rows and the held-out set, and the first document as the model sees it.

    `whole`: the whole set is measured, not only some batches.
    """
    parts = report.get("sources", {"": report}).values()
    count = sum(part["rows"] for part in parts)
    cut = sum(
        sum(dropped["rows"] for why, dropped in part["dropped"].items() if why != "nothing to learn")
        + part.get("truncated", {}).get("rows", 0)
        for part in parts
    )
    formats = {part["format"] for part in parts}
    return {
        "path": ", ".join(str(part["source"]) for part in parts),
        "kind": KINDS.get(formats.pop(), "chats") if len(formats) == 1 else "mixed",
        "rows": count,
        "held_out_rows": held["rows"] if whole else None,
        "tokens": report["tokens"],
        "loss_tokens": report.get("loss_tokens"),
        "max_length": report.get("length"),
        "cut_share": cut / count if count else None,
        "split": "taken" if held.get("holdout") else "given",
        "example": [[text, trains] for text, trains in rows[0][0]],
    }


def _base(config: ConfigDict) -> dict[str, Any]:
    whole = copied(config, "model")
    whole.trainable, whole.model.quantise = "all", ""
    model = build.base_of(whole, build.tokenizer_of(config)[0], None, abstract=True)
    count = sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return {"path": config.model.path, "family": model.config.family, "parameters": count, "dtype": config.model.dtype}
