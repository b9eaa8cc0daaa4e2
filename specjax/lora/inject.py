"""A fresh adapter: what it touches, its ranks and scales, its first values."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.errors import UserError
from specjax.lora import experts
from specjax.lora import targets as names
from specjax.lora.adapters import (
    DEFAULT,
    Adapter,
    Copies,
    Factors,
    attach,
    check_free,
    factor_shapes,
    is_stacked,
    leading,
)
from specjax.lora.targets import TIED_HEAD, Layers
from specjax.models import Decoder
from specjax.models.layers import Linear
from specjax.models.moe import ExpertLinear

BIASES = ("none", "all", "lora_only")


def inject(
    model: Decoder,
    *,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] = (),
    bias: str = "none",
    ensure_weight_tying: bool = False,
    seed: int = 0,
    name: str = DEFAULT,
) -> None:
    """Adds a fresh adapter to the model and puts it in use.

    y = Wx + s B(A(dropout(x))), s = alpha/rank (alpha/sqrt(rank) for rsLoRA, arXiv:2312.03732), A uniform in
    +-1/sqrt(inputs), B zero, both float32, as PEFT initialises them. The model's output stays the same, bit for bit;
    with DoRA, whose magnitude starts as the weights' norm, up to rounding.

    Args:
      model: changed in place; the base's parameters keep their values.
      rank: of the update.
      alpha: default 2 * rank.
      targets: see `targets.match`.
      dropout: probability that an input of A is dropped while training.
      rslora: rank-stabilised scale.
      dora: train a magnitude of each output beside the update (arXiv:2402.09353).
      rank_pattern: other ranks, by a regular expression for the end of a module's name ("q_proj", "layers.0.*").
      alpha_pattern: other alphas, likewise.
      layers_to_transform: numbers of the layers to touch, where `targets` is a list; default all.
      exclude_modules: linear maps to leave out, given like `targets`.
      modules_to_save: ends of names of modules that train as a whole beside the factors ("embed_tokens", "lm_head",
        "norm" for every norm). The base keeps its own.
      bias: "all" biases train, or those of the targeted maps ("lora_only"), or "none". The base keeps its own.
      ensure_weight_tying: where embeddings are tied, `modules_to_save` trains one table for both ends; otherwise it
        trains the end that it names, and the other stays the base's, as in PEFT.
      seed: of A.
      name: the adapter's name.

    Raises:
      UserError: names that match nothing, a rank below 1, what contradicts itself, or a name in use.
    """
    alpha = 2.0 * rank if alpha is None else float(alpha)
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    for what, value in {"rank": rank, **{f"of rank_pattern {key!r}": value for key, value in ranks.items()}}.items():
        if value < 1:
            raise UserError(f"LoRA rank {value}{what.removeprefix('rank') and ' ' + what}: it must be at least 1.")
    for key, number in {"alpha": alpha, **alphas}.items():
        if number <= 0:
            raise UserError(f"LoRA alpha {number} of {key!r}: it must be above 0.")
    check_free(model, name)
    chosen = names.match(
        model,
        targets,
        exclude=exclude_modules,
        layers=layers_to_transform,
        saved=modules_to_save,
    )
    saved = names.match_saved(model, modules_to_save)
    copies = _copies(model, saved, chosen, bias, ensure_weight_tying)
    touched = [
        m for path, flags in chosen.items() for m, on in zip(names.modules(model, path), flags, strict=True) if on
    ]
    names.check_patterns(ranks, touched, "rank_pattern")
    names.check_patterns(alphas, touched, "alpha_pattern")
    rank_of = names.by_pattern(ranks, rank, "rank_pattern")
    alpha_of = names.by_pattern(alphas, alpha, "alpha_pattern")
    ranks_of, alphas_of = {}, {}
    for path, flags in chosen.items():
        found = names.modules(model, path)
        ranks_of[path] = tuple(int(rank_of(one)) if on else 0 for one, on in zip(found, flags, strict=True))
        alphas_of[path] = tuple(float(alpha_of(one)) for one in found)
    longest = max((math.prod(factor_shapes(model, path, max(ranks_of[path]))[0]) for path in chosen), default=0)
    factors = {path: _fresh(model, path, ranks_of[path], alphas_of[path], dora, seed, longest) for path in chosen}
    experts.check(factors, dropout)
    attach(model, name, Adapter(factors, copies, dropout, rslora))


def _fresh(
    model: Decoder, path: str, ranks: tuple[int, ...], alphas: tuple[float, ...], dora: bool, seed: int, longest: int
) -> Factors:
    """The factors of one map, of whose A none has more than `longest` numbers."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    rank = max(ranks)
    a_shape, b_shape, _ = factor_shapes(model, path, rank)
    linear = names.linears(model)[path]
    lead = leading(linear)
    bound = 1 / math.sqrt(math.prod(a_shape[lead + 1 :]))
    # Drawn with the rank last, whatever order the parameter has: a seed keeps its meaning.
    shape = (*a_shape[:lead], *a_shape[lead + 1 :], rank)
    # A program that draws takes most of a second to compile. So all draw equally many: a key's first numbers are those
    # that it gives for any shape of as many.
    a = jax.random.uniform(key, (longest,), jnp.float32, -bound, bound)[: math.prod(shape)].reshape(shape)
    a = jnp.moveaxis(a, -1, lead)
    if min(ranks) < rank:  # behind a layer's true rank stand zeros, which stay zeros
        true = jnp.arange(rank)[None] < jnp.asarray(ranks)[:, None]
        a = a * true.reshape(len(ranks), *(1,) * (lead - 1), rank, *(1,) * (a.ndim - lead - 1))
    magnitude = base_norms(linear, is_stacked(path)) if dora else None
    return Factors(a, jnp.zeros(b_shape, jnp.float32), magnitude, ranks, alphas)


