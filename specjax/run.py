"""The composition root, the only reader of a ConfigDict: it builds mesh, model, data and optimizer, and calls `fit`."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from specjax import lora, sharding
from specjax.config import check_length, differing, get_config, lora_settings, merge, resolved, validate
from specjax.data import Data
from specjax.data import load as load_data
from specjax.data.report import show
from specjax.errors import UserError
from specjax.generate import generate as generate_texts
from specjax.hf import load as hf_load
from specjax.hf.export import export as export_folder
from specjax.models import Decoder, ModelConfig
from specjax.train import optim
from specjax.train.checkpoint import Checkpoints
from specjax.train.evaluate import evaluate as evaluate_set
from specjax.train.fit import Result, fit
from specjax.train.step import make_eval_step, split

SEED_MODEL, SEED_LORA = 0, 1  # offsets of config.seed, so that no two draws share a key


def train(config: ConfigDict, workdir: str | Path) -> Result:
    """Runs the job of a config; called again on the same workdir, it resumes.

    Everything that can be wrong with config, data and folder is said before the weights are read. Writes `config.json`,
    `data.json`, `metrics.jsonl`, `checkpoints/`, `summary.json` and `export/` into the workdir.

    Raises:
      UserError: any of the above, or what `fit` raises.
      SystemExit: 143 after SIGTERM, once the checkpoint is saved.
    """
    workdir = Path(workdir)
    validate(config, jax.device_count())
    settings = resolved(config)
    _claim(workdir, settings)
    mesh = sharding.make_mesh(**config.mesh)
    folder, tokenizer = _tokenizer(config)
    data, eval_data = _data(config, tokenizer)
    _write_json(workdir / "config.json", settings)
    _write_json(workdir / "data.json", {"train": data.report} | {name: d.report for name, d in eval_data.items()})
    model = _model(config, folder, mesh)
    steps = config.steps or max(1, round(config.epochs * data.steps_per_epoch))
    result = fit(
        model,
        data,
        _optimizer(config, steps),
        steps=steps,
        trainable=_filter(config),
        workdir=workdir,
        accumulate=config.accumulate,
        eval_data=eval_data,
        eval_every=config.eval.every,
        eval_batches=config.eval.batches,
        patience=config.eval.patience,
        best=settings["eval"]["best"] if eval_data else "",
        save_every=config.checkpoint.every,
        log_every=config.log.every,
        seed=config.seed,
        sample=_sampler(config, tokenizer),
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        config=settings,
    )
    if result.stopped == "signal":
        raise SystemExit(143)
    if config.export and not (workdir / "export").exists():
        _restore(model, config, workdir, "best")
        _write_export(model, tokenizer, config, workdir / "export")
    _summarise(workdir, config, result)
    if jax.process_index() == 0:
        done = f"{result.step} steps" if result.tokens else "the run was complete, nothing was trained"
        print(f"{done}; {workdir / 'export'} is ready; try: specjax generate --model={workdir} --prompt=...")
    return result


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, dict[str, float]]:
    """Prints and returns loss, perplexity and accuracy of a run's best checkpoint on the config's named sets.

    The sets, their template and their lengths are the config's; the model is the run's.
    """
    validate(config, jax.device_count())
    model, run_config = _load_run(workdir, "best", sharding.make_mesh(**config.mesh))
    _, tokenizer = _tokenizer(run_config)
    check_length(config.data.length, model.config.max_positions)
    _, eval_data = _data(config, tokenizer)
    if not eval_data:
        raise UserError(
            "config.data.eval is empty and config.data.eval_fraction is 0: name a set, --config.data.eval.NAME=FILE."
        )
    graph, params, frozen = split(model, nnx.Param)
    step, mesh = jax.jit(make_eval_step(graph)), sharding.mesh_of(next(iter(params.values())))
    assert mesh is not None
    with jax.set_mesh(mesh):
        found = {
            name: evaluate_set(step, params, frozen, rows, mesh, batches=config.eval.batches)
            for name, rows in eval_data.items()
        }
    table = Table("set", "loss", "perplexity", "token accuracy", "tokens")
    for name, values in found.items():
        numbers = (f"{values['loss']:.4f}", f"{values['perplexity']:.2f}", f"{values['accuracy']:.1%}")
        table.add_row(name, *numbers, f"{values['tokens']:,}")
    Console().print(table)
    return found


def generate(
    model: str,
    prompts: Sequence[str],
    *,
    adapters: Mapping[str, str] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
    system: str = "",
) -> None:
    """Prints what a model, or a run's best checkpoint, answers; with several adapters, what each of them answers."""
    mesh = sharding.make_mesh()
    if (Path(model) / "checkpoints").is_dir():
        decoder, config = _load_run(model, "best", mesh)
        _, tokenizer = _tokenizer(config)
    else:
        decoder, tokenizer = hf_load.load(
            model, mesh=mesh, dtype="bfloat16" if jax.default_backend() != "cpu" else "float32"
        )
        if tokenizer is None:
            raise UserError(f"{model} has no tokenizer files: give a folder that has.")
    for name, folder in (adapters or {}).items():
        lora.load(decoder, folder, name=name)
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    console = Console(soft_wrap=True, highlight=False, markup=False)
    chosen: list[str | None] = [*(adapters or {})] or [None]
    for adapter in chosen:
        if adapter is not None:
            lora.use(decoder, adapter)
        answers = generate_texts(decoder, tokenizer, list(prompts), chat=not raw, system=system or None, **sampling)
        for prompt, answer in zip(prompts, answers, strict=True):
            if len(prompts) > 1 or adapter is not None:
                console.print("--- " + (f"[{adapter}] " if adapter is not None else "") + prompt)
            console.print(answer)


