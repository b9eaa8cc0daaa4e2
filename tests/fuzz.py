"""A fuzz of what reads foreign files: inputs are mutated, and those that reach new lines of the package are kept.

    python tests/fuzz.py [--reader=header] [--executions=20000] [--seed=0]

Each input must be read, or be refused by one sentence; anything else is printed, and is a failure. It prints how many
inputs were tried of each reader, how many were refused, and how many lines of the package they reached.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import malformed
import numpy as np

ROOT = Path(__file__).parent.parent
BASE, TEMPLATES = ROOT / "demo" / "base", ROOT / "specjax" / "data" / "templates"
WORDS = [
    *(b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"9" * 30, b"9" * 5000, b"0.5", b'""', b"[]"),
    *(b"{}", b'"', b"\\", b"\\ud800", b"\xff", b"\0", b"\n", b"[" * 2000, b'{"a":', b"]", b"}", b",", b":", b"../"),
    *(b"{% for a in messages %}", b"{% endfor %}", b"{{", b"}}", b"{%", b"%}", b"|tojson", b"loop.index", b"/etc/a"),
]  # fmt: skip
VALUES: list[Any] = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf")]
VALUES += ["", "x", "../x", "a\0b", "\ud800", "x" * 3000, [], [[]], {}, {"a": 1}, [1], ["x"], [None], {"": None}]


class Found(NamedTuple):
    """What a run of the fuzz did: `lines` of the package were reached; a failure is an input and what came of it."""

    executions: int
    refused: int
    lines: int
    failures: list[tuple[bytes, str]]


class Reader(NamedTuple):
    """What reads an input in a folder, and good inputs to begin with."""

    read: Callable[[Path, bytes], Any]
    seeds: list[bytes]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _header(folder: Path, data: bytes) -> None:
    from specjax.hf.tensors import Tensors

    (folder / "model.safetensors").write_bytes(data)
    Tensors([folder / "model.safetensors"])


def _index(folder: Path, data: bytes) -> None:
    from specjax.hf.folder import INDEX, weight_files
    from specjax.hf.tensors import Tensors

    for number in (1, 2):
        (folder / f"part-{number}.safetensors").write_bytes(malformed.tensors(**{f"a{number}": np.zeros(4, "f4")}))
    (folder / INDEX).write_bytes(data)
    Tensors(weight_files(folder))


def _config(folder: Path, data: bytes) -> None:
    from specjax.hf import config

    (folder / "config.json").write_bytes(data)
    config.origin(folder)
    config.from_folder(folder)


def _adapter(folder: Path, data: bytes) -> None:
    from specjax import lora
    from specjax.hf.config import from_folder
    from specjax.hf.load import abstract

    if not _MODEL:
        sizes = from_folder(BASE)
        _MODEL.append(abstract(sizes, dtype="float32", param_dtype="float32"))
        shapes = {"A": (4, sizes.embed_dim), "B": (sizes.embed_dim, 4)}
        name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        held = {name.format(i, one): np.zeros(shapes[one], "f4") for i in range(sizes.num_layers) for one in "AB"}
        _MODEL.append(malformed.tensors(**held))
    (folder / "adapter_config.json").write_bytes(data)
    (folder / "adapter_model.safetensors").write_bytes(_MODEL[1])
    lora.peft.read(_MODEL[0], folder)


def _tokenizer_of() -> Any:
    from specjax.hf.tokenizer import load_tokenizer

    if not _TOKENIZER:
        _TOKENIZER.append(load_tokenizer(BASE))
    return _TOKENIZER[0]


def _rows(folder: Path, data: bytes) -> None:
    from specjax.data.prepare import load

    (folder / "x.jsonl").write_bytes(data)
    load(folder / "x.jsonl", _tokenizer_of(), length=64, batch_size=1, cache=False)


def _template(folder: Path, data: bytes) -> None:
    from specjax.data.prepare import load

    text = data.decode("utf-8", "replace")
    text = text if "{%" in text or "{{" in text else text + "{{ messages }}"
    load([malformed.CHAT], _tokenizer_of(), template=text, length=64, batch_size=1, cache=False)


_MODEL: list[Any] = []
_TOKENIZER: list[Any] = []
_ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}
_TENSORS = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}
READERS = {
    "header": Reader(_header, [malformed.header(_TENSORS), malformed.tensors(a=np.zeros(4, "f4"))]),
    "index": Reader(_index, [_json({"weight_map": {"a1": "part-1.safetensors", "a2": "part-2.safetensors"}})]),
    "config": Reader(_config, [(BASE / "config.json").read_bytes()]),
    "adapter": Reader(_adapter, [_json(_ADAPTER), _json(_ADAPTER | {"target_modules": r".*\.q_proj"})]),
    "rows": Reader(
        _rows,
        [
            b"\n".join(map(_json, [malformed.GOOD, malformed.GOOD | {"input": "in", "system": "be"}])),
            b"\n".join(map(_json, [malformed.CHAT, malformed.CHAT])),
            _json({"prompt": "a", "chosen": "b", "rejected": "c"}),
            _json({"text": "a cat"}),
        ],
    ),
    "template": Reader(_template, [(TEMPLATES / f"{name}.jinja").read_bytes() for name in ("chatml", "qwen3")]),
}  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A likeness of an input: some bytes of it, or a value of its JSON, changed."""
    if rng.random() < 0.5:
        try:
            value = json.loads(data)
            return _json(_mutated_value(value, rng))
        except (ValueError, RecursionError):
            pass
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 64)))
        match rng.randrange(5):
            case 0:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at] + data[end:]
            case 2:
                data = data[:at] + rng.choice(WORDS) + data[at:]
            case 3:
                data = data[:at] + data[at:end] * rng.choice((2, 3, 50)) + data[end:]
            case 4:
                data = data[:at] + rng.choice(WORDS) + data[end:]
    return data[:100_000]


