"""What a compiled step needs and how fast it can be at best: in words, and as JSON."""

from collections.abc import Sequence
from json import dumps
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from specjax import build, flops
from specjax.config import settled, validate
from specjax.config.entries import swept
from specjax.errors import UserError, keys
from specjax.fleet import job as fleet_job
from specjax.plan import compiled, job, targets
from specjax.plan import search as search_lib

ASSUMPTIONS = (
    "The bound is the longest of three: the step's FLOPs at the chip's peak, or the compiler's own cycle estimates "
    "where they say more; each placed byte read once from memory; the collectives' bytes over all links at once. "
    "Nothing else is counted and all three overlap: no run is faster."
)


@keys({"target": "--target"})
def report(
    config: ConfigDict,
    target: Sequence[str],
    json: bool = False,
    search: bool = False,
    price_per_chip_hour: float = 0.0,
) -> list[dict[str, Any]]:
    """Compiles a config's training step for each target and prints what was found.

    In this process, which `process.ask_for_no_device` has kept from asking for an accelerator; `apart.plan` does it in
    another one.

    Args:
      config: of `train`; its model's path may be a folder with a config.json and nothing else.
      target: names, see `targets.parse`; a family alone, such as v5e, is its smallest slice that holds the job.
      json: one object per target on stdout, and nothing else.
      search: try meshes, rematerialisation and micro-batches on each target, and rank them.
      price_per_chip_hour: of a chip for an hour, in any currency; 0: unknown. Adds what a million tokens cost, an
        epoch of the config's data and the run, where it and the model's tokenizer are there to count.

    Returns:
      An object per target, with the keys of `--json`; with `search` an object per try, the best first.

    Raises:
      UserError: no such target, a compiler that is not installed, or a config that cannot be on it.
    """
    config = swept(config)
    parsed = [name if name in search_lib.SLICES else targets.parse(name) for name in target]

    def planner(config: ConfigDict, target: targets.Target) -> dict[str, Any]:
        # Where several are tried, those whose arguments alone are too large need no compiler.
        figures = _plan(config, target, quick=search or target.name not in given)
        return _priced(figures, price_per_chip_hour * targets.chips(target), epoch) if price_per_chip_hour else figures

    epoch = _epoch(config) if price_per_chip_hour else {}
    given, plans = set(target), []
    for each in parsed:
        within = search_lib.search if search else None
        if isinstance(each, str):
            tried = search_lib.smallest(config, each, planner, within)
        else:
            tried = within(config, each, planner) if within else [planner(config, each)]
            if config.fleet and not tried[0]["fits"]:
                tried[0]["slots_that_fit"] = search_lib.fewer_slots(config, each, planner)
        plans += tried
        if json:
            for each_found in tried:
                print(dumps(each_found), flush=True)
        else:
            _show_tries(tried)
    if not json:
        Console().print(ASSUMPTIONS, style="dim")
    return plans


def show(tries: Sequence[list[dict[str, Any]]]) -> None:
    """Prints what was found of each target, a list of the tries there, the best first."""
    for tried in tries:
        _show_tries(tried)
    Console().print(ASSUMPTIONS, style="dim")


def _show_tries(tried: list[dict[str, Any]]) -> None:
    if len(tried) > 1:
        _rank(tried)
    _show(tried[0])


def _epoch(config: ConfigDict) -> dict[str, Any]:
    """The steps of a pass over the config's data and of its run, which wants the data and a tokenizer; else why not."""
    if config.fleet:
        return {"steps_per_epoch": None, "steps": None, "epoch_unknown": "each adapter has epochs of its own"}
    try:
        _, tokenizer = build.tokenizer_of(config, weights=False)
        data = build.train_data_of(config, tokenizer)
        return {"steps_per_epoch": data.steps(1.0), **data.course(config.steps or data.steps(config.epochs))}
    except UserError as error:
        return {"steps_per_epoch": None, "steps": config.steps or None, "epoch_unknown": str(error)}


