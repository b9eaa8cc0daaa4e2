"""mlx-lm's adapters, read: `adapters.safetensors`, and an `adapter_config.json` of its own.

y = W x + scale (x A) B with A [in, R] and B [R, out], so that PEFT's alpha is scale * R; DoRA's magnitude is `m`.
Modules are called as in Hugging Face's files, and the file alone says which of them are touched.
Source: mlx_lm/tuner/{lora,dora,utils}.py, version 0.32.
"""

from pathlib import Path
from typing import Any

import numpy as np

from specjax.errors import UserError
from specjax.files import read_object
from specjax.hf.place import check
from specjax.hf.tensors import Tensors
from specjax.lora import targets
from specjax.lora.adapters import Adapter, Factors
from specjax.lora.variants import variant_of
from specjax.models import Decoder
from specjax.models.layers import Linear
from specjax.values import number, shown, whole

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_FIELDS = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}
_PARAMETERS = {
    "rank": whole(1),
    "scale": number("a number other than 0", lambda v: v != 0),
    "dropout": number("a number from 0 to below 1", lambda v: 0 <= v < 1),
}


def is_mlx(folder: Path) -> bool:
    """Whether a folder has an adapter in this form, and none in PEFT's."""
    return (folder / WEIGHTS).is_file() and not (folder / "adapter_model.safetensors").exists()


def base_of(folder: Path) -> str:
    """The name of the base in an adapter's settings, or ""."""
    return str(read_object(folder / CONFIG).get("model") or "")


def read(model: Decoder, folder: Path) -> Adapter:
    """The adapter in a folder, in arrays of this model's shapes.

    Raises:
      UserError: whole weights, settings that are absent, or a tensor of no linear map of the model or of another shape.
    """
    kind, parameters = _settings(folder)
    fields = {last: field for last, field in _FIELDS.items() if kind == "dora" or field != "magnitude"}
    rank, scale = int(parameters["rank"]), float(parameters["scale"])
    held = Tensors([folder / WEIGHTS])
    maps = {path: one for path, one in targets.linears(model).items() if isinstance(one, Linear)}
    places = {name: (path, layer) for path in maps for layer, name in enumerate(targets.modules(model, path))}
    found: dict[Any, dict[int, dict[str, np.ndarray]]] = {}
    for key, tensor in held.items():
        name, _, last = key.rpartition(".")
        if name not in places or last not in fields:
            raise UserError(
                f"{folder / WEIGHTS}: tensor {key} is of no linear map of this model (adapters of embeddings and of "
                "experts are not read in mlx-lm's form): is the adapter of another base?"
            )
        check(f"{key} of {folder / WEIGHTS}", tensor)
        path, layer = places[name]
        found.setdefault(path, {}).setdefault(layer, {})[last] = np.asarray(tensor).astype(np.float32)
    if not found:
        raise UserError(f"{folder}: {WEIGHTS} is empty.")
    factors = {}
    for path, layers in found.items():
        variant, linear = variant_of(maps[path], {"use_dora": kind == "dora"}), maps[path]
        arrays = variant.arrays(linear, rank)
        values: dict[str, Any] = {field: np.zeros(shape, np.float32) for field, (shape, _) in arrays.items()}
        names, stacked = targets.modules(model, path), targets.is_stacked(linear)
        for layer, tensors in layers.items():
            for last, field in fields.items():
                target = values[field][layer] if stacked else values[field]
                # Ours have the rank first in A and last in B, as PEFT's files; theirs are the transposes.
                wanted = _transposed(target, field)
                if last not in tensors or tensors[last].shape != wanted:
                    have = list(tensors[last].shape) if last in tensors else "absent"
                    raise UserError(f"{folder / WEIGHTS}: {names[layer]}.{last} is {have}, not {list(wanted)}.")
                target[...] = (tensors[last].T if tensors[last].ndim == 2 else tensors[last]).reshape(target.shape)
        ranks = tuple(rank if layer in layers else 0 for layer in range(len(names)))
        factors[path] = Factors(variant, values, ranks, (scale * rank,) * len(names))
    return Adapter(factors, {}, float(parameters["dropout"]), False)


def _settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """The kind of adapter, lora or dora, and its rank, scale and dropout."""
    path = folder / CONFIG
    config = read_object(path)
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise UserError(
            f"{path}: fine_tune_type is {shown(kind)}: an adapter of mlx-lm is read where it is lora or dora."
        )
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: there are no lora_parameters: restore the file that mlx-lm wrote.")
    for key, told in _PARAMETERS.items():
        if key not in parameters or not told.fits(parameters[key]):
            raise UserError(f"{path}: lora_parameters.{key} must be {told.words}, not {shown(parameters.get(key))}.")
    return kind, parameters


def _transposed(target: np.ndarray, field: str) -> tuple[int, ...]:
    """The shape that mlx-lm gives one layer's array."""
    if field == "a":
        return int(np.prod(target.shape[1:])), target.shape[0]
    if field == "b":
        return target.shape[-1], int(np.prod(target.shape[:-1]))
    return (target.size,)
