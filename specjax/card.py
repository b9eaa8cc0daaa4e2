"""The model card: what a run was, as the README.md beside its exported weights, with the hub's metadata in front.

Nothing of the machine is in it: of a local path the last part alone. The same run has the same card.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from specjax import __version__
from specjax.config import get_config
from specjax.config.checks import flat
from specjax.files import read_object, read_rows

LICENCE = ("license", "license_name", "license_link")  # of the hub's metadata
METADATA_BYTES = 1 << 16  # of a base's README.md: what is longer is no metadata
HUB = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
VERSIONS = ("jax", "flax", "optax", "transformers")
COLUMNS = {"rows": "rows", "documents": "documents", "tokens": "tokens", "loss tokens": "loss_tokens"}
# Keys that say how a run was watched, computed or named, and not what came of it; data and base have their own lines.
LEFT_OUT = re.compile(
    r"(log|export|compare|seeds|eval\.answers|checkpoint|mesh|model\.path|model\.revision|data\.(train|eval|cache))(\.|$)"
)


def card(workdir: str | Path, base: str | Path, *, step: int, adapter: bool) -> str:
    """The card of a run's weights.

    Args:
      workdir: the run's, with `config.json`, `data.json` and `metrics.jsonl`.
      base: the folder of its base, whose README.md may state a licence.
      step: of the checkpoint that is exported.
      adapter: whether an adapter is written, and no whole model.

    Returns:
      The text of README.md, which begins with metadata in YAML
      (https://github.com/huggingface/hub-docs/blob/main/modelcard.md).
    """
    workdir = Path(workdir)
    config = read_object(workdir / "config.json")
    data = read_object(workdir / "data.json") if (workdir / "data.json").is_file() else {}
    lines = read_rows(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").is_file() else []
    evals = [row for _, row in lines if any(key.startswith("eval/") for key in row)]
    name, method, licence = _short(config["model"]["path"]), _method(config, data), base_licence(Path(base))
    metadata = _metadata(config, method, licence, adapter)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {name}, {method}",
        f"{'A PEFT adapter over' if adapter else 'A model trained from'} `{name}` by {method}, with specjax: "
        f"step {step}, {config['batch_size']} rows of {config['data']['length']} tokens per step.",
        "## Data",
        "\n".join(_data(data)) if data else "Not recorded.",
        "## Losses",
        "\n".join(_losses(evals, step)) or "No set was evaluated.",
        "## How to load",
        _loading(config, adapter),
        "## Licence",
        _licence(name, licence),
        "## Settings",
        "What differs from specjax's defaults:",
        "```yaml\n" + "\n".join(_settings(config)) + "\n```",
        f"Versions: specjax {__version__}, " + ", ".join(f"{part} {version(part)}" for part in VERSIONS),
    ]
    return "\n\n".join(parts) + "\n"


def base_licence(folder: Path) -> dict[str, str]:
    """The licence that the metadata of a folder's README.md states; {} where it states none that can be read."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    with readme.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(METADATA_BYTES)
    if not (front := re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)):
        return {}
    try:
        found = yaml.safe_load(front[1])
    except yaml.YAMLError:  # another's file, from which only this is wanted: the card says that nothing is stated
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: found[key] for key in LICENCE if isinstance(found.get(key), str)}


def _metadata(config: Mapping[str, Any], method: str, licence: Mapping[str, str], adapter: bool) -> dict[str, Any]:
    base, sources = config["model"]["path"], _sources(config)
    made: dict[str, Any] = {}
    if _on_hub(base):
        made |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if hub := [source for source in sources if _on_hub(source)]:
        made["datasets"] = hub
    made |= licence
    made |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    return made | {"tags": ["specjax", "jax", method.lower().replace(" ", "-")]}


def _method(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    lora, objective = config["lora"], config.get("objective", "next_token")
    name = "full fine-tuning" if data.get("train", {}).get("format") == "text" else "SFT"
    if config["trainable"] == "lora":
        name = "DoRA" if lora.get("dora") else "rsLoRA" if lora.get("rslora") else "LoRA"
    if objective == "next_token":
        return name
    return f"{objective.upper()} with {name}" if config["trainable"] == "lora" else objective.upper()


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"| set | source | {' | '.join(COLUMNS)} |"
    yield "|---|---|" + "---|" * len(COLUMNS)
    for name, report in data.items():
        for part in report.get("sources", {"": report}).values():
            counts = (f"{part[key]:,}" if isinstance(part.get(key), int) else "" for key in COLUMNS.values())
            yield f"| {name} | {_short(str(part.get('source', '')))} | {' | '.join(counts)} |"


def _losses(evals: list[dict[str, Any]], step: int) -> Iterator[str]:
    """A row per number of the evaluation at this step, with what it was at the first."""
    here = next((row for row in reversed(evals) if row["step"] == step), None)
    if here is None:
        return
    yield f"| set | measure | step {evals[0]['step']} | step {step} |"
    yield "|---|---|---|---|"
    for key, value in here.items():
        if (part := re.fullmatch(r"eval/([^/]+)/(.+)", key)) and isinstance(value, float):
            before = evals[0].get(key)
            yield f"| {part[1]} | {part[2]} | {before if before is None else format(before, '.4f')} | {value:.4f} |"


def _loading(config: Mapping[str, Any], adapter: bool) -> str:
    base = config["model"]["path"] if _on_hub(config["model"]["path"]) else "BASE"
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if adapter:
        lines = ["from peft import PeftModel", *lines, f'base = AutoModelForCausalLM.from_pretrained("{base}")']
        loading = ['model = PeftModel.from_pretrained(base, "THIS FOLDER")']
    else:
        loading = ['model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")']
    lines += [
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        *_resizing(config["model"], adapter),
        *loading,
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _resizing(model: Mapping[str, Any], adapter: bool) -> Iterator[str]:
    """Gives the base of an adapter the rows that it was trained with, where tokens were added."""
    if adapter and (model.get("add_tokens") or model.get("add_words")):
        multiple = model["pad_to_multiple_of"]
        yield "if len(tokenizer) > base.config.vocab_size:"
        more = f", pad_to_multiple_of={multiple}" if multiple > 1 else ""
        yield f"    base.resize_token_embeddings(len(tokenizer){more})"


def _licence(name: str, licence: Mapping[str, str]) -> str:
    if not licence:
        return f"The licence of `{name}` applies; the files of the base do not state it."
    stated = ", ".join(str(value) for value in licence.values())
    return f"That of the base `{name}`, as its files state it: {stated}. The data may add conditions of their own."


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    defaults = dict(flat(get_config().to_dict()))
    for key, value in flat(config):
        plain = list(defaults[key]) if isinstance(defaults.get(key), tuple) else defaults.get(key)
        if value != plain and not LEFT_OUT.match(key):
            told = _short(value) if key in ("data.template", "lora.init_from") else value
            yield f"{key}: {json.dumps(told, ensure_ascii=False)}"


def _sources(config: Mapping[str, Any]) -> list[str]:
    train = config["data"]["train"]
    return [train] if isinstance(train, str) else [str(source) for source, _ in train]


def _on_hub(name: str) -> bool:
    return bool(HUB.fullmatch(name)) and Path(name).suffix not in FILES and not Path(name).exists()


def _short(path: str) -> str:
    """A hub name, or the last part of a path."""
    return path if _on_hub(path) else Path(path).name
