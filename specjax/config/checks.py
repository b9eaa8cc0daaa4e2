"""What is impossible in a config or contradicts itself, said in one sentence: the key, its value and what to do.

`specjax.config.validate` is the door to this file.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from specjax.errors import UserError, keys, nearest
from specjax.values import shown

NESTED = ("compare", "fleet", "sweep")  # groups whose names are the user's own; every value is overrides of the config
ADDED = "added"  # of lora.trainable_token_indices: the tokens of model.add_tokens and model.add_words
FREE = ("data.eval", "data.columns")  # groups whose names are the user's own; every value is a string
TEXTS = ("eval.prompts", "model.add_tokens", "model.add_words")  # whose flags may be repeated, a string each
CHOICES = {
    "trainable": ("all", "lora"),
    "objective": ("next_token", "dpo"),
    "dpo.loss": ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust"),
    "model.dtype": ("auto", "bfloat16", "float32"),
    "model.init": ("checkpoint", "random"),
    "model.remat": ("none", "full", "attention", "dots", "offload"),
    "model.quantise": ("", "int8", "nf4"),
    "data.format": ("auto", "text", "instruct", "prompt", "messages", "conversations", "preference"),
    "data.shares": ("tokens", "rows"),
    "data.loss": ("answers", "all"),
    "data.turns": ("exact", "whole"),
    "data.overlong": ("drop", "truncate", "keep_end", "split"),
    "optimizer.name": ("adamw", "lion"),
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "optimizer.moments": ("float32", "bfloat16", "8bit"),
}
AT_LEAST = {
    **dict.fromkeys(("batch_size", "eval.max_new_tokens", "log.every", "checkpoint.keep", "seeds"), 1),
    **dict.fromkeys(("seed", "steps", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm"), 0),
    **dict.fromkeys(("accumulate", "slots", "eval.every", "eval.batches", "eval.patience"), 0),
    **dict.fromkeys(("checkpoint.every", "eval.answers"), 0),
    "model.pad_to_multiple_of": 1,
    "data.eval_seed": -1,
    "data.length": 2,
}
INT32 = 2**31 - 1
RANK = 1 << 16
SEED = 2**63 - 2  # JAX takes 64 bits, with a sign; LoRA's draws have the next one
AT_MOST = {
    **dict.fromkeys(("steps", "accumulate", "slots", "optimizer.warmup_steps"), INT32),
    **dict.fromkeys(("eval.every", "eval.batches", "eval.patience", "eval.max_new_tokens"), INT32),
    **dict.fromkeys(("checkpoint.every", "log.every"), INT32),
    **dict.fromkeys(("seed", "data.eval_seed"), SEED),
    "model.pad_to_multiple_of": RANK,
    "seeds": 20,
    "eval.answers": 1000,
}
# How the errors of library functions call what a config gives them: their argument -> the key.
ARGUMENTS = {
    **{
        name: f"config.data.{name}"
        for name in ("columns", "format", "length", "overlong", "split", "template", "turns")
    },
    **{axis: f"config.mesh.{axis}" for axis in ("data", "fsdp", "expert", "context", "tensor")},
    **{"remat": "config.model.remat", "offload": "config.optimizer.offload", "wandb": "config.log.wandb"},
    "holdout": "config.data.eval_fraction",
    **{name: f"config.model.{name}" for name in ("add_tokens", "add_words", "pad_to_multiple_of")},
    **{name: f"config.dpo.{name}" for name in ("beta", "loss", "label_smoothing")},
    "objective": "config.objective",
    "accumulate": "config.accumulate",
    "keep": "config.checkpoint.keep",
    **{
        name: f"config.lora.{name}"
        for name in (
            *("rank", "alpha", "targets", "rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules"),
            *(
                "modules_to_save",
                "bias",
                "ensure_weight_tying",
                "dropout",
                "rslora",
                "dora",
                "init",
                "trainable_token_indices",
            ),
        )
    },
}
POSITIVE = ("optimizer.learning_rate", "optimizer.eps", "optimizer.loraplus_ratio")
BIASES = ("none", "all", "lora_only")  # config.lora.bias
FRACTIONS = ("data.eval_fraction", "optimizer.b1", "optimizer.b2")
TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "a list of strings"}


def check(config: ConfigDict, default: ConfigDict, device_count: int | None) -> None:
    """`specjax.config.validate`, given the defaults."""
    _check_types(config, default, default)
    _check_values(config)
    _check_lora(config)
    _check_steps(config, default)
    _check_data(config)
    _check_eval(config)
    for key in ("slots", "rungs"):
        if config[key] and not (config.fleet or config.sweep):
            raise UserError(
                f"config.{key} is {config[key]}, but config.fleet is empty: name adapters there, or leave it."
            )
    _check_rungs(config)
    if config.accumulate and config.batch_size % config.accumulate:
        raise UserError(
            f"config.batch_size is {config.batch_size}, which config.accumulate={config.accumulate} does not divide: "
            "make the batch size a multiple of it."
        )
    if device_count is not None:
        _check_devices(config, device_count)


def eval_names(config: ConfigDict) -> list[str]:
    """The names of the eval sets, those given sorted; the first is the default of `eval.best`."""
    return [*(heldout(config) if holds_out(config) else ()), *sorted(config.data.eval)]


def holds_out(config: ConfigDict) -> bool:
    """Whether a part of the training rows is held out, to be measured."""
    return bool(config.data.eval_fraction and (config.data.eval_beside or not config.data.eval))


def sources(config: ConfigDict) -> dict[str, tuple[str, float]]:
    """Name -> (source, share) of the training rows; a name is a file's, without what follows its first dot."""
    train, named = config.data.train, dict[str, tuple[str, float]]()
    for source, share in [(train, 1.0)] if isinstance(train, str) else train:
        stem = re.sub(r"[^\w-]+", "-", str(source).rstrip("/").rpartition("/")[2].partition(".")[0]) or "source"
        same = sum(re.fullmatch(rf"{re.escape(stem)}(-\d+)?", name) is not None for name in named)
        named[f"{stem}-{same + 1}" if same else stem] = (source, share)
    return named


