"""What an adapter's folder says of its base beside PEFT's files: `base.json`, which PEFT passes over."""

import json
from pathlib import Path
from typing import Any

from specjax.files import read_object
from specjax.lora import mlx
from specjax.lora.peft_config import read_config

BASE = "base.json"  # {"fingerprint": of the base's weights, "vocab_size": its rows where tokens were added to it}


def write(folder: Path, fingerprint: str, vocab_size: int) -> None:
    """Writes what is known of it (`fingerprint` is not "", `vocab_size` not 0)."""
    known = {"fingerprint": fingerprint, "vocab_size": vocab_size}
    if told := {name: value for name, value in known.items() if value}:
        (folder / BASE).write_text(json.dumps(told) + "\n")


def base_of(folder: str | Path) -> tuple[str, str]:
    """What an adapter's folder says of its base: the name, and the fingerprint of its weights; each may be ""."""
    if mlx.is_mlx(Path(folder)):
        return mlx.base_of(Path(folder)), ""
    name = read_config(Path(folder)).get("base_model_name_or_path", "")
    return str(name), str(_told(folder).get("fingerprint") or "")


def rows_of(folder: str | Path) -> int:
    """The rows of the vocabulary that an adapter was trained with, where tokens were added to its base; else 0."""
    rows = _told(folder).get("vocab_size")
    return rows if isinstance(rows, int) else 0


def _told(folder: str | Path) -> dict[str, Any]:
    return read_object(Path(folder) / BASE) if (Path(folder) / BASE).is_file() else {}
