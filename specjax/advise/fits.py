"""An estimate of which methods fit the hardware, with the command that compiles each of them."""

import os
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from specjax import build, flops
from specjax.advise import memory, rules
from specjax.config import copied, settled
from specjax.hf import folder as hf_folder
from specjax.models import Decoder, ModelConfig
from specjax.plan import targets

GIB = 2**30


class Base(NamedTuple):
    """The model.

    Attributes:
      sizes: its sizes.
      parameters: the number of its parameters.
      frozen: the bytes of its weights if they are frozen.
      per_rank: the parameters of a rank-1 adapter on all linear layers.
    """

    sizes: ModelConfig
    parameters: int
    frozen: int
    per_rank: int


class Fit(NamedTuple):
    """A method on the hardware.

    Attributes:
      name: in words.
      settings: the config keys of the method.
      need: the memory that each device needs.
      fits: whether it fits; None: compile it to know.
    """

    name: str
    settings: dict[str, object]
    need: memory.Need
    fits: bool | None


def base_of(config: ConfigDict, sizes: ModelConfig, target: targets.Target, devices: int) -> Base:
    """Counts the parameters of a config's model."""
    parameters, _ = count(config, {"trainable": "all"}, target, devices)
    trained, frozen = count(config, {"trainable": "lora", "lora.rank": rules.RANKS[0]}, target, devices)
    return Base(sizes, parameters, frozen, trained // rules.RANKS[0])


def count(config: ConfigDict, settings: dict[str, object], target: targets.Target, devices: int) -> tuple[int, int]:
    """The number of trained parameters with these settings, and the bytes of frozen ones, from the model's shapes."""
    config = copied(config, "lora", "model")
    config.update_from_flattened_dict(settings)
    _, trainable, frozen = _split(config, target, devices)
    trained = sum(leaf.size for leaf in trainable.values())
    return trained, sum(leaf.size * leaf.dtype.itemsize for leaf in frozen.values())


def _split(config: ConfigDict, target: targets.Target, devices: int) -> tuple[Decoder, dict[Any, Any], dict[Any, Any]]:
    """A config's model without weights, and the shapes of trained and frozen parameters by path."""
    config = settled(config, "cpu" if target.chip is None else "tpu", devices)
    folder = hf_folder.resolve(config.model.path, config.model.revision, weights=False)
    model = build.model_of(config, folder, None, abstract=True)
    _, trainable, frozen = nnx.split(model, build.filter_of(config), ...)
    return model, dict(nnx.to_flat_state(trainable)), dict(nnx.to_flat_state(frozen))


def seconds(config: ConfigDict, target: targets.Target, devices: int, steps: int) -> tuple[float, float]:
    """The least and the most seconds that a config's training takes, without compiling and evaluating."""
    step = work(config, target, devices)
    return rules.seconds(steps * step, devices, target.chip.flops if target.chip else None, os.cpu_count() or 1)


def work(config: ConfigDict, target: targets.Target, devices: int) -> float:
    """The operations of a step."""
    model, trainable, _ = _split(config, target, devices)
    return flops.of_step(model, trainable, rows=config.batch_size, length=config.data.length)


def tries(config: ConfigDict, base: Base, rank: int, target: targets.Target, devices: int) -> list[Fit]:
    """Full training and LoRA on the hardware, and LoRA over a quantised base if that could make it fit."""
    lora: dict[str, object] = {"trainable": "lora", "lora.rank": rank}
    lora |= {"lora.alpha": rules.ALPHA, "lora.targets": "all-linear"}
    found = [
        _fit(config, base, ("every weight", {"trainable": "all"}), (base.parameters, 0), target, devices),
        _fit(config, base, (f"LoRA r{rank}", lora), (rank * base.per_rank, base.frozen), target, devices),
    ]
    if not found[-1].fits and 2 * found[-1].need.state > _limit(target):
        lora |= {"model.quantise": "nf4"}
        way = (f"LoRA r{rank}, nf4", lora)
        found.append(_fit(config, base, way, count(config, lora, target, devices), target, devices))
    return found


def _fit(
    config: ConfigDict,
    base: Base,
    way: tuple[str, dict[str, object]],
    counts: tuple[int, int],
    target: targets.Target,
    devices: int,
) -> Fit:
    """A method with all its rows at once or, if these do not fit, with one row per device at a time."""
    name, settings = way
    limit = _limit(target)
    rows = config.batch_size // devices
    for accumulate in dict.fromkeys((1, rows)):
        need = memory.need(
            base.sizes,
            trained=counts[0],
            frozen=counts[1],
            devices=devices,
            rows=rows // accumulate,
            length=config.data.length,
            family=target.family,
            quantised="model.quantise" in settings,
            accumulated=accumulate > 1,
        )
        fits = need.fits(limit)
        if fits:
            break
    how: dict[str, object] = {"accumulate": 0} if target.chip is None else {"accumulate": accumulate}
    if target.chip is not None:
        how["model.remat"] = "full"
    return Fit(name, settings | how, need, fits)


def _limit(target: targets.Target) -> int:
    """The bytes of a device; the CPU devices of a process share the machine's memory."""
    return target.chip.memory if target.chip else memory.of_this_machine() // targets.count(target)


def lines(config: ConfigDict, tried: list[Fit], target: targets.Target, hardware: str) -> Iterator[tuple[str, str]]:
    """(method, its estimated memory and the command that compiles it)."""
    limit, many = _limit(target), targets.count(target)
    where = "this machine" if target.chip is None else f"{many} device{'s' if many > 1 else ''}"
    yield "hardware", f"{hardware}, {where}, {limit / GIB:.1f} GiB each; what follows is an estimate, of one device"
    words = {True: "fits", False: "DOES NOT FIT"}
    for fit in tried:
        state, more = fit.need
        held = f"{state / GIB:.2f} GiB of weights, moments and gradients"
        if more is None:
            total = "activations come on top, of which no estimate is trusted"
        else:
            total = f"with activations about {(state + more) / GIB:.2f} GiB"
        unsure = f"{'probably fits' if 4 * state <= limit else 'may fit'}, compile it to know"
        yield fit.name, f"{unsure if fit.fits is None else words[fit.fits]}: {held}; {total}"
        yield "", _plan(config, fit, target)


def _plan(config: ConfigDict, fit: Fit, target: targets.Target) -> str:
    file = "full" if fit.settings["trainable"] == "all" else "lora"
    keys = {"model.path": config.model.path, "batch_size": config.batch_size, "data.length": config.data.length}
    if config.objective != "next_token":
        keys["objective"] = config.objective
    same = ("trainable", "lora.alpha", "lora.targets")
    keys |= {key: value for key, value in fit.settings.items() if key not in same}
    given = " ".join(f"--config.{key}={shlex.quote(str(value))}" for key, value in keys.items())
    return f"specjax plan --config=configs/{file}.py --target={target.name} {given}"
