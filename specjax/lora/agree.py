"""Whether an adapter is the one that settings describe: what a run starts from is what trains."""

from pathlib import Path
from typing import Any

from specjax.errors import UserError, argument
from specjax.lora import adapters, targets, tokens
from specjax.lora.peft_config import CONFIG, read_config
from specjax.models import Decoder

# Arguments of `inject` and PEFT's keys, with PEFT's defaults.
_SCALARS: dict[str, tuple[str, Any]] = {
    "rank": ("r", 8),
    "alpha": ("lora_alpha", 8),
    "dropout": ("lora_dropout", 0.0),
    "rslora": ("use_rslora", False),
    "dora": ("use_dora", False),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "bias": ("bias", "none"),
    "ensure_weight_tying": ("ensure_weight_tying", False),
}


def check(model: Decoder, folder: Path, **given: Any) -> None:
    """Refuses arguments of `inject` that describe another adapter than the one in use, which was read from a folder.

    Raises:
      UserError: one does, with both values.
    """
    held = read_config(folder)

    def refuse(name: str, theirs: Any) -> None:
        raise UserError(
            f"{argument(name)} is {given[name]!r}, but the adapter in {folder} has {theirs!r} ({CONFIG}), and it is "
            "what trains: leave it out, or give it this value."
        )

    for name, (key, default) in _SCALARS.items():
        if name in given and given[name] != held.get(key, default):
            refuse(name, held.get(key, default))
    active = adapters.active(model)
    assert active is not None
    worn = adapters.collect(model, active)
    if "modules_to_save" in given:
        theirs = held.get("modules_to_save", [])
        same = [set(targets.match_saved(model, saved, strict=False)) for saved in (given["modules_to_save"], theirs)]
        if same[0] != same[1]:
            refuse("modules_to_save", theirs)
    if "trainable_token_indices" in given:
        theirs = held.get("trainable_token_indices")
        if theirs is None or tokens.match(model, theirs) != tokens.match(model, given["trainable_token_indices"]):
            refuse("trainable_token_indices", theirs)
    places = {"targets": "target_modules", "exclude_modules": "exclude_modules"}
    places["layers_to_transform"] = "layers_to_transform"
    asked = {name: given.get(name, held.get(key)) for name, key in places.items()}
    if given.keys() & places.keys():
        wanted = targets.match(
            model,
            asked["targets"] or (),
            exclude=asked["exclude_modules"],
            layers=asked["layers_to_transform"],
            layers_pattern=held.get("layers_pattern"),
            saved=held.get("modules_to_save", []),
        )
        if wanted != {path: tuple(rank > 0 for rank in one.ranks) for path, one in worn.factors.items()}:
            first = next(name for name in places if name in given)
            refuse(first, held.get(places[first]))
