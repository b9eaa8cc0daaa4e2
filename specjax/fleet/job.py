"""`specjax train` for a config with `fleet`: one config and one folder per adapter, and one summary."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from specjax import build, files, process, resume, sharding
from specjax.config import lora_settings, plain, resolved, settled, validate
from specjax.config.checks import ARGUMENTS, groups_of_rows
from specjax.config.entries import members, slots_of, swept
from specjax.errors import UserError, keys, naming
from specjax.fleet.fit import fit
from specjax.fleet.member import Member, adamw, lion
from specjax.fleet.step import Rule
from specjax.lock import Lock
from specjax.models import Decoder
from specjax.train.result import Result


@keys(ARGUMENTS)
def train(config: ConfigDict, workdir: str | Path, *, profile: bool = False) -> dict[str, Result]:
    """Trains the adapters of `config.fleet` in one run; called again on the same workdir, it resumes.

    Writes `config.json`, `metrics.jsonl` (each line has the key `adapter`), `checkpoints/` and `summary.json` into the
    workdir. `adapters/<name>` holds what a single run of this adapter would hold: `config.json`, `data.json`,
    `metrics.jsonl`, `checkpoints/` (trained weights, without the optimizer's state), `summary.json` and `export/`, so
    that `specjax eval`, `generate` and `export` accept it.

    Raises:
      UserError: a wrong config of any adapter, raised before any data is read, or what `fleet.fit` raises.
      SystemExit: 143 after SIGTERM or Ctrl-C, once the checkpoint is saved.
    """
    if profile:
        raise UserError("--profile is of a single run: leave it out, or train one adapter by a config of its own.")
    workdir = Path(workdir)
    with Lock(workdir) as lock:
        config = swept(config)
        configs = configs_of(config)
        config = settled(config, jax.default_backend(), jax.device_count())
        configs = {name: settled(one, jax.default_backend(), jax.device_count()) for name, one in configs.items()}
        check_rows(config, jax.device_count())
        for one in configs.values():
            resume.refuse_sources(workdir, one)
        files.claim(workdir)
        if resume.begun(workdir):
            resume.changes(workdir, plain(config), drawn=True)
        if (workdir / "summary.json").exists():
            print(f"{workdir}: the run was complete, nothing was trained")
            return _finished(workdir)
        lock.take(make=False)
        made = {name: _member(name, one) for name, one in configs.items()}
        files.mark(workdir)
        lock.take()
        files.write_json(workdir / "config.json", plain(config))
        for name, (_, one, report, _) in made.items():
            folder = workdir / "adapters" / name
            folder.mkdir(parents=True, exist_ok=True)
            files.mark(folder)
            files.write_json(folder / "config.json", resolved(one))
            files.write_json(folder / "data.json", report)
        return _fit(config, workdir, made)


def _fit(config: ConfigDict, workdir: Path, made: dict[str, Any]) -> dict[str, Result]:
    folder = next(iter(made.values()))[3][0]
    base = build.base_of(config, folder, sharding.make_mesh(**config.mesh))

    def ended(name: str, model: Decoder, result: Result) -> None:
        _, one, _, (_, tokenizer) = made[name]
        place = workdir / "adapters" / name
        lines = [line for line, row in files.read_rows(workdir / "metrics.jsonl") if row.get("adapter") == name]
        files.write_text(place / "metrics.jsonl", "".join(lines))
        if one.export:
            end, card = build.end_of_answers(place, tokenizer, model), build.card_of(place, one, model, "best")
            told: dict[str, Any] = {"eos_token": end, "card": card, "overwrite": True}
            if note := build.write_export(model, tokenizer, one, place / "export", **told):
                print(f"{name}: {note}")
        files.write_json(place / "summary.json", _summary(result))

    results = fit(
        base,
        {name: member for name, (member, *_) in made.items()},
        rule=rule_of(config),
        objective=build.objective_of(config),
        slots=slots_of(config),
        rungs=tuple(config.rungs or ()),
        survive=config.survive,
        workdir=workdir,
        accumulate=config.accumulate,
        save_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        log_every=config.log.every,
        tensorboard=config.log.tensorboard,
        ended=ended,
        attach=False,
    )
    if any(result.stopped == "signal" for result in results.values()):
        raise SystemExit(process.STOPPED)
    some = next(iter(results.values()))
    whole = {"seconds": some.seconds, "compile_seconds": some.compile_seconds}
    whole |= {"peak_memory_bytes": process.peak_memory()}
    files.write_json(
        workdir / "summary.json", whole | {"adapters": {name: _summary(one) for name, one in results.items()}}
    )
    Console(soft_wrap=True).print(_table(results))
    exported = f"; {workdir / 'adapters'} has an export of each" if config.export else ""
    print(
        f"{len(results)} adapters{exported}; try: specjax generate --model={workdir / 'adapters' / next(iter(results))}"
    )
    return results


def configs_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """The config of each adapter, each valid alone.

    Raises:
      UserError: a mistake in one of them, after the adapter's name, or something that a fleet cannot do.
    """
    configs = members(config)
    for name, one in configs.items():
        with naming(f"config.fleet.{name}"):
            validate(one, None)
            if said := alone(one):
                raise UserError(said)
    return configs


def alone(config: ConfigDict) -> str:
    """Why a run cannot be an adapter of a fleet, in one sentence, or ""; this does not look at the model."""
    if config.trainable != "lora":
        return f"config.trainable is {config.trainable!r}: a fleet trains adapters, set it to 'lora'."
    for key in ("init_from", "init", "dora", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"):
        if config.lora[key]:
            return f"config.lora.{key} is set: a fleet trains plain LoRA from fresh factors."
    for key, only in (
        ("optimizer.moments", "float32"),
        ("optimizer.offload", False),
        ("optimizer.loraplus_ratio", 1.0),
        ("log.wandb", ""),
    ):
        if config[key] != only:
            return f"config.{key} is {config[key]!r}, which a fleet does not know: leave it at {only!r}."
    return ""


def check_rows(config: ConfigDict, device_count: int) -> None:
    """Raises `UserError` if the rows of a micro-batch do not divide over the devices."""
    ways = groups_of_rows(config, device_count)
    count = slots_of(config)
    rows = count * config.batch_size // config.accumulate
    if config.batch_size % config.accumulate or rows % ways:
        raise UserError(
            f"config.slots {count} x config.batch_size {config.batch_size} gives each of config.accumulate="
            f"{config.accumulate} micro-batches {rows} rows for {ways} groups of devices (config.mesh.data x fsdp x "
            "expert): make one of them a multiple of that."
        )


def _member(name: str, config: ConfigDict) -> tuple[Member, ConfigDict, dict[str, Any], tuple[Path, Any]]:
    """An adapter's member, config, data report, and (model folder, tokenizer)."""
    with naming(f"config.fleet.{name}"):
        folder, tokenizer = build.tokenizer_of(config)
        data, sets = build.data_of(config, tokenizer, Console())
        build.check_pairs(config, data)
        build.check_ids(config, folder, data, sets)
    steps, c = config.steps or data.steps(config.epochs), config.optimizer
    member = Member(
        data=data,
        steps=steps,
        lora=adapter_of(config),
        learning_rate=build.rate_of(config, steps),
        weight_decay=c.weight_decay,
        clip_norm=c.clip_norm,
        seed=config.seed,
        eval_data=sets,
        eval_every=config.eval.every,
        eval_batches=config.eval.batches,
        patience=config.eval.patience,
        best=resolved(config)["eval"]["best"] if sets else "",
        sample=build.sampler_of(config, tokenizer),
        measure=build.measure_of(config, tokenizer, sets),
    )
    course = data.course(steps)
    print(f"{name}: {steps:,} steps of {config.batch_size} rows: {course['passes']} passes over {data.num_rows:,} rows")
    report = {"train": data.report | course} | {label: one.report for label, one in sets.items()}
    return member, config, report, (folder, tokenizer)


def adapter_of(config: ConfigDict) -> dict[str, Any]:
    """The arguments of `lora.inject` for one adapter's config."""
    return lora_settings(config) | {"seed": config.seed + build.SEED_LORA}


def rule_of(config: ConfigDict) -> Rule:
    """The optimizer that all adapters share."""
    c = config.optimizer
    return lion(c.b1, c.b2) if c.name == "lion" else adamw(c.b1, c.b2, c.eps)


def _summary(result: Result) -> dict[str, Any]:
    """The summary of one adapter; its seconds and memory are those of the fleet."""
    first, last = result.first_evals, result.evals
    return {
        "trainable": "lora",
        "trainable_parameters": result.trainable_parameters,
        "step": result.step,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "evals": {name: {"before": first[name]["loss"], "after": last[name]["loss"]} for name in last},
        "exact": {
            name: {"before": first[name]["exact"], "after": last[name]["exact"]}
            for name in last
            if "exact" in last[name]
        },
    }


def _finished(workdir: Path) -> dict[str, Result]:
    """The summary of a complete fleet, which is written last."""
    adapters = files.read_object(workdir / "summary.json", "delete it")["adapters"]
    kept = ("step", "best_step", "stopped", "trainable_parameters")
    return {name: Result(**{key: one[key] for key in kept}) for name, one in adapters.items()}


def _table(results: dict[str, Result]) -> Table:
    """One row per adapter; every set's loss before -> after, in nats per token."""
    sets = list(dict.fromkeys(name for one in results.values() for name in one.evals))
    table = Table("adapter", "trainable", "steps", "", "best", *(f"{name} loss" for name in sets))
    for name, one in results.items():
        losses = (
            f"{one.first_evals[label]['loss']:.3f} -> {one.evals[label]['loss']:.3f}" if label in one.evals else ""
            for label in sets
        )
        best = "" if one.best_step is None else f"{one.best_step:,}"
        table.add_row(name, f"{one.trainable_parameters:,}", f"{one.step:,}", one.stopped, best, *losses)
    return table
