"""PEFT's adapter folder, written and read: `adapter_config.json` and `adapter_model.safetensors`.

One table (`_table`) says which tensor of the file is which layer of which of our arrays, in both directions.
Format: https://github.com/huggingface/peft/blob/main/docs/source/developer_guides/checkpoint.md
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from specjax import sharding
from specjax.cluster import processes
from specjax.errors import UserError, keys
from specjax.files import refuse_base
from specjax.hf import names as hf_names
from specjax.hf.ends import declared
from specjax.hf.place import check
from specjax.hf.tensors import Tensors
from specjax.hf.tokenizer import save_tokenizer
from specjax.lora import adapters, base_file, fused, mlx, targets, tokens
from specjax.lora.adapters import Adapter, Copies, Factors
from specjax.lora.peft_config import CONFIG, WEIGHTS, read_config, write_config
from specjax.lora.targets import TIED_HEAD, TIED_PATH
from specjax.lora.variants import variant_of
from specjax.models import Decoder
from specjax.models.adapter import Path as ModulePath
from specjax.models.experts import ExpertLinear
from specjax.models.layers import Linear
from specjax.models.moe import Router

_PREFIX = "base_model.model."
_TABLE = re.compile(  # the base's embedding or head, also inside of what PEFT wraps it in
    re.escape(_PREFIX)
    + r"((?:model\.(?:language_model\.)?)?(embed_tokens|lm_head))(?:\.token_adapter)?(?:\.base_layer)?\.weight"
)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One tensor of the file: the layer of one of our arrays that it holds, and how."""

    key: str
    path: ModulePath
    field: str  # of the variant's arrays, or the parameter that a copy stands for
    layer: int
    kind: str


def save(
    model: Decoder,
    out: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    eos_token: str = "",
    card: str = "",
    fingerprint: str = "",
    vocab_size: int = 0,
) -> list[str]:
    """Writes an adapter as PEFT does, and reads it back before the folder appears.

    Args:
      model: wears the adapter.
      out: the folder to make.
      name: which adapter; default the one in use.
      base: `base_model_name_or_path`; default what the model was loaded from.
      revision: of the base; default that which the model was loaded with.
      tokenizer: written beside the adapter, with its chat template; None: none.
      overwrite: replace files of an existing folder.
      eos_token: the token that ends its answers, where it was taught another than the tokenizer's eos token. What ends
        a text is in the folder's tokenizer and, where the base's files do not say it, in a `generation_config.json`.
      card: the text of README.md, the model card; "": none is written.
      fingerprint: of the base's weights, kept in a file beside the adapter's, see `base_file`; "": not known.
      vocab_size: the base's rows where tokens were added to it, kept there too; 0: none were.

    Returns:
      The targeted modules whose B is all zero, in which the adapter changes nothing; after training, none.

    Raises:
      UserError: no such adapter, `out` is not empty, or what was written does not come back the same.
    """
    name = name or adapters.active(model)
    if name is None:
        raise UserError("no adapter is in use: nothing to save.")
    refuse_base(out, model.origin.source)
    adapter = adapters.as_saved(model, adapters.on_host(adapters.collect(model, name)))
    source = base or model.origin.source or None
    config = write_config(model, adapter, source, revision or (None if base else model.origin.revision or None))
    tensors = {row.key: _to_file(model, adapter, row) for row in _table(model, adapter)}
    tensors |= dict(fused.tensors(model, adapter, _PREFIX))

    _, generation = declared(model.origin, tokenizer, eos_token)

    def write(folder: Path) -> None:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})  # a second key of it would come in any order
        base_file.write(folder, fingerprint, vocab_size)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if generation != model.origin.generation_config:
            (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder, eos_token=eos_token)

    def check(folder: Path) -> None:
        different = _differs(model, adapter, read(model, folder))
        if different:
            raise UserError(f"{out}: {different} came back otherwise than it was written: nothing is saved.")

    processes.together(out, overwrite, write, check)
    last = re.compile(r"\.(lora_B\.weight|lora_embedding_A)$")
    return [last.sub("", key)[len(_PREFIX) :] for key, one in tensors.items() if last.search(key) and not one.any()]