def base_norms(linear: Linear | ExpertLinear, stacked: bool) -> jax.Array:
    """||W|| over the inputs, float32 [(L,) *out], in which DoRA's magnitude starts; layer by layer."""
    graph, state = nnx.split(linear)
    axes = tuple(range(-linear.in_dims, 0))

    def norm(state: Any) -> jax.Array:
        kernel = nnx.merge(graph, state).kernel[...]
        return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=axes))

    norms: jax.Array = jax.jit(lambda state: jax.lax.map(norm, state) if stacked else norm(state))(state)
    return norms


def _copies(
    model: Decoder, saved: Mapping[str, Layers], chosen: Mapping[str, Layers], bias: str, tie: bool
) -> dict[str, Copies]:
    """The parameters that train as they are: those of whole modules, and biases."""
    parts = names.parts(model)
    if bias not in BIASES:
        raise UserError(f"bias {bias!r}: choose one of {', '.join(BIASES)}.")
    if tie and not (model.config.tied and {"embed_tokens", TIED_HEAD} & set(saved)):
        raise UserError(
            "ensure_weight_tying is for a model whose embeddings are tied and modules_to_save that names one of them: "
            "leave it out."
        )
    both = sorted(
        path for path in saved if any(a and b for a, b in zip(saved[path], chosen.get(path, ()), strict=False))
    )
    if both:
        raise UserError(f"{both[0]} is both in the LoRA targets and in modules_to_save: name it in one of them.")
    found: dict[str, Copies] = {}
    for path, flags in saved.items():
        if path == TIED_HEAD and model.lm_head is None:
            continue
        found[path] = Copies({key: getattr(parts[path], key)[...] for key in names.parameters(parts[path])}, flags)
    if model.lm_head is None and TIED_HEAD in saved or tie:
        found["embed_tokens"] = _tied_copies(model, saved, tie)
    if bias != "none":
        for path, values in _biases(model, chosen if bias == "lora_only" else None, saved).items():
            found[path] = values
    return found


def _tied_copies(model: Decoder, saved: Mapping[str, Layers], tie: bool) -> Copies:
    table: Any = model.embed_tokens.embedding[...]
    if tie:
        return Copies({"embedding": table}, (True,), tied=True)
    return Copies(
        {key: table for key in ("embedding", TIED_HEAD) if key == TIED_HEAD or "embed_tokens" in saved}, (True,)
    )


def _biases(model: Decoder, chosen: Mapping[str, Layers] | None, saved: Mapping[str, Layers]) -> dict[str, Copies]:
    """Copies of the biases of the chosen maps, or of all."""
    found = {}
    for path, linear in names.linears(model).items():
        if not isinstance(linear, Linear) or linear.bias is None or (chosen is not None and path not in chosen):
            continue
        if path in saved:
            raise UserError(f"{path} is in modules_to_save, which trains its bias too: use bias 'none' or 'lora_only'.")
        flags = (True,) * len(names.modules(model, path)) if chosen is None else chosen[path]
        found[path] = Copies({"bias": linear.bias[...]}, flags)
    if not found:
        which = "linear maps of this model have" if chosen is None else "targeted linear maps have"
        raise UserError(f"bias is set to train, but the {which} none: leave it at 'none'.")
    return found
