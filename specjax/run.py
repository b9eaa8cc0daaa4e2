"""The composition root, a function for each verb: it takes the parts that `build` makes of a config, and runs them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from specjax import build, files, lora, process, resume, sharding
from specjax.chat.prompts import BASE, Prompt
from specjax.chat.speakers import Who
from specjax.chat.speakers import load as load_speakers
from specjax.cluster import processes
from specjax.config import check_length, resolved, settled, validate
from specjax.config.checks import ARGUMENTS
from specjax.config.entries import members, refuse_fleet, swept
from specjax.data.report import show
from specjax.errors import UserError, keys
from specjax.hf import load as hf_load
from specjax.hf.tokenizer import load_tokenizer
from specjax.lock import Lock
from specjax.train.evaluate import evaluate as evaluate_set
from specjax.train.evaluate import most_documents
from specjax.train.fit import fit
from specjax.train.result import Result
from specjax.train.session import check_ids
from specjax.train.step import make_eval_step, split


@keys(ARGUMENTS)
def train(config: ConfigDict, workdir: str | Path, *, profile: bool = False) -> Result:
    """Runs the job of a config; called again on the same workdir, it resumes; a finished run stays as it is.

    Everything that can be wrong with config, data and folder is said before the weights are read. Writes `config.json`,
    `data.json`, `metrics.jsonl`, `checkpoints/`, `summary.json` and `export/` into the workdir; `profile` traces a few
    steps into `profile/`.

    Raises:
      UserError: any of the above, or what `fit` raises.
      SystemExit: 143 after SIGTERM or Ctrl-C, once the checkpoint is saved.
    """
    refuse_fleet(config, "run.train")
    with Lock(workdir) as lock:
        return _train(config, Path(workdir), lock, profile)


@keys(ARGUMENTS)
def train_part(config: ConfigDict, workdir: str | Path, share: float) -> Result:
    """`train` up to a share of the steps, where it is evaluated and saved; `train` then goes on from there."""
    refuse_fleet(config, "run.train")
    with Lock(workdir) as lock:
        return _train(config, Path(workdir), lock, False, share)


def _train(config: ConfigDict, workdir: Path, lock: Lock, profile: bool, share: float = 0.0) -> Result:
    with processes.agreement("nothing was trained"):
        validate(config, jax.device_count())
        config = settled(config, jax.default_backend(), jax.device_count())
        settings = resolved(config)
        changed = resume.claim(workdir, config, settings)
        locked = not processes.first() or lock.take(make=False)
        finished = resume.finished(workdir, config)
    if finished is not None:
        _say(f"{workdir}: the run was complete after {finished.step} steps, nothing was trained")
        return finished
    with processes.agreement("nothing was trained"):
        mesh = sharding.make_mesh(**config.mesh)
        objective = build.objective_of(config)
        folder, tokenizer = build.tokenizer_of(config)
        data, eval_data = build.data_of(config, tokenizer, Console(quiet=not processes.first()))
        build.check_pairs(config, data)
        build.check_ids(config, folder, data, eval_data)
        resume.check_model(workdir, changed, folder, config)
        steps = resume.steps(workdir, config, data)
    if changed:
        _say(f"{workdir} goes on with another {', '.join(changed)}: the same batches, computed otherwise")
    course = data.course(steps)
    _say(f"{steps:,} steps of {config.batch_size} rows: {course['passes']} passes over {data.num_rows:,} rows")
    if note := build.warmup_note(config, steps):
        _say(note)
    with processes.agreement("nothing was trained"):
        if processes.first():
            report = {"train": data.report | course} | {name: d.report for name, d in eval_data.items()}
            files.mark(workdir)
            lock.take()
            if not locked and (resume.claim(workdir, config, settings) != changed or resume.finished(workdir, config)):
                raise UserError(f"{workdir}: another run was there in the meantime: run the same command again.")
            files.sweep(workdir / "export")
            files.write_json(workdir / "config.json", settings)
            files.write_json(workdir / "data.json", report)
    with processes.agreement("nothing was trained"):
        if not (workdir / "config.json").is_file():  # the first process wrote it
            raise UserError(f"{workdir} is not on a filesystem that all processes share: choose a workdir that is.")
        model = build.model_of(config, folder, mesh)
    if model.origin.quantisation is not None:
        _say(str(model.origin.quantisation))
    result = fit(
        model,
        data,
        build.optimizer_of(config, steps),
        steps=steps,
        until=max(1, round(share * steps)) if share else 0,
        trainable=build.filter_of(config),
        objective=objective,
        workdir=workdir,
        accumulate=config.accumulate,
        eval_data=eval_data,
        eval_every=config.eval.every,
        eval_batches=config.eval.batches,
        patience=config.eval.patience,
        best=settings["eval"]["best"] if eval_data else "",
        save_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        log_every=config.log.every,
        seed=config.seed,
        sample=build.sampler_of(config, tokenizer),
        measure=build.measure_of(config, tokenizer, eval_data),
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        config=settings,
        profile=profile,
    )
    if result.stopped == "signal":
        if not result.tokens:
            _say(f"{workdir}: stopped by a signal before a step was done; nothing is lost, call again to go on")
        raise SystemExit(143)
    if result.stopped == "until":
        return result
    if config.export and not resume.exported(workdir):
        build.restore(model, config, workdir, "best")
        end = build.end_of_answers(workdir, tokenizer, model)
        card = build.card_of(workdir, config, model, "best")
        if note := build.write_export(model, tokenizer, config, workdir / "export", eos_token=end, card=card):
            _say(note)
    if processes.first():
        _summarise(workdir, config, result)
    exported = f"; {workdir / 'export'} is ready" if config.export else ""
    _say(f"{result.step} steps{exported}; try: specjax generate --model={workdir} --prompt=...")
    return result


@keys(ARGUMENTS)
def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, dict[str, float]]:
    """Prints and returns what the objective is on the config's named sets, with a run's best checkpoint.

    The objective, the sets, their template and their lengths are the config's; the model is the run's.
    """
    with processes.agreement("nothing was evaluated"):
        refuse_fleet(config, "specjax eval")
        validate(config, jax.device_count())
        config = settled(config, jax.default_backend(), jax.device_count())
        objective, run_config = build.objective_of(config), build.config_of(workdir)
        folder, tokenizer = build.tokenizer_of(run_config)
        model = build.model_of(run_config, folder, sharding.make_mesh(**config.mesh))
        check_length(config.data.length, model.config.max_positions)
        eval_data = build.eval_data_of(config, tokenizer, Console(quiet=not processes.first()))
        if not eval_data:
            raise UserError(
                "config.data.eval is empty and config.data.eval_fraction is 0: name a set, "
                "--config.data.eval.NAME=FILE."
            )
        for name, rows_of in eval_data.items():
            check_ids(f"the set {name!r}", rows_of, model.config.vocab_size)
        # A reference is the model as it was before it was trained.
        rows = config.batch_size // config.accumulate
        measure = build.measure_of(config, tokenizer, eval_data)
        objective, eval_data = objective.prepare(objective, model, build.filter_of(run_config), eval_data, rows)
        build.restore(model, run_config, Path(workdir), "best")
    graph, params, frozen = split(model, nnx.Param)
    mesh = sharding.mesh_of(next(iter(params.values())))
    assert mesh is not None
    step = jax.jit(make_eval_step(graph, objective, documents=most_documents(eval_data)))
    options: dict[str, Any] = {"objective": objective, "batches": config.eval.batches}
    with jax.set_mesh(mesh):
        found = {name: evaluate_set(step, params, frozen, rows, mesh, **options) for name, rows in eval_data.items()}
    for name, numbers in measure(model).items() if measure else ():
        found[name] |= numbers
    heads = list(dict.fromkeys(head for values in found.values() for head in values))
    shown = {"perplexity": "{:.2f}", "accuracy": "{:.1%}", "exact": "{:.1%}", objective.counts: "{:,}"}
    table = Table("set", *found)  # a row per number: an objective may have many
    for head in heads:
        cells = (shown.get(head, "{:.4f}").format(values[head]) if head in values else "" for values in found.values())
        table.add_row({"accuracy": "token accuracy", "exact": "exact answers"}.get(head, head), *cells)
    Console(quiet=not processes.first()).print(table)
    return found


@keys({"chat=False": "--raw", "generation_config={}": "--generation_config=false"})
def generate(
    model: str,
    prompts: Sequence[Prompt],
    *,
    adapters: Mapping[str, str] | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
    system: str = "",
    generation_config: bool = True,
    **sampling: Any,
) -> None:
    """Prints what a model, or a run's best checkpoint, answers to each prompt, or each of the adapters that it is for.

    `generation_config` False leaves the model's `generation_config.json` out; `sampling` is `specjax.generate`'s, where
    None is not given.
    """
    speakers = load_speakers(model, adapters or {})
    sampling |= {"stop": list(stop) or None, "generation_config": None if generation_config else {}}
    everyone: list[Who] = [*(adapters or {})] or [...]
    asked = [
        (prompt.text, who) for prompt in prompts for who in (everyone if prompt.adapter is ... else [prompt.adapter])
    ]
    answers = speakers.answers(asked, chat=not raw, system=system or None, **sampling)
    console = Console(soft_wrap=True, highlight=False, markup=False, quiet=not processes.first())
    for (text, who), answer in zip(asked, answers, strict=True):
        if len(prompts) > 1 or adapters:
            console.print("--- " + ("" if who is ... else f"[{who or BASE}] ") + text)
        console.print(answer)


@keys({"dequantise=True": "--merge --dequantise", "dequantise": "--dequantise"})
def export(
    workdir: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    dequantise: bool = False,
    step: int | None = None,
    overwrite: bool = False,
    dtype: str | None = None,
) -> None:
    """Writes a run's weights: a Hugging Face folder (everything trained, or `merge`), else a PEFT adapter folder.

    `step` defaults to the best checkpoint where sets were evaluated, else to the last; `dtype`, of a Hugging Face
    folder alone, to that of the base's files. `dequantise` lets a merge into a quantised base make it float.
    """
    if dequantise and not merge:
        raise UserError("--dequantise is of a merge into a quantised base: add --merge, or leave it out.")
    run_config = build.config_of(workdir)
    for source in (run_config.model.path, run_config.lora.init_from or ""):
        files.refuse_base(out, source)
    which = "best" if step is None else str(step)
    model, config = build.load_run(workdir, which, sharding.make_mesh())
    if merge and config.trainable != "lora":
        raise UserError(f"{workdir} trained every weight: there is no adapter to merge, leave --merge out.")
    if dtype and config.trainable == "lora" and not merge:
        raise UserError(
            f"{workdir} trained an adapter, which is written in float32: leave --dtype out, or give --merge."
        )
    if merge:
        lora.merge(model, dequantise=dequantise)
    _, tokenizer = build.tokenizer_of(config)
    end = build.end_of_answers(Path(workdir), tokenizer, model)
    told = {"eos_token": end, "card": build.card_of(Path(workdir), config, model, which)}
    note = build.write_export(model, tokenizer, config, Path(out), overwrite=overwrite, dtype=dtype, **told)
    _say(f"wrote {out}{note and '; ' + note}; to publish it: hf upload ORG/NAME {out}")


@keys({name: f"--{name}" for name in ("how", "rank", "density", "majority_sign")})
def combine(
    model: str,
    adapters: Mapping[str, str],
    weights: Mapping[str, float],
    out: str | Path,
    *,
    overwrite: bool = False,
    **how: Any,
) -> None:
    """Writes one PEFT adapter folder, made of several over one base; `how` is `specjax.lora.combine`'s.

    The tokenizer is the adapters' own where they agree on its chat template; else none is written.
    """
    if (Path(model) / files.MARK).is_file():
        raise UserError(f"--model={model} is the folder of a run: give the base of the adapters.")
    decoder, _ = hf_load.load(model, mesh=sharding.make_mesh())
    for name, folder in adapters.items():
        lora.load(decoder, folder, name=name)
    lora.combine(decoder, weights, **how)
    tokenizers = [load_tokenizer(folder) for folder in adapters.values()]
    alike = all(tokenizers) and len({str(one.chat_template) for one in tokenizers}) == 1
    lora.save(decoder, out, tokenizer=tokenizers[0] if alike else None, overwrite=overwrite)
    _say(f"wrote {out}{'' if alike else ', without a tokenizer: the adapters have none, or templates that differ'}")


def data(config: ConfigDict, *, rows: str = "") -> None:
    """Prints what the model will see: counts, truncation, first rows decoded with the mask in colour.

    `rows`: numbers of rows of the training data, with commas between them, as a run names them: these alone.
    """
    for name, one in members(swept(config)).items():
        Console().rule(f"adapter {name}")
        data(one)
    if config.fleet or config.sweep:
        return
    validate(config, None)
    if rows and not re.fullmatch(r"\d{1,18}(, ?\d{1,18})*", rows):
        raise UserError(f"--rows={rows}: give numbers of rows with commas between them, such as --rows=3,14.")
    _, tokenizer = build.tokenizer_of(config)
    train_data, eval_data = build.data_of(config, tokenizer, Console())
    if rows:
        numbers = [int(number) for number in rows.split(",")]
        if max(numbers) >= train_data.num_rows:
            raise UserError(f"--rows={rows}: the rows are 0 to {train_data.num_rows - 1}.")
        show({"format": train_data.report.get("format")}, train_data.preview(numbers), numbers=numbers)
        return
    sets = {"train": train_data, **eval_data}
    course = train_data.course(config.steps or train_data.steps(config.epochs))
    for name, of in sets.items():
        for source, part in of.report.get("sources", {}).items():
            Console().rule(f"{name}: {source}")
            show(part)
        Console().rule(name)
        show(of.report | (course if name == "train" else {}), of.preview(2 if name == "train" else 0))
    if note := build.warmup_note(config, course["steps"]):
        Console().print(note)


def _say(text: str) -> None:
    if processes.first():
        print(text)


def _summarise(workdir: Path, config: ConfigDict, result: Result) -> None:
    """Writes `summary.json`: what the run cost and what came of it."""
    lines = [row for _, row in files.read_rows(workdir / "metrics.jsonl")]
    evals = [line for line in lines if any(key.startswith("eval/") for key in line)]
    names = sorted({key.split("/")[1] for line in evals for key in line if key.startswith("eval/")})
    saved = sum(file.stat().st_size for file in (workdir / "export").glob("*.safetensors"))
    summary = {
        "trainable": config.trainable,
        "trainable_parameters": result.trainable_parameters,
        "step": result.step,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "eval_seconds": result.eval_seconds,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens / result.seconds if result.seconds else None,
        "data_seconds": result.data_seconds,
        "peak_memory_bytes": process.peak_memory(),
        "saved_bytes": saved,
        "evals": {n: {"before": evals[0][f"eval/{n}/loss"], "after": evals[-1][f"eval/{n}/loss"]} for n in names},
        "exact": {
            n: {"before": evals[0][f"eval/{n}/exact"], "after": evals[-1][f"eval/{n}/exact"]}
            for n in names
            if f"eval/{n}/exact" in evals[0]
        },
    }
    # A run that was already complete did nothing now: what it cost stands there already.
    if result.tokens or not (workdir / "summary.json").exists():
        files.write_json(workdir / "summary.json", summary)
