"""What the compiler says of a job's program: found once, and kept by program."""

import hashlib
import json
import os
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from specjax.plan import hlo, job

_FORM = "4"  # of what is kept: another one where this file or `hlo` finds other things in the same program


def facts(made: job.Job, target: str) -> dict[str, Any]:
    """Compiles a job's step, unless this very program was compiled before.

    What was found lies in $XDG_CACHE_HOME/specjax/plan (default ~/.cache), in a file named by a digest of the program,
    its devices, the compiler's options and versions.

    Args:
      made: the job.
      target: its name, part of the digest.

    Returns:
      `total`, bytes that the program has at once, arguments included, or what it wants where it does not fit (None:
      the compiler does not say); `aliased`, bytes of arguments that results are written over; `fits` the compiler;
      `collectives` by kind; `between_slices`, bytes; `cycles`; `not_understood`, lines of the program; `seconds` of
      compilation; `cached`.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specjax" / "plan"
    path = folder / f"{_digest(made, target)}.json"
    try:
        return json.loads(path.read_text()) | {"cached": True}
    except (OSError, ValueError):
        answer = _compile(made)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(answer))
        partial.replace(path)
    except OSError:
        pass  # a home that cannot be written to: it is compiled again next time
    return answer | {"cached": False}


def _digest(made: job.Job, target: str) -> str:
    compilers = ("jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
    versions = [f"{one.name} {one.version}" for one in metadata.distributions() if one.name in compilers]
    devices = [[device.id for device in made.mesh.devices.flat], list(made.mesh.shape.items())]
    settings = [_FORM, target, devices, sorted(map(str, made.options.items())), sorted(versions)]
    return hashlib.sha256((json.dumps(settings) + made.lowered.as_text()).encode()).hexdigest()[:32]


def _compile(made: job.Job) -> dict[str, Any]:
    began = time.perf_counter()
    answer: dict[str, Any] = {"fits": True, "collectives": {}, "between_slices": 0.0, "cycles": 0.0}
    try:
        compiled = made.lowered.compile(compiler_options=made.options)
    except Exception as error:  # jaxlib's own, of several kinds
        # A kernel that wants more of a core's own memory than it has is no job too large for the device.
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error).lower():
            raise
        return answer | {"fits": False, "total": _needed(str(error)), "seconds": time.perf_counter() - began}
    answer["seconds"] = time.perf_counter() - began
    arguments = sum(job.device_bytes(tree) for tree in (made.frozen, made.trainable, made.opt_state, made.batch))
    slices = {number: getattr(device, "slice_index", 0) for number, device in enumerate(made.mesh.devices.flat)}
    walked = hlo.walk(compiled.as_text(), slices)
    answer |= {"collectives": hlo.as_json(walked), "between_slices": walked.between_slices, "cycles": walked.cycles}
    answer["not_understood"] = walked.not_understood
    aliased = int(compiled.memory_analysis().alias_size_in_bytes)
    return answer | {"total": peak(compiled, arguments, made.mesh.devices.flat[0].platform), "aliased": aliased}


def peak(compiled: Any, arguments: int, platform: str) -> int:
    """Bytes that the program has at once, its arguments included."""
    memory = compiled.memory_analysis()
    whole = arguments + int(memory.temp_size_in_bytes)
    # On TPU that counts more than is there at once: programs that it puts above the limit compile. On CPU the peak is
    # the arguments and outputs alone; there and on GPU the temporaries are allocated as one piece.
    peak = int(getattr(memory, "peak_memory_in_bytes", 0))
    return peak if platform == "tpu" and peak >= arguments else whole


def _needed(error: str) -> int | None:
    """What a compiler that ran out of memory says that the program wants."""
    hit = re.search(r"(?:Used|requires?|needs?)\s+([\d.]+)\s*([KMG])", error)
    return int(float(hit[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[hit[2]]) if hit else None