def heldout(config: ConfigDict) -> dict[str, str]:
    """Name of a held-out set -> its source's."""
    names = list(sources(config))
    return {"heldout": names[0]} if len(names) == 1 else {f"heldout-{name}": name for name in names}


def nearest_key(key: str, default: ConfigDict) -> str:
    """A hint that names the key nearest to the dotted `key`, by its last part or as a whole, or ""."""
    last = {name: name.rpartition(".")[2] for name in [*(k for k, _ in flat(default.to_dict())), *FREE, *NESTED]}
    part = key.rpartition(".")[2]
    near = [part] if part in last.values() else difflib.get_close_matches(part, last.values(), 1)
    close = difflib.get_close_matches(key, [name for name in last if last[name] in near], 1, 0.0)
    close = close or difflib.get_close_matches(key, last, 1)
    return f" Did you mean 'config.{close[0]}'?" if close else ""


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, each with its dotted key.

    >>> dict(flat({"a": 1, "b": {"c": 2}}))
    {'a': 1, 'b.c': 2}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_types(config: ConfigDict, default: ConfigDict, root: ConfigDict, group: str = "") -> None:
    for key in {**config, **default}:
        name = f"{group}{key}"
        if key not in default:
            raise UserError(f"config.{name} is not a key.{nearest_key(name, root)}")
        if key not in config:
            raise UserError(f"config.{name} is missing: start from specjax.config.get_config().")
        value, expected = config[key], default.get_type(key)
        if name in FREE:
            for own, text in value.items():
                if not (isinstance(text, str) and text):
                    raise UserError(f"config.{name}.{own} is {text!r}: it takes a string that is not empty.")
        elif isinstance(default[key], ConfigDict):
            if not isinstance(value, ConfigDict):
                raise UserError(f"config.{name} is {value!r}: it is a group of keys.")
            if key not in NESTED:
                _check_types(value, default[key], root, f"{name}.")
        elif value is None and default[key] is None:
            pass
        elif not isinstance(value, expected) or (isinstance(value, bool) and expected is int):
            raise UserError(f"config.{name} is {value!r}: it takes {TYPES[expected]}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name} is {value!r}: it takes a finite number.")