def load(model: Decoder, folder: str | Path, *, name: str = adapters.DEFAULT) -> None:
    """Reads a PEFT adapter folder, or one of mlx-lm's, onto the model under `name` and puts it in use.

    Raises:
      UserError: files absent or corrupt, an adapter of another kind, a setting that is unknown or not supported, or
        tensors that do not fit the model and the settings.
    """
    adapters.check_free(model, name)
    adapters.attach(model, name, read(model, Path(folder)))


def read(model: Decoder, folder: Path) -> Adapter:
    """The adapter in a folder, in arrays of this model's shapes; see `load`."""
    if mlx.is_mlx(folder):
        return mlx.read(model, folder)
    config = read_config(folder)
    held = Tensors([folder / WEIGHTS])
    if not held:
        raise UserError(f"{folder}: {WEIGHTS} is empty.")
    _check_ranks(folder, config, held)
    try:
        with keys({"targets": "target_modules"}):
            adapter = _plan(model, config)
        rank_of, alpha_of = _patterns(config)
        parameters = fused.parameters(model, config.get("target_parameters", []))
        more = parameters, held, _PREFIX, rank_of, alpha_of, adapter.rslora
        by_expert, expert_keys = fused.read(model, *more)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    rows = {row.key: row for row in _table(model, adapter)}
    unknown = [
        key
        for key in held
        if key not in rows and key not in expert_keys and not _is_the_bases(model, adapter, folder, key, held)
    ]
    if unknown and model.config.multimodal and not any(".language_model." in key for key in unknown):
        raise UserError(
            f"{folder}: {len(unknown)} tensors are of no part of the language model, the first {unknown[0]}: the rest "
            "of a multimodal model is kept as it is here: give an adapter that was trained on the language model alone."
        )
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} tensors fit no linear map of the model that {CONFIG} targets, the first "
            f"{unknown[0]}: is this adapter of another base model?"
        )
    missing = [key for key in rows if key not in held]
    if missing:
        raise UserError(
            f"{folder}: tensor {missing[0]} is missing, though {CONFIG} targets its module "
            f"({len(missing)} are missing in all)."
        )
    for row in rows.values():
        target, layer = _place(model, adapter, row), held[row.key]
        wanted = hf_names.hf_shape(target.shape, row.kind)
        if layer.shape != wanted:
            raise UserError(f"{folder}: tensor {row.key} is {list(layer.shape)} where {list(wanted)} is needed.")
        target[...] = hf_names.view(layer, target.shape)
    for key, tensor in held.items():
        check(f"{key} of {folder / WEIGHTS}", tensor)
    adapter.factors |= by_expert
    tied = adapter.copies.get(targets.embedding(model))
    if tied is not None and tied.tied:
        head = held[f"{_PREFIX}lm_head.weight"]
        if not np.array_equal(head.astype(np.float32), tied.values["embedding"]):
            raise UserError(f"{folder}: ensure_weight_tying is true, but embed_tokens and lm_head are not the same.")
    return adapter


def _check_ranks(folder: Path, config: dict[str, Any], held: Tensors) -> None:
    """Raises `UserError` where a rank is larger than any tensor of the file: before memory is taken for it."""
    most = max((size for tensor in held.values() for size in tensor.shape), default=0)
    ranks = {"r": config["r"]} | {f"rank_pattern {key!r}": rank for key, rank in config.get("rank_pattern", {}).items()}
    for key, rank in ranks.items():
        if rank > most:
            raise UserError(
                f"{folder / CONFIG}: {key} is {rank}, but no tensor of {WEIGHTS} has over {most} rows or columns: are "
                "these the files of one adapter?"
            )


