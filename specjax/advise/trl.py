"""The advice as a script on transformers, TRL and PEFT, without JAX, which trains what specjax would train.

Its own code makes specjax's rows, masks, packing and order. Before the script is written, the rows that it would make
are compared with specjax's, so that no template or column is silently read in another way.
"""

import csv
import datetime
import pprint
import textwrap
from collections.abc import Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from ml_collections import ConfigDict

from specjax.advise.facts import Facts
from specjax.data import Corpus
from specjax.data.formats import recognise
from specjax.data.read import opened
from specjax.errors import UserError
from specjax.models import ModelConfig
from specjax.plan.targets import Target

ROWS = 1000  # of the beginning, that are compared
OWN = (".jsonl", ".json", ".csv")  # which the script reads by code of its own
KINDS = (*OWN, ".parquet")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_NEEDS = '"torch>=2.6" "transformers>=5.20" "trl>=1.10" "peft>=0.18" datasets numpy'
_INSTEAD = "use --write=specjax"


def check(config: ConfigDict, found: Facts, sizes: ModelConfig, target: Target) -> None:
    """Raises `UserError` if TRL cannot do what is advised, before anything else happens."""
    why = ""
    if found.preference:
        why = "the data are preference pairs, several of which share a row here, which TRL's DPOTrainer can't do"
    elif config.model.quantise:
        why = f"the advice is a base in {config.model.quantise}, over which TRL's factors are bfloat16, not float32"
    elif sizes.num_experts:
        why = "the model has experts, whose balancing loss and factors are others in transformers and PEFT"
    elif sizes.multimodal:
        why = "the model has more than its language model, and PEFT would adapt all of it"
    elif target.chip is not None and target.family != "h100":
        why = f"--hardware={target.name} is a TPU, and TRL's trainer is for GPUs and CPUs"
    elif config.data.overlong != "drop":
        why = f"config.data.overlong is {config.data.overlong!r}, and the script can drop alone"
    elif not all(_is_readable(source) for source in (config.data.train, *config.data.eval.values())):
        why = f"it reads one file of {' '.join(KINDS)} or a hub name for each set"
    if why:
        raise UserError(f"--write=trl can't be: {why}: {_INSTEAD}.")


def _is_readable(source: str) -> bool:
    path = Path(source)
    return path.suffix in KINDS if path.exists() else "://" not in source


def text(config: ConfigDict, corpus: Corpus, why: Mapping[str, str]) -> str:
    """The script.

    Args:
      config: the advice.
      corpus: its training rows.
      why: key -> the rules behind its value.

    Raises:
      UserError: a row that would have other tokens there.
    """
    made = _head(config) + _constants(config, corpus, why) + "\n\n"
    made += files("specjax.advise").joinpath("trl_script.txt").read_text(encoding="utf-8")
    _compare(made, config, corpus)
    for name, source in config.data.eval.items():
        found = list(dict.fromkeys(column for _, row in islice(opened(source).rows(), ROWS) for column in row))
        if recognise(found, columns=config.data.columns, own_columns=True) != (corpus.format, corpus.columns):
            raise UserError(
                f"--write=trl can't be: config.data.eval.{name} has other columns than {config.data.train}, and the "
                f"script knows one kind of row: {_INSTEAD}."
            )
    return made


def _head(config: ConfigDict) -> str:
    what = f"LoRA r{config.lora.rank}" if config.trainable == "lora" else "All weights"
    said = (
        f'"""{what} of {config.model.path} on {config.data.train}, by transformers, TRL and PEFT.\n\n'
        f"Written by `specjax advise --write=trl` on {datetime.date.today()}. It needs:\n\n"
        f"    pip install {_NEEDS}\n\n"
        "and runs as it is, on a CPU or a GPU; on several GPUs by `accelerate launch --num_processes=N FILE`.\n\n"
    )
    same = (
        "It trains as `specjax train` does with what `--write=specjax` writes: the same rows in the same order, the "
        "same tokens, masks, packing, rate, schedule, clip and precision. LoRA's first factors are another draw of the "
        "same kind: START_FROM takes a PEFT adapter in their place. It saves the last step, where specjax exports the "
        f"best evaluation. The first {ROWS:,} rows were compared token for token."
    )
    return (
        said
        + textwrap.fill(same, 118)
        + '\n"""\n\n'
        + (
            "import bisect\nimport csv\nimport hashlib\nimport json\nimport os\nfrom pathlib import Path\n\n"
            "import numpy as np\n\n"
        )
    )


