"""Malformed inputs, by a table of small mutations of good ones: `python tests/malformed.py` lists them.

Each is a way to read something (`READERS`), and the files or arguments that are spoilt. What reads it must answer with
one sentence that names what is wrong: a `UserError`.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """A reader's name, what is spoilt in words, what is spoilt, and what the sentence must have in it."""

    reader: str
    name: str
    spoilt: Any
    said: str


DEEP = "[" * 10_000 + "]" * 10_000
LONG = "9" * 5000
# Files of JSON that are none, or hold no object.
NO_OBJECT = {
    "empty": b"",
    "cut short": b'{"a": [1, 2',
    "a list": b"[]",
    "a string": b'"x"',
    "a number": b"3",
    "null": b"null",
    "NULs": b"\0" * 512,
    "binary": bytes(range(128, 256)),
    "half of a character in UTF-8": b'{"a": "\xc3"}',
    "nested deeply": DEEP.encode(),
    "an object nested deeply": ('{"a":' * 5000 + "1" + "}" * 5000).encode(),
    "a number of 5,000 digits": f'{{"a": {LONG}}}'.encode(),
    "two values": b"{} {}",
    "a comment": b'{"a": 1} // so',
}
NAN, INF = float("nan"), float("inf")
NO_SIZE = [0, -1, 2**31, 10**30, 1.5, "32", True, [32], {"a": 1}, NAN]
NO_NUMBER = ["x", True, [], {}, NAN, INF, 10**400]
NO_FLAG = ["true", 2, [], {}]
NO_TEXT = [3, [], {}, True]
NO_OBJECT_VALUE = [3, "x", [1]]

