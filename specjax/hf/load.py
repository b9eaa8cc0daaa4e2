"""From a Hugging Face folder straight into shards: each device's slice is read from the file by range."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from specjax import sharding
from specjax.errors import UserError
from specjax.hf import names
from specjax.hf.config import from_folder, origin
from specjax.hf.folder import fingerprint, resolve, weight_files
from specjax.hf.multimodal import unwrap
from specjax.hf.place import place, threads
from specjax.hf.quantise import Reader, convert
from specjax.hf.tensors import Tensors
from specjax.hf.tokenizer import load_tokenizer
from specjax.models import Decoder, ModelConfig
from specjax.models.layers import Wide
from specjax.models.quantised import Quantised, QuantisedParam

_HEAD = "lm_head.weight"
_EMBEDDING = ("embed_tokens", "embedding")
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
    prefix, kept = unwrap(tensors, folder) if config.multimodal else ("", {})
    further = names.further(config)
    kept |= {name: tensors.pop(name) for name in list(tensors) if further and name.startswith(further)}
    if config.tied:
        _tie(model, tensors)
    _check(folder, model, tensors)
    if quantise:
        convert(model, quantise)
        places = _places(model, mesh)
    told = origin(folder, source=str(path), revision=revision or "", fingerprint=fingerprint(folder))
    model.origin = dataclasses.replace(told, prefix=prefix, kept=kept, dtypes=_dtypes(model, tensors))
    return _read(model, places, tensors, mesh), load_tokenizer(folder)


def abstract(config: ModelConfig, *, dtype: Any, param_dtype: Any, remat: str = "none", quantise: str = "") -> Decoder:
    """The model's shapes without its weights: `jax.ShapeDtypeStruct` leaves of `param_dtype`, or quantised ones."""
    graph, state = nnx.split(Decoder(config, rngs=None, dtype=dtype, remat=remat))
    leaves = nnx.to_flat_state(state)
    cast = [(path, jax.ShapeDtypeStruct(leaf.shape, _stored(leaf, param_dtype))) for path, leaf in leaves]
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
    def cast(leaf: nnx.Variable) -> nnx.Variable:
        if isinstance(leaf, QuantisedParam):
            return leaf
        made: nnx.Variable = jax.tree.map(lambda x: x.astype(_stored(leaf, dtype)), leaf)
        return made

    return cast


def _stored(leaf: nnx.Variable, dtype: Any) -> np.dtype:
    """What a parameter is stored in, where the others are stored in `dtype`."""
    return np.promote_types(jnp.dtype(dtype), np.float32) if isinstance(leaf, Wide) else jnp.dtype(dtype)


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


def _dtypes(model: Decoder, tensors: Tensors) -> dict[str, np.dtype]:
    """The files' dtypes of parameters that are kept as exactly as there."""
    leaves = {path: leaf for path, leaf in nnx.to_flat_state(nnx.state(model, Wide))}
    table = names.entries(model.config, list(leaves))
    return {name: tensors[name].dtype for entry in table for _, name in entry.tensors(leaves[entry.path].shape)}


def _places(model: Decoder, mesh: Mesh | None) -> dict[names.Path, jax.sharding.Sharding]:
    """Where each parameter goes, by path."""
    if mesh is not None:
        return dict(sharding.of_module(model, mesh))
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {path: default for path, _ in nnx.to_flat_state(nnx.state(model))}


def _tie(model: Decoder, tensors: Tensors) -> None:
    """Lets the head's tensor stand for the embedding's where it alone is there: transformers ties to what there is."""
    (entry,) = names.entries(model.config, [_EMBEDDING])
    if entry.hf not in tensors and _HEAD in tensors:
        tensors[entry.hf] = tensors[_HEAD]


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
    ignored = names.unused(config) | ({_HEAD} if config.tied else set())
    unexpected = [
        name
        for name in tensors
        if name not in wanted and name not in ignored and not name.endswith(names.IGNORED_SUFFIXES)
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
        embedding = tensors[next(entry.hf for entry in table if entry.path == _EMBEDDING)]
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
