"""`specjax advise`: facts about the data, what fits, and settings to start from, each with its rule and source."""

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from specjax import build
from specjax.advise import domains, fits, here, rules, trl, written
from specjax.advise import facts as facts_lib
from specjax.advise.printed import duration, entry, say
from specjax.config import copied, get_config, validate
from specjax.errors import UserError, keys
from specjax.hf import config as hf_config
from specjax.hf import folder as hf_folder
from specjax.models import ModelConfig
from specjax.plan import targets

CPU = "cpu"  # this machine's


class Line(NamedTuple):
    """A piece of advice: the setting, its value in words, the rules behind it, and remarks."""

    what: str
    value: str
    rules: tuple[str, ...]
    note: str = ""


@keys({"target": "--hardware"})
def advise(
    data: str = "",
    model: str = "",
    *,
    hardware: str = CPU,
    write: str | None = None,
    out: str = "",
    explain: bool = False,
    domain: str = "",
    lang: str | None = None,
    check: bool = False,
    start: ConfigDict | None = None,
) -> ConfigDict | None:
    """Prints the advice and returns it as a config; nothing is trained or compiled, and no weight is read.

    With a domain, its public datasets are listed first; without data, only these are listed.

    Args:
      data: the training data: a file, a folder or a hub name.
      model: a folder that holds at least config.json and the tokenizer, or a hub name.
      hardware: cpu (this machine), found (what this machine has), or a target of `specjax plan`, such as h100:1.
      write: specjax writes a config; trl writes a script on transformers, TRL and PEFT; None writes a config if `out`
        is given, else nothing.
      out: the file to write; "": a default name in the current folder.
      explain: also print every rule.
      domain: list the public datasets of this domain.
      lang: their language, such as fr; None: any.
      check: ask the hub about each of them.
      start: the default config, with the keys that say how the data are read.

    Raises:
      UserError: something cannot be read or is not known, or the file exists already.
    """
    _check_given(data, model, domain, {"lang": lang, "check": check}, {"write": write, "out": out, "explain": explain})
    if domain:
        domains.show(domain, lang or "", check)
        if not data:
            return None
    hardware = here.found() if hardware == "found" else hardware
    target = targets.parse(f"{CPU}:1" if hardware == CPU else hardware)
    if write or out:
        write, out = write or "specjax", out or ("advised_trl.py" if write == "trl" else "advised.py")
        written.check(out)
    start = copied(get_config() if start is None else start, "data", "model")
    start.model.path, start.data.train = model, data
    sizes = hf_config.from_folder(hf_folder.resolve(model, start.model.revision or None, weights=False))
    start.data.length = min(start.data.length, sizes.max_positions)
    validate(start, None)
    _, tokenizer = build.tokenizer_of(start, weights=False)
    found = facts_lib.facts(start, tokenizer)
    if start.data.template and found.text:
        raise UserError(
            f"config.data.template is {start.data.template!r}, but {data} is raw text, which goes through no template: "
            "leave it out."
        )
    advised, lines, tried = _advised(start, found, sizes, target)
    validate(advised, targets.count(target))
    made = ""
    if write == "trl":
        trl.check(advised, found, sizes, target)
        made = trl.text(advised, found.corpus, _reasons(lines))
    elif write:
        made = written.text(advised, _reasons(lines))
    sets = build.eval_data_of(advised, tokenizer) if advised.data.eval else {}
    twice = {name: facts_lib.leaked(found, held) for name, held in sets.items()}
    named = [
        (f"set {name}", f"{held.report['rows']:,} rows, of which {twice[name]:,} examples train too")
        for name, held in sets.items()
    ]
    say("Data", facts_lib.lines(found, advised.data.length) + named)
    say("Fits", fits.lines(advised, tried, target, hardware))
    print("Advice: a start by rules that others published; measure before you trust it")
    for line in lines:
        entry(line.what, line.value)
        for name in line.rules:
            rule = rules.RULES[name]
            entry("", f"{rule.says} [{rule.source}; {rule.strength}]", mark="- ")
        if line.note:
            entry("", line.note, mark="! ")
    print()
    if missing := list(_missing(advised, found, twice)):
        say("Missing", missing)
    if explain:
        say("Rules", [(name, f"{rule.says} [{rule.source}; {rule.strength}]") for name, rule in rules.RULES.items()])
    if out:
        written.write(out, made)
    if write == "trl":
        print(f"{out} is written, with no JAX in it; what it needs stands at its top; train: python {shlex.quote(out)}")
    elif write:
        print(f"{out} is written; train: specjax train --config={shlex.quote(out)} --workdir=runs/advised")
    else:
        print("--out=advised.py writes this as a config for `specjax train`, --write=trl as a script on TRL and PEFT.")
    return advised


