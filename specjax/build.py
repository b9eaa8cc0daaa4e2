"""From a config to the parts of a run: tokenizer, data, model, optimizer; and a run's weights from its checkpoints."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from specjax import lora, vocabulary
from specjax.card import card
from specjax.config import check_length, lora_settings
from specjax.config.checks import ARGUMENTS, heldout, holds_out, sources
from specjax.config.source import load_config_file
from specjax.data import Corpus, Data, Mixture, mix, tokenise
from specjax.data.chat import resolve as resolve_template
from specjax.data.questions import questions
from specjax.data.report import watched
from specjax.errors import UserError, keys
from specjax.files import read_object
from specjax.generation.answers import MOST, exact
from specjax.generation.generate import generate as generate_texts
from specjax.hf import config as hf_config
from specjax.hf import folder as hf_folder
from specjax.hf import load as hf_load
from specjax.hf.export import export as export_folder
from specjax.hf.tokenizer import load_tokenizer
from specjax.hf.vocabulary import grow, resized
from specjax.lora import agree
from specjax.lora import peft_config as lora_files
from specjax.models import Decoder
from specjax.train import optim, session
from specjax.train.checkpoint import Checkpoints
from specjax.train.dpo import dpo
from specjax.train.loraplus import lora_plus
from specjax.train.objective import Objective, next_token
from specjax.train.step import split, write_back

SEED_MODEL, SEED_LORA = 0, 1  # offsets of config.seed, so that no two draws share a key


@keys(ARGUMENTS)
def tokenizer_of(config: ConfigDict, *, weights: bool = True) -> tuple[Path, Any]:
    """The model's folder and its tokenizer, after the length is known to fit; without `weights` it needs none there."""
    folder = hf_folder.resolve(config.model.path, config.model.revision, weights=weights)
    check_length(config.data.length, hf_config.from_folder(folder).max_positions)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"config.model.path: {config.model.path} has no tokenizer files: give a folder that has.")
    vocabulary.extend(config, folder, tokenizer)
    if config.data.template:
        # What it learns to answer in is what it will be asked in: samples, export and `specjax generate` all use it.
        tokenizer.chat_template = resolve_template(tokenizer, config.data.template)
    elif start := config.lora.init_from:
        lora_files.read_config(Path(start))  # whatever is wrong there is said before the data is read
        taught = load_tokenizer(start)  # with the template that the adapter was trained with
        if taught is not None and taught.chat_template:
            tokenizer.chat_template = taught.get_chat_template()
    return folder, tokenizer


def data_of(
    config: ConfigDict, tokenizer: Any, console: Console | None = None
) -> tuple[Data | Mixture, dict[str, Data]]:
    """`train_data_of` and `eval_data_of`, of one reading of the training rows where some of them are held out."""
    corpora = corpora_of(config, tokenizer, console)
    return _train(config, corpora), eval_data_of(config, tokenizer, console, corpora)


def train_data_of(config: ConfigDict, tokenizer: Any, console: Console | None = None) -> Data | Mixture:
    """The training rows, without those held out."""
    return _train(config, corpora_of(config, tokenizer, console))


def eval_data_of(
    config: ConfigDict, tokenizer: Any, console: Console | None = None, corpora: dict[str, Corpus] | None = None
) -> dict[str, Data]:
    """The named sets: those given, or the part of the training rows (of each source) that is held out.

    Args:
      config: of a run.
      tokenizer: of its model.
      console: shows how far it is; None: nothing is shown.
      corpora: of the training rows, by source, if they are there already.
    """
    # No more rows at once than a micro-batch: what trains must also fit when it is measured.
    rows = config.batch_size // (config.accumulate or 1)
    found = dict[str, Data]()
    if holds_out(config):
        corpora = corpora or corpora_of(config, tokenizer, console)
        found = {name: _packed(config, corpora[source], rows, "eval") for name, source in heldout(config).items()}
    # A set that is measured may be of another kind than the one that trains, and call its columns otherwise.
    sets = {
        name: _corpus(config, tokenizer, path, console, format="auto", own_columns=True)
        for name, path in sorted(config.data.eval.items())
    }
    return found | {name: _packed(config, corpus, rows) for name, corpus in sets.items()}


