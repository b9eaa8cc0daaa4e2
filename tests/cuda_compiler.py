"""Puts the CUDA compiler of the installed JAX, and nothing of CUDA itself, into a folder of its own.

    python tests/cuda_compiler.py FOLDER

Tests that compile for GPUs find it by PYTHONPATH, in a process of their own: it says on stderr, once a process, that
there is no GPU. Where it is not to be had those tests are skipped.
"""

import shutil
import subprocess
import sys
from importlib.metadata import version


def main(folder: str) -> None:
    """Empties the folder and installs into it."""
    wanted = version("jaxlib")
    names = [f"{name}=={wanted}" for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt")]
    shutil.rmtree(folder, ignore_errors=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*install, "--target", folder, *names], stderr=subprocess.DEVNULL).returncode:
        shutil.rmtree(folder, ignore_errors=True)
        print("There is no CUDA compiler for this machine: the tests that need it are skipped.")


if __name__ == "__main__":
    main(sys.argv[1])
