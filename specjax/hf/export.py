"""From our parameters to a folder that `AutoModelForCausalLM.from_pretrained` opens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from specjax import sharding
from specjax.errors import UserError
from specjax.files import new_folder
from specjax.hf import names
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
) -> None:
    """Writes a Hugging Face folder: config, generation config, weights (sharded by size), tokenizer.

    One shard at a time is on the host. The folder appears whole or not at all.

    Args:
      model: without adapters in use: merge them first, or save them by `specjax.lora.save`.
      tokenizer: its files and chat template are written too; None: none.
      out: the folder to make.
      dtype: of the weights in the files; default that of the checkpoint the model came from.
      shard_bytes: the largest size of one weights file.
      overwrite: replace files of an existing folder.

    Raises:
      UserError: `out` is not empty, or the model wears adapters.
    """
    if any(isinstance(leaf, nnx.LoRAParam) for _, leaf in nnx.to_flat_state(nnx.state(model))):
        raise UserError("the model wears LoRA adapters: merge them before export, or save them as an adapter folder.")
    dtype = jnp.dtype(dtype or model.config.stored_dtype)
    with new_folder(out, overwrite=overwrite) as folder:
        _write_weights(model, folder, dtype, shard_bytes)
        (folder / "config.json").write_text(json.dumps(_config(model, dtype), indent=2) + "\n")
        if model.config.generation:
            (folder / "generation_config.json").write_text(json.dumps(model.config.generation, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def tensors(model: Decoder, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every HF tensor by name, made one parameter at a time."""
    state = {sharding.path_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for entry in names.entries(model.config, list(state)):
        layers = model.config.num_layers
        for layer, name in enumerate(entry.hf_names(layers)):
            array = state[entry.path][layer] if entry.stacked else state[entry.path]
            yield name, np.ascontiguousarray(names.to_hf(np.asarray(jax.device_get(array)).astype(dtype), entry.kind))


def _config(model: Decoder, dtype: Any) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in model.config.hf else "dtype"
    return {**model.config.hf, key: str(dtype)}


def _write_weights(model: Decoder, folder: Path, dtype: Any, shard_bytes: int) -> None:
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        path = folder / f"part-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending.clear()

    for name, array in tensors(model, dtype):
        if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > shard_bytes:
            flush()
        pending[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, (path, held) in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / file)
        where |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
