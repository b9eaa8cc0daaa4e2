"""LoRA on a mixture of experts, as PEFT's files hold it: factors of two fused parameters and of the router.

PEFT knows the experts of a layer as two parameters, `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F], whose factors
lie in one matrix each: A [R*E, in], expert by expert, and B [out, R*E], rank by rank. Ours are three maps, a [L,E,R,in]
and b [L,E,out,R] each. So gate and up of rank r are one update of rank 2r there, B block-diagonal (what PEFT makes of
"all-linear": rank and alpha doubled); an update that PEFT trained is dense, and gate and up share its A.

A router is a parameter too, and so is a dense layer's MLP map in a model with experts: PEFT takes `target_modules` that
end in gate_proj, up_proj or down_proj for the experts' in every layer, and would drop the dense layer's.
Source: `ParamWrapper` in peft/tuners/lora/layer.py, peft/utils/transformers_weight_conversion.py, version 0.21.

E experts, F mlp, D embed, L layers, R rank.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from specjax import sharding
from specjax.errors import UserError
from specjax.lora.adapters import Adapter, Factors
from specjax.lora.targets import Layers, maps_of, modules
from specjax.lora.variants import ExpertLoRA, variant_of
from specjax.models import Decoder
from specjax.models.adapter import Path
from specjax.models.experts import ExpertLinear
from specjax.models.moe import Router
from specjax.values import shown

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def check(model: Decoder, factors: Mapping[Path, Factors], dropout: float, dora: bool) -> None:
    """Raises `UserError` for an adapter on experts or router that PEFT's files cannot hold."""
    maps = maps_of(model)
    single = by_parameter(model)
    touched = [path for path in factors if isinstance(maps[path], ExpertLinear) or path in single]
    if not touched:
        return
    if dropout or dora:
        dense = not isinstance(maps[touched[0]], ExpertLinear | Router)
        what = "the MLP of a dense layer in a model with experts" if dense else "a mixture of experts"
        raise UserError(
            f"{sharding.path_name(touched[0])} is part of {what}, where PEFT has neither dropout nor "
            "DoRA: leave those out, or target the attention's maps alone."
        )
    for fused in FUSED.values():
        wanted = [path for path, one in maps.items() if isinstance(one, ExpertLinear) and path[-1] in fused]
        held = [factors[path] for path in wanted if path in factors]
        ranks = {rank for one in held for rank in one.ranks}
        alphas = {alpha for one in held for alpha in one.alphas}
        if held and (len(held) < len(wanted) or len(ranks) > 1 or len(alphas) > 1):
            raise UserError(
                f"{' and '.join(fused)} of the experts must be targeted together, in every layer, with one rank and "
                "alpha: PEFT holds them in one tensor."
            )


def by_parameter(model: Decoder) -> dict[Path, list[str]]:
    """The maps of one matrix that PEFT must know by their parameter, with its name in each layer."""
    maps = maps_of(model)
    experts = {path[-1] for path, one in maps.items() if isinstance(one, ExpertLinear)}
    return {
        path: [f"{name}.weight" for name in modules(model, path)]
        for path, one in maps.items()
        if isinstance(one, Router) or (path[-1] in experts and not isinstance(one, ExpertLinear))
    }


def matrices(model: Decoder, wanted: list[str]) -> dict[Path, Layers]:
    """Which of `by_parameter` PEFT's `target_parameters` names, and in which layers."""
    flags = {
        path: tuple(any(_names(one, name) for one in wanted) for name in known)
        for path, known in by_parameter(model).items()
    }
    return {path: layers for path, layers in flags.items() if any(layers)}


def parameters(model: Decoder, wanted: list[str]) -> set[str]:
    """Which of `gate_up_proj` and `down_proj` PEFT's `target_parameters` names.

    Raises:
      UserError: one names no parameter here, or the experts' of some layers only.
    """
    found = set()
    layers = _layers(model)
    if wanted and model.config.clamp is not None:
        raise UserError(
            f"target_parameters {shown(wanted[0])}: no adapter goes on gpt-oss' experts or router here; target its "
            "attention's maps, as PEFT's 'all-linear' does."
        )
    for one in wanted:
        hits = {known: [_names(one, _name(layer, known)) for layer in layers] for known in FUSED}
        if not (matrices(model, [one]) or any(map(any, hits.values()))) or any(
            any(hit) and not all(hit) for hit in hits.values()
        ):
            raise UserError(
                f"target_parameters {shown(one)} names no parameter of a mixture of experts in this model, or not in "
                "every layer of it."
            )
        found |= {known for known, hit in hits.items() if any(hit)}
    return found


