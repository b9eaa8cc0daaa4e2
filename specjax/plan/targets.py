"""Hardware that is not here: its chips' figures, and its devices as the compiler sees them.

A target is `FAMILY:SHAPE`, such as v5e:4x4 or v5p:2x2x4, with `N*` before it for several slices; h100:8, the GPUs of
one machine; or cpu:8.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from specjax.errors import UserError, argument, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a kind, as its makers give it; what a compiled program may use of its memory.

    Attributes:
      memory: bytes that the compiler lets a program have (what it names where one does not fit).
      flops: dense bfloat16 operations per second.
      bandwidth: bytes per second between memory and chip.
      links: bytes per second that a device can send to its neighbours, over all its links together, one way.
      hertz: of the clock that the compiler's cycle estimates count (0: unknown).
      dimensions: of a topology's shape.
      between_slices: bytes per second that a device can send to another slice, by the data centre's network.
    """

    memory: int
    flops: float
    bandwidth: float
    links: float
    hertz: float
    dimensions: int
    between_slices: float = 6.25e9


# Sources: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} (FLOPs, bandwidth), jax-ml.github.io/scaling-book/tpus (links,
# one way, and the data centre's network), the compiler's own "out of memory" (memory). tpu7x has two devices a chip.
# NVIDIA's H100 SXM5 data sheet (dense FLOPs, bandwidth, half of NVLink's both ways); of a GPU's memory JAX takes three
# quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
    "v5e": Chip(int(15.75 * GIB), 1.97e14, 8.1e11, 4 * 4.5e10, 1.5e9, 2),
    "v5p": Chip(int(95.74 * GIB), 4.59e14, 2.765e12, 6 * 9e10, 1.75e9, 3),
    "v6e": Chip(int(31.25 * GIB), 9.18e14, 1.64e12, 4 * 9e10, 1.75e9, 2),
    "tpu7x": Chip(int(94.75 * GIB), 1.1535e15, 3.69e12, 6 * 9e10, 0, 3),
    "h100": Chip(84942979072 * 3 // 4, 9.89e14, 3.35e12, 4.5e11, 0, 1),
}
FORMS = "v5e:4x4, v5p:2x2x4, v6e:2x4, tpu7x:2x2x1 (2*v5e:4x4: two slices), h100:8 or cpu:8"
GPUS = 8  # of one machine
_INSTALL = "run `pip install -e '.[{}]'` in specjax's folder"  # no package index has it

# What XLA's GPU compiler asks of a device: NVIDIA's figures for compute capability 9.0 (CUDA C++ Programming Guide,
# technical specifications) and for the H100 SXM5. It has no cuDNN here, whose kernels it could try.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A parsed target; `chip` is None for cpu."""

    name: str
    family: str
    shape: tuple[int, ...]
    slices: int
    chip: Chip | None


def asked(name: str) -> str:
    """A target as its caller gave it, for an error."""
    return f"{argument('target')}={name}"


def parse(name: str) -> Target:
    """Reads a target's name.

    >>> parse("2*v5p:2x2x4").shape, parse("cpu:8").slices
    ((2, 2, 4), 1)

    Raises:
      UserError: it is none.
    """
    hit = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)", name)
    families = [*CHIPS, "cpu"]
    if hit is None or hit[2] not in families:
        guess = nearest(hit[2], families) if hit else ""
        raise UserError(f"{asked(name)} is no target: give one such as {FORMS}.{guess}")
    slices, family, shape = int(hit[1] or 1), hit[2], tuple(map(int, hit[3].split("x")))
    chip = CHIPS.get(family)
    if family in ("h100", "cpu") and (slices > 1 or (family == "h100" and len(shape) == 1 and shape[0] > GPUS)):
        raise UserError(f"{asked(name)}: {family} is one machine's: give one such as {family}:{GPUS}.")
    if min(*shape, slices) < 1 or len(shape) != (chip.dimensions if chip else 1):
        wanted = "x".join("N" * chip.dimensions) if chip else "N"
        raise UserError(f"{asked(name)}: the shape of {family} is {wanted}, all at least 1: give one such as {FORMS}.")
    return Target(name, family, shape, slices, chip)


def chips(target: Target) -> int:
    """How many chips it has, which is what is rented."""
    return math.prod(target.shape) * target.slices


def count(target: Target) -> int:
    """How many devices it has."""
    return 2 * chips(target) if target.family == "tpu7x" else chips(target)  # two devices a chip


def cpus(names: Sequence[str]) -> int:
    """How many CPU devices targets of these names want, 0 for none."""
    return max((int(hit[1]) for name in names if (hit := re.fullmatch(r"cpu:(\d{1,6})", name))), default=0)


def devices(target: Target) -> list[Any]:
    """The target's devices, which can be compiled for and not run on (cpu: which can).

    Raises:
      UserError: the compiler is not installed, or knows no such shape.
    """
    if target.family == "cpu":
        have = jax.devices("cpu")
        if len(have) < target.shape[0]:
            raise UserError(f"{asked(target.name)}: this process has {len(have)} CPU devices: ask for fewer.")
        return have[: target.shape[0]]
    if target.family == "h100":
        return _gpus(target)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"{asked(target.name)} needs the TPU compiler: {_INSTALL.format('tpu')}.")
    from jax.experimental import topologies

    layout = "x".join(map(str, target.shape))
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if math.prod(target.shape) < 4:  # less than a whole host
        options["chips_per_host_bounds"] = (*target.shape, 1, 1)[:3]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{target.family}:{layout}", **options)
    except Exception as error:  # jaxlib's own, of several kinds
        reason = str(error).strip().splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"{asked(target.name)}: the TPU compiler knows no such slice ({reason}).") from error
    return list(found.devices)


def _gpus(target: Target) -> list[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(f"{asked(target.name)} needs the CUDA compiler: {_INSTALL.format('cuda')}.")
    from jax.experimental import topologies

    given = {"target_config": _H100, "topology": f"1x1x{target.shape[0]}"}
    return list(topologies.get_topology_desc(platform="cuda", topology_name="h100", **given).devices)
