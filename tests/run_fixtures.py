"""A tiny Hugging Face folder, data that it can learn, and the command line called on them in this process."""

import json
from pathlib import Path

import transformers
from helpers import torch_model

from demo.tokenizer import train_tokenizer
from specjax import cli

ROOT = Path(__file__).parent.parent
VOCABULARY = 300
NAMES = ("ada", "bo", "cy", "dee", "ed", "fay", "gus", "hal", "ivy", "jo", "kit", "lou")
THINGS = ("cats", "dogs", "eels", "figs", "gnus", "hens", "inks", "jars")
PAIRS = [
    {"instruction": f"What has {name} got, and how many {thing}?", "response": f"{name} has {len(thing) + i} {thing}."}
    for name in NAMES
    for i, thing in enumerate(THINGS)
]
TEXTS = [{"text": f"{row['instruction']} {row['response']}"} for row in PAIRS]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_base(folder: Path, *, seed: int = 0, **changes) -> Path:
    """A random Llama that transformers wrote, with a tokenizer whose chat template is ChatML's."""
    train_tokenizer([row["text"] for row in TEXTS], folder, vocabulary=VOCABULARY, length=128)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    transformers.utils.logging.disable_progress_bar()
    ids = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    made = torch_model(seed=seed, **{"vocab_size": VOCABULARY, **sizes, **ids, **changes})
    made.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model card\n")
    return folder


def as_of_transformers_4(folder: Path) -> None:
    """Rewrites a tokenizer's files in the dialect of transformers 4, which does not know the class that 5 names."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    told = json.loads(path.read_text())
    special = {key: value for key, value in told.items() if key.endswith("_token")}
    added = {str(one.pop("id")): one for one in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    for key in ("backend", "is_local", "local_files_only"):
        told.pop(key, None)
    told |= {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    told["chat_template"] = template.read_text() if template.is_file() else "{{ messages }}"
    template.unlink(missing_ok=True)
    path.write_text(json.dumps(told))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def write_data(folder: Path) -> Path:
    """pairs, pairs_eval, text and text_eval `.jsonl`; what is asked in the eval sets is not in the others."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("pairs", PAIRS), ("text", TEXTS)):
        write_rows(folder / f"{name}.jsonl", rows[:-16])
        write_rows(folder / f"{name}_eval.jsonl", rows[-16:])
    return folder


def flags(base: Path, workdir: Path, kind: str = "lora", train: Path | None = None, **overrides) -> list[str]:
    """The arguments of a short training job on 8 devices: `full`, `sft` or `lora`, by the files in configs/."""
    rows = base.parent / "data" / ("text.jsonl" if kind == "full" else "pairs.jsonl")
    keys = {
        "model.path": base,
        "model.dtype": "float32",
        "data.train": train or rows,
        "data.length": 64,
        "batch_size": 8,
        "steps": 6,
        "optimizer.warmup_steps": 2,
        "optimizer.learning_rate": 2e-2 if kind == "lora" else 1e-2,
        "log.every": 2,
        "log.tensorboard": False,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    given = [f"--config.{key}={value}" for key, value in keys.items() if value is not None]
    return [f"--config={ROOT}/configs/{kind}.py", f"--workdir={workdir}", *given]


def specjax(verb: str, *argv: object) -> int:
    """The exit status of one command."""
    try:
        return cli.main([verb, *map(str, argv)])
    except SystemExit as stop:  # after SIGTERM, and where a process that `compare` started has said what is wrong
        assert isinstance(stop.code, int)
        return stop.code


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's content by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
