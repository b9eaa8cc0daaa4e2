"""What preparing many short pairs costs, at the first start and at the second.

    python benchmarks/data.py [--rows=200000] [--kind=pairs] [--model=demo/base]

Writes a file of random questions and answers (or of short texts), runs `specjax data` on it, which holds 2 % of the
rows out as a run does, twice one after the other in a cache of its own, and once on ten of the rows, which is what any
start costs. Prints seconds, those of the CPUs, which other work on the machine changes less, the peak memory
(ru_maxrss), and how much of the disk a row takes once it is prepared.

`--kind=tokens` makes up tokens in place of texts: what is left is how they grow on the disk, are found again, held out,
planned and packed, in this one process.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS = "the a tax value is of rate due what how when form year sum each state file pay date law part who must".split()


def write(path: Path, rows: int, kind: str) -> None:
    """Pairs of about 40 words, or texts of about 12, no two alike, the same at each call."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            if kind == "texts":
                file.write(
                    json.dumps({"text": f"{number}: {' '.join(draw.choices(WORDS, k=draw.randint(4, 20)))}."}) + "\n"
                )
                continue
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(4, 40))) for _ in range(2))
            file.write(json.dumps({"instruction": f"{number}: {question}?", "response": f"{answer}."}) + "\n")


def start(model: str, data: Path, cache: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and MiB of one command."""
    argv = [sys.executable, "-m", "specjax", "data", "--config=configs/sft.py", "--config.data.format=auto"]
    argv += [f"--config.data.train={data}", f"--config.model.path={model}"]
    began = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(argv)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def pack(rows: int, folder: Path) -> None:
    """Prints what each step costs of documents of 6 to 44 tokens."""
    from specjax.data import Corpus, cache

    draw, path = np.random.default_rng(0), folder / "made.tokens"

    def said(what: str, began: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{what:40} {time.perf_counter() - began:7.1f} s {peak:8.0f} MiB", flush=True)

    began, sizes = time.perf_counter(), draw.integers(6, 45, rows)
    with cache.Spool(folder, {"tokens": "int32", "trained": "bool"}) as grown:
        for at in range(0, rows, 1000):
            count = int(sizes[at : at + 1000].sum())
            grown.add("tokens", draw.integers(0, 4096, count).astype(np.int32))
            grown.add("trained", np.ones(count, bool))
        arrays = grown.arrays() | {"offsets": np.append(0, np.cumsum(sizes)), "rows": np.arange(rows)}
        cache.keep(path, cache.Kept(arrays, {}))
    said(f"grown and kept, {path.stat().st_size / rows:.0f} bytes per row", began)
    del arrays
    began, found = time.perf_counter(), cache.find(path)
    said("found again, its digest compared", began)
    assert found is not None
    facts: dict[str, Any] = {
        "name": "made",
        "format": "text",
        "columns": {},
        "found": (),
        "tokenizer": None,
        "template": None,
    }
    sides = draw.integers(0, 2**64, rows, dtype=np.uint64)
    corpus = Corpus(**facts | dict(found.arrays), count=rows, empty=0, seed=0, sides=sides)
    for part in ("train", "eval"):
        began = time.perf_counter()
        data = corpus.pack(length=1024, batch_size=8, holdout=(0.02, part))
        said(f"{part}: {data.report['tokens']:,} tokens, {data.num_rows:,} rows", began)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--kind", choices=("pairs", "texts", "tokens"), default="pairs")
    parser.add_argument("--model", default="demo/base")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.kind == "tokens":
            return pack(args.rows, folder)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        write(few, 10, args.kind)
        write(many, args.rows, args.kind)
        print(f"{args.rows:,} rows, {many.stat().st_size / 2**20:.0f} MiB of JSON lines")
        for name, path in (("ten rows", few), ("first start", many), ("second start", many)):
            seconds, cpu, peak = start(args.model, path, folder / "cache")
            print(f"{name:14} {seconds:7.1f} s {cpu:7.1f} s of the CPUs {peak:8.0f} MiB", flush=True)
        kept = max(path.stat().st_size for path in (folder / "cache").rglob("*.tokens"))
        print(f"prepared: {kept / args.rows:.0f} bytes per row, {many.stat().st_size / args.rows:.0f} as JSON")


if __name__ == "__main__":
    main()
