"""From a Hugging Face folder straight into shards: each device's slice is read from the file by range."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
import transformers
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from specjax import sharding
from specjax.errors import UserError
from specjax.hf import names
from specjax.models import Decoder, ModelConfig

_BLOCK = 32  # rows of a transpose at a time, of 16 to 256 the best for bfloat16 to itself and to float32
_LISTED = 8  # at most this many tensors of a kind are named in one error


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = "bfloat16",
    param_dtype: Any = None,
    revision: str | None = None,
    remat: str = "none",
) -> tuple[Decoder, Any]:
    """Loads a checkpoint and its tokenizer.

    Args:
      path: a folder with `config.json` and safetensors (one file, or shards with an index), or a hub name.
      mesh: where the parameters go, by the table in `specjax.sharding`; None: the default device.
      dtype: the compute dtype.
      param_dtype: the dtype the parameters are stored in, default `dtype`; `fit` casts those that train to float32.
      revision: of a hub name.
      remat: "none" or "full", see `Decoder`.

    Returns:
      (model, tokenizer); the tokenizer is None where the folder has none.

    Raises:
      UserError: nothing there, an unsupported architecture, a corrupt file, or tensors that are missing, unexpected or
        of another shape (all of them in one sentence).
    """
    folder = resolve(path, revision)
    config = ModelConfig.from_folder(folder)
    tensors = open_tensors(weight_files(folder))
    config = dataclasses.replace(config, source=str(path), fingerprint=fingerprint(folder))
    model = abstract(config, dtype=dtype, param_dtype=param_dtype or dtype, remat=remat)
    return _read(folder, model, tensors, mesh), load_tokenizer(folder)


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a path or hub name (downloaded to the hub's cache).

    Raises:
      UserError: neither exists, or the hub can't be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    name = str(path)
    if not name or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model {name!r}: no such folder, and not a hub name of the form org/name.")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Mistral's repositories hold the same weights a second time, as "consolidated".
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["consolidated*"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: no such folder, and the hub did not give it ({reason}).") from error


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, or None where it has none."""
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((Path(folder) / file).is_file() for file in files):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its tokenizer does not load ({str(error).strip().splitlines()[0]}).") from error


def abstract(config: ModelConfig, *, dtype: Any, param_dtype: Any, remat: str = "none") -> Decoder:
    """The model's shapes without its weights (`jax.ShapeDtypeStruct` leaves of `param_dtype`)."""

    def build() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat)

    graph, state = nnx.split(nnx.eval_shape(build))
    leaves = nnx.to_flat_state(state)
    cast = [(path, jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(param_dtype))) for path, leaf in leaves]
    return nnx.merge(graph, nnx.from_flat_state(cast))


def random(
    config: ModelConfig,
    *,
    mesh: Mesh | None = None,
    dtype: Any = "float32",
    param_dtype: Any = "float32",
    seed: int = 0,
    remat: str = "none",
) -> Decoder:
    """A model with random weights (normal, 0.02), initialised in place on the mesh."""

    def build() -> Any:
        model = Decoder(config, rngs=nnx.Rngs(seed), dtype=dtype, remat=remat)
        return jax.tree.map(lambda x: x.astype(param_dtype), nnx.state(model))

    shapes = abstract(config, dtype=dtype, param_dtype=param_dtype, remat=remat)
    layout = None
    if mesh is not None:
        places = sharding.of_module(shapes, mesh)
        layout = nnx.from_flat_state(
            [(path, places[sharding.path_name(path)]) for path, _ in nnx.to_flat_state(nnx.state(shapes))]
        )
        layout = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(build)), jax.tree.leaves(layout))
    return nnx.merge(nnx.graphdef(shapes), jax.jit(build, out_shardings=layout)())


