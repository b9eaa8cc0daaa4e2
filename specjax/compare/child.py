"""The process of one method, started by `multiprocessing`. Nothing heavy is imported before the process is prepared."""

import multiprocessing
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax import process
from specjax.config import get_config, merge
from specjax.errors import UserError

STOPPED = (130, process.STOPPED)


def train(told: Any, settings: Mapping[str, Any], workdir: str, name: str, twin: str) -> None:
    """Runs a whole method; its process ends with 0, 2 or 130, or with 143 if it was stopped.

    Args:
      told: the end of a pipe that receives (status, why) if the method fails.
      settings: the method's config, as plain values.
      workdir: the comparison's folder.
      name: the method's name.
      twin: see `record.record`.
    """
    _prepare()
    from specjax.compare import record

    _ended(told, lambda config: record.record(config, Path(workdir), name, twin), settings)


def probe(told: Any, settings: Mapping[str, Any], workdir: str) -> None:
    """Runs a few steps of a method to measure its speed; writes `summary.json` into the folder."""
    _prepare()
    from specjax import run

    _ended(told, lambda config: run.train(config, workdir), settings)


def aim(told: Any, settings: Mapping[str, Any], model: str, prices: Mapping[str, float], out: str) -> None:
    """Writes the result of `aim.aimed` as JSON."""
    process.prepare()
    process.ask_for_no_device()
    from specjax.compare import aim as aim_lib
    from specjax.files import write_json

    configs = {name: merge(get_config(), one) for name, one in settings.items()}
    _ended(told, lambda _: write_json(Path(out), aim_lib.aimed(configs, model, prices)), {})


def _prepare() -> None:
    process.prepare()  # this process begins anew, without what its parent's command did
    process.keep_compiled()


def _ended(told: Any, do: Any, settings: Mapping[str, Any]) -> None:
    import jax

    from specjax.train.memory import exhausted

    try:
        do(merge(get_config(), settings))
    except UserError as error:
        told.send(("too_large" if exhausted(error.__cause__) else "failed", " ".join(str(error).split())))
        sys.exit(2)
    except KeyboardInterrupt:
        print("specjax: interrupted", file=sys.stderr)
        process.leave(130)
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        told.send(("too_large", f"the memory of a device does not do ({str(error).splitlines()[0]})."))
        sys.exit(2)


def run(target: Any, *arguments: Any) -> tuple[int, str, str]:
    """Runs one of the functions above in a fresh interpreter, without JAX state and with its own peak memory.

    SIGTERM and Ctrl-C in this process stop it: it saves and ends with 143. A second Ctrl-C reaches it from the terminal
    directly and ends it at once.

    Returns:
      The exit status; "done", "failed" or "too_large"; and the reason.

    Raises:
      SystemExit: it was stopped; the code is its status.
    """
    context = multiprocessing.get_context("spawn")
    hears, told = context.Pipe(duplex=False)
    one = context.Process(target=target, args=(told, *arguments))
    asked = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        if one.pid:
            one.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        one.start()
        told.close()
        if asked:
            one.terminate()
        one.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = one.exitcode or 0
    if status in STOPPED:
        raise SystemExit(status)
    if asked:  # before it heard of signals, in the midst of something that cannot, or at its very end
        raise SystemExit(process.STOPPED)
    if status == 0:
        return 0, "done", ""
    try:
        said = hears.recv()
    except EOFError:
        said = ("failed", f"its process ended with status {status}; what it said stands above.")
        if status == -signal.SIGKILL:  # which nobody can hear of, as Linux does where its memory is at an end
            said = ("too_large", "its process was killed, as Linux does where memory is at an end.")
    return status, *said