def _names(wanted: str, name: str) -> bool:
    """Whether an entry of `target_parameters` names a parameter: by its name or the end of it."""
    return name == wanted or name.endswith(f".{wanted}")


def _layers(model: Decoder) -> list[int]:
    """The numbers of the layers with experts."""
    spans = zip(model.config.segments, model.config.spans, strict=True)
    return [layer for segment, span in spans if segment.block == "experts" for layer in span]


def _name(layer: int, parameter: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{parameter}"


def settings(model: Decoder, adapter: Adapter) -> tuple[dict[str, int], dict[str, float], list[str]]:
    """Rank and alpha of each targeted parameter, by PEFT's name in every layer, and `target_parameters`."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    targets: list[str] = []
    maps = maps_of(model)
    for path, known in by_parameter(model).items():
        if path not in adapter.factors:
            continue
        factors = adapter.factors[path]
        for name, rank, alpha in zip(known, factors.ranks, factors.alphas, strict=True):
            if rank:
                ranks[name], alphas[name] = rank, alpha
        everywhere = isinstance(maps[path], Router) and all(factors.ranks)  # no other module is called "gate"
        targets += ["gate.weight"] if everywhere else [name for name in known if name in ranks]
    for parameter in FUSED:
        held = _held(adapter.factors, parameter)
        if held:
            targets.append(parameter)
            own, fused = held[0].ranks[0], _fused_rank(held)
            alpha = held[0].alphas[0] * (math.sqrt(fused / own) if adapter.rslora else fused / own)
            for layer in _layers(model):
                ranks[_name(layer, parameter)], alphas[_name(layer, parameter)] = fused, alpha
    return ranks, alphas, targets


def tensors(model: Decoder, adapter: Adapter, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file that holds the experts' factors."""
    both = all(_held(adapter.factors, parameter) for parameter in FUSED)
    for parameter in FUSED:
        held = _held(adapter.factors, parameter)
        for place, layer in enumerate(_layers(model) if held else ()):
            a, b = _fuse(held, place)
            rows = {
                "A": a.reshape(-1, a.shape[2]),
                "B": b.transpose(1, 2, 0).reshape(b.shape[1], -1),
            }
            for letter, value in rows.items():
                yield _key(both, prefix, parameter, layer, letter), np.ascontiguousarray(value)


def _fuse(held: list[Factors], place: int) -> tuple[np.ndarray, np.ndarray]:
    """A [E, R, in] and B [E, out, R] of one layer's fused parameter, by its place among the layers with experts."""
    a, b = ([np.asarray(one.values[letter])[place] for one in held] for letter in "ab")
    if _fused_rank(held) == held[0].ranks[0]:
        return a[0], np.concatenate(b, axis=1)
    gate, up = b
    blocks = np.concatenate(
        [np.concatenate([gate, np.zeros_like(gate)], axis=-1), np.concatenate([np.zeros_like(up), up], axis=-1)], axis=1
    )
    return np.concatenate(a, axis=1), blocks


def read(
    model: Decoder,
    wanted: set[str],
    held: Mapping[str, np.ndarray],
    prefix: str,
    rank_of: Callable[[str], Any],
    alpha_of: Callable[[str], Any],
    rslora: bool,
) -> tuple[dict[Path, Factors], set[str]]:
    """The experts' factors of a file, by our paths, and the tensors that they were read from.

    Raises:
      UserError: a tensor is missing or has another shape, or layers differ in rank or alpha.
    """
    found: dict[Path, Factors] = {}
    keys: set[str] = set()
    layers = _layers(model)
    both = set(FUSED) <= wanted
    for parameter in sorted(set(FUSED) & wanted):
        ranks, alphas = ({of(_name(layer, parameter)) for layer in layers} for of in (rank_of, alpha_of))
        if len(ranks) > 1 or len(alphas) > 1:
            raise UserError(f"{parameter} of the experts has another rank or alpha in some layers: not supported.")
        pairs = []
        for layer in layers:
            at = [_key(both, prefix, parameter, layer, letter) for letter in "AB"]
            keys |= set(at)
            pairs.append(_layer(model, parameter, ranks.copy().pop(), held, at))
        a, b = (np.stack(each) for each in zip(*pairs, strict=True))
        found |= _maps(model, parameter, a, b, float(alphas.pop()), rslora)
    return found, keys


def _layer(
    model: Decoder, parameter: str, rank: int, held: Mapping[str, np.ndarray], keys: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """A [E, R, in] and B [E, out, R] of one layer's fused parameter."""
    count = model.config.num_experts
    kernels = [segments[0][1].kernel for segments in _maps_of(model, parameter)]
    size, out = kernels[0].shape[3], sum(kernel.shape[2] for kernel in kernels)
    for key, shape in zip(keys, ((rank * count, size), (out, rank * count)), strict=True):
        if key not in held:
            raise UserError(f"tensor {key} is missing, though target_parameters names its parameter.")
        if held[key].shape != shape:
            raise UserError(f"tensor {key} is {list(held[key].shape)} where {list(shape)} is needed.")
    a, b = (held[key].astype(np.float32) for key in keys)
    return a.reshape(count, rank, size), b.reshape(out, rank, count).transpose(2, 0, 1)


def _maps_of(model: Decoder, parameter: str) -> list[list[tuple[Path, ExpertLinear]]]:
    """Our maps that PEFT has as one parameter, in its order, each as its modules, one per segment, by path."""
    maps = [(path, one) for path, one in sorted(maps_of(model).items()) if isinstance(one, ExpertLinear)]
    return [[(path, one) for path, one in maps if path[-1] == name] for name in FUSED[parameter]]


def _maps(
    model: Decoder, parameter: str, a: np.ndarray, b: np.ndarray, alpha: float, rslora: bool
) -> dict[Path, Factors]:
    """The fused update, a [L,E,R,in] and b [L,E,out,R], as those of our maps."""
    maps, rank = _maps_of(model, parameter), a.shape[2]
    half, first = rank // 2, maps[0][0][1].kernel.shape[2]
    blocks = not b[:, :, first:, :half].any() and not b[:, :, :first, half:].any()
    apart = len(maps) > 1 and rank % 2 == 0 and blocks  # as we write it: gate and up have updates of their own
    if apart:
        alpha = round(alpha / (math.sqrt(2) if rslora else 2), 12)
    result: dict[Path, Factors] = {}
    for number, segments in enumerate(maps):
        rows = slice(number * half, (number + 1) * half) if apart else slice(0, rank)
        columns = slice(number * first, (number + 1) * first)
        start = 0
        for path, linear in segments:
            layers = linear.kernel.shape[0]
            here, start = slice(start, start + layers), start + layers
            values = {"a": np.ascontiguousarray(a[here, :, rows]), "b": np.ascontiguousarray(b[here, :, columns, rows])}
            ranks = (values["a"].shape[2],) * layers
            result[path] = Factors(variant_of(linear, {}), values, ranks, (alpha,) * layers)
    return result


def _held(factors: Mapping[Path, Factors], parameter: str) -> list[Factors]:
    """The factors of our maps that PEFT has as one parameter, each with the layers of all segments."""
    of_experts = [(path[-1], one) for path, one in sorted(factors.items()) if isinstance(one.variant, ExpertLoRA)]
    maps = [[one for last, one in of_experts if last == name] for name in FUSED[parameter]]
    return [_joined(segments) for segments in maps if segments]


def _joined(segments: list[Factors]) -> Factors:
    """The layers of several segments, whose ranks are equal, one after another."""
    if len(segments) == 1:
        return segments[0]
    values = {field: np.concatenate([one.values[field] for one in segments]) for field in segments[0].values}
    ranks, alphas = (sum((getattr(one, name) for one in segments), ()) for name in ("ranks", "alphas"))
    return Factors(segments[0].variant, values, ranks, alphas)


def _fused_rank(held: list[Factors]) -> int:
    """The rank of the fused update: gate's alone where gate and up share A."""
    shared = len(held) < 2 or np.array_equal(np.asarray(held[0].values["a"]), np.asarray(held[1].values["a"]))
    return held[0].ranks[0] if shared else sum(one.ranks[0] for one in held)


def _key(both: bool, prefix: str, parameter: str, layer: int, letter: str) -> str:
    """PEFT wraps the experts once a parameter, gate_up_proj inside: it is the base layer where both are targeted."""
    inside = "base_layer." if both and parameter == "gate_up_proj" else ""
    return f"{prefix}model.layers.{layer}.mlp.experts.{inside}lora_{letter}.weight"
