"""Checks report.json: the type of each value; an absent key is a value that was not measured, null."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax.errors import UserError
from specjax.files import read_object
from specjax.values import FLAG, NAMES, OBJECT, TEXT, Kind, check, listed, mapped, number, optional, shown

FORMAT = 1
FILE = "report.json"
REMEDY = "run `specjax compare` again on this workdir, which writes it"

# A loss that ran away is written as NaN, and is as good as not measured.
_NUMBER = Kind("a number, or null", lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool)))
_TEXT, _NAMES, _FLAG, _OBJECT = optional(TEXT), optional(NAMES), optional(FLAG), optional(OBJECT)
_OBJECTS = optional(listed(OBJECT, "a list of objects"))
_NUMBERS = optional(listed(number("a number"), "a list of numbers"))
_PIECE = Kind("a text and whether it counts", lambda v: isinstance(v, list) and [*map(type, v)] == [str, bool])

_TOP: Mapping[str, Kind] = {
    "format": Kind("1", lambda v: v == FORMAT),
    **dict.fromkeys(("specjax", "made"), _TEXT),
    **dict.fromkeys(("machine", "base", "data", "budget", "grid", "sets", "target", "advice"), _OBJECT),
    **dict.fromkeys(("general", "methods", "answers"), _OBJECTS),
    "seconds": _NUMBER,
}
_PARTS: Mapping[str, Mapping[str, Kind]] = {
    "machine": {"device": _TEXT, "memory_bytes": _NUMBER, "jax": _TEXT},
    "base": {"path": _TEXT, "family": _TEXT, "parameters": _NUMBER, "dtype": _TEXT},
    "data": {
        **dict.fromkeys(("path", "kind", "split"), _TEXT),
        **dict.fromkeys(("rows", "held_out_rows", "loss_tokens", "max_length", "cut_share"), _NUMBER),
        "example": optional(listed(_PIECE, "a list of pieces, each a text and whether it counts in the loss")),
    },
    "budget": {"steps": _NUMBER, "tokens_per_step": _NUMBER, "seconds": _NUMBER, "seeds": _NUMBERS},
    "grid": {"source": _TEXT},
    "sets": {"domain": _TEXT, "forgetting": _NAMES},
    "target": {"model": _TEXT, "parameters": _NUMBER, "rows": _OBJECTS, "price": _OBJECT},
    "advice": {"best": _TEXT, "lowest_loss": _TEXT, "nats_apart": _NUMBER, "forgets_of": _NUMBER},
}
_GENERAL = {"name": TEXT, "path": _TEXT, "shipped": _FLAG, "rows": _NUMBER}
_METHOD: Mapping[str, Kind] = {
    "name": TEXT,
    **dict.fromkeys(("method", "status", "why", "folder", "config"), _TEXT),
    **dict.fromkeys(("rank", "alpha", "rate", "trainable", "total", "seconds", "compile_seconds"), _NUMBER),
    **dict.fromkeys(("tokens_per_s", "peak_memory_bytes", "saved_bytes"), _NUMBER),
    "shared_process": _FLAG,
    "measures": optional(mapped(OBJECT, "an object for each set")),
    "trials": _OBJECTS,
    "commands": _NAMES,
    **{"data": _OBJECT, "tokens": _NUMBER},
}
_ROWS = {"kind": _TEXT, **dict.fromkeys(("rows", "tokens", "loss_tokens"), _NUMBER)}
_MEASURE = {"before": _OBJECT, "after": _OBJECT, "low": _NUMBER, "high": _NUMBER, "seeds": _NUMBER}
_VALUES = dict.fromkeys(("loss", "token_accuracy", "exact", "chrf", "rouge_l"), _NUMBER)
_TRIAL: Mapping[str, Kind] = {
    **dict.fromkeys(("rate", "rank", "seed", "steps"), _NUMBER),
    "stopped": _TEXT,
    "curve": _OBJECTS,
}
_POINT = {"step": number("a number"), "loss": mapped(_NUMBER, "a number for each set")}
_ANSWER = {
    "set": _TEXT,
    "prompt": TEXT,
    "expected": _TEXT,
    "base": _TEXT,
    "said": optional(mapped(_TEXT, "a text for each method")),
}
_KINDS = optional(mapped(_NUMBER, "a number of each kind of hardware"))
_OF_KINDS = ("bytes_per_chip", "seconds_per_million_tokens", "cost_per_million_tokens")
_ROW = {"method": TEXT, "tpu": _TEXT, "gpu": _TEXT, **dict.fromkeys(_OF_KINDS, _KINDS)}


def read(folder: str | Path) -> dict[str, Any]:
    """The report of a comparison's folder, checked.

    Raises:
      UserError: there is no report.json, or it is not a report.
    """
    path = Path(folder) / FILE
    return checked(read_object(path, REMEDY), str(path))


def checked(found: Mapping[str, Any], where: str = "the report") -> dict[str, Any]:
    """A report with every key, null where it was absent, and with numbers that are finite or null.

    Args:
      found: the report as `specjax compare` writes it.
      where: its name in errors.

    Raises:
      UserError: another format, a value of the wrong type, or no method.
    """
    if found.get("format") != FORMAT or isinstance(found["format"], bool):
        raise UserError(
            f"{where} has the format {shown(found.get('format'))}, and this specjax reads {FORMAT}: write it anew with "
            "`specjax compare`, or use the specjax that wrote it."
        )
    top = _filled(found, _TOP, where)
    for name, kinds in _PARTS.items():
        if top[name] is not None or name != "target":
            top[name] = _filled(top[name] or {}, kinds, f"{where}: {name}")
    top["general"] = _each(top["general"], _GENERAL, f"{where}: general")
    top["answers"] = _each(top["answers"], _ANSWER, f"{where}: answers")
    if top["target"]:
        top["target"]["rows"] = _each(top["target"]["rows"], _ROW, f"{where}: target.rows")
    top["methods"] = [_method(one, f"{where}: methods[{i}]") for i, one in enumerate(top["methods"] or ())]
    if not top["methods"]:
        raise UserError(f"{where} has no methods: {REMEDY}.")
    return top


def _method(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    made = _filled(found, _METHOD, where)
    made["measures"] = {
        name: _filled(one, _MEASURE, f"{where}.measures.{name}") for name, one in (made["measures"] or {}).items()
    }
    for name, one in made["measures"].items():
        for side in ("before", "after"):
            one[side] = _filled(one[side] or {}, _VALUES, f"{where}.measures.{name}.{side}")
    made["data"] = _filled(made["data"] or {}, _ROWS, f"{where}.data")
    made["trials"] = _each(made["trials"], _TRIAL, f"{where}.trials")
    for i, trial in enumerate(made["trials"]):
        trial["curve"] = _each(trial["curve"], _POINT, f"{where}.trials[{i}].curve")
    return made


def _each(found: list[Any] | None, kinds: Mapping[str, Kind], where: str) -> list[dict[str, Any]]:
    return [_filled(one, kinds, f"{where}[{i}]") for i, one in enumerate(found or ())]


def _filled(found: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> dict[str, Any]:
    """The object with every key of `kinds`; keys that may not be null must be present."""
    whole = {key: _finite(found.get(key)) for key in kinds}
    check(whole, kinds, where)
    return {**found, **whole}


def _finite(value: Any) -> Any:
    """Replaces numbers that are not finite or do not fit a float by None, here and one level below."""
    if isinstance(value, dict):
        return {key: None if _unwritable(one) else one for key, one in value.items()}
    return None if _unwritable(value) else value


def _unwritable(value: Any) -> bool:
    return isinstance(value, int | float) and not (abs(value) <= 1e300 and math.isfinite(value))
