"""Rows of the embedding and of the output layer that an adapter trains: PEFT's `trainable_token_indices`.

The rows stand in the place of the base's. Those of a tied embedding stand at both its ends, unless the output layer is
given rows of its own. Source: `set_additional_trainable_modules` in peft/utils/other.py, version 0.21.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from specjax import sharding
from specjax.errors import UserError, argument, nearest
from specjax.lora import targets
from specjax.lora.adapters import Adapter, Copies
from specjax.lora.targets import TIED_HEAD, TIED_PATH
from specjax.models import Decoder
from specjax.models.adapter import Path
from specjax.values import shown

Given = Sequence[int] | Mapping[str, Sequence[int]]  # ids of the embedding, or by the module's name
Places = dict[Path, dict[str, tuple[int, ...]]]  # by path and parameter, the ids of the rows
KEY = "token_adapter.trainable_tokens_delta"  # in PEFT's files, behind the module's name


def match(model: Decoder, given: Given) -> Places:
    """Which rows of which parameters are meant; of a tied output layer under `TIED_HEAD`, where they are its own.

    Raises:
      UserError: a module that is neither the embedding nor the output layer, ids that have no row, or one named twice.
    """
    embedding = targets.embedding(model)
    (name,), found = targets.modules(model, embedding), dict[str, tuple[int, ...]]()
    for module, ids in (given if isinstance(given, Mapping) else {name: given}).items():
        end = next((end for end in (name, TIED_HEAD) if end.endswith(module) and module), None)
        if end is None or end in found:
            raise UserError(
                f"{argument('trainable_token_indices')} names {shown(module)}: name embed_tokens or lm_head, or both, "
                f"once.{nearest(str(module), ('embed_tokens', TIED_HEAD))}"
            )
        found[end] = _checked(model, ids)
    ends = [found.get(name), found.get(TIED_HEAD)]
    if model.lm_head is None:
        tied = {"embedding": ends[0], TIED_HEAD: ends[1] if ends[1] != ends[0] else None}
        return {embedding: {parameter: ids for parameter, ids in tied.items() if ids}}
    apart = {embedding: {"embedding": ends[0]}, TIED_PATH: {"kernel": ends[1]}}
    return {path: {key: ids for key, ids in one.items() if ids} for path, one in apart.items() if any(one.values())}


def _checked(model: Decoder, ids: Sequence[int]) -> tuple[int, ...]:
    rows, what = model.config.vocab_size, argument("trainable_token_indices")
    if not ids:
        raise UserError(f"{what} is empty: name ids, or leave it out.")
    seen = set[int]()
    for one in ids:
        if not 0 <= one < rows:
            raise UserError(
                f"{what} has {one}, and the model has rows for 0 to {rows - 1}: where tokens were added, give it their "
                f"rows first ({argument('add_tokens')})."
            )
        if one in seen:
            raise UserError(f"{what} has {one} twice: name each id once.")
        seen.add(one)
    return tuple(int(one) for one in ids)


def fresh(model: Decoder, given: Given, taken: Collection[Path]) -> dict[Path, Copies]:
    """Rows that start as the base's.

    Args:
      model: which it will be put on.
      given: see `match`.
      taken: modules that the adapter has factors for, or trains whole.

    Raises:
      UserError: what `match` raises, or a module that is taken.
    """
    found = match(model, given)
    ends = {*found, TIED_PATH} if model.lm_head is None else set(found)
    if both := sorted(map(sharding.path_name, ends & set(taken))):
        raise UserError(
            f"{argument('trainable_token_indices')} trains rows of {both[0]}, or of what is tied to it, and so do "
            f"{argument('targets')} or {argument('modules_to_save')}: name it in one of them."
        )

    def rows(path: Path, parameter: str, ids: tuple[int, ...]) -> Any:
        part = targets.part(model, path)
        return getattr(part, "embedding" if parameter == TIED_HEAD else parameter)[...][np.asarray(ids)]

    return {path: _copies(path, one, rows) for path, one in found.items()}


def blank(model: Decoder, given: Given) -> dict[Path, Copies]:
    """Rows of zeros, to read a file into."""
    width = model.config.embed_dim
    return {
        path: _copies(path, one, lambda _, __, ids: np.zeros((len(ids), width), np.float32))
        for path, one in match(model, given).items()
    }


def _copies(path: Path, one: dict[str, tuple[int, ...]], rows: Any) -> Copies:
    values = {parameter: rows(path, parameter, ids) for parameter, ids in one.items()}
    return Copies(values, (True,), rows=one)


def covered(model: Decoder, adapter: Adapter, end: str) -> tuple[int, ...]:
    """The rows of "embed_tokens" or "lm_head" in whose place an adapter's own stand."""
    held = adapter.copies.get(TIED_PATH if end == TIED_HEAD and model.lm_head is not None else targets.embedding(model))
    if held is None:
        return ()
    own = {"embed_tokens": "embedding", TIED_HEAD: TIED_HEAD if model.lm_head is None else "kernel"}[end]
    both = own == TIED_HEAD and own not in held.values
    return held.rows.get("embedding" if both else own, ())


def written(adapter: Adapter) -> list[int] | dict[str, list[int]] | None:
    """What PEFT's config says of an adapter's rows."""
    found = {"embed_tokens" if key == "embedding" else TIED_HEAD: list(ids) for key, ids in _all(adapter).items()}
    return found["embed_tokens"] if list(found) == ["embed_tokens"] else found or None


def _all(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {key: ids for copies in adapter.copies.values() for key, ids in copies.rows.items()}
