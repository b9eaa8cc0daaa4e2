"""Several runs in one config: the methods of a comparison, the adapters of a fleet, the combinations of a sweep."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from specjax.config import copied, merge
from specjax.config.checks import flat
from specjax.errors import UserError

# Keys of which each adapter of a fleet may have its own value.
OWN = re.compile(
    r"(seed|steps|epochs)$|(lora|eval)\.|data\.(?!length$|cache$)"
    r"|optimizer\.(learning_rate|schedule|warmup_steps|final_fraction|weight_decay|clip_norm)$"
)


def methods(config: ConfigDict) -> dict[str, ConfigDict]:
    """The config of each method in `config.compare`, in the file's order.

    Raises:
      UserError: when there is none, or when one's overrides are wrong.
    """
    if not config.compare:
        raise UserError(
            "config.compare is empty: give it a name and overrides for each method, as configs/demo.py does."
        )
    made = {}
    for name, overrides in config.compare.items():
        if not isinstance(overrides, Mapping | ConfigDict):
            raise UserError(f"config.compare.{name} is {overrides!r}: give the overrides of this method as a dict.")
        made[name] = merge(config, overrides, where=f"config.compare.{name}")
        made[name].compare = ConfigDict()
    return made


def swept(config: ConfigDict) -> ConfigDict:
    """A copy in which `config.sweep` has become the adapters of `config.fleet`.

    Raises:
      UserError: it has something else than lists, or `config.fleet` has adapters too.
    """
    over = dict(flat(config.sweep.to_dict()))
    if not over:
        return config
    for key, values in over.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"config.sweep.{key} is {values!r}: give a list of values.")
    if config.fleet:
        raise UserError("config.sweep makes the adapters of config.fleet, which has some: give one of them.")
    made = copied(config, "fleet", "sweep")
    made.sweep = ConfigDict()
    made.fleet.unlock()
    for values in itertools.product(*over.values()):
        overrides = dict[str, Any]()
        for key, value in zip(over, values, strict=True):
            *groups, last = key.split(".")
            inner = overrides
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[last] = value
        parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in zip(over, values, strict=True))
        made.fleet[re.sub(r"[^\w-]+", "_", "--".join(parts))] = overrides
    return made


def members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The config of each adapter of `config.fleet`, as if it were trained alone, in the file's order.

    Raises:
      UserError: when one's overrides are wrong, or are of what all share.
    """
    made, base = {}, dict(flat(copied(config, "fleet").to_dict()))
    for name, overrides in config.fleet.items():
        where = f"config.fleet.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"config.fleet has an adapter named {name!r}: use letters, digits, '_' and '-' alone.")
        if not isinstance(overrides, Mapping | ConfigDict):
            raise UserError(f"{where} is {overrides!r}: give the overrides of this adapter as a dict.")
        one = merge(config, overrides, where=where)
        own = dict(flat(one.to_dict()))
        shared = [key for key in own if not OWN.match(key) and own[key] != base.get(key, own[key])]
        if shared:
            raise UserError(
                f"{where}.{shared[0]} is {own[shared[0]]!r}, but all adapters of a fleet share one base and one batch: "
                f"set config.{shared[0]} for all of them, or train {name} in a run of its own."
            )
        one.fleet, one.sweep, one.rungs, one.slots = ConfigDict(), ConfigDict(), None, 0
        made[name] = one
    return made


def slots_of(config: ConfigDict) -> int:
    """How many adapters of `config.fleet` train at once: all, or with rungs as many as are left behind the last one."""
    left = len(config.fleet)
    for _ in () if config.slots else config.rungs or ():
        left = math.ceil(config.survive * left)
    return min(config.slots or left, left)


def refuse_fleet(config: ConfigDict, verb: str) -> None:
    """Raises `UserError` where a config of several adapters is given to what knows one run."""
    if config.fleet or config.sweep:
        raise UserError(
            f"`{verb}` is of one run, and config.fleet or config.sweep names several adapters: give it a config "
            "without them, such as the config.json in <workdir>/adapters/<name>."
        )
