"""From a Hugging Face folder straight into shards: each device's slice is read from the file by range."""

import dataclasses
import hashlib
import json
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
import transformers
from flax import nnx
from jax.sharding import Mesh

from specjax import sharding
from specjax.errors import UserError
from specjax.files import read_object
from specjax.hf import names
from specjax.hf.config import from_folder, origin
from specjax.hf.place import place, threads
from specjax.hf.quantise import Reader, convert
from specjax.hf.tensors import Tensors
from specjax.models import Decoder, ModelConfig
from specjax.models.quantised import Quantised, QuantisedParam

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_HEAD = "lm_head.weight"
_LISTED = 8  # at most this many tensors of a kind are named in one error


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = "bfloat16",
    param_dtype: Any = None,
    revision: str | None = None,
    remat: str = "none",
    quantise: str = "",
) -> tuple[Decoder, Any]:
    """Loads a checkpoint and its tokenizer.

    Args:
      path: a folder with `config.json` and safetensors (one file, or shards with an index), or a hub name.
      mesh: where the parameters go, by the table in `specjax.sharding`; None: the default device.
      dtype: the compute dtype.
      param_dtype: the dtype the parameters are stored in, default `dtype`; `fit` casts those that train to float32.
      revision: of a hub name.
      remat: see `Decoder`.
      quantise: "nf4" or "int8": the layers' linear maps are stored so, and frozen; "": as floats. What that costs is in
        `model.origin.quantisation`.

    Returns:
      (model, tokenizer); the tokenizer is None where the folder has none.

    Raises:
      UserError: nothing there, an unsupported architecture, a corrupt file, or tensors that are missing, unexpected or
        of another shape (all of them in one sentence).
    """
    folder = resolve(path, revision)
    config = from_folder(folder)
    model = abstract(config, dtype=dtype, param_dtype=param_dtype or dtype, remat=remat)
    places = _places(model, mesh)  # a mesh that does not fit is said before a file is opened
    tensors = Tensors(weight_files(folder))
    _check(folder, model, tensors)
    if quantise:
        convert(model, quantise)
        places = _places(model, mesh)
    model.origin = origin(folder, source=str(path), revision=revision or "", fingerprint=fingerprint(folder))
    return _read(model, places, tensors, mesh), load_tokenizer(folder)


def resolve(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a path or hub name (downloaded to the hub's cache; without `weights`, its JSON files alone).

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
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"] if weights else ["*.json"]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["consolidated*"]
            )
        )
        if not weights or any(folder.glob("*.safetensors")):
            return folder
        pickled = huggingface_hub.file_exists(name, "pytorch_model.bin", revision=revision or None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: no such folder, and the hub did not give it ({reason}).") from error
    if pickled or (folder / "pytorch_model.bin.index.json").is_file():
        raise _pickled(name, name.rpartition("/")[2] + "-safetensors", tokenizer=True)
    return folder


def _pickled(model: str, out: str, *, tokenizer: bool) -> UserError:
    code = "import transformers as t; "
    code += f"t.AutoModelForCausalLM.from_pretrained({model!r}, dtype='auto').save_pretrained({out!r})"
    if tokenizer:
        code += f"; t.AutoTokenizer.from_pretrained({model!r}).save_pretrained({out!r})"
    return UserError(
        f"{model} has only pickled weights (.bin), which can run code when opened: where you trust them, convert them "
        f"with `python -c {shlex.quote(code)}` (it needs torch) and give {out}."
    )


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, or None where it has none. Code that a folder brings along is never run, nor asked about.

    Raises:
      UserError: its files do not load, or name a class that is code of the folder's own.
    """
    if not any((Path(folder) / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        # Not given, it asks on the terminal, and reads the answer from whatever is standard input.
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if any("auto_map" in read_object(file) for file in Path(folder).glob("*config.json")):
            raise UserError(
                f"{folder}: its tokenizer is code of its own (auto_map), which is not run here: give a folder whose "
                "tokenizer transformers knows, with a tokenizer.json."
            ) from error
        raise UserError(f"{folder}: its tokenizer does not load ({str(error).strip().splitlines()[0]}).") from error


def abstract(config: ModelConfig, *, dtype: Any, param_dtype: Any, remat: str = "none", quantise: str = "") -> Decoder:
    """The model's shapes without its weights: `jax.ShapeDtypeStruct` leaves of `param_dtype`, or quantised ones."""
    graph, state = nnx.split(Decoder(config, rngs=None, dtype=dtype, remat=remat))
    leaves = nnx.to_flat_state(state)
    cast = [(path, jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(param_dtype))) for path, leaf in leaves]
    model = nnx.merge(graph, nnx.from_flat_state(cast))
    if quantise:
        convert(model, quantise)
    return model