def _plan(model: Decoder, config: dict[str, Any]) -> Adapter:
    """The adapter that the settings describe, its arrays not filled in yet: zeros, and the base where layers are left.

    What PEFT would match silently nothing of is no error here: the tensors of the file decide.
    """
    saved = targets.match_saved(model, config.get("modules_to_save", []), strict=False)
    chosen = {}
    if config["target_modules"] or not config.get("target_parameters"):
        chosen = targets.match(
            model,
            config["target_modules"],
            exclude=config.get("exclude_modules"),
            layers=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern"),
            saved=config.get("modules_to_save", []),
            strict=False,
        )
    maps, parts = targets.maps_of(model), targets.parts(model)
    rank_of, alpha_of = _patterns(config)
    chosen = {path: flags for path, flags in chosen.items() if not isinstance(maps[path], ExpertLinear | Router)}
    matrices = fused.matrices(model, config.get("target_parameters", []))
    chosen |= matrices
    factors = {}
    for path, flags in chosen.items():
        suffix = ".weight" if path in matrices else ""
        modules = [f"{name}{suffix}" for name in targets.modules(model, path)]
        ranks = tuple(int(rank_of(name)) if on else 0 for name, on in zip(modules, flags, strict=True))
        variant = variant_of(maps[path], config)
        arrays = variant.arrays(maps[path], max(ranks))
        values: dict[str, Any] = {field: np.zeros(shape, np.float32) for field, (shape, _) in arrays.items()}
        factors[path] = Factors(variant, values, ranks, tuple(float(alpha_of(name)) for name in modules))
    tie = bool(config.get("ensure_weight_tying")) and model.lm_head is None
    if tie and targets.embedding(model) in chosen:
        raise UserError(
            "ensure_weight_tying with embed_tokens in target_modules, one update at both ends of tied embeddings, is "
            "not supported."
        )
    copies: dict[ModulePath, Copies] = {}
    for path, flags in saved.items():
        if path in parts:
            copies[path] = _blank(model, path, targets.parameters(parts[path]), flags)
    embedding = targets.embedding(model)
    if TIED_PATH in saved and TIED_PATH not in parts or tie and embedding in saved:
        both = ("embedding",) if tie else ("embedding", TIED_HEAD) if embedding in saved else (TIED_HEAD,)
        copies[embedding] = _blank(model, embedding, both, (True,))
        copies[embedding].tied = tie
    bias = config.get("bias", "none")
    for path, linear in maps.items():
        if (
            bias == "none"
            or not isinstance(linear, Linear)
            or linear.bias is None
            or path in saved
            or (bias == "lora_only" and path not in chosen)
        ):
            continue
        everywhere = (True,) * len(targets.modules(model, path))
        copies[path] = _blank(model, path, ("bias",), chosen[path] if bias == "lora_only" else everywhere)
    if given := config.get("trainable_token_indices"):
        copies |= tokens.blank(model, given)
    return Adapter(factors, copies, config.get("lora_dropout", 0.0), config.get("use_rslora", False))


def _patterns(config: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[str], Any]]:
    """Rank and alpha by a module's name."""
    ranks = targets.by_pattern(config.get("rank_pattern", {}), config["r"], "rank_pattern")
    return ranks, targets.by_pattern(config.get("alpha_pattern", {}), config.get("lora_alpha", 8), "alpha_pattern")


def _blank(model: Decoder, path: ModulePath, fields: tuple[str, ...], layers: targets.Layers) -> Copies:
    """Arrays to read into: the base's own where a layer is left alone."""
    part = targets.part(model, path)
    values: dict[str, Any] = {}
    for field in fields:
        base = getattr(part, "embedding" if field == TIED_HEAD else field)
        of_shapes = all(layers) or isinstance(base[...], jax.core.Tracer)
        values[field] = np.zeros(base.shape, np.float32) if of_shapes else np.array(processes.gather(base[...]), "f4")
    return Copies(values, layers)


def _table(model: Decoder, adapter: Adapter) -> Iterator[_Row]:
    """Every tensor of the adapter's file."""
    maps = targets.maps_of(model)
    for path, factors in adapter.factors.items():
        tensors = factors.variant.tensors(maps[path].in_dims)  # none of experts: see `fused.tensors`
        for layer, module in enumerate(targets.modules(model, path)):
            if factors.ranks[layer]:
                for field, end, kind in tensors:
                    yield _Row(f"{_PREFIX}{module}.{end}", path, field, layer, kind)
    for path, copies in adapter.copies.items():
        ranks = adapter.factors[path].ranks if path in adapter.factors else (0,) * len(copies.layers)
        for field in copies.values:
            keys, kind = targets.tensors(model, path, field)
            for layer, key in enumerate(keys):
                if field in copies.rows:
                    yield _Row(f"{_PREFIX}{key.removesuffix('weight')}{tokens.KEY}", path, field, layer, "table")
                elif copies.layers[layer]:
                    inside = "base_layer." if ranks[layer] and field != TIED_HEAD else ""  # where PEFT wraps the map
                    module, _, last = key.rpartition(".")
                    yield _Row(f"{_PREFIX}{module}.{inside}{last}", path, field, layer, kind)
        if copies.tied:  # the same table, under both names
            yield _Row(f"{_PREFIX}lm_head.weight", path, "embedding", 0, "table")


