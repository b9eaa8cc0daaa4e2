"""The hardware that each method needs for the target model, by arithmetic: nothing is compiled."""

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
    """For each method, the smallest v5e slice and the fewest H100s of one machine that can train it, or None.

    The estimate is for one row per device, full rematerialisation, and weights sharded over all devices: the least
    memory possible. A mixture of experts has no trusted estimate and gives None. The result includes the least seconds
    per million tokens: their operations at the chips' peak; with a price, their cost.

    Args:
      configs: the methods' configs, by name.
      model: a folder that holds at least config.json, or a hub name.
      prices: per chip and hour, by family, in any currency.

    Raises:
      UserError: the model's config cannot be read.
    """
    sizes = hf_config.from_folder(hf_folder.resolve(model, weights=False))
    rows, parameters, prices = [], 0, prices or {}
    for name, config in configs.items():
        made: Any = copied(config, "model", "lora", "data")
        made.model.path, made.model.revision, made.model.dtype = model, "", "bfloat16"
        made.model.add_tokens = made.model.add_words = ()  # of the target's tokenizer nothing is known
        if made.lora.trainable_token_indices == "added":
            made.lora.trainable_token_indices = None
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
    """The number of trained parameters, and the bytes of frozen ones."""
    return fits.count(config, {"trainable": config.trainable}, targets.parse("v5e:1x1"), 1)


def _parameters(config: ConfigDict) -> int:
    """The number of the model's parameters."""
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