def random(
    config: ModelConfig,
    *,
    mesh: Mesh | None = None,
    dtype: Any = "float32",
    param_dtype: Any = "float32",
    seed: int = 0,
    remat: str = "none",
    quantise: str = "",
) -> Decoder:
    """A model with random weights (normal, 0.02), initialised in place on the mesh."""

    def build() -> Any:
        model = Decoder(config, rngs=nnx.Rngs(seed), dtype=dtype, remat=remat)
        if quantise:
            convert(model, quantise)
        return jax.tree.map(_cast(param_dtype), nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))

    shapes = abstract(config, dtype=dtype, param_dtype=param_dtype, remat=remat, quantise=quantise)
    layout = None
    if mesh is not None:
        places = sharding.of_module(shapes, mesh)
        layout = nnx.from_flat_state([(path, places[path]) for path, _ in nnx.to_flat_state(nnx.state(shapes))])
        layout = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(build)), jax.tree.leaves(layout))
    return nnx.merge(nnx.graphdef(shapes), jax.jit(build, out_shardings=layout)())


def _cast(dtype: Any) -> Any:
    return lambda leaf: leaf if isinstance(leaf, QuantisedParam) else jax.tree.map(lambda x: x.astype(dtype), leaf)


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
        table = read_object(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise UserError(f"{index} is not a safetensors index (it has no weight_map of names): restore the file.")
        files = [folder / name for name in sorted(set(table.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{index} names files that are not there: {', '.join(absent)}.")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("pytorch_model*.bin")):
        here = str(folder.absolute())
        raise _pickled(here, here + "-safetensors", tokenizer=any((folder / f).is_file() for f in _TOKENIZER_FILES))
    raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json.")


def _read(
    model: Decoder, places: dict[names.Path, jax.sharding.Sharding], tensors: Tensors, mesh: Mesh | None = None
) -> Decoder:
    """The model with its weights in their places, parameter by parameter; several threads copy."""
    graph, state = nnx.split(model)
    kernels = {path: part for path, part in nnx.iter_modules(model) if isinstance(part, Quantised)}
    leaves = {path: leaf for path, leaf in nnx.to_flat_state(state) if not isinstance(leaf, QuantisedParam)}
    arrays, reader = [], Reader(mesh)
    with threads() as pool:
        for entry in names.entries(model.config, list(kernels)):
            found = reader.read(entry, kernels[entry.path], tensors, pool)
            arrays += [((*entry.path, name), value) for name, value in found.items()]
        for entry in names.entries(model.config, list(leaves)):
            leaf = leaves[entry.path]
            array = place(entry, leaf.shape, leaf.dtype, places[entry.path], tensors, pool)
            arrays.append((entry.path, array))
            tensors.release()
    read: Decoder = nnx.merge(graph, nnx.from_flat_state(arrays))
    if kernels:
        report = reader.report(next(iter(kernels.values())).kind)
        read.origin = dataclasses.replace(read.origin, quantisation=report)
    return read


def _places(model: Decoder, mesh: Mesh | None) -> dict[names.Path, jax.sharding.Sharding]:
    """Where each parameter goes, by path."""
    if mesh is not None:
        return dict(sharding.of_module(model, mesh))
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {path: default for path, _ in nnx.to_flat_state(nnx.state(model))}


def _check(folder: Path, model: Decoder, tensors: Tensors) -> None:
    """Missing, unexpected and mis-shaped tensors, all in one sentence; a tied head that differs."""
    config = model.config
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    wanted: dict[str, tuple[int, ...]] = {}
    table = names.entries(config, list(shapes))
    for entry in table:
        shape = shapes[entry.path]
        wanted |= {name: entry.hf_shape(shape) for _, name in entry.tensors(shape)}
    missing = [name for name in wanted if name not in tensors]
    tied_head = {_HEAD} if config.tied else set()
    unexpected = [
        name
        for name in tensors
        if name not in wanted and name not in tied_head and not name.endswith(names.IGNORED_SUFFIXES)
    ]
    misshaped = []
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            misshaped.append(f"{name} is {list(tensors[name].shape)} where config.json says {list(shape)}")
    parts = [
        f"{len(bad)} {what}: {', '.join(bad[:_LISTED])}{', …' if len(bad) > _LISTED else ''}"
        for what, bad in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if bad
    ]
    if parts:
        raise UserError(f"{folder}: its tensors do not fit config.json ({'; '.join(parts)}).")
    if config.tied and (head := tensors.get(_HEAD)) is not None:
        embedding = tensors[next(entry.hf for entry in table if entry.path == ("embed_tokens", "embedding"))]
        # transformers ties them only if they are equal, and uses the head as it is otherwise.
        if head.shape != embedding.shape or not all(map(np.array_equal, _bits(head), _bits(embedding))):
            raise UserError(
                f"{folder}: config.json says that {_HEAD} is tied to the embeddings, but the file holds another: set "
                "tie_word_embeddings to false there to use it, or take the tensor out of the file."
            )
        tensors.release()


def _bits(array: np.ndarray) -> Iterator[np.ndarray]:
    """A matrix in blocks of rows, as integers."""
    for start in range(0, len(array), 4096):
        yield array[start : start + 4096].view(f"u{array.itemsize}")