def _place(model: Decoder, adapter: Adapter, row: _Row) -> np.ndarray:
    """The part of our array that a row's tensor is: a view."""
    part: Any = targets.part(model, row.path)
    factors = adapter.factors.get(row.path)
    if factors is None or row.field not in factors.values:
        array = np.asarray(adapter.copies[row.path].values[row.field])
        return array[row.layer] if targets.is_stacked(part) else array
    _, axes = factors.variant.arrays(part, 1)[row.field]
    index = {"layers": row.layer, "lora_rank": slice(factors.ranks[row.layer])}  # without the zeros of other layers
    chosen: Any = tuple(index.get(axis or "", slice(None)) for axis in axes)
    view: np.ndarray = np.asarray(factors.values[row.field])[chosen]
    return view


def _to_file(model: Decoder, adapter: Adapter, row: _Row) -> np.ndarray:
    return np.ascontiguousarray(hf_names.to_hf(_place(model, adapter, row), row.kind))


def _is_the_bases(model: Decoder, adapter: Adapter, folder: Path, key: str, held: Tensors) -> bool:
    """Whether a tensor only repeats the base's embedding or head, as PEFT's `save_embedding_layers` writes them.

    What it has in the place of rows that are the adapter's own is of no matter: there PEFT writes what it drew.

    Raises:
      UserError: it holds others: the adapter was trained on another vocabulary or embedding.
    """
    hit = _TABLE.fullmatch(key)
    if hit is None:
        return False
    head = model.lm_head if hit[2] == "lm_head" else None
    table: Any = model.embed_tokens.embedding[...] if head is None else head.kernel[...]
    theirs = held[key]
    if theirs.shape == table.shape:
        if isinstance(table, jax.core.Tracer):  # of a model of shapes alone there is nothing to compare
            return True
        others = (theirs.astype(table.dtype) != processes.gather(table)).any(axis=1)
        if set(np.flatnonzero(others).tolist()) <= set(tokens.covered(model, adapter, hit[2])):
            return True
    raise UserError(
        f"{folder}: {key} is another table than the base's, but {CONFIG} does not have {hit[2]} in modules_to_save: "
        "is this adapter of another base model, or of one whose vocabulary was resized?"
    )


def _differs(model: Decoder, wrote: Adapter, found: Adapter) -> str:
    """What is not the same in two adapters, or ""."""
    if (wrote.dropout, wrote.rslora) != (found.dropout, found.rslora):
        return "lora_dropout or use_rslora"
    for what in ("factors", "copies"):
        ours, theirs = getattr(wrote, what), getattr(found, what)
        if ours.keys() != theirs.keys():
            return f"the set of modules ({', '.join(sorted(map(sharding.path_name, ours.keys() ^ theirs.keys())))})"
    for path, one in wrote.factors.items():
        other = found.factors[path]
        alphas = [[a for a, r in zip(f.alphas, f.ranks, strict=True) if r] for f in (one, other)]
        if one.variant is not other.variant or one.ranks != other.ranks or alphas[0] != alphas[1]:
            return f"variant, rank or alpha of {sharding.path_name(path)}"
    for path, held in wrote.copies.items():
        if held.rows != found.copies[path].rows:
            return f"trainable_token_indices of {sharding.path_name(path)}"
    for row in _table(model, wrote):
        if _place(model, wrote, row).tobytes() != _place(model, found, row).tobytes():
            return row.key
    pairs = zip(fused.tensors(model, wrote, _PREFIX), fused.tensors(model, found, _PREFIX), strict=True)
    return next((key for (key, one), (_, other) in pairs if one.tobytes() != other.tobytes()), "")
