"""What a compiled step needs and how fast it can be at best: in words, and as JSON."""

import re
import time
from collections.abc import Sequence
from json import dumps
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from specjax import flops
from specjax.config import validate
from specjax.plan import hlo, job, targets

ASSUMPTIONS = (
    "The bound is the longest of three: the step's FLOPs at the chip's peak, or the compiler's own cycle estimates "
    "where they say more; each placed byte read once from memory; the collectives' bytes over all links at once. "
    "Nothing else is counted and all three overlap: no run is faster."
)


def plan(
    config: ConfigDict, target: Sequence[str], json: bool = False, price_per_chip_hour: float = 0.0
) -> list[dict[str, Any]]:
    """Compiles a config's training step for each target and prints what was found.

    Args:
      config: of `train`; its model's path may be a folder with a config.json and nothing else.
      target: names, see `targets.parse`.
      json: one object a line and a target, and nothing else, on stdout.
      price_per_chip_hour: of a chip for an hour, in any currency; 0: unknown.

    Returns:
      An object a target, with the keys of `--json`.

    Raises:
      UserError: no such target, a compiler that is not installed, or a config that cannot be on it.
    """
    parsed = [targets.parse(name) for name in target]
    targets.prepare(parsed)
    found = []
    for one in parsed:
        one_found = _one(config, one, price_per_chip_hour)
        found.append(one_found)
        if json:
            print(dumps(one_found), flush=True)
        else:
            _show(one_found)
    if not json:
        Console().print(ASSUMPTIONS, style="dim")
    return found


def _one(config: ConfigDict, target: targets.Target, price: float) -> dict[str, Any]:
    devices = targets.devices(target)
    validate(config, len(devices))
    made = job.make(config, devices)
    limit = target.chip.memory if target.chip else None
    held = {name: job.device_bytes(getattr(made, name)) for name in ("frozen", "trainable", "opt_state", "batch")}
    tokens = config.batch_size * config.data.length
    work = flops.of_step(made.model, made.trainable, rows=config.batch_size, length=config.data.length)
    found: dict[str, Any] = {
        "target": target.name,
        "devices": len(devices),
        "mesh": dict(made.mesh.shape),
        "fits": None,
        "limit_bytes": limit,
        "bytes_per_device": {
            "frozen": held["frozen"],
            "trained": held["trainable"],
            "optimizer": held["opt_state"],
            "batch": held["batch"],
            "temporaries": None,
            "total": None,
        },
        "tokens_per_step": tokens,
        "flops_per_step": work,
        "step_seconds_bound": None,
        "bound_by": None,
        "collective_bytes": None,
        "mfu_ceiling": None,
        "compile_seconds": None,
    }
    began = time.perf_counter()
    try:
        compiled = made.lowered.compile(compiler_options=made.options)
    except Exception as error:  # jaxlib's own, of several kinds
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found |= {"fits": False, "compile_seconds": time.perf_counter() - began}
        found["bytes_per_device"]["total"] = _needed(str(error))
        return found
    found["compile_seconds"] = time.perf_counter() - began
    total = _peak(compiled, sum(held.values()))
    found["bytes_per_device"] |= {"temporaries": max(0, total - sum(held.values())), "total": total}
    found["fits"] = limit is None or total <= limit
    slices = {number: getattr(device, "slice_index", 0) for number, device in enumerate(made.mesh.devices.flat)}
    walked = hlo.walk(compiled.as_text(), slices)
    found["collectives"] = hlo.as_json(walked)
    found["collective_bytes"] = sum(one["bytes"] for one in found["collectives"].values())
    if target.chip:
        _bound(found, target.chip, walked, total)
        if price:
            hours = found["step_seconds_bound"] / 3600
            found["price_per_million_tokens"] = price * len(devices) * hours / tokens * 1e6
    return found


def _peak(compiled: Any, arguments: int) -> int:
    """Bytes that the program has at once, its arguments included."""
    memory = compiled.memory_analysis()
    peak = int(getattr(memory, "peak_memory_in_bytes", 0))
    # TPU's `temp_size_in_bytes` counts more than is there at once: programs that it puts above the limit compile.
    return peak if peak >= arguments else arguments + int(memory.temp_size_in_bytes)


def _needed(error: str) -> int | None:
    """What a compiler that ran out of memory says that the program wants."""
    hit = re.search(r"(?:Used|requires?|needs?)\s+([\d.]+)\s*([KMG])", error)
    return int(float(hit[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[hit[2]]) if hit else None


def _bound(found: dict[str, Any], chip: targets.Chip, walked: hlo.Walk, total: int) -> None:
    """Fills in the bound on a step's time, what sets it, and the share of the chips' peak that it leaves."""
    compute = found["flops_per_step"] / found["devices"] / chip.flops
    if chip.hertz:
        compute = max(compute, walked.cycles / chip.hertz)
    within = found["collective_bytes"] - walked.between_slices
    held = sum(found["bytes_per_device"][name] for name in ("frozen", "trained", "optimizer"))
    bounds = {
        "compute": compute,
        "memory": held / chip.bandwidth,
        "links": within / chip.links,
        "network": walked.between_slices / chip.between_slices,
    }
    name = max(bounds, key=lambda key: bounds[key])
    seconds = bounds[name]
    found |= {"step_seconds_bound": seconds, "bound_by": name, "bounds": bounds}
    found["mfu_ceiling"] = found["flops_per_step"] / found["devices"] / chip.flops / seconds
    found["tokens_per_second_bound"] = found["tokens_per_step"] / seconds


def _show(found: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title=f"{found['target']}: {_verdict(found)}", show_header=False, title_justify="left")
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    table.add_row("mesh", f"{mesh} ({found['devices']} devices)")
    for name, size in found["bytes_per_device"].items():
        if size is not None:
            table.add_row(f"{name} a device", _size(size))
    table.add_row("tokens a step", f"{found['tokens_per_step']:,}")
    table.add_row("FLOPs a step", f"{found['flops_per_step']:.3g}")
    for kind, one in found.get("collectives", {}).items():
        table.add_row(kind, f"{_size(one['bytes'])} a device, in {one['count']:,}")
    if found["step_seconds_bound"]:
        table.add_row("a step takes at least", f"{found['step_seconds_bound']:.3f} s, by {found['bound_by']}")
        rate = f"{found['tokens_per_second_bound']:,.0f} tokens/s, MFU {found['mfu_ceiling']:.0%}"
        table.add_row("at most", rate)
    if "price_per_million_tokens" in found:
        table.add_row("a million tokens cost at least", f"{found['price_per_million_tokens']:.3f}")
    table.add_row("compiled in", f"{found['compile_seconds']:.0f} s")
    Console().print(table)


def _verdict(found: dict[str, Any]) -> str:
    total, limit = found["bytes_per_device"]["total"], found["limit_bytes"]
    if limit is None:
        return f"needs {_size(total)} a device"
    need = "more" if total is None else _size(total)
    return f"{'fits' if found['fits'] else 'DOES NOT FIT'}: {need} of {_size(limit)} a device"


def _size(count: float) -> str:
    """Bytes for people.

    >>> _size(3.5 * 2**30), _size(5000)
    ('3.50 GiB', '0.00 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
