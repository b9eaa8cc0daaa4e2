"""From our parameters to a folder that `AutoModelForCausalLM.from_pretrained` opens."""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax.cluster import processes
from specjax.errors import UserError, argument
from specjax.files import refuse_base
from specjax.hf import names
from specjax.hf.ends import declared
from specjax.hf.multimodal import wrapped
from specjax.hf.place import finish
from specjax.hf.quantise import is_quantised
from specjax.hf.strided import copy, pieces, runs
from specjax.hf.tensors import DTYPES
from specjax.hf.tokenizer import save_tokenizer
from specjax.models import Decoder
from specjax.models.stack import Constant

SHARD_BYTES = 5 * 10**9  # transformers' own default size of a weights file


def export(
    model: Decoder,
    tokenizer: Any,
    out: str | Path,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    eos_token: str = "",
    card: str = "",
) -> None:
    """Writes a Hugging Face folder: config, generation config, weights (sharded by size), tokenizer.

    Two tensors at a time are on the host. Under several processes each writes what its devices hold, by range into the
    same files, so `out` must be on a filesystem that they share. The folder appears whole or not at all.

    Args:
      model: without adapters in use: merge them first, or save them by `specjax.lora.save`.
      tokenizer: its files and chat template are written too; None: none.
      out: the folder to make.
      dtype: of the weights in the files; default that of the checkpoint the model came from.
      shard_bytes: the largest size of one weights file.
      overwrite: replace files of an existing folder.
      eos_token: the token that ends its answers, where it was taught another than the tokenizer's eos token: the
        folder's tokenizer and configs have it. The end of the chat template's turns ends a text in any case.
      card: the text of README.md, the model card; "": none is written.

    Raises:
      UserError: `out` is not empty, the model wears adapters, is quantised, has no `config.json` or not the other
        parts of its multimodal checkpoint, or another process failed.
    """
    if any(isinstance(leaf, nnx.LoRAParam) for _, leaf in nnx.to_flat_state(nnx.state(model))):
        raise UserError("the model wears LoRA adapters: merge them before export, or save them as an adapter folder.")
    if is_quantised(model):
        raise UserError(
            "the base is quantised, and rounded weights are not written as if they were the base's: save the adapter "
            f"alone, or merge it with {argument('dequantise=True')}."
        )
    if not model.origin.config_json:
        raise UserError("model.origin.config_json is empty, so the folder would have no config.json: set it.")
    if model.config.multimodal and not model.origin.kept:
        raise UserError(
            "config.json is of a multimodal model, and there is no file to take all but its language model from: set "
            "model.origin.config_json to the language model's own."
        )
    refuse_base(out, model.origin.source)
    dtype = jnp.dtype(dtype or model.origin.stored_dtype)
    if dtype not in map(np.dtype, DTYPES.values()):
        raise UserError(f"dtype {dtype}: weights are written as bfloat16, float16, float32 or float64.")
    files = _layout(model, dtype, shard_bytes)

    config, generation = declared(model.origin, tokenizer, eos_token)

    def begin(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(_of_files(config, dtype), indent=2) + "\n")
        if generation:
            (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder, eos_token=eos_token)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        for name, content in model.origin.processor.items():
            (folder / name).write_bytes(content)
        _write_headers(folder, files)

    processes.together(out, overwrite, begin, lambda folder: _write_tensors(folder, model, files))


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One HF tensor: the row and place in the stack that it is of, and where in its file's data it goes."""

    name: str  # in the file
    entry: names.Entry | None  # None: a tensor that is kept as it was
    place: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    start: int  # bytes
    stop: int


def tensors(model: Decoder, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every HF tensor by name, one at a time; all shards must be this process's."""
    arrays = _arrays(model)
    for slot in (slot for file in _layout(model, np.dtype(dtype), SHARD_BYTES).values() for slot in file):
        yield slot.name, _held(slot, model, arrays)[0]


def _arrays(model: Decoder) -> dict[names.Path, jax.Array]:
    held = nnx.state(model, nnx.Any(nnx.Param, Constant))  # of a model without adapters: what its files hold
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(held)}


def _layout(model: Decoder, dtype: Any, shard_bytes: int) -> dict[str, list[_Slot]]:
    """The tensors of each file, filled in the table's order up to `shard_bytes`."""
    files: list[list[_Slot]] = [[]]
    end = 0
    for name, entry, place, shape, kind in _listed(model, dtype):
        size = math.prod(shape) * np.dtype(kind).itemsize
        if files[-1] and end + size > shard_bytes:
            files.append([])
            end = 0
        files[-1].append(_Slot(name, entry, place, shape, kind, end, end + size))
        end += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": slots for n, slots in enumerate(files, 1)}


