"""On which hardware each method would fit with the model that it is meant for, by arithmetic: nothing is compiled."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from specjax.advise import fits, memory
from specjax.config import copied
from specjax.hf import config as hf_config
from specjax.hf import folder as hf_folder
from specjax.models import ModelConfig
from specjax.plan import search, targets

FAMILIES = {"tpu": "v5e", "gpu": "h100"}


def aimed(configs: Mapping[str, ConfigDict], model: str, prices: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Per method the smallest v5e slice and the fewest H100s of a machine that hold its training, or None.

    A row is on a device at a time, each layer is computed a second time, and weights lie over all devices: the least
    that it can need. A mixture of experts has no trusted estimate, and None. With it, the seconds that a million tokens
    take at least: their operations at the chips' peak; with a price, what these cost.

    Args:
      configs: of the methods, by name.
      model: a folder of which config.json is enough, or a hub name.
      prices: of a chip and hour, by family, in any currency.

    Raises:
      UserError: it cannot be read.
    """
    sizes = hf_config.from_folder(hf_folder.resolve(model, weights=False))
    rows, parameters, prices = [], 0, prices or {}
    for name, config in configs.items():
        made: Any = copied(config, "model", "lora", "data")
        made.model.path, made.model.revision, made.model.dtype = model, "", "bfloat16"
        made.data.length = min(config.data.length, sizes.max_positions)
        counts = _counts(made)
        parameters = parameters or _parameters(made)
        row: dict[str, Any] = {"method": name, "bytes_per_chip": {}, "seconds_per_million_tokens": {}}
        row["cost_per_million_tokens"] = {}
        work = fits.work(made, targets.parse("v5e:1x1"), 1) / (made.batch_size * made.data.length)
        for place, family in FAMILIES.items():
            row[place] = None
            for target in _targets(family):
                need = _need(made, sizes, counts, target)
                row["bytes_per_chip"][place] = None if need.more is None else need.state + need.more
                if target.chip and need.fits(target.chip.memory):
                    row[place] = target.name
                    peak = target.chip.flops * targets.count(target)
                    row["seconds_per_million_tokens"][place] = seconds = 1e6 * work / peak
                    if family in prices:
                        hours = seconds * targets.count(target) / 3600
                        row["cost_per_million_tokens"][place] = hours * prices[family]
                    break
        rows.append(row)
    return {"model": model, "parameters": parameters, "rows": rows, "price": prices or None}


def _targets(family: str) -> Iterator[targets.Target]:
    for shape in search.SLICES[family]:
        yield targets.parse(f"{family}:{shape}")


def _counts(config: ConfigDict) -> tuple[int, int]:
    """Parameters that train, and bytes of those that do not."""
    return fits.count(config, {"trainable": config.trainable}, targets.parse("v5e:1x1"), 1)


def _parameters(config: ConfigDict) -> int:
    """Of all the model's weights."""
    whole = copied(config, "model")
    whole.model.quantise = ""
    return fits.count(whole, {"trainable": "all"}, targets.parse("v5e:1x1"), 1)[0]


def _need(config: ConfigDict, sizes: ModelConfig, counts: tuple[int, int], target: targets.Target) -> memory.Need:
    return memory.need(
        sizes,
        trained=counts[0],
        frozen=counts[1],
        devices=targets.count(target),
        rows=1,
        length=config.data.length,
        family=target.family,
        quantised=bool(config.model.quantise),
    )