def fingerprint(folder: str | Path) -> str:
    """A hash of a checkpoint's content: every file's header and up to 16 blocks of 4 KiB of every tensor.

    It reads a fraction of the bytes, so that a 70B base is checked in seconds, and still sees any training of it.
    """
    digest = hashlib.sha256()
    for file in weight_files(Path(folder)):
        with file.open("rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            header = stream.read(size)
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                for block in range(start, end, max(4096, (end - start) // 16)):
                    stream.seek(8 + size + block)
                    digest.update(stream.read(min(4096, end - block)))
    return digest.hexdigest()[:32]


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, in the index's order of names.

    Raises:
      UserError: there are none, or the index names one that is absent.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not a safetensors index ({error!r}): restore the file.") from error
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{index} names files that are not there: {', '.join(absent)}.")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} has only pickled weights (.bin), which can run code when opened: convert them with "
            "`transformers`' `save_pretrained(..., safe_serialization=True)` first."
        )
    raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json.")


def open_tensors(files: list[Path]) -> dict[str, Any]:
    """Every tensor's name and the open file that holds it; nothing is read yet.

    Raises:
      UserError: a file is corrupt or cut short; it is named.
    """
    found: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="np")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is corrupt or cut short ({error}): copy or download it again.") from error
        found |= dict.fromkeys(handle.keys(), handle)
    return found


def _read(folder: Path, model: Decoder, tensors: dict[str, Any], mesh: Mesh | None) -> Decoder:
    config = model.config
    graph, state = nnx.split(model)
    shapes = {sharding.path_name(path): leaf for path, leaf in nnx.to_flat_state(state)}
    places: dict[str, Any] = {} if mesh is None else sharding.of_module(model, mesh)
    table = names.entries(config, list(shapes))
    _check(folder, table, shapes, tensors, config)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = []
    for entry in table:
        leaf = shapes[entry.path]

        def slices(index: Any, entry: names.Entry = entry, leaf: Any = leaf) -> np.ndarray:
            return _read_slice(entry, leaf.shape, leaf.dtype, index, tensors, config.num_layers)

        place = places.get(entry.path, default)
        array = jax.make_array_from_callback(leaf.shape, place, slices)
        arrays.append((tuple(entry.path.split(".")), array))
    return nnx.merge(graph, nnx.from_flat_state(arrays))


def _read_slice(
    entry: names.Entry,
    shape: tuple[int, ...],
    dtype: Any,
    index: tuple[slice, ...],
    tensors: dict[str, Any],
    num_layers: int,
) -> np.ndarray:
    """One device's slice of one parameter: layer by layer into one buffer, cast on the way."""
    hf_names = entry.hf_names(num_layers)
    layer_index, layer_shape = (index[1:], shape[1:]) if entry.stacked else (index, shape)
    out_shape = [len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)]
    out = np.empty(out_shape, dtype)
    where = names.hf_slice(layer_index, layer_shape, entry.kind)
    for row, layer in enumerate(range(*index[0].indices(shape[0])) if entry.stacked else [0]):
        values = tensors[hf_names[layer]].get_slice(hf_names[layer])[where]
        _fill(out[row] if entry.stacked else out, values, entry.kind)
    return out


def _fill(target: np.ndarray, values: np.ndarray, kind: str) -> None:
    """target[...] = names.from_hf(values, kind, target.shape), a transpose in blocks: else it misses the cache."""
    if not kind.startswith("kernel"):
        target[...] = names.from_hf(values, kind, target.shape)
        return
    matrix = target.reshape(values.shape[::-1])
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        matrix[:, start : start + _BLOCK] = names.from_hf(block, kind, block.shape[::-1])


def _check(
    folder: Path, table: list[names.Entry], shapes: dict[str, Any], tensors: dict[str, Any], config: ModelConfig
) -> None:
    """Missing, unexpected and mis-shaped tensors, all in one sentence."""
    wanted = {}
    for entry in table:
        shape = shapes[entry.path].shape
        for name in entry.hf_names(config.num_layers):
            wanted[name] = entry.hf_shape(shape[1:] if entry.stacked else shape)
    missing = [name for name in wanted if name not in tensors]
    tied_head = {"lm_head.weight"} if config.tied else set()
    unexpected = [
        name
        for name in tensors
        if name not in wanted and name not in tied_head and not name.endswith(names.IGNORED_SUFFIXES)
    ]
    misshaped = []
    for name, shape in wanted.items():
        if name in tensors:
            found = tuple(tensors[name].get_slice(name).get_shape())
            if found != shape:
                misshaped.append(f"{name} is {list(found)} where config.json says {list(shape)}")
    parts = [
        f"{len(bad)} {what}: {', '.join(bad[:_LISTED])}{', …' if len(bad) > _LISTED else ''}"
        for what, bad in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if bad
    ]
    if parts:
        raise UserError(f"{folder}: its tensors do not fit config.json ({'; '.join(parts)}).")