def _listed(model: Decoder, dtype: Any) -> Iterator[tuple[str, names.Entry | None, tuple[int, ...], Any, Any]]:
    """Name, row, place, shape and dtype of every tensor of the files: the model's in the table's order, those kept."""
    arrays = _arrays(model)
    for entry in names.entries(model.config, list(arrays)):
        whole = arrays[entry.path].shape
        for place, name in entry.tensors(whole):
            own = dtype
            if dtype == model.origin.stored_dtype:  # a config.json that says none has float32, its files may not
                own = np.promote_types(model.origin.dtypes.get(name, dtype), dtype)
            yield wrapped(name, model.origin.prefix), entry, place, entry.hf_shape(whole), own
    for name, value in model.origin.kept.items():
        yield name, None, (), value.shape, value.dtype


def _header(slots: list[_Slot]) -> bytes:
    """A safetensors file up to its data, which begins at a multiple of 8 bytes."""
    codes = {np.dtype(known): code for code, known in DTYPES.items()}
    held: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for slot in slots:
        code = codes[np.dtype(slot.dtype)]
        held[slot.name] = {"dtype": code, "shape": slot.shape, "data_offsets": [slot.start, slot.stop]}
    text = json.dumps(held, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_headers(folder: Path, files: dict[str, list[_Slot]]) -> None:
    """Every file at its full size, its data still to come, and the index of several."""
    for file, slots in files.items():
        header = _header(slots)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + slots[-1].stop)
    if len(files) > 1:
        where = {slot.name: file for file, slots in files.items() for slot in slots}
        index = {"metadata": {"total_size": sum(slots[-1].stop for slots in files.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_tensors(folder: Path, model: Decoder, files: dict[str, list[_Slot]]) -> None:
    """This process's part of every file's data."""
    arrays = _arrays(model)

    def write(stream: int, data: int, slot: _Slot) -> None:
        whole, ranges = _held(slot, model, arrays)
        held = whole.reshape(-1).view(np.uint8).data
        for start, stop in ranges:
            while start < stop:
                start += os.pwrite(stream, held[start:stop], data + slot.start + start)

    # From an accelerator a tensor comes to the host before it is transposed there: two are in memory already.
    workers = 2 if jax.default_backend() == "cpu" else 1
    for file, slots in files.items():
        data = len(_header(slots))
        with (folder / file).open("r+b") as stream, ThreadPoolExecutor(workers) as pool:
            finish([pool.submit(write, stream.fileno(), data, slot) for slot in slots])


def _held(slot: _Slot, model: Decoder, arrays: dict[names.Path, jax.Array]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """One HF tensor with what this process holds of it, and the ranges of its bytes that this is.

    A shard that several devices hold is the first one's, a tensor that is kept as it was the first process's.
    """
    if slot.entry is None:
        value = model.origin.kept[slot.name]
        return value, [] if jax.process_index() else [(0, value.nbytes)]
    array, stacked = arrays[slot.entry.path], slot.entry.stacked
    whole = np.empty(slot.shape, slot.dtype)
    seen = names.view(whole, array.shape[stacked:])
    parts = []
    for shard in array.addressable_shards:
        bounds = [index.indices(size)[:2] for index, size in zip(shard.index, array.shape, strict=True)]
        stack = bounds[:stacked]
        inner: tuple[Any, ...] = (*(slice(*b) for b in bounds[stacked:]), ...)
        if shard.replica_id or not all(a <= i < b for i, (a, b) in zip(slot.place, stack, strict=True)):
            continue
        within = (*(i - start for i, (start, _) in zip(slot.place, stack, strict=True)), ...)
        # An array of the CPU's is memory of ours already.
        on_cpu = jax.default_backend() == "cpu"
        values = np.asarray(shard.data)[within] if on_cpu else np.asarray(shard.data[within])
        parts.append(seen[inner])
        for pair in pieces(parts[-1], values):
            copy(*pair)
    return whole, runs(parts, whole) if parts else []


def _of_files(config: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """`config.json` of weights in files of this dtype."""
    told = {**config, "torch_dtype" if "torch_dtype" in config else "dtype": str(dtype)}
    told.pop("quantization_config", None)  # of a base that was read into floats
    told.pop("transformers_weights", None)  # the base's name for its files, which are called as usual here
    return told
