"""The long versions of what docs/reliability.md promises: `torture.py [--minutes=20] [--only=NAME,...]`, bounded.

Each part prints its figures in a line and fails with what it found; a part that the time no longer allows is named.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))
# As the suite compiles: tests/conftest.py.
QUICK = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ.setdefault("XLA_FLAGS", QUICK)

from helpers import contents, logged, metrics, xla_flags  # noqa: E402
from run_fixtures import ROOT, flags, write_base, write_data  # noqa: E402

STEPS = 12
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SPECJAX_DISABLE": "huge_pages",
}


def job(base, workdir, **changes):
    keys = {"steps": STEPS, "checkpoint.every": 3, "eval.every": 6, "log.every": 1, "lora.dropout": 0.1}
    keys |= {
        "eval.prompts": "What?",
        "eval.max_new_tokens": 4,
        "data.eval.pairs": base.parent / "data/pairs_eval.jsonl",
    }
    return ["train", *flags(base, workdir, "lora", **(keys | changes))]


def run(argv, devices=1, fault="", processes=1, timeout=400):
    """[(status, stdout, stderr, seconds until it ended)] of each process of one command."""
    assert time.monotonic() < DEADLINE, "the time is over"
    command = [sys.executable, *([str(TESTS / "faults.py"), fault] if fault else ["-m", "specjax"]), *map(str, argv)]
    environment = ENVIRONMENT | {"XLA_FLAGS": xla_flags(devices)}
    if processes > 1:
        command.append("--distributed")
        environment |= {"SPECJAX_COORDINATOR": f"localhost:{port()}", "SPECJAX_PROCESSES": str(processes)}
    began, found = time.monotonic(), {}
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(processes):
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            environment["SPECJAX_PROCESS"] = str(index)
            one = subprocess.Popen(command, env=environment, stdout=files[0], stderr=files[1], text=True)
            stack.callback(one.kill)
            started.append((one, *files))
        while len(found) < processes and time.monotonic() - began < timeout:
            for index, (one, *_) in enumerate(started):
                if index not in found and one.poll() is not None:
                    found[index] = time.monotonic() - began
            time.sleep(0.05)
        ends = []
        for index, (one, *files) in enumerate(started):
            said = []
            for file in files:
                file.seek(0)
                said.append(file.read())
            ends.append((one.poll(), *said, found.get(index, float("inf"))))
        return ends


def port():
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def same(one, other, rtol=0.0):
    """Two runs have the same lines and weights; where some difference is allowed, their losses are compared."""
    mine, theirs = metrics(one), metrics(other)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs], "other lines"
    differences = [
        abs(a[key] - b[key]) / max(1.0, abs(b[key]))
        for a, b in zip(mine, theirs, strict=True)
        for key in a
        if not rtol or key.endswith("loss")
    ]
    worst = max(differences)
    assert worst <= rtol, f"the metrics differ by {worst:.1e}"
    if not rtol:
        assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text(), "other samples"
    ours, wanted = contents(one / "export"), contents(other / "export")
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.allclose(ours[name], tensor, rtol=1e-3, atol=1e-4) if rtol else np.array_equal(ours[name], tensor), (
            name
        )
    return worst


def damages(base, folder):
    done = subprocess.run(
        [sys.executable, str(TESTS / "damages.py"), "3"], env=ENVIRONMENT, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if "single damages" in line]
    assert done.returncode == 0, done.stdout
    return "; ".join(lines)


def kills(base, folder):
    command = [sys.executable, "-m", "pytest", "-q", "-s", "tests/test_fit.py", "-k", "killed_at_random"]
    environment = ENVIRONMENT | {"KILLS": "8"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return "; ".join(line for line in done.stdout.splitlines() if "the last checkpoint at each kill" in line)


def faults(base, folder):
    """A fault at each place, then the same command again: the run that nothing interrupted, bit for bit."""
    whole = folder / "whole"
    assert run(job(base, whole))[0][0] == 0
    tried = []
    for fault in (
        *("step@4=kill", "line@5=kill", "written@6=kill", "listed@6=kill", "renamed@6=kill", "weights=kill"),
        *(
            "export=kill",
            "exported=kill",
            "step@7=stop",
            "written@6=full",
            "save@6=small",
            "weights=full",
            "export=full",
        ),
    ):
        workdir = folder / fault
        status, out, err, _ = run(job(base, workdir), fault=fault)[0]
        kind = fault.partition("=")[2]
        assert status == {"kill": -9, "stop": 143, "full": 2, "small": 2}[kind], (fault, status, out, err)
        assert kind not in ("full", "small") or len(err.strip().splitlines()) == 1, (fault, err)
        status, out, err, _ = run(job(base, workdir))[0]
        assert status == 0 and not err, (fault, out, err)
        try:
            same(workdir, whole)
        except AssertionError as error:
            raise AssertionError(f"{fault}: {error}") from error
        left = [path.name for path in workdir.rglob("*") if ".specjax-" in path.name or "partial" in path.name]
        left += [path.name for path in workdir.rglob("*orbax-checkpoint-tmp*")]
        assert not left, (fault, left)
        tried.append(fault)
    return f"{len(tried)} faults, each resumed bit for bit: {', '.join(tried)}"


def second(base, folder):
    """A second run beside the first is refused, and a killed one's lock is nobody's."""
    workdir = folder / "locked"
    first = subprocess.Popen(
        [sys.executable, "-m", "specjax", *map(str, job(base, workdir, steps=4000))],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not any((workdir / "checkpoints").glob("[0-9]*")):
            time.sleep(0.1)
        status, _, err, seconds = run(job(base, workdir, steps=4000))[0]
        assert status == 2 and f"is in use by process {first.pid} on " in err, (status, err)
        first.kill()
        first.wait()
        workdir_free = run(job(base, workdir, steps=4001))[0]
        assert "holds a run with another config" in workdir_free[2], workdir_free
    finally:
        first.kill()
    return f"refused after {seconds:.1f} s; after SIGKILL the folder is free at once"


def processes(base, folder):
    """One of several processes is killed, or its disk is full: the others end in a bounded time and say why."""
    figures, wanted = [], {"kill": -9, "full": 2, "small": 2}
    for count, faults in (
        (2, ("step@7=kill:1", "step@7=kill:0", "written@6=full:0", "save@6=small:1")),
        (4, ("step@7=kill:2", "step@4=kill:0")),
    ):
        whole = folder / f"of{count}"
        ends = run(job(base, whole), processes=count)
        assert [end[0] for end in ends] == [0] * count, ends
        for fault in faults:
            workdir, who = folder / f"{count}{fault}", int(fault[-1])
            ends = run(job(base, workdir), processes=count, fault=fault)
            assert ends[who][0] == wanted[fault[fault.index("=") + 1 : -2]], (fault, ends)
            for index, (status, _, err, _) in enumerate(ends):
                if index != who:
                    assert status == 75 and len(err.splitlines()) == 1 and f"specjax: process {who} (" in err, (
                        fault,
                        ends,
                    )
            seconds = max(end[3] for end in ends) - min(end[3] for end in ends)
            ends = run(job(base, workdir), processes=count)
            assert [end[0] for end in ends] == [0] * count, (fault, ends)
            same(workdir, whole)
            figures.append(f"{fault} of {count}: all ended within {seconds:.0f} s, resumed bit for bit")
    return "; ".join(figures)


def elastic(base, folder):
    """8 devices, then 4, then 2: the run of 8; and the first 20 steps on 1, 2, 4 and 8."""
    whole, moved, long = folder / "eight", folder / "moved", {"batch_size": 8, "steps": 20, "lora.dropout": 0.0}
    assert run(job(base, whole, **long), devices=8)[0][0] == 0
    said = []
    for devices, fault in ((8, "step@7=stop"), (4, "step@14=stop"), (2, "")):
        status, out, err, _ = run(job(base, moved, **long), devices=devices, fault=fault)[0]
        assert status == (143 if fault else 0), (devices, status, err)
        said += [line for line in out.splitlines() if "resumed at step" in line]
    worst = same(moved, whole, rtol=1e-5)
    starts = {8: whole}
    for devices in (1, 2, 4):
        starts[devices] = folder / f"on{devices}"
        assert run(job(base, starts[devices], **long), devices=devices)[0][0] == 0
    spread = max(same(starts[devices], whole, rtol=1e-5) for devices in (1, 2, 4))
    return (
        f"8, 4, 2 devices: metrics within {worst:.0e} ({'; '.join(said)}); 20 steps on 1, 2, 4, 8: within {spread:.0e}"
    )


def cut(seen, start, end):
    """The first and the last of what was seen in a share of the steps."""
    last = seen[-1][0]
    rows = [row for row in seen if start * last <= row[0] <= end * last]
    return rows[0], rows[-1]


def soak(base, folder):
    """Many steps with evaluations, checkpoints and answers: memory, files, speed, one compilation."""
    import psutil

    workdir, steps = folder / "soak", int(os.environ.get("SOAK", 4000))
    often = {"steps": steps, "eval.every": 100, "checkpoint.every": 50, "log.every": 10, "log.tensorboard": True}
    argv = [sys.executable, "-m", "specjax", *map(str, job(base, workdir, **often))]
    with tempfile.TemporaryFile("w+") as said:
        running = subprocess.Popen(argv, env=ENVIRONMENT, stdout=said, stderr=said)
        seen = []
        while running.poll() is None:
            with contextlib.suppress(OSError, IndexError, ValueError, psutil.Error):
                step = logged(workdir)[-1]["step"]
                one = psutil.Process(running.pid)
                used = one.cpu_times()
                seen.append((step, one.memory_info().rss / 2**20, one.num_fds(), used.user + used.system))
            time.sleep(0.5)
        said.seek(0)
        assert running.returncode == 0, said.read()
    late = [row for row in seen if row[0] > steps // 4]
    slope = np.polyfit([row[0] / 1000 for row in late], [row[1] for row in late], 1)[0]
    # Of a machine that others use too, the processor's time says more than the clock's.
    spent = [(b[3] - a[3]) / (b[0] - a[0]) for a, b in (cut(seen, 0.1, 0.25), cut(seen, 0.85, 1.0))]
    speeds = [row["tokens_per_s"] for row in logged(workdir) if "tokens_per_s" in row]
    parts = [
        float(np.median(speeds[len(speeds) // 10 : len(speeds) // 4])),
        float(np.median(speeds[-len(speeds) // 6 :])),
    ]
    return (
        f"{steps} steps: host memory {slope:+.1f} MiB per 1,000 steps after the first quarter, open files "
        f"{late[0][2]} to {late[-1][2]}, tokens/s at the end {parts[1] / parts[0]:.0%} of the start, CPU time a step "
        f"{spent[1] / spent[0]:.0%}"
    )


DEADLINE = float("inf")
PARTS = {one.__name__: one for one in (damages, kills, faults, second, processes, elastic, soak)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    failed: list[str] = []
    DEADLINE = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "data")
        base = write_base(Path(folder) / "base")
        for name in given.only.split(",") if given.only else PARTS:
            if time.monotonic() > DEADLINE:
                failed.append(name)
                print(f"{name}: NOT DONE, the time is over", flush=True)
                continue
            start = time.monotonic()
            try:
                said = PARTS[name](base, Path(folder))
            except AssertionError as error:
                failed.append(name)
                said = f"FAILED: {error}"
            print(f"{name} ({time.monotonic() - start:.0f} s): {said}", flush=True)
    sys.exit(bool(failed))