def _priced(figures: dict[str, Any], price: float, epoch: dict[str, Any]) -> dict[str, Any]:
    """Adds what a million tokens, an epoch and the run cost at least, at a price of all chips for an hour."""
    seconds = figures["step_seconds_bound"]
    if not seconds:
        why = "no speed of a CPU is known" if figures["fits"] else "it does not fit"
        return figures | {"price_unknown": why}
    a_step = price * seconds / 3600
    costs = {"price_per_million_tokens": a_step / figures["tokens_per_step"] * 1e6}
    for name, steps in (("price_per_epoch", epoch["steps_per_epoch"]), ("price_of_run", epoch["steps"])):
        costs[name] = steps and steps * a_step
    return figures | costs | epoch


def _plan(config: ConfigDict, target: targets.Target, *, quick: bool = False) -> dict[str, Any]:
    devices = targets.devices(target)
    if config.fleet:
        fleet_job.check_rows(settled(config, devices[0].platform, len(devices)), len(devices))
    else:
        validate(config, len(devices))
    made = job.make(config, devices)
    limit = target.chip.memory if target.chip else None
    held = {name: job.device_bytes(getattr(made, name)) for name in ("frozen", "trainable", "opt_state", "batch")}
    beside = job.device_bytes(made.best)
    rows = config.batch_size * (made.slots or 1)
    tokens = rows * config.data.length
    work = flops.of_step(made.model, made.trainable, rows=rows, length=config.data.length)
    figures: dict[str, Any] = {
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
            **({"best": beside} if made.slots else {}),
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
        "cached": False,
    }
    if waiting := job.device_bytes(made.opt_state, host=True):
        figures["host_bytes_per_device"] = waiting
    if made.slots:
        figures |= {"adapters": len(config.fleet), "slots": made.slots}
    arguments = sum(held.values())
    if quick and limit is not None and arguments + beside > limit:
        figures["bytes_per_device"]["total"] = arguments + beside
        return figures | {"fits": False, "compile_seconds": 0.0}
    known = compiled.facts(made, target.name)
    figures |= {"fits": known["fits"], "compile_seconds": known["seconds"], "cached": known["cached"]}
    total = known["total"] and known["total"] + beside
    figures["bytes_per_device"]["total"] = total
    if not known["fits"]:
        return figures
    figures["bytes_per_device"]["temporaries"] = max(0, known["total"] - arguments)
    figures["aliased_bytes"] = known["aliased"]
    figures["fits"] = limit is None or total <= limit
    figures["collectives"] = known["collectives"]
    figures["lines_not_understood"] = known["not_understood"]
    figures["collective_bytes"] = sum(traffic["bytes"] for traffic in figures["collectives"].values())
    if target.family == "h100":
        figures["attention"] = "chunked: cuDNN's kernel does not compile without the GPU"
    if target.chip:
        _bound(figures, target.chip, known)
    return figures


def _bound(figures: dict[str, Any], chip: targets.Chip, known: dict[str, Any]) -> None:
    """Fills in the bound on a step's time, what sets it, and the share of the chips' peak that it leaves."""
    compute = figures["flops_per_step"] / figures["devices"] / chip.flops
    if chip.hertz:
        compute = max(compute, known["cycles"] / chip.hertz)
    within = figures["collective_bytes"] - known["between_slices"]
    held = sum(figures["bytes_per_device"][name] for name in ("frozen", "trained", "optimizer"))
    bounds = {
        "compute": compute,
        "memory": held / chip.bandwidth,
        "links": within / chip.links,
        "network": known["between_slices"] / chip.between_slices,
    }
    name = max(bounds, key=lambda key: bounds[key])
    seconds = bounds[name]
    figures |= {"step_seconds_bound": seconds, "bound_by": name, "bounds": bounds}
    figures["mfu_ceiling"] = figures["flops_per_step"] / figures["devices"] / chip.flops / seconds
    figures["tokens_per_second_bound"] = figures["tokens_per_step"] / seconds


