"""A fault at a named place of a run: `faults.py PLACE[@STEP]=KIND[:PROCESS] VERB FLAGS...` is the command with it.

The places are those of `PLACES`; KIND is kill (SIGKILL), stop (SIGTERM), full (the disk, at that place) or small (no
file may grow beyond 512 bytes from there on). The fault comes once, in the process of that number, the first where none
is given.
"""

import os
import re
import resource
import signal
import sys

from specjax import cli, process

FAULT = re.compile(r"(?P<place>\w+)(@(?P<step>\d+))?=(?P<kind>kill|stop|full|small)(:(?P<process>\d+))?")


def happen(kind):
    if kind == "full":
        raise OSError(28, "No space left on device", "disk")
    if kind == "small":
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        return
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)


def around(owner, name, step_of, step, kind, *, after=False):
    """The function does as it did, and the fault happens before it or after it, at that step, once."""
    real, left = getattr(owner, name), [kind]

    def faulty(*given, **named):
        hit = left and step in (None, step_of(*given, **named))
        if hit and not after:
            happen(left.pop())
        found = real(*given, **named)
        if hit and after:
            happen(left.pop())
        return found

    setattr(owner, name, faulty)


def torn(step, kind):
    """Half a line is written, and no more."""
    from specjax.train.metrics import Log

    real, left = Log._write, [kind]

    def write(self, name, row):
        if left and name == "metrics.jsonl" and row["step"] == step:
            self._files[name].write('{"step": ' + str(step))
            self._files[name].flush()
            happen(left.pop())
        real(self, name, row)

    Log._write = write


def install(place, step, kind):
    from orbax.checkpoint import checkpoint_manager

    from specjax import files, run
    from specjax.lora import peft
    from specjax.train.checkpoint import Checkpoints
    from specjax.train.session import Session

    at = {
        # In a step: the batch is there, the state about to change.
        "step": lambda: around(Session, "step", lambda self, number, *more: number, step, kind),
        # In the line of a step.
        "line": lambda: torn(step, kind),
        "save": lambda: around(Session, "save", lambda self, number, loss: number, step, kind),
        # A checkpoint: all is written, and nothing listed; listed, and not renamed; renamed, and the older ones there.
        "written": lambda: around(Checkpoints, "_sum", lambda self: self._saving, step, kind),
        "listed": lambda: around(Checkpoints, "_sum", lambda self: self._saving, step, kind, after=True),
        "renamed": lambda: around(
            checkpoint_manager.CheckpointManager, "_finalize_checkpoint", lambda self, number: number, step, kind
        ),
        # The export: its weights are there under another name, and no more of it.
        "weights": lambda: around(peft, "save_file", lambda tensors, path, **more: True, True, kind, after=True),
        # Its files are there under another name; it is there, and the summary is not.
        "export": lambda: around(files.os, "replace", lambda old, new: ".specjax-" in str(old), True, kind),
        "exported": lambda: around(run, "_summarise", lambda *given: step, step, kind),
    }
    at[place]()


PLACES = ("step", "line", "save", "written", "listed", "renamed", "weights", "export", "exported")

if __name__ == "__main__":
    fault = FAULT.fullmatch(sys.argv.pop(1))
    if fault["place"] not in PLACES:
        sys.exit(f"no such place: {fault['place']}")
    process.prepare()
    if os.environ.get("SPECJAX_PROCESS", "0") == (fault["process"] or "0"):
        install(fault["place"], int(fault["step"]) if fault["step"] else None, fault["kind"])
    cli.entry()
