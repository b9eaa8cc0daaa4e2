"""Which modules, and which of their layers, an adapter touches: names and patterns as PEFT matches them.

A map that is stacked here is one module a layer for PEFT. So a match is a tuple of flags, one a layer (one alone for a
module that is not stacked). Source: `check_target_module_exists` in peft/tuners/tuners_utils.py, `_set_trainable` and
`get_pattern_key` in peft/utils/other.py, version 0.21.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from specjax import sharding
from specjax.errors import UserError, argument, nearest
from specjax.hf import multimodal
from specjax.hf import names as hf_names
from specjax.models import Decoder
from specjax.models.adapter import Adaptable, Path, adaptables
from specjax.models.experts import ExpertLinear
from specjax.models.layers import Embed, Linear
from specjax.models.moe import Router
from specjax.sandbox import Pattern
from specjax.values import shown

Layers = tuple[bool, ...]
TIED_HEAD = "lm_head"  # the name of a tied output layer among the copies of the embedding
TIED_PATH: Path = (TIED_HEAD,)  # and among the modules that are matched, where it is none
_PARAMETERS = ("kernel", "bias", "scale", "embedding")


def parts(model: Decoder) -> dict[Path, Adaptable]:
    """The modules that can wear an adapter, by path (("layers", 0, "mlp", "up_proj"): the first segment's)."""
    return adaptables(model)


def part(model: Decoder, path: Path) -> Adaptable:
    """The module at a path, without a walk through the model."""
    found: Any = model
    for step in path:
        found = found[step] if isinstance(step, int) else getattr(found, step)
    assert isinstance(found, Adaptable)
    return found


def linears(model: Decoder) -> dict[Path, Linear | ExpertLinear]:
    """The linear maps among them."""
    return {path: part for path, part in parts(model).items() if isinstance(part, Linear | ExpertLinear)}


def maps_of(model: Decoder) -> dict[Path, Linear | ExpertLinear | Embed]:
    """What factors go beside: the linear maps and the embedding."""
    return {path: part for path, part in parts(model).items() if isinstance(part, Linear | ExpertLinear | Embed)}


def weight(part: Linear | ExpertLinear | Embed) -> Any:
    """The variable that factors add to."""
    return part.embedding if isinstance(part, Embed) else part.kernel


def embedding(model: Decoder) -> Path:
    """The path of the embedding."""
    return next(path for path, part in parts(model).items() if isinstance(part, Embed))


def parameters(part: Adaptable) -> tuple[str, ...]:
    """The names of a module's own parameters."""
    return tuple(name for name in _PARAMETERS if getattr(part, name, None) is not None)


def is_stacked(part: Adaptable) -> bool:
    """Whether the module's arrays have a leading layer axis."""
    return bool(getattr(part, parameters(part)[0]).get_metadata("axes")[0] == "layers")


def tensors(model: Decoder, path: Path, parameter: str) -> tuple[list[str], str]:
    """The tensors of a module's parameter as PEFT names them, by layer, and how they lie in a file (see `hf.names`)."""
    if parameter == TIED_HEAD:
        return ["lm_head.weight"], "table"
    (entry,) = hf_names.entries(model.config, [(*path, parameter)])
    shape = getattr(part(model, path), parameter).shape
    found = [name for _, name in entry.tensors(shape)]
    return [multimodal.module(name) for name in found] if model.config.multimodal else found, entry.kind


def modules(model: Decoder, path: Path) -> list[str]:
    """The names PEFT knows a module by, one a layer: "model.layers.0.mlp.up_proj", ..."""
    module = part(model, path)
    if isinstance(module, Router | ExpertLinear):  # transformers 5 knows them so, whatever the files say
        layers, segment, *rest = path
        return [sharding.path_name(("model", layers, layer, *rest)) for layer in model.config.spans[int(segment)]]
    tensor_names, _ = tensors(model, path, parameters(module)[0])
    return [name.removesuffix(".weight") for name in tensor_names]


def match(
    model: Decoder,
    targets: str | Sequence[str],
    *,
    exclude: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    saved: Sequence[str] = (),
    strict: bool = True,
) -> dict[Path, Layers]:
    """The maps that `targets` names, linear ones and the embedding, and in which layers.

    Args:
      model: the model.
      targets: "all-linear" (every linear map of the layers, neither the head nor the embedding); another string is a
        regular expression that must match a module's full name ("model.layers.0.self_attn.q_proj"); a list holds names
        or ends of names.
      exclude: likewise, of maps to leave out.
      layers: numbers of the layers to touch, where `targets` is a list of ends of names; None: all.
      layers_pattern: the name before a layer's number ("layers"); None: any.
      saved: modules trained as a whole, which no factors go beside.
      strict: each name must match something; else it is enough that one does.

    Raises:
      UserError: a target matches nothing; the names that are there are listed.
    """
    known = sorted({str(path[-1]) for path in maps_of(model)})
    ends = [part for part in (model.lm_head, model.embed_tokens) if part is not None]
    pattern = targets if isinstance(targets, str) and targets.lower() != "all-linear" else None
    hit = Pattern(pattern, argument("targets")) if pattern is not None else None
    names = {path: modules(model, path) for path in maps_of(model)}
    everything = [name for found in names.values() for name in found]
    for one in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or ():
        Pattern(one, "layers_pattern")
    if strict:
        _check_layers(model, targets, layers)
        if not isinstance(targets, str):
            _check_each(targets, everything, argument("targets"), known)
        if exclude and not isinstance(exclude, str):
            _check_each(exclude, everything, argument("exclude_modules"), known)
    left_out = Pattern(exclude, argument("exclude_modules")) if isinstance(exclude, str) else _ends(exclude or ())
    whole = [Pattern(rf"(^|.*\.){name}($|\..*)", argument("modules_to_save")) for name in saved]

    def chosen(path: Path, name: str) -> bool:
        if left_out(name) or any(inside(name) for inside in whole):
            return False
        if isinstance(targets, str):
            return hit(name) if hit else all(part(model, path) is not end for end in ends)
        if name in targets:  # PEFT asks a full name for no layer
            return True
        return _ends(targets)(name) and (
            layers is None or layers == [] or _layer(name, layers_pattern) in _some(layers)
        )

    found = {path: tuple(chosen(path, name) for name in of) for path, of in names.items()}
    found = {path: flags for path, flags in found.items() if any(flags)}
    if not found:
        raise UserError(
            f"{argument('targets')} {_shown(targets)} match no linear map; there are {', '.join(known)}: give names, "
            "'all-linear', or a regular expression that matches a full name such as model.layers.0.self_attn.q_proj."
        )
    return found


def match_saved(model: Decoder, wanted: Sequence[str], *, strict: bool = True) -> dict[Path, Layers]:
    """The modules, of any kind, whose name, or that of a module around them, ends in one of `wanted`.

    PEFT matches `modules_to_save` so: "norm" names every norm, "model.norm" the last one. A tied output layer, which
    is no module here, comes out as "lm_head".

    Raises:
      UserError: one matches nothing; the names that are there are listed.
    """
    names = {p: modules(model, p) for p, part in parts(model).items() if not isinstance(part, Router | ExpertLinear)}
    if model.lm_head is None:
        names[TIED_PATH] = [TIED_HEAD]
    if strict:
        known = sorted({str(path[-1]) for path in names})
        for one in wanted:
            if not any(_inside(name, [one]) for found in names.values() for name in found):
                raise UserError(
                    f"{argument('modules_to_save')} {shown(one)} matches no module; there are {', '.join(known)}."
                    f"{nearest(one, known)}"
                )
    found = {path: tuple(_inside(name, wanted) for name in names[path]) for path in names}
    return {path: flags for path, flags in found.items() if any(flags)}


def by_pattern(patterns: Mapping[str, Any], default: Any, what: str) -> Callable[[str], Any]:
    """The value of the first pattern that matches the end of a module's name, as in `rank_pattern`.

    Raises:
      UserError: a pattern is no regular expression.
    """
    compiled = [(Pattern(rf"(.*\.)?({key})", what), value) for key, value in patterns.items()]
    return lambda name: next((value for hit, value in compiled if hit(name)), default)


def check_patterns(patterns: Mapping[str, Any], touched: Iterable[str], what: str) -> None:
    """Raises `UserError` at a pattern that matches none of the targeted modules."""
    touched = list(touched)
    for key in patterns:
        hit = Pattern(rf"(.*\.)?({key})", what)
        if not any(hit(name) for name in touched):
            known = sorted({name.rsplit(".", 1)[-1] for name in touched})
            raise UserError(
                f"{what} {shown(key)} matches no targeted linear map; there are {', '.join(known)}."
                f"{nearest(key, known)}"
            )


def shorten(chosen: Iterable[str], others: Iterable[str], ends: Callable[[str, str], bool]) -> list[str]:
    """The last parts of the chosen modules' names where they name no other module, else whole names; sorted."""
    chosen, others = set(chosen), set(others)
    result = set()
    for name in chosen:
        last = name.rsplit(".", 1)[-1]
        result.add(name if any(ends(other, last) for other in others - chosen) else last)
    return sorted(result)


def _inside(name: str, wanted: Sequence[str]) -> bool:
    """Whether a module, or one around it up to its layer, ends in one of the names."""
    pieces = name.split(".")
    # model.layers.3 is the outermost that can be named: "model" and "layers" hold more than modules of one kind.
    outer = next((place for place, piece in enumerate(pieces, 1) if piece.isdigit()), len(pieces))
    around = [".".join(pieces[:n]) for n in range(outer, len(pieces) + 1)]
    return any(one.endswith(end) for one in around for end in wanted)


def _shown(targets: str | Sequence[str]) -> str:
    return shown(targets) if isinstance(targets, str) else repr(targets)


def _ends(wanted: Sequence[str]) -> Callable[[str], bool]:
    return lambda name: any(name == end or name.endswith(f".{end}") for end in wanted)


def _some(layers: int | Sequence[int]) -> Sequence[int]:
    return [layers] if isinstance(layers, int) else layers


def _layer(name: str, pattern: str | Sequence[str] | None) -> int | None:
    """The layer's number in a module's name."""
    patterns = [pattern] if isinstance(pattern, str) and pattern else list(pattern or [])
    tried = [rf"(?:^|.*?\.){one}\.(\d+)\..*" for one in patterns] or [r".*?\.[^.]*\.(\d+)\..*"]
    found = (hit for one in tried if (hit := Pattern(one, "layers_pattern").groups(name)))
    number = next((groups[-1] for groups in found), None)
    return None if number is None else int(number)


def _check_layers(model: Decoder, targets: str | Sequence[str], layers: int | Sequence[int] | None) -> None:
    if layers is None:
        return
    if isinstance(targets, str):
        raise UserError(
            f"{argument('layers_to_transform')} = {shown(layers)} goes with a list of {argument('targets')}, not with "
            f"{targets!r}: give names of linear maps."
        )
    wrong = [one for one in _some(layers) if not 0 <= one < model.config.num_layers]
    if wrong or not _some(layers):
        raise UserError(
            f"{argument('layers_to_transform')} = {shown(layers)}: the model has layers 0 to "
            f"{model.config.num_layers - 1}: give some."
        )


def _check_each(wanted: Sequence[str], names: Sequence[str], what: str, known: Sequence[str]) -> None:
    for one in wanted:
        if not any(_ends([one])(name) for name in names):
            hint = nearest(one, known)
            raise UserError(f"{what} {shown(one)} matches no linear map; there are {', '.join(known)}.{hint}")
