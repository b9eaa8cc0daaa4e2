"""From our parameters to a folder that `AutoModelForCausalLM.from_pretrained` opens."""

import dataclasses
import json
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
from specjax.hf import names
from specjax.hf.ends import declared
from specjax.hf.place import finish
from specjax.hf.quantise import is_quantised
from specjax.hf.strided import copy, pieces, runs
from specjax.hf.tensors import DTYPES
from specjax.hf.tokenizer import save_tokenizer
from specjax.models import Decoder

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

    Raises:
      UserError: `out` is not empty, the model wears adapters, is quantised or has no `config.json`, or another process
        failed.
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
        _write_headers(folder, files, dtype)

    processes.together(out, overwrite, begin, lambda folder: _write_tensors(folder, model, files, dtype))


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One HF tensor: the row and place in the stack that it is of, and where in its file's data it goes."""

    name: str
    entry: names.Entry
    place: tuple[int, ...]
    shape: tuple[int, ...]
    start: int  # bytes
    stop: int


def tensors(model: Decoder, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every HF tensor by name, one at a time; all shards must be this process's."""
    arrays = _arrays(model)
    for slot in (slot for file in _layout(model, np.dtype(dtype), SHARD_BYTES).values() for slot in file):
        yield slot.name, _assemble(slot, arrays[slot.entry.path], np.dtype(dtype))[0]


def _arrays(model: Decoder) -> dict[names.Path, jax.Array]:
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _layout(model: Decoder, dtype: Any, shard_bytes: int) -> dict[str, list[_Slot]]:
    """The tensors of each file, filled in the table's order up to `shard_bytes`."""
    arrays = _arrays(model)
    files: list[list[_Slot]] = [[]]
    end = 0
    for entry in names.entries(model.config, list(arrays)):
        whole = arrays[entry.path].shape
        shape = entry.hf_shape(whole)
        size = int(np.prod(shape)) * dtype.itemsize
        for place, name in entry.tensors(whole):
            if files[-1] and end + size > shard_bytes:
                files.append([])
                end = 0
            files[-1].append(_Slot(name, entry, place, shape, end, end + size))
            end += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": slots for n, slots in enumerate(files, 1)}


def _header(slots: list[_Slot], dtype: Any) -> bytes:
    """A safetensors file up to its data, which begins at a multiple of 8 bytes."""
    code = next(code for code, known in DTYPES.items() if np.dtype(known) == dtype)
    held: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for slot in slots:
        held[slot.name] = {"dtype": code, "shape": slot.shape, "data_offsets": [slot.start, slot.stop]}
    text = json.dumps(held, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_headers(folder: Path, files: dict[str, list[_Slot]], dtype: Any) -> None:
    """Every file at its full size, its data still to come, and the index of several."""
    for file, slots in files.items():
        header = _header(slots, dtype)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + slots[-1].stop)
    if len(files) > 1:
        where = {slot.name: file for file, slots in files.items() for slot in slots}
        index = {"metadata": {"total_size": sum(slots[-1].stop for slots in files.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_tensors(folder: Path, model: Decoder, files: dict[str, list[_Slot]], dtype: Any) -> None:
    """This process's part of every file's data."""
    arrays = _arrays(model)

    def write(stream: int, data: int, slot: _Slot) -> None:
        whole, ranges = _assemble(slot, arrays[slot.entry.path], dtype)
        held = whole.reshape(-1).view(np.uint8).data
        for start, stop in ranges:
            while start < stop:
                start += os.pwrite(stream, held[start:stop], data + slot.start + start)

    # From an accelerator a tensor comes to the host before it is transposed there: two are in memory already.
    workers = 2 if jax.default_backend() == "cpu" else 1
    for file, slots in files.items():
        data = len(_header(slots, dtype))
        with (folder / file).open("r+b") as stream, ThreadPoolExecutor(workers) as pool:
            finish([pool.submit(write, stream.fileno(), data, slot) for slot in slots])


def _assemble(slot: _Slot, array: jax.Array, dtype: Any) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """One HF tensor with what this process holds of it, and the ranges of its bytes that this is.

    A shard that several devices hold is the first one's.
    """
    whole = np.empty(slot.shape, dtype)
    seen = names.view(whole, array.shape[slot.entry.stacked :])
    parts = []
    for shard in array.addressable_shards:
        bounds = [index.indices(size)[:2] for index, size in zip(shard.index, array.shape, strict=True)]
        stack, inner = bounds[: slot.entry.stacked], tuple(slice(*b) for b in bounds[slot.entry.stacked :])
        if shard.replica_id or not all(a <= i < b for i, (a, b) in zip(slot.place, stack, strict=True)):
            continue
        within = tuple(i - start for i, (start, _) in zip(slot.place, stack, strict=True))
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
    told.pop("transformers_weights", None)  # the base's name for its files, which are called as usual here
    return told
