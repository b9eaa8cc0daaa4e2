"""What a fleet buys: N adapters in one run against N runs, and whether each is what it would be alone.

    python benchmarks/fleet.py [--adapters=1,2,4,8] [--steps=20,120] [--singles=8] [--model=demo/base] [--json]
    python benchmarks/fleet.py --check

The first trains LoRA adapters of rank 8 over the model on made-up pairs, 2 rows of 256 tokens per step each; every run
is a process of its own, started as the command starts it, and fleets and single runs take turns. CPU seconds and wall
clock are of whole processes: the start, loading and compilation of each run are part of what it costs. From eight
adapters on, a fleet with successive halving is beside it. With `--singles` fewer single runs than adapters are timed,
and a fleet is held against their mean, times its adapters.

`--check` compares four unequal adapters (ranks 4, 8, 8, 16, rates, data, dropout, rsLoRA) with their lone runs over 20
steps on one device, on fsdp 8 and on fsdp 4 x tensor 2, of fake CPU devices: losses and gradient norms number by
number, factors taken together.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS, RELATIVE = 20, 1e-5
RUNGS = (0.125, 0.25, 0.5)  # of eight adapters 4, 2, 1 are left
LAYOUTS: dict[str, dict[str, Any]] = {
    "one device": {},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
}
CONFIG = """
from specjax.config import get_config as defaults

def get_config():
    c = defaults()
    c.trainable, c.lora.rank, c.model.path, c.data.train = "lora", 8, "{base}", "{rows}"
    c.data.length, c.data.eval_fraction, c.batch_size, c.steps, c.rungs = 256, 0.02, 2, {steps}, {rungs}
    c.optimizer.learning_rate, c.log.tensorboard, c.log.every, c.checkpoint.keep = 2e-3, False, 50, 1
    for number in range({fleet}):
        c.fleet["a%d" % number] = {{"seed": number}}
    return c
