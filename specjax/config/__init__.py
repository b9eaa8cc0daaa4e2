"""The default configuration: what its keys mean, what contradicts what, and in what two of them differ.

Every file in `configs/` starts from `get_config()`, and the command line overrides any key. A config is locked and
typed: an unknown key or a wrong type is refused where it is written, and `validate` refuses what contradicts itself
before anything is loaded.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict as ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from specjax.config.checks import ADDED, FREE, NESTED, TYPES, check, eval_names, flat, groups_of_rows, nearest_key
from specjax.errors import UserError

MICRO_TOKENS = 256  # from so many on, a CPU's matrix products are no faster (docs/measurements.md, Beside TRL and PEFT)
# Keys that say how a batch is computed, and not what: a run may go on with another value (`resume.claim`).
HOW = re.compile(r"(accumulate|mesh\..*|model\.remat|optimizer\.offload)$")


def get_config() -> ConfigDict:
    """The defaults. 0, "" and -1 mean what the comment beside them says; a key of None is not set.

    The comments above and beside a key are what `specjax help config` and the reference say of it (`keys.py`).
    """
    config = ConfigDict()
    config.seed = 0  # seeds the order of rows, LoRA's first factors, dropout and random weights
    config.trainable = "all"  # what trains: all: every weight | lora: the LoRA factors only
    config.steps = 0  # optimizer steps; 0: as many as `epochs` make
    config.epochs = 1.0  # passes over the rows: round(epochs * rows / batch_size) steps, at least 1
    config.batch_size = 8  # rows per optimizer step, over all devices and micro-batches
    # Micro-batches per optimizer step. 0 chooses: on a CPU as many as leave at least 256 tokens in each, because fewer
    # tokens are slower and more take more memory; elsewhere 1.
    config.accumulate = 1

    # What is minimised: next_token: the loss of each next token | dpo: the chosen of two answers becomes more likely
    # (needs preference pairs).
    config.objective = "next_token"
    config.dpo = ConfigDict()  # only with objective="dpo"
    config.dpo.beta = 0.1  # a larger beta keeps the model closer to the reference
    config.dpo.loss = "sigmoid"  # sigmoid | sigmoid_norm | hinge | ipo | robust, named as in TRL
    config.dpo.label_smoothing = 0.0  # with loss="robust": the share of pairs that are labelled the wrong way round

    config.model = ConfigDict()
    config.model.path = ""  # a Hugging Face folder or a hub name
    config.model.revision = ""  # of a hub name: a branch, tag or commit; "": the default branch
    # Dtype of the computation: bfloat16 | float32 | auto: float32 on a CPU, where bfloat16 is slower, and bfloat16
    # elsewhere. A frozen base is stored in it too, so on a CPU bfloat16 saves half of the base's memory.
    config.model.dtype = "auto"
    # Where weights come from: checkpoint | random: only the folder's config.json is read, training starts from nothing.
    config.model.init = "checkpoint"
    # Tokens that the tokenizer gets, with rows of the model for them, each the mean of the rows that are there: special
    # ones, left out of what an answer says, such as <|im_start|>. The flag may be repeated.
    config.model.add_tokens = ()
    config.model.add_words = ()  # likewise, words that are no special tokens: of a domain, or <think>
    # Where rows are added, all are a multiple of this, as in transformers: of the mesh's axis `tensor`, and better of
    # all its devices.
    config.model.pad_to_multiple_of = 1
    # What the backward pass recomputes to save memory: none | dots: all but the linear maps' outputs | attention: all
    # but the attention's outputs | full: each layer | offload: as attention, whose outputs wait in the host's memory.
    config.model.remat = "none"
    config.model.quantise = ""  # nf4 | int8: how the frozen base is stored, with trainable="lora"; "": as floats
    # Weight of a mixture of experts' balancing loss; not set: the value in config.json.
    config.model.router_aux_coef = placeholder(float)

    config.lora = ConfigDict()  # only with trainable="lora"
    # A PEFT adapter's folder to start from. Its rank, targets and other settings are taken over.
    config.lora.init_from = placeholder(str)
    config.lora.rank = placeholder(int)  # rank of the factors; must be set, unless `init_from` is
    config.lora.alpha = placeholder(float)  # the update is scaled by alpha/rank; not set: 2 * rank
    config.lora.dropout = placeholder(float)  # probability; not set: 0
    # Which linear maps, or embed_tokens, get factors: names, "a,b" or a pattern, as in PEFT; not set: "all-linear".
    config.lora.targets = placeholder(object)
    config.lora.rslora = placeholder(bool)  # scale by alpha/sqrt(rank) instead of alpha/rank
    config.lora.dora = placeholder(bool)  # DoRA: train the magnitude of each output too
    config.lora.init = placeholder(str)  # pissa: from the weights' largest singular parts; not set: A random, B zero
    config.lora.rank_pattern = placeholder(object)  # pattern of a module's name -> its rank: {"layers.0.*": 4}
    config.lora.alpha_pattern = placeholder(object)  # pattern of a module's name -> its alpha
    config.lora.layers_to_transform = placeholder(object)  # layer numbers, with a list of targets; not set: all
    config.lora.exclude_modules = placeholder(object)  # names, "a,b" or a pattern of maps to leave out
    config.lora.modules_to_save = placeholder(object)  # names of modules that train whole: embed_tokens, lm_head, norm
    # Ids or tokens whose rows of the embedding train, and of a tied output layer with it, as in PEFT; or of each by
    # name: {"embed_tokens": [...], "lm_head": [...]}; or "added": the added tokens, at both ends.
    config.lora.trainable_token_indices = placeholder(object)
    config.lora.bias = placeholder(str)  # which biases train: none | all | lora_only; not set: none
    config.lora.ensure_weight_tying = placeholder(bool)  # modules_to_save trains tied embeddings as one table

    config.data = ConfigDict()
    # A file, a folder or a hub name; or several, each with its share: [("mine.jsonl", 0.8), ("general.jsonl", 0.2)].
    # With several, an epoch is a pass over the first.
    config.data.train = FieldReference("", field_type=object)
    config.data.shares = "tokens"  # what the shares of several sources are shares of: tokens | rows
    config.data.split = "train"  # the split to read, of a hub name or of a folder of splits
    # Eval set's name -> file: --config.data.eval.domain=domain.jsonl. Empty: `eval_fraction` of the train rows, named
    # "heldout", or of each source, named "heldout-mine" and so on.
    config.data.eval = ConfigDict()
    config.data.eval_fraction = 0.02  # share of the train rows that is held out; 0: none
    config.data.eval_beside = False  # hold rows out where `eval` names sets too: they are measured beside those
    config.data.eval_seed = -1  # seeds which rows are held out; -1: `seed`
    # Which tokens of pairs and chats train: answers: the assistant's | all: the prompts' too, as of raw text. The sets
    # that are measured count answers either way.
    config.data.loss = "answers"
    # Format of the rows: auto: by their columns | text | instruct | prompt | messages | conversations | preference
    config.data.format = "auto"
    # Role -> column, for columns with other names: --config.data.columns.instruction=question.
    config.data.columns = ConfigDict()
    config.data.template = ""  # chat template: a built-in such as chatml, or a .jinja file; "": the tokenizer's own
    # For a chat whose template rewrites earlier turns (drops their reasoning): exact: one row per answer: the prompt
    # that inference gives, and the answer | whole: one row, with earlier answers as they are rendered there.
    config.data.turns = "exact"
    config.data.length = 1024  # tokens per row
    config.data.packing = True  # put several documents into a row, each of which sees only itself
    # Pairs and chats longer than `length`: drop | truncate: keep the start | keep_end: keep the answer's end | split:
    # make several documents. Raw text is always cut into pieces, and nothing of it is lost.
    config.data.overlong = "drop"
    # Folder in which tokens are kept, so that a second start makes none; "": ~/.cache/specjax/data; off: nowhere.
    config.data.cache = ""

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | lion
    config.optimizer.learning_rate = 1e-4  # the peak of the schedule
    config.optimizer.schedule = "cosine"  # after the warmup: cosine | linear | constant
    config.optimizer.warmup_steps = 0  # steps in which the rate grows to its peak
    config.optimizer.final_fraction = 0.1  # the rate at the last step, as a fraction of the peak
    config.optimizer.weight_decay = 0.0  # decoupled, times the learning rate; norms and biases do not decay
    config.optimizer.loraplus_ratio = 1.0  # LoRA+: the rate of B as a multiple of that of A, such as 16; 1: off
    config.optimizer.b1 = 0.9  # decay of the first moment
    config.optimizer.b2 = 0.999  # decay of the second moment
    config.optimizer.eps = 1e-8  # AdamW's epsilon
    config.optimizer.clip_norm = 1.0  # limit of the norm of all gradients together; 0: off
    # How moments are stored between steps: float32 | bfloat16 | 8bit, the last two rounded at random.
    config.optimizer.moments = "float32"
    config.optimizer.offload = False  # keep the optimizer's state in the host's memory between steps (TPU and GPU)

    config.eval = ConfigDict()
    config.eval.every = 0  # steps between evaluations; 0: at the start and at the end only
    config.eval.batches = 0  # batches of each set that are evaluated; 0: all
    config.eval.patience = 0  # evaluations without a better loss after which the run stops; 0: it never stops early
    config.eval.best = ""  # the set whose loss decides which checkpoint is best; "": the first by name
    config.eval.prompts = ()  # prompts that are answered at each evaluation; the flag may be repeated
    # Sets of chats or pairs whose questions (at most 100) are answered too. `exact` is the share of answers that equal
    # the known ones but for case and punctuation. Raw text has no questions.
    config.eval.exact = ("general",)
    config.eval.max_new_tokens = 64  # limit of an answer's tokens
    # For `specjax compare`: held-out questions that the base and each result answer, to be shown and scored; 0: none.
    config.eval.answers = 32

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 0  # steps between checkpoints; 0: at each evaluation and at the end
    # How many of the last checkpoints are kept, beside the best. With 2, one is left if a disk damages the newest.
    config.checkpoint.keep = 1

    config.log = ConfigDict()
    config.log.every = 10  # steps between logged steps
    config.log.tensorboard = True  # write <workdir>/tensorboard
    config.log.wandb = ""  # name of a Weights & Biases project; "": none

    config.mesh = ConfigDict()  # devices on each axis; -1: all that are left
    config.mesh.data = 1  # copies of the model
    config.mesh.fsdp = -1  # over which parameters, optimizer state and rows are split
    config.mesh.expert = 1  # over which the experts of a mixture of experts, and rows, are split
    config.mesh.context = 1  # over which the length of each row is split
    config.mesh.tensor = 1  # over which heads, MLP and vocabulary are split

    config.export = True  # write <workdir>/export at the end
    # For `specjax compare`: method -> overrides of this same config, as in configs/compare.py; `sweep`, `rungs` and
    # `survive` among them find its best values, LoRA's in a fleet, others' one after another.
    config.compare = ConfigDict(sort_keys=False)
    config.seeds = 1  # for `specjax compare`: with how many seeds the best values of each method are trained
    # Adapters that train in one run over one base, each as if alone: name -> overrides of what is its own (data, eval,
    # lora, seed, steps, epochs, and of the optimizer rate, schedule, weight decay and clip), as in configs/fleet.py.
    config.fleet = ConfigDict(sort_keys=False)
    # Makes a fleet of one config: lists of values in place of what `fleet` overrides, as in configs/sweep.py; each
    # combination is an adapter.
    config.sweep = ConfigDict(sort_keys=False)
    # Shares of the steps at which the worse adapters of a fleet stop, by the loss on `eval.best`: (0.125, 0.25, 0.5).
    config.rungs = placeholder(object)
    config.survive = 0.5  # the share of the adapters at a rung that goes on
    config.slots = 0  # adapters of a fleet that train at once, the others wait for a slot; 0: all
    config.lock()
    for key in (*FREE, *NESTED):
        config[key].unlock()
    return config


def validate(config: ConfigDict, device_count: int | None = None) -> None:
    """Raises `UserError` at the first key whose value is impossible or contradicts another's.

    Args:
      config: as `get_config` makes it.
      device_count: devices of the mesh over all processes; None leaves the mesh unchecked (`specjax data`).
    """
    check(config, get_config(), device_count)


def copied(config: ConfigDict, *parts: str) -> ConfigDict:
    """A copy of which these parts may be changed; the others are the config's own.

    `copy.deepcopy` refuses keys with dots, which `lora.rank_pattern` may have.
    """
    made = ConfigDict(config)
    with made.unlocked():
        for name in parts:
            del made[name]
            made[name] = ConfigDict(config[name])
    return made


def settled(config: ConfigDict, platform: str, device_count: int = 1) -> ConfigDict:
    """A copy in which what is chosen automatically is named: `model.dtype` and `accumulate`.

    Args:
      config: a valid one.
      platform: of the devices: cpu, gpu or tpu.
      device_count: of the mesh.
    """
    made = copied(config, "model")
    if made.model.dtype == "auto":
        made.model.dtype = "float32" if platform == "cpu" else "bfloat16"
    if not made.accumulate:
        groups = groups_of_rows(config, device_count)
        whole = [n for n in range(groups, config.batch_size + 1, groups) if config.batch_size % n == 0]
        enough = [n for n in whole if n // groups * config.data.length >= MICRO_TOKENS]
        rows = min(enough, default=config.batch_size) if platform == "cpu" else config.batch_size
        made.accumulate = config.batch_size // rows
    return made


def check_length(length: int, max_positions: int) -> None:
    """Raises `UserError` where rows of `length` tokens are longer than the model has positions for."""
    if length > max_positions:
        raise UserError(
            f"config.data.length is {length}, but the model has {max_positions} positions: "
            f"set config.data.length to at most {max_positions}."
        )


def lora_settings(config: ConfigDict) -> dict[str, Any]:
    """The keyword arguments of `specjax.lora.inject`, what is not set made explicit ("q_proj,v_proj" is a list).

    With `lora.init_from`, what is set, and `init_from`.
    """
    lora = config.lora
    if lora.init_from:
        plain: dict[str, Callable[[Any], Any]] = {"rank_pattern": dict, "alpha_pattern": dict}
        plain |= {"targets": _names, "exclude_modules": _names, "modules_to_save": _list}
        plain["trainable_token_indices"] = _tokens
        return {key: plain.get(key, _plain)(lora[key]) for key in lora if lora[key] is not None}
    targets = "all-linear" if lora.targets is None else _names(lora.targets)
    layers = lora.layers_to_transform
    return {
        "rank": lora.rank,
        "alpha": 2.0 * lora.rank if lora.alpha is None else lora.alpha,
        "dropout": lora.dropout or 0.0,
        "targets": targets,
        "rslora": bool(lora.rslora),
        "dora": bool(lora.dora),
        "rank_pattern": dict(lora.rank_pattern or {}),
        "alpha_pattern": dict(lora.alpha_pattern or {}),
        "layers_to_transform": list(layers) if isinstance(layers, list | tuple) else layers,
        "exclude_modules": _names(lora.exclude_modules),
        "modules_to_save": _list(lora.modules_to_save),
        "bias": lora.bias or "none",
        "ensure_weight_tying": bool(lora.ensure_weight_tying),
        # Not there in runs of before.
        **({"init": lora.init} if lora.init else {}),
        **({"trainable_token_indices": _tokens(named)} if (named := lora.trainable_token_indices) else {}),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _list(names: Any) -> list[str]:
    """A list of names of a list, a single name, "a,b" or None."""
    return names.split(",") if isinstance(names, str) else list(names or [])


def _tokens(named: Any) -> Any:
    """Ids and tokens as lists, of a list, a dict of lists or "5,6"; "added" as it is."""
    if isinstance(named, Mapping | ConfigDict):
        return {name: _tokens(of) for name, of in named.items()}
    if isinstance(named, str):
        return named if named == ADDED else [int(one) if one.isdecimal() else one for one in named.split(",")]
    return [named] if isinstance(named, int) else list(named)


def _names(names: Any) -> Any:
    """Names as a list where a string holds several; a pattern, or None, as it is."""
    if isinstance(names, str):
        return names.split(",") if re.fullmatch(r"\w+(,\w+)+", names) else names
    return None if names is None else list(names)


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The valid `config` as plain JSON values, with the defaults that depend on other keys filled in."""
    values = plain(config)
    if config.trainable == "lora":
        values["lora"] = lora_settings(config)
    values["eval"]["best"] = config.eval.best or next(iter(eval_names(config)), "")
    return values


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two `resolved` configs differ, of those that can change the run's result.

    >>> differing({"seed": 0, "log": {"every": 1}}, {"seed": 1, "log": {"every": 9}})
    ['seed']
    """
    was, now = dict(flat(old)), dict(flat(new))
    # A key that a run's specjax did not know yet stood, unsaid, at what is now its default.
    default, absent = dict(flat(json.loads(json.dumps(get_config().to_dict())))), object()
    of = lambda values, key: values.get(key, default.get(key, absent))  # noqa: E731
    keys = (key for key in {**was, **now} if of(was, key) != of(now, key))
    return [
        key
        for key in keys
        if not re.match(r"(log|export|compare|seeds|checkpoint|data\.cache|eval\.answers)(\.|$)", key)
    ]


def merge(config: ConfigDict, overrides: Mapping[str, Any], where: str = "config") -> ConfigDict:
    """A new config: `config` with the nested `overrides` (a mapping, or a `resolved` config read back).

    Raises:
      UserError: for a key that does not exist or a value of the wrong type, named as `<where>.<key>`.
    """
    merged = get_config()
    _update(merged, config.to_dict(), "config")
    _update(merged, overrides, where)
    return merged


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values, as it was given."""
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return values


def _update(config: ConfigDict, values: Mapping[str, Any], where: str, group: str = "") -> None:
    """Writes nested `values` into `config`, whose own place is the dotted `group`."""
    for key, value in values.items():
        inner = f"{group}.{key}".lstrip(".")
        if key not in config and group not in FREE:
            raise UserError(f"{where}.{inner} is not a key.{nearest_key(inner, get_config())}")
        if isinstance(config.get(key), ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise UserError(f"{where}.{inner} is {value!r}: it is a group of keys, so give a dict.")
            if inner in NESTED:
                config[inner].update(value)
            else:
                _update(config[key], value, where, inner)
            continue
        try:
            config[key] = value
        except TypeError:
            kind = TYPES.get(config.get_type(key), "another type")
            raise UserError(f"{where}.{inner} is {value!r}: it takes {kind}.") from None
