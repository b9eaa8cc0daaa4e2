"""What a test file has compiled once it does not compile again: conftest.py's, of a worker's process.

JAX keeps a program with the function that it was traced from. Runs that are started, resumed and compared make the same
program from new functions each time.
"""

import hashlib
import io
from typing import Any

from jax._src import compiler
from jax._src.lib.mlir import passmanager

KEPT: dict[bytes, Any] = {}
_compile = compiler.backend_compile_and_load


def share() -> None:
    """From now on a program of the same instructions, options and devices as one of `KEPT` is that one.

    What calls back into Python holds addresses, and what is compiled for absent devices is kept by plans themselves:
    neither is shared. JAX counts and times a compilation either way.
    """
    compiler.backend_compile_and_load = _once


def _once(backend: Any, module: Any, devices: Any, options: Any, callbacks: Any) -> Any:
    if callbacks or not hasattr(backend, "compile_and_load"):
        return _compile(backend, module, devices, options, callbacks)
    key = hashlib.sha256(_instructions(module))
    key.update(options.SerializeAsString())
    key.update(repr([backend.platform, *(device.id for device in devices)]).encode())
    found = KEPT.get(key.digest())
    if found is None:
        found = KEPT[key.digest()] = _compile(backend, module, devices, options, callbacks)
    return found


def _instructions(module: Any) -> bytes:
    """The program without the places in Python that it comes from."""
    with module.context:
        bare, out = module.operation.clone(), io.BytesIO()
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(bare)
        bare.write_bytecode(file=out)
    return out.getvalue()