def _mutated_value(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.3 or not value or not isinstance(value, dict | list):
        return rng.choice(VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], _mutated_value(value[at], rng), *value[at + rng.randrange(2) :]]
    key = rng.choice(sorted(value))
    match rng.randrange(4):
        case 0:
            return {name: one for name, one in value.items() if name != key}
        case 1:
            return value | {rng.choice(("", "x", key + "x", "a\0")): value[key]}
    return value | {key: _mutated_value(value[key], rng)}


class _Lines:
    """The lines of the package that run meanwhile."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def __enter__(self) -> "_Lines":
        self.before = sys.gettrace()
        sys.settrace(self._frame)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.settrace(self.before)

    def _frame(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if "/specjax/" in frame.f_code.co_filename else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def run(name: str, folder: Path, *, executions: int, seed: int) -> Found:
    """Tries so many inputs of a reader, in a folder of its own."""
    from specjax.errors import UserError

    reader, rng = READERS[name], random.Random(f"{name} {seed}")
    kept, reached, refused = list(reader.seeds), set[tuple[str, int]](), 0
    failures: list[tuple[bytes, str]] = []
    for number in range(executions):
        data = kept[number] if number < len(kept) else mutated(rng.choice(kept), rng)
        place = folder / "input"
        place.mkdir()
        with _Lines() as lines, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are passed over
            try:
                reader.read(place, data)
            except UserError as error:
                refused += 1
                said = str(error)
                if "\n" in said or not said.endswith((".", "?")) or len(said) > 3000:
                    failures.append((data, f"it says {said!r}"))
            except Exception:
                failures.append((data, traceback.format_exc()))
        shutil.rmtree(place)
        if lines.seen - reached:
            reached |= lines.seen
            kept.append(data)
    return Found(executions, refused, len(reached), failures)


def main() -> None:
    """Runs it and prints a line a reader."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reader", choices=READERS, help="default: all")
    parser.add_argument("--executions", type=int, default=20_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    failed = False
    for name in [given.reader] if given.reader else READERS:
        with tempfile.TemporaryDirectory() as folder:
            found = run(name, Path(folder), executions=given.executions, seed=given.seed)
        print(
            f"{name}: {found.executions:,} inputs, {found.refused:,} refused, {found.lines} lines reached", flush=True
        )
        for data, what in found.failures[:5]:
            print(f"{data[:300]!r}\n{what}", flush=True)
        failed |= bool(found.failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
