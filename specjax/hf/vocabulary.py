"""Tokens beyond those of a model's files: in its tokenizer, and as rows of its embedding and its output layer.

V rows, D embed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import AddedToken

from specjax import sharding
from specjax.errors import UserError, argument, nearest
from specjax.models import Decoder, ModelConfig
from specjax.values import shown


def add_tokens(model: Decoder, tokenizer: Any, tokens: Sequence[str] = (), words: Sequence[str] = ()) -> list[int]:
    """Gives a tokenizer further tokens and a model rows for them, both changed in place: see `extend` and `grow`.

    Returns:
      The ids of `tokens`, then of `words`; an adapter trains their rows by `trainable_token_indices`.

    Raises:
      UserError: what these raise.
    """
    ids = extend(tokenizer, tokens, words)
    grow(model, rows_for(ids, model.config))
    return ids


def extend(tokenizer: Any, tokens: Sequence[str] = (), words: Sequence[str] = ()) -> list[int]:
    """Adds tokens to a tokenizer, each of which is one token from then on, wherever it stands in a text.

    One that is a piece of the vocabulary keeps its id; one that had been added already stays as it is.

    Args:
      tokenizer: of transformers; changed in place.
      tokens: special ones, such as `<|im_start|>`, which are left out of what a model's answer says.
      words: others, such as the words of a domain.

    Returns:
      The ids of `tokens`, then of `words`.

    Raises:
      UserError: one is empty, or is named twice.
    """
    everything = [*tokens, *words]
    for place, token in enumerate(everything):
        name = argument("add_tokens" if place < len(tokens) else "add_words")
        if not isinstance(token, str) or not token.strip():
            raise UserError(f"{name} holds {token!r}: a token is a text that is not empty.")
        if token in everything[:place]:
            raise UserError(f"{name} holds {token!r}, which is named twice: name each token once.")
    held = tokenizer.get_added_vocab()
    for special, named in ((True, tokens), (False, words)):
        # Not normalised: what a tokenizer does to a text before it is cut would hide a token from it (Llama 2's).
        new = [AddedToken(token, special=special, normalized=False) for token in named if token not in held]
        tokenizer.add_tokens(new, special_tokens=special)
    return [int(token) for token in tokenizer.convert_tokens_to_ids(everything)]


def rows_for(ids: Sequence[int], config: ModelConfig, multiple: int = 1) -> int:
    """The rows of a model that has one for each of the ids: its own where they suffice, else up to a multiple.

    Raises:
      UserError: the model has a second embedding, which is not enlarged (Gemma 4's per-layer embeddings).
    """
    needed = max(ids, default=-1) + 1
    if needed <= config.vocab_size:
        return config.vocab_size
    if config.per_layer:
        raise UserError(
            f"{argument('add_tokens')} needs rows beyond the model's {config.vocab_size}, and its per-layer embeddings "
            "have a table of their own, which is not enlarged: name tokens that it has rows for."
        )
    return -(-needed // multiple) * multiple


def grow(model: Decoder, rows: int) -> None:
    """Appends rows to the embedding and to an untied output layer, each the mean of that table's rows.

    transformers' `resize_token_embeddings` draws them around that mean, with 1e-9 of the rows' covariance; here nothing
    is drawn. `model.config` and the `config.json` of an export say the new number.

    Args:
      model: without adapters; changed in place.
      rows: V from then on, at least as many as there are.

    Raises:
      UserError: there are more, an adapter is loaded, or the mesh cannot split so many.
    """
    old = model.config.vocab_size
    if rows < old:
        raise UserError(f"the vocabulary has {old} rows, and {rows} are asked for: none are taken away.")
    if rows == old:
        return
    if any(model.adapters):
        raise UserError("the model wears adapters, which know its vocabulary: add the tokens before they are loaded.")
    mesh = sharding.mesh_of(model.embed_tokens.embedding[...])
    ways = 1 if mesh is None else sharding.ways(mesh, sharding.RULES["vocab"])
    if rows % ways:
        raise UserError(
            f"{rows} rows of the vocabulary cannot be split {ways} ways over mesh axis tensor: set "
            f"{argument('pad_to_multiple_of')} to a multiple of {ways}."
        )
    tables: dict[str, tuple[Any, str]] = {"embed_tokens.embedding": (model.embed_tokens, "embedding")}
    if model.lm_head is not None:
        tables["lm_head.kernel"] = (model.lm_head, "kernel")
    for name, (module, parameter) in tables.items():
        leaf = getattr(module, parameter)
        axes = leaf.get_metadata("axes")
        place = None if mesh is None else sharding.named_sharding(mesh, axes, (rows, *leaf.shape[1:]), name)
        setattr(module, parameter, nnx.Param(_enlarged(rows - old, place)(leaf[...]), axes=axes))
    model.config = dataclasses.replace(model.config, vocab_size=rows)
    model.origin = dataclasses.replace(model.origin, config_json=resized(model.origin.config_json, rows))


def _enlarged(count: int, place: Any) -> Any:
    def enlarged(table: jax.Array) -> jax.Array:
        mean = jnp.mean(table.astype(jnp.float32), axis=0, keepdims=True).astype(table.dtype)
        return jnp.concatenate([table, jnp.broadcast_to(mean, (count, table.shape[1]))])

    return jax.jit(enlarged, out_shardings=place)


def resized(told: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A `config.json` that says so many rows, also where a multimodal checkpoint says it of its language model."""
    made = dict(told)
    if isinstance(made.get("text_config"), dict):
        made["text_config"] = made["text_config"] | {"vocab_size": rows}
    if "vocab_size" in made or "text_config" not in made:
        made["vocab_size"] = rows
    return made


def ids_of(tokenizer: Any, named: Sequence[int | str]) -> list[int]:
    """The ids of tokens that are given as ids or as their texts.

    Raises:
      UserError: a text is no token.
    """
    vocabulary = tokenizer.get_vocab()
    for one in named:
        if isinstance(one, str) and one not in vocabulary:
            raise UserError(
                f"{argument('trainable_token_indices')} names {shown(one)}, which is no token of the tokenizer: add it "
                f"by {argument('add_tokens')}, or give ids.{nearest(one, tokenizer.get_added_vocab())}"
            )
    return [vocabulary[one] if isinstance(one, str) else int(one) for one in named]
