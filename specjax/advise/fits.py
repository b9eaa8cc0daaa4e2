"""Which methods fit on the hardware, by estimate, and the command that compiles each one."""

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
      sizes: of it.
      parameters: of all its weights.
      frozen: bytes of these where none of them trains.
      per_rank: parameters of an adapter of rank 1 on all linear maps.
    """

    sizes: ModelConfig
    parameters: int
    frozen: int
    per_rank: int


class Fit(NamedTuple):
    """A method on the hardware.

    Attributes:
      name: in words.
      settings: keys that make it.
      need: of a device.
      fits: whether it does; None: to be compiled.
    """

    name: str
    settings: dict[str, object]
    need: memory.Need
    fits: bool | None


def base_of(config: ConfigDict, sizes: ModelConfig, target: targets.Target, devices: int) -> Base:
    """Counts the model of a config."""
    parameters, _ = count(config, {"trainable": "all"}, target, devices)
    trained, frozen = count(config, {"trainable": "lora", "lora.rank": rules.RANKS[0]}, target, devices)
    return Base(sizes, parameters, frozen, trained // rules.RANKS[0])


def count(config: ConfigDict, settings: dict[str, object], target: targets.Target, devices: int) -> tuple[int, int]:
    """Parameters that train with these settings, and bytes of those that do not, by the model's shapes."""
    config = copied(config, "lora", "model")
    config.update_from_flattened_dict(settings)
    _, trainable, frozen = _split(config, target, devices)
    trained = sum(leaf.size for leaf in trainable.values())
    return trained, sum(leaf.size * leaf.dtype.itemsize for leaf in frozen.values())


def _split(config: ConfigDict, target: targets.Target, devices: int) -> tuple[Decoder, dict[Any, Any], dict[Any, Any]]:
    """A config's model, without weights, and by path the shapes of what trains and of what does not."""
    config = settled(config, "cpu" if target.chip is None else "tpu", devices)
    folder = hf_folder.resolve(config.model.path, config.model.revision, weights=False)
    model = build.model_of(config, folder, None, abstract=True)
    _, trainable, frozen = nnx.split(model, build.filter_of(config), ...)
    return model, dict(nnx.to_flat_state(trainable)), dict(nnx.to_flat_state(frozen))


def seconds(config: ConfigDict, target: targets.Target, devices: int, steps: int) -> tuple[float, float]:
    """How long a config's training takes, from and to, compiling and evaluating left out."""
    step = work(config, target, devices)
    return rules.seconds(steps * step, devices, target.chip.flops if target.chip else None, os.cpu_count() or 1)


def work(config: ConfigDict, target: targets.Target, devices: int) -> float:
    """Operations of a step."""
    model, trainable, _ = _split(config, target, devices)
    return flops.of_step(model, trainable, rows=config.batch_size, length=config.data.length)


def tries(config: ConfigDict, base: Base, rank: int, target: targets.Target, devices: int) -> list[Fit]:
    """Every weight and LoRA on the hardware; over a quantised base too, where that could make it fit."""
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
    """A way with all its rows at once, or with one row a device at a time where these do not fit."""
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
    """Bytes of a device; the CPU devices of a process share the machine's."""
    return target.chip.memory if target.chip else memory.of_this_machine() // targets.count(target)


def lines(config: ConfigDict, tried: list[Fit], target: targets.Target, hardware: str) -> Iterator[tuple[str, str]]:
    """(method, what it needs and the command that compiles it), by estimate."""
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
