"""PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Format: https://github.com/huggingface/peft/blob/main/docs/source/developer_guides/checkpoint.md
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from specjax.errors import UserError
from specjax.files import new_folder
from specjax.hf import names as hf_names
from specjax.hf.load import open_tensors
from specjax.lora import adapters
from specjax.models import Decoder

_PREFIX = "base_model.model."

# What an adapter may say without changing what this reader would make of it.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None,),
    # The others (pissa, olora, corda, loftq, ...) subtract their start from the base: the adapter fits no plain base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def save(
    model: Decoder,
    out: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter as PEFT does.

    Args:
      model: wears the adapter.
      out: the folder to make.
      name: which adapter; default the one in use.
      base: `base_model_name_or_path`; default what the model was loaded from.
      tokenizer: written beside the adapter, with its chat template; None: none.
      overwrite: replace files of an existing folder.

    Raises:
      UserError: no such adapter, or `out` is not empty.
    """
    name = name or adapters.active(model)
    if name is None:
        raise UserError("no adapter is in use: nothing to save.")
    tensors: dict[str, np.ndarray] = {}
    worn = list(adapters.worn(model, name))
    for path, linear, lora in worn:
        a, b = np.asarray(jax.device_get(lora.a[...])), np.asarray(jax.device_get(lora.b[...]))
        modules = adapters.hf_modules(path, model.config.num_layers)
        for layer, module in enumerate(modules):
            stacked = path.startswith("layers.")
            for letter, factor, in_dims in (("A", a, linear.in_dims), ("B", b, 1)):
                one = hf_names.to_hf(factor[layer] if stacked else factor, f"kernel/{in_dims}")
                tensors[f"{_PREFIX}{module}.lora_{letter}.weight"] = np.ascontiguousarray(one)
    lora = worn[0][2]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or model.config.source or None,
        "r": lora.a.shape[-1],
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": False,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path, _, _ in worn}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
    with new_folder(out, overwrite=overwrite) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def load(model: Decoder, folder: str | Path, *, name: str = adapters.DEFAULT) -> None:
    """Reads a PEFT adapter folder onto the model under `name` and puts it in use.

    Raises:
      UserError: files absent or corrupt, an adapter of another kind, a setting that is not supported, or tensors that
        do not fit the model (all of them named).
    """
    folder = Path(folder)
    config = _read_config(folder)
    if name in adapters.names(model):
        raise UserError(f"the model already has an adapter {name!r}: unload it, or give another name.")
    handles = open_tensors([folder / "adapter_model.safetensors"])
    maps, layers, rank = adapters.linears(model), model.config.num_layers, config["r"]
    modules = {module: path for path in maps for module in adapters.hf_modules(path, layers)}
    shape = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")
    found = {key: shape.fullmatch(key) for key in handles}
    unknown = [key for key, hit in found.items() if hit is None or hit[1] not in modules]
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} tensors fit no linear map of the model, the first {unknown[0]}: is this adapter "
            "of another base model?"
        )
    touched = list(dict.fromkeys(modules[hit[1]] for hit in found.values() if hit))
    if not touched:
        raise UserError(f"{folder}: adapter_model.safetensors is empty.")
    factors = {path: _factors(folder, model, path, rank, handles) for path in touched}
    for path, (a, b) in factors.items():
        adapters.add(
            maps[path],
            name,
            a,
            b,
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            rslora=bool(config.get("use_rslora", False)),
        )
    adapters.use(model, name)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    for file in (path, folder / "adapter_model.safetensors"):
        if not file.is_file():
            raise UserError(f"{folder} is not a PEFT adapter folder: it has no {file.name}.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore the file.") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r} is not supported; supported is LORA.")
    for key, neutral in _NEUTRAL.items():
        if config.get(key, neutral[0]) not in neutral:
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported.")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise UserError(f"{path}: r must be a whole number of at least 1.")
    return config


def _factors(folder: Path, model: Decoder, path: str, rank: int, handles: dict[str, Any]) -> list[np.ndarray]:
    """A and B of one linear map, stacked over the layers, float32."""
    linear = adapters.linears(model)[path]
    stacked = path.startswith("layers.")
    result = []
    for letter, in_dims, whole in zip(
        "AB", (linear.in_dims, 1), adapters.factor_shapes(model, path, rank), strict=True
    ):
        kind, shape = f"kernel/{in_dims}", whole[1:] if stacked else whole
        rows = []
        for module in adapters.hf_modules(path, model.config.num_layers):
            key = f"{_PREFIX}{module}.lora_{letter}.weight"
            if key not in handles:
                raise UserError(f"{folder}: tensor {key} is missing, though other layers have theirs.")
            array = handles[key].get_tensor(key)
            wanted = hf_names.hf_shape(shape, kind)
            if array.shape != wanted:
                raise UserError(f"{folder}: tensor {key} is {list(array.shape)} where {list(wanted)} is needed.")
            rows.append(hf_names.from_hf(array.astype(np.float32), kind, shape))
        result.append(np.stack(rows) if stacked else rows[0])
    return result