def _check_values(config: ConfigDict) -> None:
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            offered = ", ".join(repr(choice) for choice in choices)
            raise UserError(f"config.{key} is {config[key]!r}: choose one of {offered}.{nearest(config[key], choices)}")
    for key, least in AT_LEAST.items():
        if config[key] < least:
            raise UserError(f"config.{key} is {config[key]!r}: give it a value of at least {least}.")
    for key, most in AT_MOST.items():
        if config[key] > most:
            raise UserError(f"config.{key} is {shown(config[key])}: give it a value of at most {most:,}.")
    if config.batch_size * config.data.length > INT32:
        raise UserError(
            f"config.batch_size is {shown(config.batch_size)} and config.data.length is {shown(config.data.length)}: a "
            f"step has at most {INT32:,} tokens, so make one of them smaller."
        )
    for key in POSITIVE:
        if config[key] <= 0:
            raise UserError(f"config.{key} is {config[key]!r}: give it a value above 0.")
    for key in FRACTIONS:
        if not 0 <= config[key] < 1:
            raise UserError(f"config.{key} is {config[key]!r}: give it a value from 0 to below 1.")
    if (router := config.model.router_aux_coef) is not None and router < 0:
        raise UserError(f"config.model.router_aux_coef is {router!r}: give it a value of at least 0.")
    if not 0 <= (final := config.optimizer.final_fraction) <= 1:
        raise UserError(f"config.optimizer.final_fraction is {final!r}: give it a value from 0 to 1.")


def _check_lora(config: ConfigDict) -> None:
    lora, given = config.lora, [key for key in config.lora if config.lora[key] is not None]
    if config.trainable != "lora":
        if config.model.quantise:
            raise UserError(
                f"config.model.quantise is {config.model.quantise!r}, but config.trainable is {config.trainable!r}: "
                "what is quantised can't train, so set config.trainable='lora', or leave config.model.quantise out."
            )
        if (ratio := config.optimizer.loraplus_ratio) != 1:
            raise UserError(
                f"config.optimizer.loraplus_ratio is {ratio!r}, but config.trainable is {config.trainable!r}: LoRA+ is "
                "for LoRA's factors, so set config.trainable='lora', or leave the ratio at 1."
            )
        if given:
            raise UserError(
                f"config.lora.{given[0]} is {lora[given[0]]!r}, but config.trainable is {config.trainable!r}: "
                f"set config.trainable='lora', or leave config.lora.{given[0]} out."
            )
        return
    if lora.init_from is not None and not lora.init_from:
        raise UserError("config.lora.init_from is '': give the folder of an adapter, or leave it out.")
    if lora.rank is None and not lora.init_from:
        raise UserError("config.lora.rank is not set, but config.trainable is 'lora': set it, --config.lora.rank=16.")
    if lora.rank is not None and lora.rank < 1:
        raise UserError(f"config.lora.rank is {lora.rank}: give it a value of at least 1.")
    if lora.rank is not None and lora.rank > RANK:
        raise UserError(f"config.lora.rank is {shown(lora.rank)}: give it a value of at most {RANK:,}.")
    if lora.alpha is not None and lora.alpha <= 0:
        raise UserError(f"config.lora.alpha is {lora.alpha}: give it a value above 0.")
    if lora.dropout is not None and not 0 <= lora.dropout < 1:
        raise UserError(f"config.lora.dropout is {lora.dropout}: give it a value from 0 to below 1.")
    if lora.init is not None and lora.init != "pissa":
        raise UserError(f"config.lora.init is {lora.init!r}: give 'pissa', or leave it out.")
    if lora.init and lora.init_from:
        raise UserError("config.lora.init and config.lora.init_from both say what to start from: leave one out.")
    _check_lora_names(lora)
    _check_lora_patterns(lora)
    if lora.bias is not None and lora.bias not in BIASES:
        offered = ", ".join(repr(choice) for choice in BIASES)
        raise UserError(f"config.lora.bias is {lora.bias!r}: choose one of {offered}.{nearest(lora.bias, BIASES)}")
    if lora.ensure_weight_tying and not lora.modules_to_save and not lora.init_from:
        raise UserError(
            "config.lora.ensure_weight_tying is True, but config.lora.modules_to_save is not set: "
            "name embed_tokens there, or leave config.lora.ensure_weight_tying out."
        )


