"""Several real processes as one run: `launch` starts 2, one is told to stop, 4 go on: it is the run of one process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import metrics, xla_flags
from run_fixtures import ROOT, flags, specjax
from safetensors.numpy import load_file

STEPS = 24


def start(
    stack: contextlib.ExitStack, count: int, devices: int, *argv: object, own_folders: Path | None = None
) -> list[subprocess.Popen]:
    """`count` processes of one command, each with some fake devices, and perhaps a working folder of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "SPECJAX_COORDINATOR": address,
        "SPECJAX_PROCESSES": str(count),
    }
    command = [sys.executable, "-m", "specjax", *map(str, argv), "--distributed"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = []
    for index in range(count):
        where = own_folders / str(index) if own_folders else None
        process = subprocess.Popen(command, env=common | {"SPECJAX_PROCESS": str(index)}, cwd=where, **pipes)
        stack.callback(process.wait)
        stack.callback(process.kill)
        found.append(process)
    return found


def together(count: int, devices: int, *argv: object) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each of `count` processes of one command."""
    with contextlib.ExitStack() as stack:
        running = start(stack, count, devices, *argv)
        return [(process.wait(), out, err) for process in running for out, err in [process.communicate(timeout=300)]]


def job(base: Path, workdir: Path, **changes) -> list[str]:
    """Full fine-tuning, packed, two micro-batches a step, evaluated and saved on the way, on 8 devices of any mesh."""
    keys = {"steps": STEPS, "accumulate": 2, "batch_size": 16, "log.every": 1, "checkpoint.every": 10}
    keys |= {"mesh.fsdp": 4, "mesh.tensor": 2, "eval.every": STEPS, "optimizer.learning_rate": 3e-3}
    keys["data.eval.text"] = base.parent / "data" / "text_eval.jsonl"
    return flags(base, workdir, "full", **(keys | changes))


def assert_same_run(one: Path, other: Path, rtol: float = 1e-5) -> None:
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert mine[key] == pytest.approx(theirs[key], rel=rtol), (mine["step"], key)
    assert (one / "data.json").read_text() == (other / "data.json").read_text()


@pytest.mark.rule(6)
def test_two_are_told_to_stop_four_go_on_and_it_is_the_run_of_one(base):
    alone, shared = base.parent / "alone", base.parent / "shared"
    assert specjax("train", *job(base, alone)) == 0
    place = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(4)}
    command = [sys.executable, "-m", "specjax", "launch", "--on=local:2", *job(base, shared)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=place, **pipes) as launched:
        for line in launched.stdout:  # the second is told while they train
            if line.startswith("[0] step 3/"):
                [second] = [
                    child
                    for child in psutil.Process(launched.pid).children()
                    if child.environ().get("SPECJAX_PROCESS") == "1"
                ]
                second.send_signal(signal.SIGTERM)
                break
        out, err = launched.communicate(timeout=300)
    assert launched.returncode == 143, (out, err)
    stopped = metrics(shared)[-1]["step"]
    assert 3 <= stopped < STEPS
    assert "[0] stopped by a signal at step" in out and "[1]" not in out
    found = together(4, 2, "train", *job(base, shared))
    assert [status for status, *_ in found] == [0] * 4, found
    assert f"resumed at step {stopped}" in found[0][1] and not any(out for _, out, _ in found[1:])
    assert_same_run(shared, alone)
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (shared, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-3, atol=1e-5, err_msg=name)


def test_one_length_and_one_tensor_split_over_two_processes(base):
    """Both processes hold every row, and half of its tokens: LoRA, evaluated, its adapter written by both."""
    alone, shared = base.parent / "lora_alone", base.parent / "lora_shared"
    sizes = {"mesh.context": 2, "mesh.fsdp": 1, "mesh.tensor": 2, "steps": 3, "log.every": 1, "batch_size": 4}
    more = {"data.eval.pairs": base.parent / "data" / "pairs_eval.jsonl"}
    assert specjax("train", *flags(base, alone, "lora", **sizes, **{"mesh.data": 2}, **more)) == 0
    found = together(2, 2, "train", *flags(base, shared, "lora", **sizes, **more))
    assert [status for status, *_ in found] == [0, 0], found
    assert_same_run(shared, alone)
    ours, theirs = (load_file(folder / "export" / "adapter_model.safetensors") for folder in (shared, alone))
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-3, atol=1e-5, err_msg=name)
    merged = base.parent / "merged"
    found = together(2, 2, "export", f"--workdir={shared}", f"--out={merged}", "--merge")
    assert [status for status, *_ in found] == [0, 0], found
    assert found[0][1].startswith(f"wrote {merged};") and not found[1][1], found
    assert specjax("export", f"--workdir={shared}", f"--out={base.parent / 'merged_alone'}", "--merge") == 0
    ours, theirs = (load_file(base.parent / name / "model.safetensors") for name in ("merged", "merged_alone"))
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_mistake_that_one_process_meets_ends_all_in_a_sentence(base, tmp_path):
    """The first process alone finds its data, for the second looks elsewhere."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    (tmp_path / "0" / "pairs.jsonl").write_bytes((base.parent / "data" / "pairs.jsonl").read_bytes())
    argv = flags(base, tmp_path / "run", "lora", train=Path("pairs.jsonl"))
    with contextlib.ExitStack() as stack:
        running = start(stack, 2, 1, "train", *argv, own_folders=tmp_path)
        ends = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [2, 2], ends
    assert "because process 1 failed" in ends[0][1] and "pairs.jsonl" in ends[1][1]
    assert all(len(err.strip().splitlines()) == 1 for _, err in ends)
    assert not (tmp_path / "run").exists()


def test_without_a_cluster_it_is_said():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECJAX_")}
    command = [sys.executable, "-m", "specjax", "export", "--workdir=x", "--out=y", "--distributed"]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no cluster was found" in done.stderr and len(done.stderr.splitlines()) == 1
