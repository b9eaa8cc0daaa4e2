"""The rotary frequencies that a `config.json` asks for."""

import math
from typing import Any

from specjax.errors import UserError
from specjax.models import rope
from specjax.models.rope import Rope
from specjax.values import shown


def ropes(c: Any, head_dim: int, kinds: tuple[str | None, ...]) -> tuple[Rope, ...]:
    """The rotary frequencies of each kind of layer; one for all where the config does not tell them apart.

    Args:
      c: transformers' configuration.
      head_dim: of a head.
      kinds: the names of the kinds in `rope_parameters`; None: its layers have no rope.

    Raises:
      UserError: a kind of scaling that is not supported.
    """
    parameters = c.rope_parameters
    if not any(kind is None or isinstance(parameters.get(kind), dict) for kind in kinds):
        return (rope_of(c, parameters, head_dim),)

    def of(kind: str | None) -> Rope:
        if kind is None:
            return Rope(dim=head_dim, kind="none")
        return rope_of(c, parameters[kind] if isinstance(parameters.get(kind), dict) else parameters, head_dim)

    return tuple(map(of, kinds))


def rope_of(c: Any, p: dict[str, Any], head_dim: int) -> Rope:
    """Those that `rope_parameters` of transformers' configuration, or a kind of layer's part of them, say.

    Raises:
      UserError: a kind of scaling that is not supported.
    """
    kind = {"su": "longrope"}.get(p["rope_type"], p["rope_type"])
    if kind not in rope.KINDS:
        raise UserError(f"rope type {shown(kind)} is not supported; supported are {', '.join(rope.KINDS)}.")
    if kind == "proportional":
        turning = int((p.get("partial_rotary_factor") or 1.0) * head_dim // 2)
        return Rope(head_dim, float(p["rope_theta"]), kind, factor=float(p.get("factor") or 1.0), turning=turning)
    if c.model_type not in ("phi3", "glm4", "qwen3_5_text") and (p.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("partial_rotary_factor is not supported for this architecture.")
    dim = int(head_dim * (p.get("partial_rotary_factor") or 1.0))
    common: dict[str, Any] = {"dim": dim, "theta": float(p["rope_theta"]), "kind": kind}
    original = int(p.get("original_max_position_embeddings") or c.max_position_embeddings)
    if kind == "linear":
        return Rope(**common, factor=float(p["factor"]))
    if kind == "llama3":
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        return Rope(
            **common,
            factor=float(p["factor"]),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=original,
        )
    if kind == "yarn":
        return Rope(
            **common,
            factor=float(p["factor"]),
            beta_fast=float(p.get("beta_fast") or 32),
            beta_slow=float(p.get("beta_slow") or 1),
            truncate=bool(p.get("truncate", True)),
            original_max_positions=original,
            attention_factor=_yarn_attention(p),
        )
    if kind == "longrope":
        short, long = tuple(map(float, p["short_factor"])), tuple(map(float, p["long_factor"]))
        if len(short) != dim // 2 or len(long) != dim // 2:
            raise UserError(
                f"rope scaling 'longrope' has {len(short)} short and {len(long)} long factors where {dim // 2} of each "
                "are needed."
            )
        factor = p.get("factor") or c.max_position_embeddings / original
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        given = p.get("attention_factor")
        return Rope(
            **common,
            short_factors=short,
            long_factors=long,
            original_max_positions=original,
            attention_factor=float(scale if given is None else given),
        )
    return Rope(**common)


def _yarn_attention(p: dict[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 1.0 if p["factor"] <= 1 else 0.1 * weight * math.log(p["factor"]) + 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return float(scale(p["mscale"]) / scale(p["mscale_all_dim"]))
    return scale(1.0)