def _check_lora_names(lora: ConfigDict) -> None:
    """The keys that name modules or layers."""
    for key in ("targets", "exclude_modules", "modules_to_save"):
        names = [lora[key]] if isinstance(lora[key], str) else lora[key]
        if names is None or (
            isinstance(names, list | tuple) and (names or key != "targets") and all(_is_text(name) for name in names)
        ):
            continue
        offered = {"targets": "'all-linear', a list of names or a pattern", "modules_to_save": "a list of names"}
        offer = offered.get(key, "a list of names or a pattern")
        raise UserError(f"config.lora.{key} is {lora[key]!r}: give {offer}.")
    rows = lora.trainable_token_indices
    each = rows.values() if isinstance(rows, Mapping | ConfigDict) else [rows]
    if rows is not None and not (each and all(map(_are_tokens, each))):
        raise UserError(
            f"config.lora.trainable_token_indices is {rows!r}: give 'added', a list of ids or tokens, or such lists by "
            "name, {'embed_tokens': [...], 'lm_head': [...]}."
        )
    layers = lora.layers_to_transform
    listed = layers if isinstance(layers, list | tuple) else [layers]
    if layers is not None and not (listed and all(_is_whole(one) and one >= 0 for one in listed)):
        raise UserError(f"config.lora.layers_to_transform is {layers!r}: give layer numbers, from 0.")


def _check_lora_patterns(lora: ConfigDict) -> None:
    """The keys that hold a value a pattern."""
    for key, least in (("rank_pattern", "a whole number of at least 1"), ("alpha_pattern", "a number above 0")):
        patterns = lora[key]
        if patterns is None:
            continue
        if not isinstance(patterns, Mapping):
            raise UserError(f"config.lora.{key} is {patterns!r}: give patterns with their values, {{'q_proj': 8}}.")
        for pattern, value in patterns.items():
            whole = _is_whole(value) and value >= 1
            if not (whole or (key == "alpha_pattern" and isinstance(value, float) and value > 0)):
                raise UserError(f"config.lora.{key} gives {pattern!r} {value!r}: give it {least}.")


def _check_steps(config: ConfigDict, default: ConfigDict) -> None:
    if not config.steps and config.epochs <= 0:
        raise UserError(f"config.epochs is {config.epochs!r} and config.steps is 0: give one of them a value above 0.")
    if config.steps and config.epochs != default.epochs:
        raise UserError(
            f"config.steps is {config.steps} and config.epochs is {config.epochs!r}, which both set the run's length: "
            f"leave config.epochs at {default.epochs} to run by steps, or config.steps at 0 to run by epochs."
        )
    if config.steps and config.optimizer.warmup_steps >= config.steps:
        raise UserError(
            f"config.optimizer.warmup_steps is {config.optimizer.warmup_steps} of config.steps={config.steps}: "
            "leave steps after the warmup."
        )


def _check_data(config: ConfigDict) -> None:
    if not config.model.path:
        raise UserError("config.model.path is empty: give a Hugging Face folder or hub name, --config.model.path=...")
    train = config.data.train
    if not train:
        raise UserError("config.data.train is empty: give a file, a folder or a hub name, --config.data.train=...")
    pairs = isinstance(train, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in train)
    if not isinstance(train, str) and not (pairs and all(_is_text(name) and _is_share(share) for name, share in train)):
        raise UserError(
            f"config.data.train is {train!r}: give a file, a folder or a hub name, or several with their shares, "
            '[("mine.jsonl", 0.8), ("general.jsonl", 0.2)].'
        )
    for name in config.data.eval:
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"config.data.eval has a set named {name!r}: use letters, digits, '_' and '-' alone.")
        if holds_out(config) and name in heldout(config):
            raise UserError(
                f"config.data.eval has a set named {name!r}, which the held-out rows of config.data.eval_beside are "
                "called: give it another name."
            )
    if config.data.loss == "all" and config.objective == "dpo":
        raise UserError("config.data.loss is 'all', but config.objective='dpo' compares answers: set it to 'answers'.")