def export(
    workdir: str | Path, out: str | Path, *, merge: bool = False, step: int | None = None, overwrite: bool = False
) -> None:
    """Writes a run's weights: a Hugging Face folder (everything trained, or `merge`), else a PEFT adapter folder.

    `step` defaults to the best checkpoint where sets were evaluated, else to the last.
    """
    model, config = _load_run(workdir, "best" if step is None else str(step), sharding.make_mesh())
    if merge and config.trainable != "lora":
        raise UserError(f"{workdir} trained every weight: there is no adapter to merge, leave --merge out.")
    if merge:
        lora.merge(model)
    _, tokenizer = _tokenizer(config)
    _write_export(model, tokenizer, config, Path(out), overwrite=overwrite)
    Console().print(f"wrote {out}", markup=False)


def data(config: ConfigDict) -> None:
    """Prints what the model will see: counts, truncation, first rows decoded with the mask in colour."""
    validate(config, None)
    _, tokenizer = _tokenizer(config)
    train_data, eval_data = _data(config, tokenizer)
    for name, rows in {"train": train_data, **eval_data}.items():
        Console().rule(name)
        show(rows.report, rows.preview(2 if name == "train" else 0))


def _claim(workdir: Path, settings: dict[str, Any]) -> None:
    """Refuses a workdir that holds something else, or a run whose result this config would change."""
    path = workdir / "config.json"
    if not path.exists():
        if workdir.is_dir() and any(workdir.iterdir()):
            raise UserError(f"{workdir} is not empty and holds no run: choose another workdir.")
        return
    if not any((workdir / "checkpoints").glob("[0-9]*")):
        return  # it ended before anything was learnt: nothing to resume, nothing to lose
    try:
        old = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or choose another workdir.") from error
    keys = differing(old, settings)
    if keys:
        changes = ", ".join(f"{key} (was {_at(old, key)!r}, now {_at(settings, key)!r})" for key in keys)
        raise UserError(f"{workdir} holds a run with another config: {changes}; undo that, or choose another workdir.")


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _tokenizer(config: ConfigDict) -> tuple[Path, Any]:
    """The model's folder and its tokenizer, after the length is known to fit."""
    folder = hf_load.resolve(config.model.path, config.model.revision)
    check_length(config.data.length, ModelConfig.from_folder(folder).max_positions)
    tokenizer = hf_load.load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"config.model.path: {config.model.path} has no tokenizer files: give a folder that has.")
    return folder, tokenizer


