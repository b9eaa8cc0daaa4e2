"""The methods of a comparison from its config: what each trains, the common evaluation sets, the values to try."""

import dataclasses
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from specjax.config import copied, differing, get_config, plain, validate
from specjax.config.checks import eval_names, flat, holds_out
from specjax.config.entries import members, methods, refuse_fleet, swept
from specjax.data.read import SHIPPED
from specjax.errors import UserError, naming

AUTO = "auto"  # in place of a sweep's rates: those around the rule's
APART = 3  # neighbours among them, as a factor
GENERAL = ("general_text", "general_chats")  # which come with specjax
RESULTS = ("comparison.json", "report.json", "report.html", "base.json", "target.json")
OWN = (*RESULTS, "methods.json", "sources.json", "seconds.json", "budget")  # what is written


@dataclasses.dataclass(frozen=True)
class Method:
    """One of a comparison's methods.

    Attributes:
      name: the user's own.
      config: the method's config, with `sweep` if values are tried.
      trials: name -> config for each combination of values; a single one has the method's name.
      domain: the set that measures learning.
      forgetting: the sets that should not get worse.
      shipped: those of them that come with specjax.
    """

    name: str
    config: ConfigDict
    trials: dict[str, ConfigDict]
    domain: str
    forgetting: tuple[str, ...]
    shipped: tuple[str, ...]


def read(config: ConfigDict, steps: int = 0) -> dict[str, Method]:
    """The methods of `config.compare`, each checked.

    Args:
      config: the comparison's config.
      steps: the steps of each run; 0: the config's.

    Raises:
      UserError: a mistake in any of them, before any begins.
    """
    refuse_fleet(config, "specjax compare")
    made = {}
    for name, one in methods(config).items():
        if not re.fullmatch(r"[\w-]+", name) or name in (*OWN, "adapters"):
            raise UserError(f"config.compare has a method named {name!r}: use letters, digits, '_' and '-' alone.")
        with naming(f"config.compare.{name}"):
            made[name] = of(name, scaled(one, steps) if steps else one)
    _check_alike(list(made.values()))
    return made


def _check_alike(made: list[Method]) -> None:
    """Raises `UserError` if the methods' losses are not on one scale and cannot be compared."""
    domains = sorted({one.domain for one in made})
    if len(domains) > 1:
        raise UserError(
            f"the methods of config.compare are chosen by different sets, {' and '.join(domains)}: set "
            "config.eval.best to the one that all are measured on."
        )
    if len({one.forgetting for one in made}) > 1:
        raise UserError(
            "the methods of config.compare are measured on different sets: give config.data.eval the same names in all."
        )
    if len({one.config.objective for one in made}) > 1:
        raise UserError(
            "the methods of config.compare have different objectives, whose losses are not one scale: compare each "
            "objective with itself alone."
        )
    split = ("train", "split", "format", "eval_fraction", "eval_seed")
    held = {
        None if one.domain in one.config.data.eval else str([one.config.data[key] for key in split]) for one in made
    }
    if len(held) > 1:
        raise UserError(
            "the methods of config.compare hold out different rows, whose losses are not one scale: name the set that "
            "all are measured on, --config.data.eval.domain=FILE."
        )


def of(name: str, config: ConfigDict) -> Method:
    """A method from its own config; for a config that this function made, the same method again.

    Raises:
      UserError: a mistake in the config.
    """
    if config.fleet:
        raise UserError(
            "config.fleet is of adapters of different data: give config.sweep, whose best one is the method."
        )
    config, domain, forgetting, shipped = _measured(config)
    config = with_rates(config)
    validate(config, None)
    if config.rungs and not config.sweep:
        raise UserError(f"config.rungs is {config.rungs}, but config.sweep is empty: nothing of it could stop early.")
    trials = members(swept(config)) if config.sweep else {name: config}
    for trial, one in trials.items():
        with naming(f"the trial {trial}"):
            validate(one, None)
    return Method(name, config, trials, domain, forgetting, shipped)