def corpora_of(config: ConfigDict, tokenizer: Any, console: Console | None = None) -> dict[str, Corpus]:
    """All training rows as tokens, by source."""
    named = sources(config)
    several = len(named) > 1  # which may be of several kinds, and call their columns otherwise
    return {
        name: _corpus(config, tokenizer, source, console, **{"own_columns": True} if several else {})
        for name, (source, _) in named.items()
    }


@keys(ARGUMENTS)
def _corpus(config: ConfigDict, tokenizer: Any, source: str, console: Console | None, **settings: Any) -> Corpus:
    d = config.data
    common = {
        "format": d.format,
        "template": d.template or None,
        "columns": d.columns.to_dict(),
        "turns": d.turns,
        "split": d.split,
        "seed": config.seed if config.data.eval_seed < 0 else config.data.eval_seed,
        "holdout": holds_out(config),
        "cache": {"": True, "off": False}.get(d.cache, d.cache),
    }
    with watched(source, console) as progress:
        corpus = tokenise(source, tokenizer, progress=progress, **(common | settings))
    return dataclasses.replace(corpus, seed=config.seed)


@keys(ARGUMENTS)
def _train(config: ConfigDict, corpora: dict[str, Corpus]) -> Data | Mixture:
    part = "train" if holds_out(config) else ""
    if config.data.loss == "all":
        every = {name: np.ones_like(corpus.trained) for name, corpus in corpora.items()}
        corpora = {name: dataclasses.replace(corpus, trained=every[name]) for name, corpus in corpora.items()}
    parts = {name: _packed(config, corpus, config.batch_size, part) for name, corpus in corpora.items()}
    if len(parts) == 1:
        return next(iter(parts.values()))
    shares = [(parts[name], share) for name, (_, share) in sources(config).items()]
    return mix(shares, shares=config.data.shares, names=list(parts))


@keys(ARGUMENTS)
def _packed(config: ConfigDict, corpus: Corpus, batch_size: int, part: str = "") -> Data:
    d = config.data
    holdout = (d.eval_fraction, part) if part else None
    return corpus.pack(length=d.length, batch_size=batch_size, packing=d.packing, overlong=d.overlong, holdout=holdout)


@keys(ARGUMENTS)
def model_of(config: ConfigDict, folder: Path, mesh: Mesh | None, *, abstract: bool = False) -> Decoder:
    """The model on its mesh, LoRA injected: float32 masters where everything trains, else the compute dtype.

    `abstract`: its shapes alone, `jax.ShapeDtypeStruct` on no mesh; the folder needs no weights.
    """
    model = base_of(config, folder, mesh, abstract=abstract)
    if config.trainable == "all":
        return model

    def adapted(model: Decoder) -> Decoder:
        settings = lora_settings(config)
        if named := settings.get("trainable_token_indices"):
            settings["trainable_token_indices"] = vocabulary.trained_rows(config, folder, named)
        if start := settings.pop("init_from", None):
            lora.load(model, start)
            agree.check(model, Path(start), **settings)
        else:
            lora.inject(model, seed=config.seed + SEED_LORA, **settings)
        return model

    if abstract:
        return nnx.eval_shape(adapted, model)
    made = adapted(model)
    if config.lora.init_from:  # what the run stands on, as a checkpoint says it
        start = hf_folder.digest(Path(config.lora.init_from) / lora_files.WEIGHTS)
        made.origin = dataclasses.replace(made.origin, fingerprint=f"{made.origin.fingerprint}+{start}")
    return made


@keys(ARGUMENTS)
def base_of(config: ConfigDict, folder: Path, mesh: Mesh | None, *, abstract: bool = False) -> Decoder:
    """`model_of` without adapters."""
    full = config.trainable == "all"
    settings = {"dtype": config.model.dtype, "param_dtype": "float32" if full else config.model.dtype}
    settings |= {"remat": config.model.remat, "quantise": config.model.quantise}
    sizes = vocabulary.sizes_of(config, folder)
    if abstract:
        model = hf_load.abstract(sizes, **settings)
    elif config.model.init == "random":
        seed = config.seed + SEED_MODEL
        model = hf_load.random(sizes, mesh=mesh, seed=seed, **settings)
        told = hf_config.origin(folder)
        model.origin = dataclasses.replace(told, config_json=resized(told.config_json, sizes.vocab_size))
    else:
        model, _ = hf_load.load(folder, mesh=mesh, **settings)
        grow(model, sizes.vocab_size)
    if config.model.router_aux_coef is not None:
        if not model.config.num_experts:
            raise UserError(
                f"config.model.router_aux_coef is set, but {config.model.path} has no experts: leave it out."
            )
        model.config = dataclasses.replace(model.config, router_aux_coef=config.model.router_aux_coef)
    return model