def _check_eval(config: ConfigDict) -> None:
    names, evals = eval_names(config), config.eval
    if evals.best and evals.best not in names:
        raise UserError(
            f"config.eval.best is {evals.best!r}, which names no eval set: choose one of "
            f"{', '.join(names) or 'config.data.eval, which is empty'}.{nearest(evals.best, names)}"
        )
    if evals.patience and not evals.every:
        raise UserError(
            f"config.eval.patience is {evals.patience}, but config.eval.every is 0, so no eval can end the run: "
            "set config.eval.every, or leave config.eval.patience at 0."
        )
    if evals.every and not names:
        raise UserError(
            f"config.eval.every is {evals.every}, but there is no eval set: "
            "give config.data.eval one, or config.data.eval_fraction a value above 0."
        )
    for prompt in evals.prompts:
        if not _is_text(prompt):
            raise UserError(f"config.eval.prompts holds {prompt!r}: every prompt is a string that is not empty.")
    for name in evals.exact:
        if name not in names and name != "general":  # the name that is asked for where nothing is said
            raise UserError(
                f"config.eval.exact names {name!r}, which is no eval set: choose of {', '.join(names) or 'none'}."
                f"{nearest(name, names)}"
            )


def _check_rungs(config: ConfigDict) -> None:
    rungs = config.rungs or ()
    shares = isinstance(rungs, list | tuple) and all(_is_share(one) and one < 1 for one in rungs)
    if not shares or list(rungs) != sorted(set(rungs)):
        raise UserError(
            f"config.rungs is {config.rungs!r}: give growing shares of the steps, such as (0.125, 0.25, 0.5)."
        )
    if not 0 < config.survive < 1:
        raise UserError(f"config.survive is {config.survive!r}: give it a value between 0 and 1.")


def groups_of_rows(config: ConfigDict, device_count: int) -> int:
    """Of how many groups of devices each has rows of its own, on the config's mesh of so many devices."""
    sizes = _axes(config, device_count)
    return device_count // (sizes["tensor"] * sizes["context"])


def _axes(config: ConfigDict, device_count: int) -> dict[str, int]:
    """The sizes of the mesh's axes, -1 filled in."""
    from specjax.sharding import MESH_AXES, fill_sizes  # here, because it imports jax, which a config file never needs

    sizes = {axis: config.mesh[axis] for axis in MESH_AXES}  # a ConfigDict sorts its keys
    with keys(ARGUMENTS):
        return fill_sizes(sizes, device_count)


def _check_devices(config: ConfigDict, device_count: int) -> None:
    sizes = _axes(config, device_count)
    if config.data.length % sizes["context"]:
        raise UserError(
            f"config.data.length is {config.data.length}, which config.mesh.context={sizes['context']} devices cannot "
            "share evenly: make it a multiple of that."
        )
    rows = groups_of_rows(config, device_count)
    micro = config.batch_size // (config.accumulate or 1)
    if micro % rows:
        raise UserError(
            f"config.batch_size is {config.batch_size}, so each of config.accumulate={config.accumulate} micro-batches "
            f"has {micro} rows for {rows} groups of devices (config.mesh.data x fsdp x expert): "
            f"make the batch size a multiple of {rows * config.accumulate}."
        )


def _are_tokens(value: Any) -> bool:
    """Whether a value is ids and tokens, or a string of them."""
    listed = value if isinstance(value, list | tuple) else [value]
    return bool(listed) and all(_is_text(one) or (_is_whole(one) and one >= 0) for one in listed)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
