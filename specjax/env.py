"""`specjax env`: what a bug report needs to say of the machine and of what is installed."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

import jax

from specjax import __version__

# Those that change what is computed or where files are looked for. No other is printed: it may be a secret.
SETTINGS = (
    *("SPECJAX_DISABLE", "GLIBC_TUNABLES", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64"),
    *("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
    *("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"),
)
PLUGINS = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "peft", "trl")


def report() -> str:
    """Versions, devices and settings as Markdown, one line each."""
    lines = [f"- specjax {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"- {os.cpu_count()} CPU cores, {_memory()}"]
    lines += [f"- packages: {', '.join(_packages())}"]
    lines += [f"- devices: {_devices()}"]
    lines += [f"- {name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return "\n".join(lines)


def _packages() -> list[str]:
    """The versions of what specjax needs, and of what decides what it runs on or is compared with."""
    own = [re.split(r"[^\w.-]", text)[0] for text in requires("specjax") or () if "extra ==" not in text]
    found = []
    for name in (*own, *PLUGINS):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue  # an extra that is not installed
    return found


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "memory unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB of memory"


def _devices() -> str:
    try:
        devices = jax.devices()
    except RuntimeError as error:  # what is to be reported may be just this
        return f"none: {' '.join(str(error).split())}"
    kinds = sorted({device.device_kind for device in devices})
    return f"{len(devices)} x {', '.join(kinds)} ({devices[0].platform})"