# config.json: key -> values that make no sense.
CONFIG: dict[str, list[Any]] = {
    "architectures": [3, "LlamaForCausalLM", [3], {}, ["x" * 10_000]],
    "vocab_size": NO_SIZE,
    "hidden_size": NO_SIZE,
    "intermediate_size": NO_SIZE,
    "num_hidden_layers": [*NO_SIZE, 10**9],
    "num_attention_heads": [*NO_SIZE, 1000],
    "num_key_value_heads": [0, -1, 1.5, "2", [], 3],
    "head_dim": [0, -2, 3, "16", [16]],
    "max_position_embeddings": [0, -1, "128", [], NAN],
    "rms_norm_eps": [0, -1e-5, *NO_NUMBER],
    "rope_theta": [0, -1, *NO_NUMBER],
    "attention_bias": NO_FLAG,
    "mlp_bias": NO_FLAG,
    "tie_word_embeddings": NO_FLAG,
    "hidden_act": [*NO_TEXT, "quick"],
    "rope_scaling": [
        *NO_OBJECT_VALUE,
        {"rope_type": 3},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": NAN},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "longrope", "short_factor": 3, "long_factor": 3},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [NAN]},
        {"rope_type": "warp"},
    ],
    "eos_token_id": ["x", -1, 1.5, [NAN], {"a": 1}, True],
    "bos_token_id": ["x", -2, [1]],
    "dtype": [3, [], "float8"],
    "layer_types": [3, "full_attention", [3]],
}
# Of a Qwen 3 and of a mixture: keys that a Llama has not.
QWEN: dict[str, list[Any]] = {
    "layer_types": [["full_attention"], ["x", "x"], {}],
    "sliding_window": [0, -1, "4", []],
}
MIXTRAL: dict[str, list[Any]] = {
    "num_local_experts": [0, -1, 10**9, "2"],
    "num_experts_per_tok": [0, -1, 9, "2", []],
    "router_aux_loss_coef": NO_NUMBER[:5],
}
GENERATION: dict[str, list[Any]] = {
    "eos_token_id": ["x", -1, 1.5, [[1]], {}],
    "do_sample": NO_FLAG,
    "stop_strings": [3, [3], {}],
    "max_new_tokens": [0, -1, "9", [], NAN, 10**12],
    "temperature": [-1, *NO_NUMBER],
    "top_k": [-1, 2**31, 1.5, "9", []],
    "top_p": [-1, 2, *NO_NUMBER],
    "repetition_penalty": [0, -1, *NO_NUMBER],
}
ADAPTER: dict[str, list[Any]] = {
    "peft_type": [None, 3, [], "IA3"],
    "r": [*NO_SIZE, 10**9],
    "lora_alpha": [0, *NO_NUMBER],
    "lora_dropout": [-1, 1, *NO_NUMBER],
    "use_rslora": NO_FLAG,
    "use_dora": NO_FLAG,
    "bias": [3, "some", []],
    "target_modules": [3, [3], {}, [], "(", "*", ["q_porj"], "a" * 100_000, "(a{60000}){60000}"],
    "exclude_modules": [3, [3], "("],
    "modules_to_save": [3, "x", [3], ["("]],
    "rank_pattern": [3, [], {"q_proj": 0}, {"q_proj": "4"}, {"q_proj": 10**9}, {"(": 4}],
    "alpha_pattern": [3, [], {"q_proj": NAN}, {"q_proj": 0}, {"(": 4}],
    "layers_to_transform": ["x", [NAN], {}, 1.5, True],
    "layers_pattern": [3, [3], "("],
    "target_parameters": [3, "x", [3], ["gate.weight"]],
    "fan_in_fan_out": [True, "x"],
    "init_lora_weights": ["pissa", 3],
}
# tokenizer_config.json
TOKENIZER: dict[str, list[Any]] = {
    "chat_template": [3, ["x"], {"a": 3}, [{"name": "a"}], True],
    "eos_token": [3, [], {"a": 1}, True],
    "pad_token": [3, []],
    "model_max_length": ["x", [], -5],
    "added_tokens_decoder": [3, [], {"x": {"content": "a"}}, {"1": 3}, {"1": {}}],
    "tokenizer_class": [3, []],
    "extra_special_tokens": [3, "x"],
}
# tokenizer.json: the object's own keys.
TOKENIZER_JSON: dict[str, list[Any]] = {
    "model": [3, [], {}, None, *({"type": "BPE", "vocab": some, "merges": []} for some in ([], {"a": -1}, 3))],
    "added_tokens": [3, [3], {"a": 1}],
    "normalizer": [3, {"type": "None"}],
    "pre_tokenizer": [3, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}],
    "decoder": [3, {"type": "x"}],
}  # fmt: skip
# A run's own config.json.
RUN: dict[str, list[Any]] = {
    "seed": ["x", -1, 2**64, 1.5, None, [], {}],
    "steps": ["x", -1, 2**31, []],
    "batch_size": [0, -1, 10**9, "8", None],
    "accumulate": [-1, 3, "x"],
    "trainable": ["some", 3, None],
    "model": [3, [], None, "x"],
    "lora": [3, {"rank": 0, "alpha": 1}, {"rank": 10**9}, {"rank": 4, "alpha": NAN}, {"rank": 4, "targets": 3}],
    "data": [3, {"train": 3}, {"train": ""}, {"length": 1}, {"length": 2**31}, {"no": 1}, {"columns": {"text": 3}}],
    "optimizer": [{"learning_rate": NAN}, {"learning_rate": "x"}, {"b1": 1.0}, {"name": "adam"}],
    "mesh": [{"fsdp": "x"}, {"fsdp": 2.5}, []],
    "eval": [{"every": -1}, {"prompts": 3}, {"prompts": [3]}],
    "log": [{"every": 0}],
    "nothing": [1],
}  # fmt: skip
FLAGS = {
    "seed": [2**64, -1, "1e3", "x", LONG],
    "batch_size": [10**9, 0, LONG],
    "steps": [2**31, -1, LONG],
    "accumulate": [2**31],
    "data.length": [2**31, 1],
    "lora.rank": [10**9, 0],
    "eval.every": [2**31],
    "eval.max_new_tokens": [2**31, 0],
    "checkpoint.every": [2**31],
    "log.every": [2**31],
    "optimizer.learning_rate": ["nan", "inf", -1],
    "optimizer.warmup_steps": [2**31],
    "lora.alpha": ["nan", "inf", 0],
    "mesh.fsdp": [2**31, 0, -2],
}