def _rank(tried: list[dict[str, Any]]) -> None:
    """A row a try, the best first."""
    table = Table("try", "a device", "a step at least", "by", title=f"{tried[0]['target']}, {len(tried)} tries")
    for figures in tried:
        total, seconds = figures["bytes_per_device"]["total"], figures["step_seconds_bound"]
        need = "too much" if total is None else _size(total)
        what = " ".join(f"{key}={value}" for key, value in figures["changes"].items() if value != 1)
        fits = "" if figures["fits"] else " (does not fit)"
        table.add_row(what, need + fits, f"{seconds:.3f} s" if seconds else "", figures["bound_by"] or "")
    Console().print(table)
    best = tried[0]["changes"]
    Console(soft_wrap=True, highlight=False).print(" ".join(f"--config.{key}={value}" for key, value in best.items()))


def _show(figures: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title=f"{figures['target']}: {_verdict(figures)}", show_header=False, title_justify="left")
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1) or "one device"
    table.add_row("mesh", f"{mesh} ({figures['devices']} devices)")
    for name, size in figures["bytes_per_device"].items():
        if size is not None:
            table.add_row(f"{name} a device", _size(size))
    if "host_bytes_per_device" in figures:
        table.add_row("optimizer in the host's memory", f"{_size(figures['host_bytes_per_device'])} a device")
    if "aliased_bytes" in figures:
        table.add_row("replaced in place", f"{_size(figures['aliased_bytes'])} a device")
    if "slots" in figures:
        table.add_row("adapters", f"{figures['adapters']}, {figures['slots']} at once")
    if "slots_that_fit" in figures:
        table.add_row("slots that fit", f"{figures['slots_that_fit'] or 'none'} (config.slots; the others wait)")
    table.add_row("tokens per step", f"{figures['tokens_per_step']:,}")
    table.add_row("FLOPs per step", f"{figures['flops_per_step']:.3g}")
    for operation, traffic in figures.get("collectives", {}).items():
        table.add_row(operation, f"{_size(traffic['bytes'])} a device, in {traffic['count']:,}")
    if count := figures.get("lines_not_understood"):
        table.add_row("not understood", f"{count:,} lines of the program: it may move more than is counted here")
    if figures["step_seconds_bound"]:
        table.add_row("a step takes at least", f"{figures['step_seconds_bound']:.3f} s, by {figures['bound_by']}")
        rate = f"{figures['tokens_per_second_bound']:,.0f} tokens/s, MFU {figures['mfu_ceiling']:.0%}"
        table.add_row("at most", rate)
    if "attention" in figures:
        table.add_row("attention", figures["attention"])
    if "price_unknown" in figures:
        table.add_row("a million tokens", f"not known: {figures['price_unknown']}")
    if "price_per_million_tokens" in figures:
        table.add_row("a million tokens cost at least", f"{figures['price_per_million_tokens']:.3f}")
        if figures["price_per_epoch"] is None:
            table.add_row("an epoch", f"not known: {figures['epoch_unknown']}")
        else:
            steps = f"{figures['steps_per_epoch']:,} steps"
            table.add_row("an epoch costs at least", f"{figures['price_per_epoch']:.2f} ({steps})")
        if figures["steps"]:
            passes = f", {figures['passes']} passes" if "passes" in figures else ""
            table.add_row(
                "the run costs at least", f"{figures['price_of_run']:.2f} ({figures['steps']:,} steps{passes})"
            )
    before = ", before now: the same program" if figures["cached"] else ""
    table.add_row("compiled in", f"{figures['compile_seconds']:.0f} s{before}")
    Console().print(table)


def _verdict(figures: dict[str, Any]) -> str:
    total, limit = figures["bytes_per_device"]["total"], figures["limit_bytes"]
    if limit is None:
        return f"needs {_size(total)} a device"
    need = "more" if total is None else _size(total)
    return f"{'fits' if figures['fits'] else 'DOES NOT FIT'}: {need} of {_size(limit)} a device"


def _size(count: float) -> str:
    """Bytes for people.

    >>> _size(3.5 * 2**30), _size(5000)
    ('3.50 GiB', '0.00 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
