"""Walking an optimised program: what runs how often, what its collectives move, how many cycles the compiler expects.

The text is XLA's. A loop's body counts as often as its known trip count says; XLA's own totals count it once.
"""

import collections
import dataclasses
import re

_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c64|c128)\[([\d,]*)\]")
_OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_OTHER_TRAFFIC = re.compile(r"= .* (?:collective-broadcast|send|recv)\(")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass
class Collective:
    """One kind of traffic of a step: bytes are what one device sends, all trips together."""

    operation: str
    count: int = 0
    bytes: float = 0.0


@dataclasses.dataclass
class Walk:
    """What one device does in one step.

    Attributes:
      cycles: the compiler's estimates, added up over all trips (0: it gives none).
      collectives: by operation.
      between_slices: bytes that it sends to other slices (they are in `collectives` too).
      not_understood: lines that may move bytes, or repeat what does, in a form that is not known here: a loop whose
        trips nothing tells counts once, traffic between devices that are not named counts nothing.
    """

    cycles: float
    collectives: dict[str, Collective]
    between_slices: float
    not_understood: int = 0


def walk(text: str, slice_of: dict[int, int] | None = None) -> Walk:
    """Reads a compiled program.

    Args:
      text: `compiled.as_text()`.
      slice_of: the slice of each partition, where there are several.
    """
    bodies = _computations(text)
    entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)
    total = Walk(0.0, {}, 0.0)
    trips: dict[str, int] = collections.defaultdict(int)
    _visit(entry, 1, bodies, trips, total)
    seen: set[str] = set()  # a TPU's collective may stand in several fusions, each of which moves a piece of it
    for name, times in trips.items():
        for line in bodies[name][1]:
            _count(line, times, total, slice_of or {}, seen)
    return total


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    """Whether it is the entry, and the lines of each, by name."""
    found: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith(" ") and line.endswith("{") and (hit := re.match(r"(ENTRY )?%?([\w.\-]+)", line)):
            lines = []
            found[hit[2]] = (bool(hit[1]), lines)
        elif line.startswith(" "):
            lines.append(line)
    return found


def _visit(
    name: str, times: int, bodies: dict[str, tuple[bool, list[str]]], trips: dict[str, int], total: Walk
) -> None:
    """Adds how often each computation that `name` calls runs; what is fused is part of its fusion."""
    if name not in bodies:
        total.not_understood += 1
        return
    trips[name] += times
    for line in bodies[name][1]:
        if " while(" in line:
            body = re.search(r"body=%?([\w.\-]+)", line)
            count = _trips(line, bodies)
            total.not_understood += count is None or body is None
            if body:
                _visit(body[1], times * (count or 1), bodies, trips, total)
        elif " conditional(" in line:
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
            names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            total.not_understood += not names
            for branch in names[:1]:  # one of them runs
                _visit(branch, times, bodies, trips, total)
        elif (hit := re.search(r"\b(?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)", line)) and hit[
            1
        ] in bodies:
            _visit(hit[1], times, bodies, trips, total)
        elif (hit := re.search(r"\bfusion\(.*calls=%?([\w.\-]+)", line)) and _gathers(
            bodies.get(hit[1], (False, []))[1]
        ):
            trips[hit[1]] += times  # a collective inside of a fusion


def _trips(line: str, bodies: dict[str, tuple[bool, list[str]]]) -> int | None:
    """How often a loop runs: as XLA says, or to the number that its condition compares with, counting from 0.

    None: nothing tells.
    """
    if hit := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(hit[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], (False, []))[1] if condition else []
    numbers = [int(hit[1]) for each in lines if (hit := re.search(r" [su]32\[\]\S* constant\((\d+)\)", each))]
    return max(numbers, default=None)


def _gathers(lines: list[str]) -> bool:
    return any(re.search(rf" (?:{'|'.join(_OPERATIONS)})(?:-start)?\(", line) for line in lines)


def _count(line: str, times: int, total: Walk, slice_of: dict[int, int], seen: set[str]) -> None:
    hit = re.search(r'"estimated_cycles":"(\d+)"', line)
    if hit and " while(" not in line:
        total.cycles += times * int(hit[1])
    hit = re.search(rf"= (.*?) ({'|'.join(_OPERATIONS)})(-start)?\(", line)
    if not hit:
        total.not_understood += bool(_OTHER_TRAFFIC.search(line))
        return
    channel = re.search(r"channel_id=(\d+)", line)
    if channel:
        if channel[1] in seen:
            return
        seen.add(channel[1])
    group = _group(line)
    sizes = [_bytes(kind, dims) for kind, dims in _ARRAY.findall(hit[1]) if dims or hit[2] == "all-reduce"]
    total.not_understood += group is None or not sizes
    group = group or []
    if len(group) < 2 and hit[2] != "collective-permute":
        return
    # Several arrays may go together. A start's result holds its operands before its results (but an all-reduce's): the
    # larger of both is the whole of a gather, and of what is scattered.
    half = len(sizes) // 2 if hit[3] and hit[2] != "all-reduce" else 0
    size, ways = max(sum(sizes[:half]), sum(sizes[half:])), max(2, len(group))
    share = (ways - 1) / ways
    if hit[2] == "all-reduce":
        moved = 2 * share * size
    elif hit[2] == "reduce-scatter":
        moved = share * (size if hit[3] else size * ways)
    elif hit[2] == "collective-permute":
        moved = size
    else:
        moved = share * size
    collective = total.collectives.setdefault(hit[2], Collective(hit[2]))
    collective.count += times
    collective.bytes += times * moved
    if len({slice_of.get(member, 0) for member in group}) > 1:
        total.between_slices += times * moved


def _group(line: str) -> list[int] | None:
    """The partitions of the first group of a collective; None: written in a form that is not known here."""
    if hit := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return [int(n) for n in hit[1].split(",") if n]
    if hit := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        import numpy as np

        shape, dims = ([int(n) for n in hit[i].split(",")] for i in (1, 2))
        ids = np.arange(np.prod(dims)).reshape(dims)
        if hit[3]:
            ids = ids.transpose([int(n) for n in hit[3].split(",")])
        return [int(n) for n in ids.reshape(shape)[0]]
    if hit := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        import numpy as np

        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", hit[1])}
        chosen = re.findall(r"'(\w+)'", hit[2])
        ids = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        ids = ids[tuple(slice(None) if name in chosen else 0 for name in sizes)]
        return [int(n) for n in ids.reshape(-1)]
    if hit := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return [int(hit[1]), int(hit[2])]
    return [] if "source_target_pairs={}" in line else None


def _bytes(kind: str, dims: str) -> float:
    bits = _BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
    count = 1
    for n in dims.split(","):
        count *= int(n) if n else 1
    return count * bits / 8


def as_json(total: Walk) -> dict[str, dict[str, float]]:
    """The collectives by operation: how many a step, and the bytes that one device sends."""
    return {name: {"count": each.count, "bytes": each.bytes} for name, each in sorted(total.collectives.items())}
