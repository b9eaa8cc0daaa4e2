"""Which mesh, rematerialisation and micro-batches suit a target, and which slice of a family is large enough."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from specjax import vocabulary
from specjax.config import copied
from specjax.config.entries import slots_of
from specjax.errors import UserError
from specjax.hf import folder as hf_folder
from specjax.plan import targets

MESHES = 4  # tried for a target
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _DEEP, "tpu7x": _DEEP, "h100": ("1", "2", "4", "8")}

Plan = dict[str, Any]
Planner = Callable[[ConfigDict, targets.Target], Plan]


def search(config: ConfigDict, target: targets.Target, planner: Planner) -> list[Plan]:
    """Plans of a job on one target, the best first: those that fit, by the bound on a step's time.

    On each mesh the least rematerialisation that fits is taken (none, attention, full), then, with all of it, two and
    four times the micro-batches: what recomputes more than it must is slower.

    Args:
      config: of the job; its mesh, `model.remat` and `accumulate` are set.
      target: where to.
      planner: the plan of a config there.

    Returns:
      What `planner` made, each with `changes`: the keys and values that were set.

    Raises:
      UserError: no mesh divides the job.
    """
    count = targets.count(target)
    plans, refused = [], ""
    for mesh in meshes(config, count, target.slices):
        for changes in _steps(config, mesh):
            try:
                plans.append(planner(changed(config, changes), target) | {"changes": changes})
            except UserError as error:
                refused = str(error)
                break
            if plans[-1]["fits"]:
                break
    if not plans:
        raise UserError(
            f"{targets.asked(target.name)}: no mesh of {count} devices divides this job; {refused}".rstrip("; ")
        )
    return sorted(plans, key=lambda plan: (not plan["fits"], plan["step_seconds_bound"] or math.inf))


def smallest(config: ConfigDict, family: str, planner: Planner, within: Callable[..., list[Plan]] | None) -> list[Plan]:
    """The plans of a job on the smallest slice of a family that holds it.

    Args:
      config: of the job.
      family: such as v5e.
      planner: the plan of a config on a target.
      within: `search`, or None: the config as it is.

    Returns:
      What was found on that slice, or on the largest that was tried where none holds it.

    Raises:
      UserError: the job can be on no slice at all.
    """
    plans, refused = [], ""
    for shape in SLICES[family]:
        target = targets.parse(f"{family}:{shape}")
        try:
            plans = within(config, target, planner) if within else [planner(config, target)]
        except UserError as error:
            refused = str(error)
            continue
        if plans[0]["fits"]:
            return plans
    if not plans:
        raise UserError(refused)
    return plans


def fewer_slots(config: ConfigDict, target: targets.Target, planner: Planner) -> int:
    """How many adapters of a fleet that does not fit would, halved until they do; 0: not one."""
    count = slots_of(config) // 2
    while count:
        try:
            if planner(changed(config, {"slots": count}), target)["fits"]:
                return count
        except UserError:
            pass  # their rows do not divide over the devices
        count //= 2
    return 0


def meshes(config: ConfigDict, count: int, slices: int) -> list[dict[str, int]]:
    """Sizes of the mesh's axes that divide the job, those that cut layers and rows least first."""
    sizes = vocabulary.sizes_of(config, hf_folder.resolve(config.model.path, config.model.revision, weights=False))
    rows, dividing = _rows(config) // (config.accumulate or 1), []
    experts = [n for n in range(1, (sizes.num_experts or 1) + 1) if (sizes.num_experts or 1) % n == 0]
    for tensor in _powers(count):
        layers = [sizes.of(segment) for segment in sizes.segments]
        split = {here.mlp_dim or tensor for here in layers}
        split |= {n for here in layers for n in (here.delta or (here.num_kv_heads, here.num_heads))[:2]}  # heads
        if any(n % tensor for n in (*split, sizes.vocab_size)):
            continue
        for context in _powers(count):
            for expert in experts:
                fixed = tensor * context * expert * slices
                if count % fixed or config.data.length % (tensor * context):
                    continue
                fsdp = count // fixed
                if rows % (slices * fsdp * expert) == 0:
                    axes = {"data": slices, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
                    dividing.append(axes)
    return sorted(dividing, key=lambda mesh: (mesh["tensor"] * mesh["context"], mesh["context"], -mesh["expert"]))[
        :MESHES
    ]


def _rows(config: ConfigDict) -> int:
    """Of a batch, those of all slots of a fleet together."""
    return config.batch_size * (slots_of(config) if config.fleet else 1)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _steps(config: ConfigDict, mesh: dict[str, int]) -> Iterator[dict[str, Any]]:
    """What to set on planner mesh, the fastest first."""
    on = {f"mesh.{axis}": size for axis, size in mesh.items()}
    least = config.accumulate or 1
    for remat in ("none", "attention", "full"):
        yield on | {"model.remat": remat, "accumulate": least}
    ways = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    for more in (2, 4):
        if config.batch_size % (least * more) == 0 and _rows(config) % (least * more * ways) == 0:
            yield on | {"model.remat": "full", "accumulate": least * more}


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of a config with some keys set."""
    made = copied(config, "mesh", "model")
    made.update_from_flattened_dict(changes)
    return made