def _measured(config: ConfigDict) -> tuple[ConfigDict, str, tuple[str, ...], tuple[str, ...]]:
    """The config with the comparison's sets: the domain's and general ones, shipped ones if none are named."""
    config = copied(config, "data", "eval")
    config.data.eval.unlock()
    if not eval_names(config):
        raise UserError(
            "config.data.eval is empty and config.data.eval_fraction is 0, so nothing would be measured: name a set, "
            "--config.data.eval.domain=FILE, or hold rows out, --config.data.eval_fraction=0.02."
        )
    if config.eval.best and config.eval.best not in eval_names(config):
        validate(config, None)  # which says so
    domain = config.eval.best or eval_names(config)[0]
    shipped: tuple[str, ...] = ()
    if config.data.eval_seed < 0 and domain not in config.data.eval:  # a trial's or a seed's own draw is of other rows
        config.data.eval_seed = config.seed
    if len(eval_names(config)) == 1 and config.objective != "dpo":  # which is measured on pairs of answers alone
        shipped = GENERAL
        config.data.eval_beside = holds_out(config)
        for name in GENERAL:
            config.data.eval[name] = SHIPPED + name
    config.eval.best = domain
    return config, domain, tuple(name for name in eval_names(config) if name != domain), shipped


def scaled(config: ConfigDict, steps: int) -> ConfigDict:
    """The config with the given steps; warmup and evaluations keep their shares of the steps."""
    made = copied(config, "optimizer", "eval")
    share = steps / config.steps if config.steps else 1.0
    made.steps, made.epochs = steps, get_config().epochs
    made.optimizer.warmup_steps = min(int(config.optimizer.warmup_steps * share), (steps - 1) // 2)
    made.eval.every = max(1, round(config.eval.every * share)) if config.eval.every else 0
    return made


def with_rates(config: ConfigDict) -> ConfigDict:
    """The config with "auto" rates of a sweep replaced by three, a factor of 3 apart, around the rule's rate."""
    over = dict(flat(config.sweep.to_dict()))
    if over.get("optimizer.learning_rate") != AUTO:
        return config
    made = copied(config, "sweep")
    made.sweep.unlock()
    rates = list(grid(*_model(config), adapter=config.trainable == "lora", steps=config.steps))
    made.sweep.optimizer = {**config.sweep.optimizer.to_dict(), "learning_rate": rates}
    return made


def grid(family: str, width: int, *, adapter: bool, steps: int) -> Iterator[float]:
    """Three rates around the rule's: for every weight by width, for LoRA 10 times that (`advise.rules`).

    >>> list(grid("llama", 4096, adapter=True, steps=1000)), list(grid("llama", 4096, adapter=False, steps=1000))
    ([9.7e-05, 0.00029, 0.00087], [9.7e-06, 2.9e-05, 8.7e-05])
    """
    from specjax.advise import rules

    # As for 100 steps and more, below which the rule of 10 is one of 15: the grid reaches over both.
    middle = rules.rate(family, width, adapter=adapter, steps=max(steps, rules.SHORT))
    return (float(f"{middle * factor:.2g}") for factor in (1 / APART, 1, APART))


def _model(config: ConfigDict) -> tuple[str, int]:
    """Family and width of the config's model, from its config.json."""
    from specjax.hf import config as hf_config
    from specjax.hf import folder as hf_folder

    if not config.model.path:
        validate(config, None)
    sizes = hf_config.from_folder(hf_folder.resolve(config.model.path, config.model.revision or None, weights=False))
    return sizes.family, sizes.embed_dim


def kind(config: ConfigDict, *, text: bool) -> str:
    """The method's kind: full, sft, dpo, or LoRA's name with the kind of base.

    Args:
      config: a run's config.
      text: whether raw text trains.
    """
    if config.trainable == "lora":
        name = "dora" if config.lora.dora else "lora"
        name = f"q{name}" if config.model.quantise else name
        return f"{name} dpo" if config.objective == "dpo" else name
    if config.objective == "dpo":
        return "dpo"
    return "full" if text or config.data.loss == "all" else "sft"


def twins(one: ConfigDict, other: ConfigDict) -> bool:
    """Whether the first, which trains only answers, would equal the second on raw text, where every token counts."""
    alike = differing(plain(one), plain(other)) == ["data.loss"]
    return alike and one.trainable == "all" and one.data.loss == "answers"