GOOD = {"instruction": "What is it?", "response": "It is a cat."}
CHAT = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]}


def _turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [CHAT["messages"][0], CHAT["messages"][1] | changes]}


# Rows of a JSONL file, the second of which is wrong.
ROWS: dict[str, Any] = {
    **{f"a value that is {kind}": text.decode("latin-1") for kind, text in NO_OBJECT.items() if kind != "empty"},
    "half of a character": '{"instruction": "\\ud800", "response": "a"}',
    **{f"a response that is {value!r}": GOOD | {"response": value} for value in (3, None, [], {}, True, NAN, [1])},
    **{f"an instruction that is {value!r}": GOOD | {"instruction": value} for value in (3, None, [], {})},
    **{f"an input that is {value!r}": GOOD | {"input": value} for value in (3, [1], {"a": 1})},
    **{f"a system that is {value!r}": GOOD | {"system": value} for value in (3, [1], {"a": 1})},
    **{f"a history that is {value!r}": GOOD | {"history": value} for value in (3, "x", [3], [["a"]], [[1, 2]])},
    **{f"tools that are {value!r}": GOOD | {"tools": value} for value in (3, "{", [3], [{"a": 1}], {"a": 1}, DEEP)},
    **{f"options that are {value!r}": GOOD | {"chat_template_kwargs": value} for value in (3, "x", [1], {"tools": 1})},
}  # fmt: skip
CHATS: dict[str, Any] = {
    **{f"messages that are {value!r}": {"messages": value} for value in (3, "x", {}, [], [3], [[]], [{}], None)},
    **{f"a role that is {value!r}": _turn(role=value) for value in (3, None, "", "robot", [], {})},
    **{f"a content that is {value!r}": _turn(content=value) for value in (3, None, {}, [3], [{"type": "image"}], True)},
    **{f"calls that are {value!r}": _turn(tool_calls=value) for value in (3, "{", [3], [{}], [{"name": 3}])},
    **{f"a weight of {value!r}": _turn(weight=value) for value in (2, "x", [], -1, NAN)},
    "arguments that are no object": _turn(tool_calls=[{"name": "a", "arguments": [1]}]),
    "half of a character": _turn(content="\udc00"),
    "two reasonings": _turn(reasoning="a", thinking="b"),
    "a reasoning that is 3": _turn(reasoning=3),
    "a user that calls": {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "a"}]}]},
}  # fmt: skip
# Whole files of data: name -> bytes.
FILES: dict[str, bytes] = {
    "x.jsonl": b"\xff\xfe\0",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n\n",
    "x.json": b'{"a": 1, "b": [',
    "number.json": b"3",
    "numbers.json": b"[1, 2]",
    "deep.json": DEEP.encode(),
    "digits.json": f"[{LONG}]".encode(),
    "x.csv": b"instruction,response\na\n",
    "wide.csv": b"instruction,response\na,b,c\n",
    "header.csv": b"instruction,response\n",
    "nul.csv": b"instruction,response\na,b\n\0\0\n",
    "x.parquet": b"PAR1",
    "zeros.parquet": b"\0" * 4096,
    "x.jsonl.gz": b"\x1f\x8b\x08\0\0\0\0\0",
    "plain.jsonl.gz": b'{"text": "a"}\n',
    "x.jsonl.zst": b"\x28\xb5\x2f\xfd\0\0",
    "latin.txt": b"caf\xe9",
    "empty.txt": b"",
    "x.xml": b"<a/>",
    "x": b"a",
}
TEMPLATES = {
    "no Jinja": "{% if %}",
    "an unknown tag": "{% run %}{{ messages }}",
    "an unknown filter": "{{ messages | shell }}",
    "division by zero": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a range too large": "{{ range(10**9) | list }}",
    "an attribute of a class": "{{ ''.__class__.__mro__ }}",
    "an undefined thing's attribute": "{{ nothing.at.all }}",
    "what it raises itself": "{{ raise_exception('no') }}",
    "a call of a string": "{{ 'a'() }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an include": "{% include '/etc/passwd' %}",
    "a file's name": "{% extends '/etc/passwd' %}{{ messages }}",
    "nested deeply": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "much memory": "{{ 'a' * 13000000000 }}",
    "much text": "{{ 'a' * 70000000 }}",
    "nothing of the row": "{{ 'a' }}",
}
ENDLESS = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 9) }}",
}