def filter_of(config: ConfigDict) -> Any:
    """The trainable filter."""
    return lora.ALL if config.trainable == "all" else lora.LORA


@keys(ARGUMENTS)
def objective_of(config: ConfigDict) -> Objective:
    """What is minimised."""
    return dpo(**config.dpo) if config.objective == "dpo" else next_token


def check_pairs(config: ConfigDict, data: Data | Mixture) -> None:
    """Raises `UserError` where the training rows are pairs of answers, and the objective would train on both."""
    if config.objective != "dpo" and data.together > 1:
        raise UserError(
            f"config.data.train: {config.data.train} has pairs of answers, of which config.objective="
            f"{config.objective} would train on the rejected ones too: set config.objective=dpo."
        )


def check_ids(config: ConfigDict, folder: Path, data: Data | Mixture, eval_data: Mapping[str, Data]) -> None:
    """Raises `UserError` where the rows have a token for which the model's embedding has no row."""
    rows = vocabulary.sizes_of(config, folder).vocab_size
    session.check_ids("config.data.train", data, rows)
    for name, one in eval_data.items():
        session.check_ids(f"the set {name!r}", one, rows)


def rate_of(config: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate, its schedule laid over `steps`."""
    c = config.optimizer
    return optim.schedule(
        c.schedule,
        learning_rate=c.learning_rate,
        steps=steps,
        warmup_steps=c.warmup_steps,
        final_fraction=c.final_fraction,
    )


def warmup_note(config: ConfigDict, steps: int) -> str:
    """A sentence for a run by epochs that ends in its warmup, or ""; runs by steps are checked with the config."""
    if steps > config.optimizer.warmup_steps:
        return ""
    return (
        f"the learning rate does not get past its warmup of {config.optimizer.warmup_steps} steps "
        "(config.optimizer.warmup_steps): set a shorter one, more config.epochs or a smaller config.batch_size"
    )


@keys(ARGUMENTS)
def optimizer_of(config: ConfigDict, steps: int) -> optim.Optimizer:
    """The optimizer, its rate laid over `steps`."""
    c, rate = config.optimizer, rate_of(config, steps)
    common = {"weight_decay": c.weight_decay, "b1": c.b1, "b2": c.b2, "clip_norm": c.clip_norm}
    common |= {"moments": c.moments, "offload": c.offload}
    match c.name:
        case "adamw":
            rule = optim.adamw(rate, eps=c.eps, **common)
        case "lion":
            rule = optim.lion(rate, **common)
        case _:
            raise UserError(f"config.optimizer.name is {c.name!r}: use adamw or lion.")
    return rule if c.loraplus_ratio == 1 else lora_plus(rule, c.loraplus_ratio)


def sampler_of(config: ConfigDict, tokenizer: Any) -> Callable[[Decoder], Sequence[tuple[str, str]]] | None:
    """What answers `config.eval.prompts` at each evaluation, or None."""
    prompts = list(config.eval.prompts)
    if not prompts:
        return None
    chat = bool(tokenizer.chat_template)
    new = config.eval.max_new_tokens
    # Always the likeliest tokens: what the model's generation_config.json draws could not be compared along a run.
    how: dict[str, Any] = {"max_new_tokens": new, "chat": chat, "generation_config": {}}
    return lambda model: list(zip(prompts, generate_texts(model, tokenizer, prompts, **how), strict=True))


def measure_of(
    config: ConfigDict, tokenizer: Any, eval_data: Mapping[str, Data]
) -> Callable[[Decoder], dict[str, dict[str, float]]] | None:
    """What answers the questions of `config.eval.exact`'s sets at each evaluation, or None where none asks any."""
    chosen = {name: data for name, data in eval_data.items() if name in config.eval.exact}
    asked = {name: found for name, data in chosen.items() if (found := questions(data, MOST))}
    if not asked:
        return None
    ends = {name: chosen[name].end_of_turn for name in asked}
    return lambda model: {
        name: {"exact": exact(model, tokenizer, found, end_of_turn=ends[name])} for name, found in asked.items()
    }


def config_of(workdir: str | Path) -> ConfigDict:
    """A run's config."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a run: it has no config.json; give the workdir of `specjax train`.")
    return load_config_file(str(path))


def load_run(workdir: str | Path, which: str, mesh: Mesh) -> tuple[Decoder, ConfigDict]:
    """A run's model with the weights of a checkpoint, and the run's config."""
    config = config_of(workdir)
    folder = hf_folder.resolve(config.model.path, config.model.revision)
    model = model_of(config, folder, mesh)
    restore(model, config, Path(workdir), which)
    return model, config


def restore(model: Decoder, config: ConfigDict, workdir: Path, which: str) -> None:
    """Puts a checkpoint's weights into the model, whose base must be the one that the checkpoint was trained on."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.pick(which)
    base = str(checkpoints.meta(step).get("base_fingerprint"))
    # What an adapter that it started from held is of no matter here: the checkpoint holds what became of it.
    if base.partition("+")[0] != model.origin.fingerprint.partition("+")[0]:
        raise UserError(
            f"{config.model.path} is not the base that {workdir} was trained on (its fingerprint is "
            f"{model.origin.fingerprint}, was {base}): restore it."
        )
    _, params, _ = split(model, filter_of(config))
    write_back(model, checkpoints.load(step, {"trainable": params})["trainable"])


def card_of(workdir: Path, config: ConfigDict, model: Decoder, which: str) -> str:
    """The model card of a run's checkpoint, as `write_export` writes the model: an adapter, or all of it."""
    base = hf_folder.resolve(config.model.path, config.model.revision, weights=False)
    step = Checkpoints(workdir / "checkpoints", read_only=True).pick(which)
    return card(workdir, base, step=step, adapter=bool(lora.names(model)))


def end_of_answers(workdir: Path, tokenizer: Any, model: Decoder) -> str:
    """The token that ended a turn in what a run was trained on, where the base's files do not declare it; else ""."""
    path = workdir / "data.json"
    train = read_object(path).get("train") if path.is_file() else None
    sources = train.get("sources") if isinstance(train, dict) else None  # of each that is mixed
    every = (train, *(sources.values() if isinstance(sources, dict) else ()))
    reports = [one for one in every if isinstance(one, dict)]
    token = next((one["end_of_turn"] for one in reports if isinstance(one.get("end_of_turn"), str)), None)
    if token is None or tokenizer.convert_tokens_to_ids(token) in model.origin.eos_ids:
        return ""
    return token


def write_export(
    model: Decoder,
    tokenizer: Any,
    config: ConfigDict,
    out: Path,
    *,
    eos_token: str = "",
    overwrite: bool = False,
    dtype: str | None = None,
    card: str = "",
) -> str:
    """Writes a PEFT adapter folder of a model that wears one, else a Hugging Face folder, its weights in `dtype`.

    `eos_token`: see `end_of_answers`; `card`: see `card_of`.

    Returns:
      What the user should know of it, in one sentence, or "".
    """
    if not lora.names(model):
        export_folder(model, tokenizer, out, dtype=dtype, overwrite=overwrite, eos_token=eos_token, card=card)
        return ""
    told: dict[str, Any] = {"base": config.model.path, "revision": config.model.revision or None, "card": card}
    told["fingerprint"] = model.origin.fingerprint.partition("+")[0]
    told["vocab_size"] = model.config.vocab_size if vocabulary.adds(config) else 0
    idle = lora.save(model, out, tokenizer=tokenizer, overwrite=overwrite, eos_token=eos_token, **told)
    if not idle:
        return ""
    return f"the adapter changes nothing in {len(idle)} of its modules, whose B is zero, the first {idle[0]}"
