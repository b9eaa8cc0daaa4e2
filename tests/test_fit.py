"""The loop: what is logged, saved and resumed, and that nothing of it shows in the numbers.

Run as a program, this file is the training job that the tests kill: `test_fit.py WORKDIR full|lora [limit]`.
"""

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import BASE, assert_same_bits, data, metrics, model, weights
from orbax.checkpoint import checkpoint_managers

import specjax as sj
from specjax.train.checkpoint import Checkpoints
from specjax.train.fit import _Run

KINDS = ("full", "lora")
STEPS = 24
FILE_LIMIT = 20_000  # bytes: more than metrics.jsonl, less than the weights


def subject(kind="full", **changes):
    """A fresh model, always the same one, and its filter."""
    made = model(**changes)
    if kind == "lora":
        sj.lora.inject(made, rank=4, dropout=0.1, targets="all-linear", seed=1)
    return made, sj.LORA if kind == "lora" else sj.ALL


def job(workdir, kind="full", rows=None, *, steps=STEPS, of=None, **changes):
    """The run whose metrics and weights the tests compare: accumulation, evaluation, dropout, saves between evals."""
    made, trainable = of or subject(kind)
    options = {
        "accumulate": 2,
        "eval_data": {"heldout": data(seed=1, documents=6)},
        "eval_every": 8,
        "save_every": 3,
        "log_every": 2,
        "tensorboard": False,
        "seed": 5,
    } | changes
    result = sj.fit(
        made, rows or data(), sj.adamw(5e-3), steps=steps, trainable=trainable, workdir=workdir, **options
    )
    return result, weights(made)


class Hooked:
    """Data that does something when the batch of a step is asked for, which is while the step before it runs."""

    def __init__(self, inner, step, do):
        self.inner, self.step, self.do = inner, step, do

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def batch(self, step, **shards):
        if step == self.step:
            self.do()
        return self.inner.batch(step, **shards)


class Stop(Exception):
    pass


def stop():
    raise Stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> (metrics, weights, workdir) of the run that nothing interrupts."""
    found = {}
    for kind in KINDS:
        workdir = tmp_path_factory.mktemp(kind)
        _, trained = job(workdir, kind)
        found[kind] = (metrics(workdir), trained, workdir)
    return found


def assert_as_whole(workdir, trained, whole):
    assert metrics(workdir) == whole[0]
    assert_same_bits(trained, whole[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_job_learns_and_logs_what_it_should(whole, kind):
    rows, trained, _ = whole[kind]
    train = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train] == [1, *range(2, STEPS + 1, 2)]
    assert [row["step"] for row in rows if "eval/heldout/loss" in row] == [0, 8, 16, 24]
    assert {"loss", "loss_tokens", "accuracy", "grad_norm", "lr", "tokens"} <= set(train[0])
    assert train[-1]["loss"] < train[0]["loss"] - 0.05
    assert rows[-1]["eval/heldout/loss"] < rows[0]["eval/heldout/loss"] - 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [2, 7, 16, 23])
def test_a_run_that_an_error_stopped_resumes_bit_for_bit(tmp_path, whole, kind, at):
    with pytest.raises(Stop):
        job(tmp_path, kind, Hooked(data(), at, stop))
    result, trained = job(tmp_path, kind)
    assert result.step == STEPS
    assert_as_whole(tmp_path, trained, whole[kind])


def test_a_finished_run_called_again_changes_nothing(whole):
    rows, trained, workdir = whole["full"]
    result, again = job(workdir)
    assert result.step == STEPS
    assert_as_whole(workdir, again, (rows, trained))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts this file as a program. What it compiles is kept between starts; the reference run compiled its own."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }

    def begin(workdir, *more):
        command = [sys.executable, "-u", __file__, str(workdir), *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def finish(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def run_until_killed(process, lines, seconds):
    """SIGKILL, so many seconds after so many lines of the log; returns the exit status."""
    for line in process.stdout:
        lines -= line.startswith("step ")
        if lines == 0:
            break
    time.sleep(seconds)
    process.kill()
    process.stdout.close()
    return process.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_moments_resumes_bit_for_bit(tmp_path, whole, start, kind):
    last = []
    for _ in range(5):
        status = run_until_killed(start(tmp_path, kind), random.randint(1, 5), random.random() / 3)
        last.append(Checkpoints(tmp_path / "checkpoints", read_only=True).latest())
        if status == 0:  # it had come to its end
            break
        assert status == -signal.SIGKILL
    code, out = finish(start(tmp_path, kind))
    assert code == 0, out
    print("the last checkpoint at each kill:", last)
    assert_as_whole(tmp_path, dict(np.load(tmp_path / "weights.npz")), whole[kind])


if __name__ == "__main__":
    _, kind, *limit = sys.argv[1:]
    workdir = Path(sys.argv[1])
    rows = data()
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        rows = Hooked(rows, 10, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT)))
    np.savez(workdir / "weights.npz", **job(workdir, kind, rows)[1])