INDEX: dict[str, Any] = {
    "no weight_map": {},
    "a list for a weight_map": {"weight_map": []},
    "an empty weight_map": {"weight_map": {}},
    "a number for a file": {"weight_map": {"a": 3}},
    "a list for a file": {"weight_map": {"a": ["model.safetensors"]}},
    "a parent's file": {"weight_map": {"a": "../x.safetensors"}},
    "a parent's file by way of a folder": {"weight_map": {"a": "b/../../x.safetensors"}},
    "an absolute path": {"weight_map": {"a": "/etc/passwd"}},
    "a folder": {"weight_map": {"a": "."}},
    "an empty name": {"weight_map": {"a": ""}},
    "a name with a NUL": {"weight_map": {"a": "x\0.safetensors"}},
    "a name too long": {"weight_map": {"a": "x" * 5000}},
    "an absent file": {"weight_map": {"a": "part-9.safetensors"}},
    "a pickled file": {"weight_map": {"a": "config.json"}},
    "a tensor in two shards": {"weight_map": {"a": "copy-1.safetensors", "b": "copy-2.safetensors"}},
}


def header(entries: Any, data: bytes = b"\0" * 16, size: int | None = None) -> bytes:
    """A safetensors file of a header, JSON or bytes."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header that is longer than the file": header(_tensor(), size=10**6),
    "a header of 2^63 bytes": header(_tensor(), size=2**63),
    "no JSON": header(b"{broken"),
    "a list": header([]),
    "nested deeply": header(DEEP.encode()),
    "half of a character": header(b'{"\xc3": 1}'),
    "cut short": header(_tensor(), b"\0" * 8),
    "more data than tensors": header(_tensor(), b"\0" * 32),
    "an unknown dtype": header(_tensor(dtype="F31")),
    "a dtype of integers": header(_tensor(dtype="I32")),
    "a dtype that is 3": header(_tensor(dtype=3)),
    "a shape that does not fit": header(_tensor(shape=[5])),
    "a negative shape": header(_tensor(shape=[-4])),
    "a shape that is text": header(_tensor(shape="4")),
    "a shape that overflows": header(_tensor(shape=[2**62, 4])),
    "offsets that run backwards": header(_tensor(data_offsets=[16, 0])),
    "offsets behind the end": header(_tensor(data_offsets=[16, 32])),
    "one offset": header(_tensor(data_offsets=[0])),
    "offsets of 2^63": header(_tensor(data_offsets=[2**63, 2**63 + 16])),
    "overlapping tensors": header(_tensor() | {"b": _tensor()["a"]}),
    "a hole": header(_tensor(shape=[2], data_offsets=[8, 16])),
    "a tensor that is 3": header({"a": 3}),
    "metadata that are 3": header(_tensor() | {"__metadata__": 3}),
    "the same name twice": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    ),
}
STATE: dict[str, Any] = {
    "no state": None,
    "a parent's file": {"_data_files": [{"filename": "../../x.arrow"}]},
    "an absolute path": {"_data_files": [{"filename": "/etc/passwd"}]},
    "an absent file": {"_data_files": [{"filename": "y.arrow"}]},
    "a list": [],
    "files that are 3": {"_data_files": 3},
    "a file that is 3": {"_data_files": [3]},
    "a file's name that is 3": {"_data_files": [{"filename": 3}]},
    "a parent's indices": {"_indices_data_files": [{"filename": "../../x.arrow"}]},
    "a format that is code": {"_format_type": "no such format"},
    "columns that are 3": {"_format_columns": 3},
}
DICT: dict[str, Any] = {
    "a parent's split": {"splits": ["../../x"]},
    "an absolute split": {"splits": ["/etc"]},
    "splits that are 3": {"splits": 3},
    "a split that is 3": {"splits": [3]},
    "no splits": {},
    "a list of splits": ["train"],
}
MODELS = ["", "nowhere", "../nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere", "x" * 5000, "a\0b/c", "a/\n", "a/.."]
SOURCES = [
    "",
    "no.jsonl",
    "../nowhere",
    "/nowhere/at/all",
    "a/b/c",
    "x" * 5000,
    "a\0b",
    "https://u:secret@host/x.jsonl",
]


def _values(reader: str, table: dict[str, list[Any]]) -> Iterator[Case]:
    others = {"rope_scaling": "rope", "num_attention_heads": "heads", "architectures": "architecture"}
    for key, values in table.items():
        for value in values:
            text = repr(value)
            name = f"{key} = {text[:60] + '…' if len(text) > 60 else text}"
            said = "tokenizer.json" if reader == "tokenizer_json" else others.get(key, key).split(".")[0]
            yield Case(reader, name, {key: value}, said)


def cases() -> Iterator[Case]:
    """All of them."""
    jsons = ("config", "generation", "tokenizer", "tokenizer_json", "index", "adapter", "run", "state")
    for reader in jsons:
        for name, content in NO_OBJECT.items():
            yield Case(reader, f"a file that is {name}", content, "json")
    for reader, table in {
        "config": CONFIG,
        "qwen": QWEN,
        "mixtral": MIXTRAL,
        "generation": GENERATION,
        "tokenizer": TOKENIZER,
        "tokenizer_json": TOKENIZER_JSON,
        "adapter": ADAPTER,
        "run": RUN,
        "flag": FLAGS,
    }.items():
        yield from _values(reader, table)
    for reader, named in {
        "index": INDEX,
        "header": HEADERS,
        "state": STATE,
        "dict": DICT,
        "rows": ROWS,
        "chats": CHATS,
        "template": TEMPLATES,
    }.items():
        said = {"rows": "x.jsonl:2", "chats": "x.jsonl:2"}.get(reader, "")
        for name, spoilt in named.items():
            yield Case(reader, name, spoilt, said)
    for name, content in FILES.items():
        yield Case("file", name, content, name)
    for name in MODELS:
        yield Case("model", repr(name)[:60], name, "model")
    for name in SOURCES:
        yield Case("source", repr(name)[:60], name, "")


def lay(base: Path, folder: Path, changed: dict[str, Any]) -> Path:
    """A folder with the files of another, but for those changed: bytes, or what JSON can hold; None: left out."""
    folder.mkdir(exist_ok=True)
    for file in base.iterdir() if base.exists() else ():
        if file.name not in changed and file.is_file():
            (folder / file.name).symlink_to(file)
    for name, content in changed.items():
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def spoil(base: Path, folder: Path, file: str, spoilt: Any) -> Path:
    """The same, one JSON file spoilt: its keys changed, or all of it."""
    content = spoilt if isinstance(spoilt, bytes) else json.loads((base / file).read_text()) | spoilt
    return lay(base, folder, {file: content})


def tensors(**arrays: np.ndarray) -> bytes:
    """A safetensors file."""
    from safetensors.numpy import save

    return save(arrays)


if __name__ == "__main__":
    every = list(cases())
    for case in every:
        print(f"{case.reader}: {case.name}")
    print(len(every), file=sys.stderr)
