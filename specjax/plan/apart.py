"""A plan made from Python, in a process of its own: the session that asks keeps its devices and its settings."""

import itertools
import json as json_lib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax.errors import UserError
from specjax.plan import report, targets


def plan(
    config: ConfigDict,
    target: Sequence[str],
    *,
    json: bool = False,
    search: bool = False,
    price_per_chip_hour: float = 0.0,
) -> list[dict[str, Any]]:
    """Compiles a config's training step for each target and prints what was found, as `specjax plan` does.

    The compilers read the environment and JAX's settings when they start, and want a JAX that sees CPUs alone. So this
    runs the command in a process of its own: no device of this session is asked for, and neither its environment nor
    its `jax.config` changes. Arguments, result and errors are those of `report.report`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json_lib.dumps(config.to_dict()))
        command = [sys.executable, "-m", "specjax", "plan", "--json", f"--config={path}"]
        command += [f"--target={name}" for name in target]
        command += [f"--price_per_chip_hour={price_per_chip_hour}", *(["--search"] if search else [])]
        # What this session finds on its path that process finds too.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 2:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("specjax: ")
        said = said.replace("--target=", targets.asked(""))  # the command's flag is this function's argument
        raise UserError(said)
    if done.returncode:
        raise RuntimeError(f"the plan's process ended with status {done.returncode}:\n{done.stderr}")
    found = [json_lib.loads(line) for line in done.stdout.splitlines()]
    if json:
        print(done.stdout, end="")
        return found
    tries = [list(group) for _, group in itertools.groupby(found, lambda one: one["target"])]
    report.show(tries if search else [[one] for one in found])
    return found
