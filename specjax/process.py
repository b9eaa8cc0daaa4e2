"""What the `specjax` command does to its own process: all of it, and called by the command alone.

Importing specjax changes nothing in the interpreter, and its Python API leaves the environment, the loggers, the hooks
and JAX's settings as it finds them. The command owns its process: `cli.entry`, and the processes that `specjax compare`
starts, call what is here. SPECJAX_DISABLE leaves any of it out.
"""

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, cast

from specjax.errors import UserError, nearest

STOPPED = 143  # what a shell says of SIGTERM
DISABLE = "SPECJAX_DISABLE"  # the environment variable: parts, with commas between them, or "all"
PARTS = {
    "huge_pages": "`train` restarts itself once to get huge pages from Linux (GLIBC_TUNABLES): faster steps on a CPU",
    "torch_block": "transformers may not load torch, unless the config file imports either of them",
    "quiet": "transformers, datasets, Orbax and the compilers print errors only",
    "compile_cache": "programs compiled for a GPU or TPU are kept in ~/.cache/specjax/xla",
    "cpu_only": "`plan` and `advise`, which are about devices that are not here, use none that are",
    "memory_trim": "memory that compiling a step took goes back to the system",
}

_ONE_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}  # what libtpu asks of a host


def enabled(part: str) -> bool:
    """Whether SPECJAX_DISABLE leaves a part of `PARTS` in.

    Raises:
      UserError: the variable names something else.
    """
    off = [name for text in os.environ.get(DISABLE, "").split(",") if (name := text.strip())]
    for name in off:
        if name not in (*PARTS, "all"):
            raise UserError(f"{DISABLE}={name}: give all, or some of {', '.join(PARTS)}.{nearest(name, PARTS)}")
    return part not in off and "all" not in off


def ask_for_huge_pages() -> None:
    """Starts this process anew with the C library asking Linux for huge pages, which it is told when it starts.

    A step's temporaries are new memory at every step, on CPU hundreds of megabytes: by pages of 4 KiB, a sixth of the
    step was spent on being given them (docs/log.md). GLIBC_TUNABLES, where it is set, is left as it is, and a debugger
    or a coverage tool that traces this process keeps it.
    """
    wanted = enabled("huge_pages") and sys.gettrace() is None
    if wanted and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare() -> None:
    """Before the heavy libraries are imported, and after the user's config file ran: torch left out, the rest quiet."""
    if enabled("torch_block"):
        leave_torch_out()
    if enabled("quiet"):
        hush()


def leave_torch_out() -> None:
    """Keeps transformers from loading torch, where it is installed, for a tokenizer and a config, which need none.

    That is 0.27 GiB and seconds at start. A config file that imported torch, or transformers, which may have found
    torch by then, has it.
    """
    if "transformers" not in sys.modules:
        sys.modules.setdefault("torch", cast(Any, None))


def hush() -> None:
    """Keeps off stderr what libraries say there beside the errors that they raise, which are told."""
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not tpu_devices():
        # Where no TPU is, JAX loads its library all the same, which asks what host this is and tells that nobody knows.
        for name, value in _ONE_HOST.items():
            os.environ.setdefault(name, value)
    for name in ("absl", "asyncio"):  # Orbax and tensorstore
        logging.getLogger(name).setLevel(logging.CRITICAL)
    format_before = warnings.formatwarning

    def formatted(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> str:
        if category is UserWarning and filename.startswith(f"{Path(__file__).parent}{os.sep}"):
            return f"specjax: {message}\n"  # ours: a sentence, as errors are
        return format_before(message, category, filename, *where, **more)

    warnings.formatwarning = formatted
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # The writes that a failed save leaves behind find their event loop closed, each with a traceback.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def tpu_devices() -> list[Path]:
    """The device files of this host's TPU chips, as Linux has them; [] where there is none."""
    return [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]


def end_at_signals() -> None:
    """SIGTERM and Ctrl-C end this process at once, with a word and the status of a stopped run.

    While a run has something to save, `fit` hears of them. Before and after, what is whole lies in the folder, and what
    is not is cleaned by the next run.
    """

    def end(number: int, frame: Any) -> None:
        os.write(2, f"specjax: stopped by {signal.Signals(number).name}: call again to go on\n".encode())
        leave(STOPPED)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)


def ask_for_no_device(cpus: int = 0) -> None:
    """Before a plan: JAX sees CPUs alone, so many where that is above 0, and the TPU's compiler waits for no TPU.

    These are settings that JAX and the compilers read when they start.
    """
    if not enabled("cpu_only"):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Without a TPU the library would wait for a metadata server, and one stale lock file would stop other processes.
    # What it then does not know of a host it would say on stderr, though no topology asked for here depends on it.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"}
    settings |= _ONE_HOST
    settings |= {"TF_CPP_MIN_LOG_LEVEL": "2"}  # NVIDIA's would say that there is no driver
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    import jax

    jax.config.update("jax_platforms", "cpu")
    if cpus and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cpus)


def keep_gloo_quiet() -> None:
    """Gives Python's output a descriptor of its own: on CPU, Gloo prints lines into the middle of ours.

    For one of several processes, once they found each other.
    """
    import jax

    if jax.default_backend() != "cpu" or not enabled("quiet"):
        return
    sys.stdout.flush()
    ours = os.dup(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    sys.stdout = open(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def keep_compiled() -> None:
    """Lets JAX keep what it compiles for an accelerator, unless it was told a place: in ~/.cache/specjax/xla.

    Not on CPU: XLA warns there, in long lines, of programs that it compiled on this very machine. Asks for the devices.
    """
    import jax

    config: Any = jax.config
    wanted = config.jax_compilation_cache_dir is None and enabled("compile_cache")
    if wanted and jax.default_backend() != "cpu":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "specjax" / "xla"))


def return_freed_memory() -> None:
    """Gives the system back what compiling took, a few hundred MiB, which glibc would keep beside the steps' own.

    The one function here that the library calls too (`fit`): it changes no setting.
    """
    import ctypes

    if sys.platform == "linux" and enabled("memory_trim"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:  # musl has none
            trim(0)


def peak_memory() -> int:
    """Bytes at the peak: of the first accelerator, else of this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: a process inherits its parent's peak there
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def leave(status: int) -> None:
    """Ends this process at once, without what Python does at its end: the others of a run may never come to that."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