"""


def made_up(path: Path) -> Path:
    """Pairs of which some hundred rows can be packed."""
    words = "loader mask row step chunk shard batch token rank scale head layer".split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(2000):
            chosen = [words[(number * 7 + place * place) % len(words)] for place in range(24)]
            row = {"instruction": f"Say {number} of {' '.join(chosen[:6])}?", "response": " ".join(chosen)}
            file.write(json.dumps(row) + "\n")
    return path


def timed(
    model: Path, folder: Path, name: str, steps: int, fleet: int, seed: int = 0, rungs: tuple[float, ...] = ()
) -> dict[str, float]:
    """One `specjax train` in a process of its own: its CPU seconds, wall clock, peak memory and what it says itself."""
    config = folder / f"{name}.py"
    given = {"base": model, "rows": folder / "rows.jsonl", "rungs": rungs}
    config.write_text(CONFIG.format(steps=steps, fleet=fleet, **given))
    command = [sys.executable, "-m", "specjax", "train", f"--config={config}", f"--workdir={folder / name}"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"--config.seed={seed}"], env=environment, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} ended with status {os.waitstatus_to_exitcode(status)}")
    summary = json.loads((folder / name / "summary.json").read_text())
    return {
        "cpu": used.ru_utime + used.ru_stime,
        "wall": time.perf_counter() - began,
        "memory": used.ru_maxrss * 1024,
        "training": summary["seconds"],
    }


def measure(model: Path, adapters: list[int], steps: list[int], most: int) -> list[dict[str, Any]]:
    """Fleets of each size, and single runs, at `most` so many, in turns."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made_up(folder / "rows.jsonl")
        timed(model, folder, "warm", 2, 0)  # the tokens are made once
        for count in steps:
            singles: list[dict[str, float]] = []
            for size in adapters:
                while len(singles) < min(size, most):
                    singles.append(timed(model, folder, f"single{count}-{len(singles)}", count, 0, len(singles)))
                found = timed(model, folder, f"fleet{count}-{size}", count, size)
                some = singles[:size]
                alone = {key: size * mean(one[key] for one in some) for key in ("cpu", "wall", "training")}
                alone["memory"] = max(one["memory"] for one in some)
                rows.append({"steps": count, "adapters": str(size), "fleet": found, "alone": alone})
                if size >= 8:
                    found = timed(model, folder, f"halved{count}-{size}", count, size, rungs=RUNGS)
                    rows.append({"steps": count, "adapters": f"{size}, halving", "fleet": found, "alone": alone})
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| steps | adapters | CPU s, one by one | fleet | wall s | fleet | peak memory | fleet |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        alone, fleet = row["alone"], row["fleet"]
        cells = [f"{row['steps']}", f"{row['adapters']}", f"{alone['cpu']:.0f}"]
        cells += [f"{fleet['cpu']:.0f} ({fleet['cpu'] / alone['cpu']:.2f})", f"{alone['wall']:.0f}"]
        cells += [f"{fleet['wall']:.0f} ({fleet['wall'] / alone['wall']:.2f})", f"{alone['memory'] / 2**30:.2f} GiB"]
        cells += [f"{fleet['memory'] / 2**30:.2f} GiB ({fleet['memory'] / alone['memory']:.2f})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def members() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> (arguments of `lora.inject`, settings of the training) of four unequal adapters."""
    from specjax.train.optim import schedule

    cosine = schedule("cosine", learning_rate=1e-2, steps=STEPS, warmup_steps=3)
    linear = schedule("linear", learning_rate=5e-3, steps=STEPS)
    some = ["q_proj", "v_proj", "down_proj"]
    return {
        "hr": ({"rank": 4, "alpha": 8, "seed": 1}, {"rate": cosine, "decay": 0.1, "clip": 0.5, "documents": 40}),
        "tax": ({"rank": 8, "seed": 2, "targets": some}, {"rate": 3e-3, "decay": 0.0, "clip": 1.0, "documents": 90}),
        "law": (
            {"rank": 8, "alpha": 4, "seed": 3, "dropout": 0.2},
            {"rate": linear, "decay": 0.01, "clip": 0.0, "documents": 23},
        ),
        "med": (
            {"rank": 16, "alpha": 32, "seed": 4, "rslora": True},
            {"rate": 1e-3, "decay": 0.0, "clip": 0.2, "documents": 60},
        ),
    }


def check(layout: str) -> None:
    """Compares a fleet with its lone runs; exits with 1 where a number differs by more than 1e-5 of itself."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import numpy as np
    from helpers import data, logged, model  # type: ignore[import-not-found]

    import specjax as sj
    from specjax.lora.adapters import collect, on_host

    mesh = sj.make_mesh(**LAYOUTS[layout]) if LAYOUTS[layout] else None
    told, worst = members(), dict[str, float]()

    def rows(name: str) -> Any:
        count = told[name][1]["documents"]
        return data(documents=count, seed=count, batch_size=16, answers=True)

    with tempfile.TemporaryDirectory() as folder:
        how: dict[str, Any] = {"accumulate": 2, "log_every": 1, "tensorboard": False}
        base, fleet = model(mesh=mesh), {}
        for number, (name, (lora, own)) in enumerate(told.items()):
            fleet[name] = sj.fleet.Member(
                data=rows(name),
                steps=STEPS,
                lora=lora,
                learning_rate=own["rate"],
                weight_decay=own["decay"],
                clip_norm=own["clip"],
                seed=number,
            )
        sj.fleet.fit(base, fleet, workdir=f"{folder}/fleet", **how)
        lines = logged(f"{folder}/fleet")
        for number, (name, (lora, own)) in enumerate(told.items()):
            alone = model(mesh=mesh)
            sj.lora.inject(alone, **lora)
            rule = sj.adamw(own["rate"], weight_decay=own["decay"], clip_norm=own["clip"])
            where = f"{folder}/{name}"
            sj.fit(alone, rows(name), rule, steps=STEPS, trainable=sj.LORA, seed=number, workdir=where, **how)
            mine = [line for line in lines if line["adapter"] == name]
            for found, wanted in zip(mine, logged(where), strict=True):
                for key in ("loss", "grad_norm", "accuracy", "loss_tokens", "lr", "tokens"):
                    apart = abs(found[key] - wanted[key]) / max(abs(wanted[key]), 1e-9)
                    worst[key] = max(worst.get(key, 0.0), apart)
            have, want = (on_host(collect(*of)).factors for of in ((base, name), (alone, "default")))
            for path, factors in want.items():
                for field, value in factors.values.items():
                    apart = float(np.linalg.norm(have[path].values[field] - value) / np.linalg.norm(value))
                    worst["factors"] = max(worst.get("factors", 0.0), apart)
    print(f"RESULT {layout}: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
    if max(worst.values()) > RELATIVE:
        sys.exit(1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", default="1,2,4,8")
    parser.add_argument("--steps", default="20,120")
    parser.add_argument("--singles", type=int, default=8, help="single runs that are timed, at most")
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "base")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.layout:
        check(given.layout)
    elif given.check:
        flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
        quick = f"{flags} --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        failed = 0
        for layout in LAYOUTS:
            command = [sys.executable, __file__, f"--layout={layout}"]
            environment = os.environ | {"XLA_FLAGS": quick, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            told = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
            print(told[0].removeprefix("RESULT ") if told else done.stderr, flush=True)
            failed |= done.returncode
        sys.exit(1 if failed else 0)
    else:
        sizes, steps = ([int(part) for part in text.split(",")] for text in (given.adapters, given.steps))
        rows = measure(given.model.resolve(), sizes, steps, given.singles)
        print("\n".join(map(json.dumps, rows)) if given.json else table(rows))


if __name__ == "__main__":
    main()
