"""What preparing many short pairs costs, at the first start and at the second.

    python benchmarks/data.py [--rows=200000] [--model=demo/base]

Writes a file of random questions and answers, runs `specjax data` on it, which holds 2 % of the rows out as a run does,
twice one after the other in a cache of its own, and once on ten of the rows, which is the cost of starting alone.
Prints seconds, those of the CPUs, which other work on the machine changes less, and the peak memory (ru_maxrss).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "the a tax value is of rate due what how when form year sum each state file pay date law part who must".split()


def write(path: Path, rows: int) -> None:
    """Pairs of about 40 words, no two alike, the same at each call."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(4, 40))) for _ in range(2))
            file.write(json.dumps({"instruction": f"{number}: {question}?", "response": f"{answer}."}) + "\n")


def start(model: str, data: Path, cache: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and MiB of one command."""
    argv = [sys.executable, "-m", "specjax", "data", "--config=configs/sft.py"]
    argv += [f"--config.data.train={data}", f"--config.model.path={model}"]
    began = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(argv)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--model", default="demo/base")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        write(few, 10)
        write(many, args.rows)
        print(f"{args.rows:,} rows, {many.stat().st_size / 2**20:.0f} MiB of JSON lines")
        for name, path in (("ten rows", few), ("first start", many), ("second start", many)):
            seconds, cpu, peak = start(args.model, path, folder / "cache")
            print(f"{name:14} {seconds:7.1f} s {cpu:7.1f} s of the CPUs {peak:8.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
