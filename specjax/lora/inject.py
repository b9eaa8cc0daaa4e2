"""A fresh adapter: what it touches, its ranks and scales, its first values."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sharding
from specjax.errors import UserError, argument, nearest
from specjax.lora import fused, tokens
from specjax.lora import targets as targets_lib
from specjax.lora.adapters import DEFAULT, Adapter, Copies, Factors, attach, check_free
from specjax.lora.targets import TIED_HEAD, TIED_PATH, Layers
from specjax.lora.variants import PISSA, variant_of
from specjax.models import Decoder
from specjax.models.adapter import Path
from specjax.models.layers import Linear
from specjax.models.quantised import Quantised
from specjax.models.stack import Member

BIASES = ("none", "all", "lora_only")
INITS = ("", "pissa")


def inject(
    model: Decoder,
    *,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: str = "",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] = (),
    trainable_token_indices: tokens.Given = (),
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
      init: "" as above; "pissa" from the largest singular parts of each map's weights (arXiv:2404.02948), as PEFT's
        `init_lora_weights="pissa"` starts them, without changing the base (`variants.pissa`); it is saved as plain LoRA
        of twice the rank.
      rank_pattern: other ranks, by a regular expression for the end of a module's name ("q_proj", "layers.0.*").
      alpha_pattern: other alphas, likewise.
      layers_to_transform: numbers of the layers to touch, where `targets` is a list; default all.
      exclude_modules: linear maps to leave out, given like `targets`.
      modules_to_save: ends of names of modules that train as a whole beside the factors ("embed_tokens", "lm_head",
        "norm" for every norm). The base keeps its own.
      trainable_token_indices: ids whose rows of the embedding train, and of a tied output layer with it; or names with
        their ids, {"embed_tokens": [...], "lm_head": [...]}. The base keeps its own.
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
    for key, value in {"rank": rank, **{f"rank_pattern.{key}": value for key, value in ranks.items()}}.items():
        if value < 1:
            raise UserError(f"{argument(key)} is {value}: it must be at least 1.")
    for key, number in {"alpha": alpha, **{f"alpha_pattern.{key}": value for key, value in alphas.items()}}.items():
        if number <= 0:
            raise UserError(f"{argument(key)} is {number}: it must be above 0.")
    check_free(model, name)
    chosen = targets_lib.match(
        model,
        targets,
        exclude=exclude_modules,
        layers=layers_to_transform,
        saved=modules_to_save,
    )
    saved = targets_lib.match_saved(model, modules_to_save)
    copies = _copies(model, saved, chosen, bias, ensure_weight_tying)
    if trainable_token_indices:
        copies |= tokens.fresh(model, trainable_token_indices, {*saved, *chosen})
    shapes = _shapes(model, chosen, (rank, ranks), (alpha, alphas))
    if init not in INITS:
        offered = ", ".join(map(repr, INITS))
        raise UserError(f"{argument('init')} is {init!r}: choose one of {offered}.{nearest(init, INITS)}")
    factors = _principal(model, shapes, dora, rslora) if init else _fresh(model, shapes, {"use_dora": dora}, seed)
    fused.check(model, factors, dropout, dora)
    attach(model, name, Adapter(factors, copies, dropout, rslora))


def _shapes(
    model: Decoder,
    chosen: Mapping[Path, Layers],
    rank: tuple[int, Mapping[str, int]],
    alpha: tuple[float, Mapping[str, float]],
) -> dict[Path, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Rank (0: left alone) and alpha of each layer of the chosen maps; `rank`, `alpha`: the usual one, patterns."""
    modules = {path: targets_lib.modules(model, path) for path in chosen}
    touched = [name for path, flags in chosen.items() for name, on in zip(modules[path], flags, strict=True) if on]
    targets_lib.check_patterns(rank[1], touched, argument("rank_pattern"))
    targets_lib.check_patterns(alpha[1], touched, argument("alpha_pattern"))
    rank_of = targets_lib.by_pattern(rank[1], rank[0], argument("rank_pattern"))
    alpha_of = targets_lib.by_pattern(alpha[1], alpha[0], argument("alpha_pattern"))
    return {
        path: (
            tuple(int(rank_of(name)) if on else 0 for name, on in zip(modules[path], flags, strict=True)),
            tuple(float(alpha_of(name)) for name in modules[path]),
        )
        for path, flags in chosen.items()
    }


def _fresh(
    model: Decoder,
    shapes: Mapping[Path, tuple[tuple[int, ...], tuple[float, ...]]],
    settings: Mapping[str, Any],
    seed: int,
) -> dict[Path, Factors]:
    """First values of the maps' factors, by the ranks and alphas of their layers and PEFT's keys for the variant."""
    maps = targets_lib.maps_of(model)
    variants = {path: variant_of(maps[path], settings) for path in shapes}
    # A program that draws takes most of a second to compile. So all draw equally many: a key's first numbers are those
    # that it gives for any shape of as many.
    longest = max(variants[path].drawn(maps[path], max(ranks)) for path, (ranks, _) in shapes.items())
    factors = {}
    for path, (ranks, alphas) in shapes.items():
        # What a seed means: the dotted name of the map decides.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(sharding.seed_name(path).encode()))

        def draw(shape: tuple[int, ...], bound: float, key: Any = key) -> Any:
            drawn: Any = jax.random.uniform(key, (longest,), jnp.float32, -bound, bound)
            # Turned about on the host: in JAX each shape would be programs to compile.
            drawn = drawn if isinstance(drawn, jax.core.Tracer) else np.asarray(drawn)
            return drawn[: math.prod(shape)].reshape(shape)

        values = variants[path].init(maps[path], ranks, draw)
        factors[path] = Factors(variants[path], values, ranks, alphas)
    return factors