def _constants(config: ConfigDict, corpus: Corpus, why: Mapping[str, str]) -> str:
    adapter, o, d = config.trainable == "lora", config.optimizer, config.data
    # Name -> (value, the key whose rule is told above it).
    values: dict[str, tuple[Any, str]] = {
        "MODEL": (config.model.path, ""),
        "REVISION": (config.model.revision or None, ""),
        "DATA": (d.train, ""),
        "SPLIT": (d.split, ""),
        "KIND": (corpus.format, ""),
        "COLUMNS": (dict(corpus.columns), ""),
        "ROLES": (ROLES, ""),
        "TEMPLATE": (corpus.template if d.template else None, ""),
        "EVAL": (d.eval.to_dict(), ""),
        "HELD_OUT": (d.eval_fraction, "data.eval_fraction"),
        "LENGTH": (d.length, "data.length"),
        "PACKING": (d.packing, ""),
        "BATCH_SIZE": (config.batch_size, "batch_size"),
        "EPOCHS": (config.epochs, "epochs"),
        "STEPS": (config.steps, ""),
        "RANK": (config.lora.rank if adapter else 0, "lora.rank"),
        "ALPHA": (config.lora.alpha if adapter else 0.0, "lora.alpha"),
        "TARGETS": (config.lora.targets if adapter else "", "lora.targets"),
        "START_FROM": ("", ""),
        "LEARNING_RATE": (o.learning_rate, "optimizer.learning_rate"),
        "FINAL_FRACTION": (o.final_fraction, ""),
        "WEIGHT_DECAY": (o.weight_decay, ""),
        "B1": (o.b1, ""),
        "B2": (o.b2, ""),
        "EPS": (o.eps, ""),
        "CLIP": (o.clip_norm, ""),
        "SEED": (config.seed, ""),
        "CHECKPOINTING": (config.model.remat != "none", "model.remat"),
        "EVAL_EVERY": (config.eval.every, ""),
        "LOG_EVERY": (config.log.every, ""),
        "OUT": ("runs/advised_trl", ""),
    }
    beside = {
        "STEPS": "0: as many as EPOCHS make",
        "RANK": "0: every weight trains",
        "START_FROM": "a PEFT adapter's folder",
        "TEMPLATE": "None: the tokenizer's own",
        "EVAL": "name of a set -> its file; with none, HELD_OUT of the rows",
        "FINAL_FRACTION": "of the rate, at the last step",
    }
    lines = []
    for name, (value, key) in values.items():
        lines += [f"# {line}" for line in textwrap.wrap(why.get(key, ""), 116, break_on_hyphens=False)]
        note = f"  # {beside[name]}" if name in beside else ""
        lines.append(f"{name} = {pprint.pformat(value, width=100, sort_dicts=False)}{note}")
    return "\n".join(lines) + "\n"


def _compare_reading(read: Any, source: str) -> None:
    """Raises `UserError` if the script's own code reads other rows from a file."""
    if not (Path(source).exists() and Path(source).suffix in OWN):
        return
    limit = csv.field_size_limit()
    try:
        theirs = read(source)
    except (ValueError, StopIteration, csv.Error) as error:
        raise UserError(
            f"--write=trl can't be: {source} by the plain code of the script: {error}: {_INSTEAD}."
        ) from error
    finally:
        csv.field_size_limit(limit)  # the script sets its process's, which is ours here
    ours = [dict(row) for _, row in opened(source).rows()]
    if theirs != ours:
        other = next(
            (n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(map(len, (theirs, ours)))
        )
        raise UserError(
            f"--write=trl can't be: {source} is other rows by the plain code of the script, from row {other + 1} on: "
            f"{_INSTEAD}."
        )


def _compare(script: str, config: ConfigDict, corpus: Corpus) -> None:
    """Raises `UserError` at the first row that has other tokens or targets in the script."""
    namespace: dict[str, Any] = {"__name__": "advised_trl"}
    exec(compile(script, "advised_trl.py", "exec"), namespace)
    for source in (config.data.train, *config.data.eval.values()):
        _compare_reading(namespace["read"], source)
    bounds = np.searchsorted(corpus.rows, np.arange(ROWS + 1)).tolist()
    for number, (where, row) in enumerate(islice(opened(config.data.train, config.data.split).rows(), ROWS)):
        try:
            theirs = namespace["document"](dict(row), corpus.tokenizer)
        except (ValueError, LookupError, TypeError, AttributeError, jinja2.TemplateError) as error:
            # A template's, or a row's of another shape than the script knows.
            reason = f"{error}" if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise UserError(f"--write=trl can't be: {where}: {reason}: {_INSTEAD}.") from error
        ours = [
            (corpus.tokens[slice(*corpus.offsets[d : d + 2])], corpus.trained[slice(*corpus.offsets[d : d + 2])])
            for d in range(*bounds[number : number + 2])
        ]
        same = len(ours) == (theirs is not None)
        if same and theirs is not None:
            same = all(np.array_equal(a, b) for a, b in zip(ours[0], theirs, strict=True))
        if not same:
            raise UserError(
                f"--write=trl can't be: {where} is other tokens, or trains others, by the plain code of the script "
                f"than by specjax, which knows this row's columns or template better: {_INSTEAD}."
            )
