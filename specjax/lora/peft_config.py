"""`adapter_config.json`: what each key may say, and what an adapter's arrays make it say.

Source: `LoraConfig` and `PeftConfig` of peft 0.21 (peft/tuners/lora/config.py, peft/config.py).
"""

import shlex
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specjax.errors import UserError, nearest
from specjax.files import read_object
from specjax.lora import fused, targets, tokens
from specjax.lora.adapters import Adapter
from specjax.lora.targets import TIED_HEAD
from specjax.lora.variants import VARIANTS
from specjax.models import Decoder
from specjax.models.experts import ExpertLinear
from specjax.values import FLAG, NAMES, TEXT, Kind, either, listed, mapped, number, shown, whole

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_SCALE = number("a number other than 0", lambda v: v != 0)
_MODULES = Kind("a list of names or a pattern", either(TEXT, NAMES).fits)
_IDS = listed(whole(), "a list of ids")
# Keys that are read: what they may hold.
_READ: dict[str, Kind] = {
    "r": whole(1),
    "lora_alpha": _SCALE,
    "lora_dropout": number("a number from 0 to below 1", lambda v: 0 <= v < 1),
    **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), FLAG),
    "bias": Kind("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
    "target_modules": _MODULES,
    "target_parameters": NAMES,
    "exclude_modules": _MODULES,
    "modules_to_save": NAMES,
    "trainable_token_indices": either(_IDS, mapped(_IDS, "modules' names with lists of ids")),
    "layers_to_transform": either(Kind("a layer's number", whole().fits), listed(whole(), "a list of such")),
    "layers_pattern": Kind("a name or a list of names", either(TEXT, NAMES).fits),
    "rank_pattern": mapped(whole(1), "patterns with whole numbers of at least 1"),
    "alpha_pattern": mapped(_SCALE, "patterns with numbers other than 0"),
}
_NEEDED = ("r", "target_modules")

# Keys that would change what an adapter computes: the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (None,),
    "enable_lora": (None,),  # of the first releases
    # The others (pissa, olora, corda, loftq, ...) subtract their start from the base: the adapter fits no plain base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

# Keys that say where the adapter comes from, or how its training started or was run: whatever they hold.
_ANY = (
    "peft_type",
    "task_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "merge_weights",
)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder; keys that are absent or null are left out.

    A key that is unknown here, as later releases of PEFT add them, is passed over with a warning where its value is
    null, false or empty: PEFT passes over any.

    Raises:
      UserError: a file is absent or no JSON, the adapter is of another kind, or a key is unknown and asks for
        something, has a value that makes no sense, or one that would change what the adapter computes and is not
        supported.
    """
    path = folder / CONFIG
    _check_files(folder)
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {shown(config.get('peft_type'))} is not supported; supported is LORA.")
    known = (*_READ, *_NEUTRAL, *_ANY)
    passed = [key for key, value in config.items() if key not in known and value in (None, False, "", [], {})]
    if passed:
        named = ", ".join(f"{key} = {config[key]!r}" for key in passed)
        warnings.warn(f"{path}: passed over, as keys that are not known here: {named}.", stacklevel=2)
    for key, value in config.items():
        if key in passed:
            continue
        if key not in known:
            raise UserError(f"{path}: {shown(key)} is no key of PEFT's LoRA that is known here.{nearest(key, known)}")
        if key in _NEUTRAL and not any(
            value is one or (value == one and type(value) is type(one)) for one in _NEUTRAL[key]
        ):
            raise UserError(f"{path}: {key} = {shown(value)} is not supported.")
        if key in _READ and not (value is None and key not in _NEEDED) and not _READ[key].fits(value):
            raise UserError(f"{path}: {key} must be {_READ[key].words}, not {shown(value)}.")
    for key in _NEEDED:
        if key not in config:
            raise UserError(f"{path} has no {key}: restore the file.")
    return {key: value for key, value in config.items() if value is not None and key not in passed}


def _check_files(folder: Path) -> None:
    """Raises `UserError` where an adapter's files are not there, and says which way leads to them."""
    none = f"{folder} is not a PEFT adapter folder: it has no"
    if not (folder / CONFIG).is_file():
        deeper = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))  # where PEFT saves one with a name
        hint = f"; give one of its folders {', '.join(deeper)}" if deeper else ""
        raise UserError(f"{none} {CONFIG}{hint}.")
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLED).is_file():
        old, new = str((folder / PICKLED).absolute()), str((folder / WEIGHTS).absolute())
        code = f"import safetensors.torch as s, torch as t; held = t.load({old!r}, 'cpu', weights_only=True); "
        code += f"s.save_file({{key: one.clone() for key, one in held.items()}}, {new!r})"
        raise UserError(
            f"{folder} has only pickled weights ({PICKLED}), which can run code when opened: convert them with "
            f"`python -c {shlex.quote(code)}` (it needs torch, and runs no code of theirs)."
        )
    theirs = (
        "; it is in mlx-lm's form: load it, and save it in PEFT's" if (folder / "adapters.safetensors").exists() else ""
    )
    raise UserError(f"{none} {WEIGHTS}{theirs}.")