def _data(config: ConfigDict, tokenizer: Any) -> tuple[Data, dict[str, Data]]:
    """The training rows, and the named sets: those given, or a part held out."""
    d = config.data
    common = {
        "length": d.length,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "packing": d.packing,
        "template": d.template or None,
        "overlong": d.overlong,
        "columns": d.columns.to_dict(),
        "split": d.split,
    }
    # No more rows at once than a micro-batch: what trains must also fit when it is measured.
    measured = common | {"batch_size": config.batch_size // config.accumulate}
    if d.eval:
        train_data = load_data(d.train, tokenizer, format=d.format, **common)
        # A set that is measured may be of another kind than the one that trains: text beside pairs.
        sets = {name: load_data(d.eval[name], tokenizer, format="auto", **measured) for name in sorted(d.eval)}
        return train_data, sets
    if not d.eval_fraction:
        return load_data(d.train, tokenizer, format=d.format, **common), {}
    parts = [
        load_data(d.train, tokenizer, format=d.format, holdout=(d.eval_fraction, part), **settings)
        for part, settings in (("train", common), ("eval", measured))
    ]
    return parts[0], {"heldout": parts[1]}


def _model(config: ConfigDict, folder: Path, mesh: Mesh) -> Decoder:
    """The model on its mesh, LoRA injected: float32 masters where everything trains, else the compute dtype."""
    full = config.trainable == "all"
    settings = {"mesh": mesh, "dtype": config.model.dtype, "remat": config.model.remat}
    if config.model.init == "random":
        model = hf_load.random(ModelConfig.from_folder(folder), seed=config.seed + SEED_MODEL, **settings)
    else:
        model, _ = hf_load.load(folder, param_dtype="float32" if full else None, **settings)
    if not full:
        lora.inject(model, seed=config.seed + SEED_LORA, **lora_settings(config))
    return model


def _filter(config: ConfigDict) -> Any:
    return lora.ALL if config.trainable == "all" else lora.LORA


def _optimizer(config: ConfigDict, steps: int) -> optim.Optimizer:
    c = config.optimizer
    rate = optim.schedule(
        c.schedule,
        learning_rate=c.learning_rate,
        steps=steps,
        warmup_steps=c.warmup_steps,
        final_fraction=c.final_fraction,
    )
    common = {"weight_decay": c.weight_decay, "b1": c.b1, "b2": c.b2, "clip_norm": c.clip_norm}
    return optim.adamw(rate, eps=c.eps, **common) if c.name == "adamw" else optim.lion(rate, **common)


def _sampler(config: ConfigDict, tokenizer: Any) -> Callable[[Decoder], Sequence[tuple[str, str]]] | None:
    prompts = list(config.eval.prompts)
    if not prompts:
        return None
    chat = bool(tokenizer.chat_template)
    new = config.eval.max_new_tokens
    return lambda model: list(
        zip(prompts, generate_texts(model, tokenizer, prompts, max_new_tokens=new, chat=chat), strict=True)
    )


def _load_run(workdir: str | Path, which: str, mesh: Mesh) -> tuple[Decoder, ConfigDict]:
    """A run's model with the weights of a checkpoint, and the run's config."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a run: it has no config.json; give the workdir of `specjax train`.")
    config = merge(get_config(), json.loads(path.read_text()), where=str(path))
    folder = hf_load.resolve(config.model.path, config.model.revision)
    model = _model(config, folder, mesh)
    _restore(model, config, Path(workdir), which)
    return model, config


def _restore(model: Decoder, config: ConfigDict, workdir: Path, which: str) -> None:
    """Puts a checkpoint's weights into the model, whose base must be the one that the checkpoint was trained on."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.pick(which)
    base = checkpoints.restore_meta(step).get("base_fingerprint")
    if base != model.config.fingerprint:
        raise UserError(
            f"{config.model.path} is not the base that {workdir} was trained on (its fingerprint is "
            f"{model.config.fingerprint}, was {base}): restore it."
        )
    _, params, _ = split(model, _filter(config))
    trained, _ = checkpoints.restore(step, params)
    nnx.update(model, nnx.from_flat_state([(tuple(path.split(".")), value) for path, value in trained.items()]))


def _write_export(model: Decoder, tokenizer: Any, config: ConfigDict, out: Path, *, overwrite: bool = False) -> None:
    if lora.names(model):
        lora.save(model, out, base=config.model.path, overwrite=overwrite)
    else:
        export_folder(model, tokenizer, out, overwrite=overwrite)


def _summarise(workdir: Path, config: ConfigDict, result: Result) -> None:
    """Writes `summary.json`: what the run cost and what came of it."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if any(key.startswith("eval/") for key in line)]
    names = sorted({key.split("/")[1] for line in evals for key in line if key.startswith("eval/")})
    saved = sum(file.stat().st_size for file in (workdir / "export").rglob("*") if file.is_file())
    summary = {
        "trainable": config.trainable,
        "trainable_parameters": result.trainable_parameters,
        "step": result.step,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens / result.seconds if result.seconds else None,
        "data_seconds": result.data_seconds,
        "peak_memory_bytes": peak_memory(),
        "saved_bytes": saved,
        "evals": {n: {"before": evals[0][f"eval/{n}/loss"], "after": evals[-1][f"eval/{n}/loss"]} for n in names},
    }
    # A run that was already complete did nothing now: what it cost stands there already.
    if result.tokens or not (workdir / "summary.json").exists():
        _write_json(workdir / "summary.json", summary)


def peak_memory() -> int:
    """Bytes at the peak: of the first accelerator, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: a process inherits its parent's peak there
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)
