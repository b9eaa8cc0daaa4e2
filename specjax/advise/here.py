"""The hardware of this machine, found without claiming a device: `--hardware=found`."""

import re
import shutil
import subprocess

from specjax import process
from specjax.errors import UserError
from specjax.plan import targets

SECONDS = 20  # that the driver has to answer


def found() -> str:
    """The target that describes this machine: cpu, or h100:N.

    Raises:
      UserError: an accelerator that no target describes, or whose kind is not recognised.
    """
    known = f"give --hardware as one of {targets.FORMS}, or cpu"
    if process.tpu_devices():
        raise UserError(f"--hardware=found: a TPU is here, whose slice only a run can tell: {known}.")
    if not (driver := shutil.which("nvidia-smi")):
        return "cpu"
    try:
        done = subprocess.run([driver, "-L"], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--hardware=found: nvidia-smi does not answer ({error}): {known}.") from error
    if done.returncode:
        why = " ".join((done.stdout + done.stderr).split())
        raise UserError(f"--hardware=found: nvidia-smi ends with status {done.returncode} ({why}): {known}.")
    names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE)
    if not names:
        return "cpu"
    if any("H100" not in name for name in names):
        kinds = ", ".join(dict.fromkeys(names))
        raise UserError(f"--hardware=found: this machine has {kinds}, of which no figures are known: {known}.")
    return f"h100:{len(names)}"