def write_config(model: Decoder, adapter: Adapter, base: str | None, revision: str | None) -> dict[str, Any]:
    """The settings that make PEFT build this adapter, told from its arrays alone.

    `r` and `lora_alpha` are the most frequent ones, `rank_pattern` and `alpha_pattern` hold the others.
    """
    maps = targets.maps_of(model)
    matrices = fused.by_parameter(model)
    ranks, alphas = {}, {}
    for path, factors in adapter.factors.items():
        if isinstance(maps[path], ExpertLinear) or path in matrices:
            continue
        for name, rank, alpha in zip(targets.modules(model, path), factors.ranks, factors.alphas, strict=True):
            if rank:
                ranks[name], alphas[name] = rank, alpha
    of_modules = list(ranks)
    expert_ranks, expert_alphas, parameters = fused.settings(model, adapter)
    ranks, alphas = ranks | expert_ranks, alphas | expert_alphas
    r, rank_pattern = _pattern(ranks)
    alpha, alpha_pattern = _pattern({name: int(a) if a == int(a) else a for name, a in alphas.items()})
    everything = [name for path in targets.parts(model) for name in targets.modules(model, path)]
    saved = saved_modules(model, adapter)

    def shorten(chosen: list[str], ends: Callable[[str, str], bool]) -> list[str]:
        # What else a multimodal model has may bear the same short names.
        return sorted(chosen) if model.config.multimodal else targets.shorten(chosen, everything, ends)

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        **_variant_settings(adapter),
        "target_modules": shorten(of_modules, lambda name, end: name.endswith(f".{end}")),
        "target_parameters": parameters or None,
        "modules_to_save": shorten(saved, str.endswith) if saved else None,
        "trainable_token_indices": tokens.written(adapter),
        "ensure_weight_tying": any(copies.tied for copies in adapter.copies.values()),
        "bias": _bias(adapter),
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _variant_settings(adapter: Adapter) -> dict[str, Any]:
    """The keys that tell the variants of the adapter's maps, at their default where none has another value."""
    default = {key: value for variant in reversed(VARIANTS) for key, value in variant.settings.items()}
    told = [pair for one in adapter.factors.values() for pair in one.variant.settings.items()]
    return default | {key: value for key, value in told if value != default[key]}


def saved_modules(model: Decoder, adapter: Adapter) -> list[str]:
    """The names PEFT knows the adapter's whole modules by."""
    found = []
    for path, copies in adapter.copies.items():
        if TIED_HEAD in copies.values and not copies.rows:
            found.append(TIED_HEAD)
        if not copies.rows and list(copies.values) not in ([TIED_HEAD], ["bias"]):
            found += [name for name, on in zip(targets.modules(model, path), copies.layers, strict=True) if on]
    return found


def _pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and patterns for the modules that have another."""
    usual = Counter(values.values()).most_common(1)[0][0]
    by_last: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_last.setdefault(name.rsplit(".", 1)[-1], set()).add(value)
    found = {}
    for name, value in values.items():
        last = name.rsplit(".", 1)[-1]
        if len(by_last[last]) == 1:
            found[last] = value
        else:  # without "model.": PEFT before 0.14 wants something in front of a pattern
            found[name.removeprefix("model.").replace(".", r"\.")] = value
    return usual, {key: value for key, value in found.items() if value != usual}


def _bias(adapter: Adapter) -> str:
    biased = [path for path, copies in adapter.copies.items() if list(copies.values) == ["bias"]]
    if not biased:
        return "none"
    targeted = all(
        path in adapter.factors
        and all(
            rank or not on for rank, on in zip(adapter.factors[path].ranks, adapter.copies[path].layers, strict=True)
        )
        for path in biased
    )
    return "lora_only" if targeted else "all"
