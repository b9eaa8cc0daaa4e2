"""The training job that the tests compare, stop and kill; as a program: `fit_job.py WORKDIR full|lora [limit]`."""

import resource
import sys
import time
from pathlib import Path

from specjax import process

if __name__ == "__main__":
    process.leave_torch_out()  # seconds of each start

from helpers import data, model, weights

import specjax as sj

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
    result = sj.fit(made, rows or data(), sj.adamw(5e-3), steps=steps, trainable=trainable, workdir=workdir, **options)
    return result, weights(made)


class Hooked:
    """Data that does something when the batch of a step is asked for, which is while the step before it runs."""

    def __init__(self, inner, step, do):
        self.inner, self.step, self.do = inner, step, do

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def micro_batches(self, step, count, rows):
        if step == self.step:
            self.do()
        return self.inner.micro_batches(step, count, rows)


class Stop(Exception):
    pass


def stop():
    raise Stop


def limit_files(workdir):
    """Once step 9 is saved no file may grow beyond FILE_LIMIT. (Python ignores SIGXFSZ: writing fails instead.)"""
    while not (workdir / "checkpoints" / "9").is_dir():
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))


if __name__ == "__main__":
    workdir, kind, *limit = sys.argv[1:]
    hooked = Hooked(data(), 10, lambda: limit_files(Path(workdir))) if limit else None
    job(workdir, kind, hooked)