def _principal(
    model: Decoder, shapes: Mapping[Path, tuple[tuple[int, ...], tuple[float, ...]]], dora: bool, rslora: bool
) -> dict[Path, Factors]:
    """First values of PiSSA's factors.

    Raises:
      UserError: DoRA, experts, a quantised base, or a rank above the number of a map's singular values.
    """
    if dora:
        raise UserError(f"{argument('init')} is 'pissa', which does not go with {argument('dora')}: leave one out.")
    maps, factors = targets_lib.maps_of(model), {}
    for path, (ranks, alphas) in shapes.items():
        linear, name = maps[path], sharding.path_name(path)
        if not isinstance(linear, Linear) or isinstance(linear.kernel, Quantised):
            what = "is quantised" if isinstance(linear, Linear) else "is of experts or an embedding"
            raise UserError(
                f"{argument('init')} is 'pissa', but {name} {what}: name other {argument('targets')}, or leave "
                f"{argument('init')} out."
            )
        inputs = math.prod(linear.kernel.shape[-linear.in_dims :])
        outputs = math.prod(linear.kernel.shape[int(targets_lib.is_stacked(linear)) : -linear.in_dims])
        if max(ranks) > min(inputs, outputs):
            raise UserError(
                f"{argument('rank')} is {max(ranks)}, but {name} has {min(inputs, outputs)} singular values, which "
                f"{argument('init')}='pissa' starts from: give a smaller rank."
            )
        scales = Member(0, ranks, alphas, 0.0, rslora).scales
        factors[path] = Factors(PISSA, PISSA.start(linear, ranks, scales), ranks, alphas)
    return factors


def _copies(
    model: Decoder, saved: Mapping[Path, Layers], chosen: Mapping[Path, Layers], bias: str, tie: bool
) -> dict[Path, Copies]:
    """The parameters that train as they are: those of whole modules, and biases."""
    parts, embedding = targets_lib.parts(model), targets_lib.embedding(model)
    if bias not in BIASES:
        raise UserError(f"{argument('bias')} {bias!r}: choose one of {', '.join(BIASES)}.")
    if tie and not (model.config.tied and {embedding, TIED_PATH} & set(saved)):
        raise UserError(
            f"{argument('ensure_weight_tying')} is for a model whose embeddings are tied and "
            f"{argument('modules_to_save')} that names one of them: leave it out."
        )
    both = sorted(
        path for path in saved if any(a and b for a, b in zip(saved[path], chosen.get(path, ()), strict=False))
    )
    if both:
        raise UserError(
            f"{sharding.path_name(both[0])} is both in {argument('targets')} and in {argument('modules_to_save')}: "
            "name it in one of them."
        )
    copies: dict[Path, Copies] = {}
    for path, flags in saved.items():
        if path in parts:
            own = targets_lib.parameters(parts[path])
            copies[path] = Copies({key: getattr(parts[path], key)[...] for key in own}, flags)
    if TIED_PATH in saved and TIED_PATH not in parts or tie:
        copies[embedding] = _tied_copies(model, embedding in saved, tie)
    if bias != "none":
        copies |= _biases(model, bias, chosen, saved)
    return copies


def _tied_copies(model: Decoder, both: bool, tie: bool) -> Copies:
    """Those of an embedding whose output end is saved; `both`: its input end too; `tie`: as one table."""
    table: Any = model.embed_tokens.embedding[...]
    if tie:
        return Copies({"embedding": table}, (True,), tied=True)
    return Copies({key: table for key in ("embedding", TIED_HEAD) if key == TIED_HEAD or both}, (True,))


def _biases(
    model: Decoder, bias: str, chosen: Mapping[Path, Layers], saved: Mapping[Path, Layers]
) -> dict[Path, Copies]:
    """Copies of the biases of the chosen maps, or of all."""
    copies: dict[Path, Copies] = {}
    for path, linear in targets_lib.linears(model).items():
        if not isinstance(linear, Linear) or linear.bias is None or (bias == "lora_only" and path not in chosen):
            continue
        if path in saved:
            raise UserError(
                f"{sharding.path_name(path)} is in {argument('modules_to_save')}, which trains its bias too: set "
                f"{argument('bias')} to 'none' or 'lora_only'."
            )
        flags = (True,) * len(targets_lib.modules(model, path)) if bias == "all" else chosen[path]
        copies[path] = Copies({"bias": linear.bias[...]}, flags)
    if not copies:
        which = "linear maps of this model have" if bias == "all" else "targeted linear maps have"
        raise UserError(f"{argument('bias')} is {bias!r}, but the {which} none: leave it at 'none'.")
    return copies