def _advised(
    start: ConfigDict, found: facts_lib.Facts, sizes: ModelConfig, target: targets.Target
) -> tuple[ConfigDict, list[Line], list[fits.Fit]]:
    """The advice as a config and in words, and the methods that were considered."""
    devices = targets.count(target)
    made = copied(start, "data", "lora", "optimizer", "model", "dpo", "eval")
    made.data.length = rules.length(found.sizes, sizes.max_positions, text=found.text)
    if not made.data.eval and start.data.eval_fraction == get_config().data.eval_fraction:
        made.data.eval_fraction = rules.held_out(found.distinct)
    part = (made.data.eval_fraction, "train") if made.data.eval_fraction and not made.data.eval else None
    packed = _packed(made, found, part)
    examples = len(found.sizes) * packed[1]
    per_row = 1.0 if found.text else examples / packed[0]
    made.batch_size, epochs, steps = rules.course(packed[0], per_row, devices)
    made.epochs = float(epochs)
    base = fits.base_of(made, sizes, target, devices)
    rank = rules.rank(found.loss_tokens, base.per_rank)
    tried = fits.tries(made, base, rank or rules.RANKS[-1], target, devices)
    method, note = _method(found, rank, tried)
    made.update_from_flattened_dict(method.settings)
    adapter = made.trainable == "lora"
    if found.preference:
        made.objective, made.dpo.beta = "dpo", rules.DPO_BETA
    rate = rules.rate(sizes.family, sizes.embed_dim, adapter=adapter, steps=steps, dpo=found.preference)
    made.optimizer.learning_rate = rate
    if made.data.eval or made.data.eval_fraction:
        made.eval.every = max(1, steps // 10)
    lines = [Line("method", method.name, ("preference", "method") if found.preference else ("method",), note)]
    if adapter:
        lines += _of_adapter(made, base, rank, sizes)
    lines += [_of_rate(rate, sizes, adapter, steps, found.preference)]
    lines += _of_course(made, found, per_row, steps, devices)
    low, high = fits.seconds(made, target, devices, steps)
    where = f"{steps:,} steps on {'this machine' if target.chip is None else target.name}"
    rule = "time on a CPU" if target.chip is None else "time"
    note = "not measured on this hardware; compiling, evaluating and loading come on top"
    lines += [Line("time", f"{duration(low)} to {duration(high)} for {where}", (rule,), note)]
    return made, lines, tried


@keys({"length": "config.data.length", "holdout": "config.data.eval_fraction", "overlong": "config.data.overlong"})
def _packed(config: ConfigDict, found: facts_lib.Facts, part: tuple[float, str] | None) -> tuple[int, float]:
    """The number of packed training rows, and the share of the examples that trains."""
    d = config.data
    made = found.corpus.pack(length=d.length, batch_size=1, packing=d.packing, overlong=d.overlong, holdout=part)
    return made.num_rows, (len(made.offsets) - 1) / (len(found.corpus.offsets) - 1)


def _method(found: facts_lib.Facts, rank: int | None, tried: list[fits.Fit]) -> tuple[fits.Fit, str]:
    """The advised method, with remarks."""
    full, *adapters = tried
    much = found.text and found.loss_tokens >= rules.CONTINUED
    every = (much or rank is None) and full.fits is not False
    fitting = [fit for fit in adapters if fit.fits] or [fit for fit in adapters if fit.fits is None]
    chosen = full if every else (fitting or adapters[-1:])[0]
    notes = []
    if every and not much:
        notes.append("no rank up to 256 holds what these tokens may say; between the ends the evidence is thin")
    elif not every and (much or rank is None):
        notes.append("every weight should train on so much, which does not fit here: LoRA will learn less")
    elif not every and (found.text or len(found.sizes) > rules.MANY_PAIRS):
        notes.append("thin: this amount lies between the sizes that were studied; compare both on a part of the data")
    if chosen.fits is False:
        notes.append("nothing fits this hardware by this estimate: give a larger one")
    return chosen, "; ".join(notes)


def _of_adapter(config: ConfigDict, base: fits.Base, rank: int | None, sizes: ModelConfig) -> Iterator[Line]:
    trained = config.lora.rank * base.per_rank
    value = f"{config.lora.rank}: {trained:,} trained parameters, {facts_lib.percent(trained / base.parameters)}"
    note = "the largest that is tried; it does not hold all that these tokens may say" if rank is None else ""
    yield Line("rank", value, ("capacity",), note)
    yield Line("alpha", f"{config.lora.alpha:g}", ("alpha",))
    note = "experts: " + rules.RULES["experts"].says if sizes.num_experts else ""
    yield Line("targets", "all-linear", ("targets", "variants"), note)


def _of_rate(rate: float, sizes: ModelConfig, adapter: bool, steps: int, dpo: bool) -> Line:
    if dpo:
        return Line("rate", f"{rate:g}", ("rate of DPO",))
    measured = rules.exponent(sizes.family) is not None
    note = "" if measured else f"thin for {sizes.family}"
    if measured and not 1000 <= sizes.embed_dim <= 10_000:
        note = f"a hidden size of {sizes.embed_dim} is far from those that this was fitted on: sweep around it"
    if adapter and steps < rules.SHORT:
        note = "; ".join(filter(None, (f"{rules.LORA_TIMES_SHORT} times, for {steps} steps are few", note)))
    names = ("rate" if measured else "rate of others", *(("times",) if adapter else ()))
    return Line("rate", f"{rate:g}", names, note)


def _of_course(config: ConfigDict, found: facts_lib.Facts, per_row: float, steps: int, devices: int) -> Iterator[Line]:
    size, about = config.batch_size, config.batch_size * per_row
    what = "" if found.text else f", about {about:.0f} {'pairs' if found.preference else 'examples'}"
    note = f"{devices} devices want a row each" if about >= rules.FEWER_THAN else ""
    yield Line(
        "batch size", f"{size} row{'' if size == 1 else 's'} of {config.data.length} tokens{what}", ("batch",), note
    )
    note = f"fewer than {rules.SHORT} steps: too few by this rule" if steps < rules.SHORT else ""
    yield Line("epochs", f"{config.epochs:g}, {steps:,} steps", ("epochs", "steps"), note)
    long, _ = found.over(config.data.length)
    note = f"{long:,} longer examples are dropped: data.overlong=keep_end keeps their ends" if long else ""
    note = note if not found.preference else note.partition(":")[0]
    yield Line("length", f"{config.data.length}", ("length",), note)
    if not config.data.eval:
        rows = round(config.data.eval_fraction * found.rows)
        share = facts_lib.percent(config.data.eval_fraction)
        yield Line("held out", f"{share}, {rows} rows", ("held out",))


def _missing(config: ConfigDict, found: facts_lib.Facts, twice: dict[str, int]) -> Iterator[tuple[str, str]]:
    """What is missing for better-founded advice or training."""
    if not found.text and found.distinct < rules.FEW_PAIRS:
        rule = rules.RULES["pairs"]
        yield "examples", f"{found.distinct:,} different rows are few: {rule.says} ({rule.source})"
    held = round(config.data.eval_fraction * found.rows)
    if not config.data.eval and held < rules.HELD_OUT:
        few = f"{held} held-out rows are too few to tell two settings apart" if held else "no row is held out"
        yield "evaluation set", f"{few}: name a set by --config.data.eval.domain=FILE"
    if "general" not in config.data.eval:
        source = rules.RULES["forgetting"].source
        yield "general set", f"without one nothing shows what is forgotten: --config.data.eval.general=FILE ({source})"
    for name, count in twice.items():
        if count:
            yield (
                "unseen rows",
                f"{count:,} examples of {name} train too, so its loss is too good: take them out of one",
            )
    if found.rows > found.distinct:
        yield (
            "duplicates",
            f"{found.rows - found.distinct:,} rows say what another says, and train twice: a look at them",
        )


def _reasons(lines: list[Line]) -> dict[str, str]:
    """Key -> the rules behind its value, for the written file."""
    places = {
        "method": "trainable",
        "rank": "lora.rank",
        "alpha": "lora.alpha",
        "targets": "lora.targets",
        "rate": "optimizer.learning_rate",
        "batch size": "batch_size",
        "epochs": "epochs",
        "length": "data.length",
        "held out": "data.eval_fraction",
    }
    own = {"model.remat": "each layer is computed a second time, to save memory", "accumulate": "to save memory"}
    return own | {
        places[line.what]: "; ".join(f"{rules.RULES[name].says} ({rules.RULES[name].source})" for name in line.rules)
        for line in lines
        if line.what in places
    }


def _check_given(data: str, model: str, domain: str, of_domain: dict[str, object], of_data: dict[str, object]) -> None:
    """Raises `UserError` if a flag lacks another flag that it needs."""
    if (domain or of_domain["lang"] or of_domain["check"]) and not domain:
        name = next(name for name, value in of_domain.items() if value)
        raise UserError(f"--{name} is of the public datasets: give --domain too, such as --domain=law.")
    if domain and not data and not model:
        if name := next((name for name, value in of_data.items() if value), ""):
            raise UserError(f"--{name} is of advice for your data: give --data and --model too, or leave it out.")
        return
    for name, value, example in (("data", data, "mine.jsonl"), ("model", model, "meta-llama/Llama-3.2-1B-Instruct")):
        if not value:
            raise UserError(
                f"`specjax advise` needs --{name}, such as --{name}={example}; --domain alone lists datasets."
            )
