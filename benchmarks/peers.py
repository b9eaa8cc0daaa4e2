"""Supervised fine-tuning and LoRA on this CPU, by specjax and by TRL with PEFT, side by side.

    python benchmarks/peers.py [--model=smollm2] [--pairs=2400] [--steps=N] [--whole] [--rounds=1] [--seeds=3]
        [--threads=1,2] [--only=NAME;...]

Both train the same base (9.4M parameters, made here by `specjax train` on the standard library's prose) on the same
question-and-answer pairs with the same masks, in the same number of steps of AdamW at one constant rate; float32 unless
a name says otherwise. Both pack into rows of as many tokens, and take a row a micro-batch, which is faster on a CPU
than all rows of a step at once (of several packed rows TRL makes one long one, whose attention costs more). Padded, TRL
takes micro-batches of 8 pairs, its default.
Each run is a process of its own, in turns; the numbers of tokens and of loss tokens of an epoch must agree.

`tokens/CPU s` counts tokens that are no padding, over the seconds of CPU time of the steps after the third, the best of
the rounds: compiling and loading are in `start s` and in `wall s`, that of the whole process, alone. With one thread
the process is bound to one core; with two to nothing. `held-out` is the loss in nats on pairs of modules never trained
on, all judged by specjax, of as many seeds as are asked for where the rows are packed. The C library is asked for huge
pages in both, as `specjax train` does for itself (GLIBC_TUNABLES= runs both without).

With --model=smollm2 the base is SmolLM2-135M-Instruct (demo/published.py), LoRA has rank 16, and a step 4 x 512 tokens.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

BEGAN = time.perf_counter()
ROOT = Path(__file__).parent.parent
WORK = ROOT / "runs" / "peers"
WHOLE = WORK / "whole"
DATA = ROOT / "runs" / "demo" / "data"
MICRO = 8
SKIP = 3  # steps that are not timed
BASE_STEPS = 200


class Setup(NamedTuple):
    """What is trained: a base, rows of so many tokens and so many of them a step, LoRA's rank, the rates."""

    base: str
    length: int
    rows: int
    rank: int
    lora: float
    sft: float


SETUPS = {
    "own": Setup(str(WORK / "base"), 256, 8, 8, 2e-3, 3e-4),
    "smollm2": Setup(str(ROOT / "runs" / "real" / "smollm2"), 512, 4, 16, 1e-3, 3e-5),
}
SETUP = SETUPS["own"]
CASES: dict[str, dict[str, Any]] = {
    "specjax LoRA": {"who": "ours", "kind": "lora", "accumulate": True},
    "TRL LoRA, packed": {"who": "theirs", "kind": "lora", "packing": True, "micro": 1},
    "specjax SFT": {"who": "ours", "kind": "sft", "accumulate": True},
    "TRL SFT, packed": {"who": "theirs", "kind": "sft", "packing": True, "micro": 1},
    "TRL LoRA, padded": {"who": "theirs", "kind": "lora", "packing": False},
    "specjax LoRA, all rows at once": {"who": "ours", "kind": "lora", "once": True},
    "TRL LoRA, packed, all rows at once": {"who": "theirs", "kind": "lora", "packing": True, "once": True},
    "specjax LoRA, bfloat16": {
        "who": "ours",
        "kind": "lora",
        "accumulate": True,
        "dtype": "bfloat16",
        "once": True,
    },
    "TRL LoRA, packed, bfloat16": {
        "who": "theirs",
        "kind": "lora",
        "packing": True,
        "micro": 1,
        "dtype": "bfloat16",
        "once": True,
    },
}
COLUMNS = {
    "threads": lambda row: str(row["threads"]),
    "tokens/CPU s": lambda row: f"{row['rate']:,.0f}",
    "tokens/s": lambda row: f"{row['wall_rate']:,.0f}",
    "start s": lambda row: f"{row['start']:.0f}",
    "wall s": lambda row: f"{row['wall']:.0f}",
    "peak memory": lambda row: f"{row['peak'] / 2**30:.2f} GiB",
    "held-out": lambda row: " ".join(f"{loss:.4f}" for loss in row.get("losses", [])),
}


class Clock:
    """Wall-clock and CPU seconds of this process at each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def tick(self) -> None:
        """Now."""
        self.times.append((time.perf_counter(), time.process_time()))

    def report(self, tokens: int) -> dict[str, float]:
        """Of the steps after the first few, with so many tokens in all steps."""
        (wall, cpu), (wall_end, cpu_end) = self.times[SKIP], self.times[-1]
        timed = tokens * (len(self.times) - 1 - SKIP) / (len(self.times) - 1)
        return {
            "rate": timed / (cpu_end - cpu),
            "wall_rate": timed / (wall_end - wall),
            "start": self.times[0][0] - BEGAN,
            "wall": time.perf_counter() - BEGAN,
        }


def rows_of(name: str, count: int | None = None) -> list[dict[str, str]]:
    """The first so many pairs, of the demo's data or (`--whole`) of whole docstrings."""
    path = DATA / f"pairs_{name}.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def whole_docstrings() -> None:
    """Pairs whose lengths vary as those of instruction sets do: a question about each public name, its whole docstring.

    Those that are longer than a row are left out; modules are held out as in the demo.
    """
    import transformers

    sys.path.insert(0, str(ROOT))
    from demo import corpus

    tokenizer = transformers.AutoTokenizer.from_pretrained(SETUP.base)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    found = [thing for file in corpus.source_files() for thing in corpus.things(*file)]
    for thing in sorted(found, key=lambda thing: corpus.share(thing.name)):
        row = {"instruction": f"What is `{thing.name}`?", "response": thing.doc}
        if len(tokenizer(row["instruction"] + row["response"])["input_ids"]) <= SETUP.length - 16:
            rows["eval" if corpus.held_out(thing.module) else "train"].append(row)
    WHOLE.mkdir(parents=True, exist_ok=True)
    for name, these in rows.items():
        these = these[:150] if name == "eval" else these
        (WHOLE / f"pairs_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in these))


def peak_memory() -> int:
    """Bytes of this process at most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def our_data(pairs: int, seed: int = 0) -> tuple[Any, Any]:
    """(tokenizer, packed rows) of the first so many pairs, in a seed's order."""
    import transformers

    import specjax as sj

    tokenizer = transformers.AutoTokenizer.from_pretrained(SETUP.base)
    data = sj.data.load(rows_of("train", pairs), tokenizer, length=SETUP.length, batch_size=SETUP.rows, seed=seed)
    return tokenizer, data


def totals(data: Any) -> dict[str, int]:
    """Tokens and loss tokens of an epoch."""
    return {"tokens": int(data.offsets[-1]), "loss_tokens": int(data.loss_mask.sum())}


def ours(case: dict[str, Any], steps: int, pairs: int, seed: int, out: Path) -> dict[str, Any]:
    """A run of `specjax.fit`; each step asks how many tokens it has just before the next one is put together."""
    from specjax import process

    process.leave_torch_out()  # as `specjax train` does
    import specjax as sj

    _, data = our_data(pairs, seed)
    model, tokenizer = sj.load(SETUP.base, dtype=case.get("dtype", "float32"))
    lora = case["kind"] == "lora"
    if lora:
        sj.lora.inject(model, rank=SETUP.rank, alpha=2 * SETUP.rank, targets="all-linear", seed=seed)
    clock = Clock()

    class Timed:
        """The data, with a clock."""

        batch_size, fingerprint = data.batch_size, data.fingerprint

        def micro_batches(self, step: int, count: int, rows: Any) -> Any:
            return data.micro_batches(step, count, rows)

        def row_ids(self, step: int) -> Any:
            return data.row_ids(step)

        def tokens_in(self, step: int) -> int:
            clock.tick()
            return int(data.tokens_in(step))

    optimizer = sj.adamw(getattr(SETUP, case["kind"]), clip_norm=1.0)
    options = {
        "accumulate": SETUP.rows if case.get("accumulate") else 1,
        "trainable": sj.LORA if lora else sj.ALL,
        "seed": seed,
    }
    result = sj.fit(model, Timed(), optimizer, steps=steps, **options)
    found = clock.report(result.tokens) | {"peak": peak_memory(), "compile": result.compile_seconds} | totals(data)
    sj.lora.save(model, out) if lora else sj.export(model, tokenizer, out)
    return found


def theirs(case: dict[str, Any], steps: int, pairs: int, seed: int, out: Path) -> dict[str, Any]:
    """A run of `trl.SFTTrainer`."""
    import peft
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if case["threads"] == 1:
        torch.set_num_threads(1)
    clock = Clock()

    class Timed(transformers.TrainerCallback):
        """A clock."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if not clock.times:
                clock.tick()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.tick()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(SETUP.base)
    dtype = case.get("dtype", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(SETUP.base, dtype=getattr(torch, dtype))
    rows = [
        {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in rows_of("train", pairs)
    ]
    packing = case["packing"]
    config = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=case.get("micro", SETUP.rows) if packing else MICRO,
        gradient_accumulation_steps=SETUP.rows // case.get("micro", SETUP.rows)
        if packing
        else max(1, round(pairs / MICRO / steps)),
        packing=packing,
        max_length=SETUP.length,
        learning_rate=getattr(SETUP, case["kind"]),
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = peft.LoraConfig(
        r=SETUP.rank, lora_alpha=2 * SETUP.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora if case["kind"] == "lora" else None,
        callbacks=[Timed()],
    )
    data = trainer.train_dataset
    tokens = sum(len(row) for row in data["input_ids"])
    a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    trainer.train()
    found = clock.report(round(tokens * steps * a_step / len(data))) | {"peak": peak_memory(), "compile": 0.0}
    # A document's first token is no target, in neither.
    found |= {"tokens": tokens, "loss_tokens": sum(label >= 0 for labels in data["labels"] for label in labels)}
    trainer.save_model(str(out))
    return found


def judge(folders: list[tuple[str, str]]) -> list[float]:
    """The held-out loss of each (kind, folder): an adapter of the base, or an exported model."""
    import jax

    import specjax as sj
    from specjax.train import evaluate as evaluating
    from specjax.train import step as steps_lib

    losses = []
    for kind, folder in folders:
        model, tokenizer = sj.load(SETUP.base if kind == "lora" else folder, dtype="float32")
        if kind == "lora":
            sj.lora.load(model, folder)
        data = sj.data.load(rows_of("eval"), tokenizer, length=SETUP.length, batch_size=SETUP.rows)
        graph, trainable, frozen = steps_lib.split(model, sj.ALL)
        eval_step = jax.jit(steps_lib.make_eval_step(graph))
        losses.append(evaluating.evaluate(eval_step, trainable, frozen, data, None)["loss"])
    return losses


def base() -> None:
    """Trains the base, once."""
    if (WORK / "base" / "config.json").exists():
        return
    if not (ROOT / "runs" / "demo" / "data" / "pairs_train.jsonl").exists():
        subprocess.run([sys.executable, "demo/corpus.py", "--out", "runs/demo/data"], cwd=ROOT, check=True)
    folder = WORK / "config"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "demo" / "base").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "num_attention_heads": 10}
    config |= {"num_key_value_heads": 5, "dtype": "float32", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    options = {
        "model.path": folder,
        "steps": BASE_STEPS,
        "epochs": 1.0,
        "optimizer.warmup_steps": 20,
        "eval.every": 0,
        "log.tensorboard": False,
    }
    given = [f"--config.{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "specjax", "train", "--config=configs/demo_base.py", *given]
    subprocess.run([*command, f"--workdir={WORK / 'base_run'}"], cwd=ROOT, check=True, stdout=sys.stderr)
    (WORK / "base_run" / "export").rename(WORK / "base")


def published(name: str) -> None:
    """Makes the folder of a published model and the demo's pairs, where they are not there."""
    if not (DATA / "pairs_train.jsonl").exists():
        subprocess.run([sys.executable, "demo/corpus.py", "--out", DATA], cwd=ROOT, check=True, stdout=sys.stderr)
    command = [sys.executable, "demo/published.py", f"--model={name}", f"--out={SETUP.base}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def child(task: dict[str, Any], threads: int = 1) -> Any:
    """The JSON that a process of its own prints last."""
    task = task | {"setup": SETUP}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if threads == 1:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def run_child(task: dict[str, Any]) -> None:
    """What a child does."""
    global DATA, SETUP
    sys.path.insert(0, str(ROOT))
    DATA, SETUP = Path(task["data"]), Setup(*task["setup"])
    if "judge" in task:
        print(json.dumps(judge(task["judge"])))
        return
    if "steps_of" in task:
        rows = our_data(task["steps_of"])[1]
        lengths = [end - start for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
        batches = [lengths[at : at + MICRO] for at in range(0, len(lengths) - MICRO + 1, MICRO)]
        padded = sum(max(batch) * len(batch) for batch in batches)
        print(json.dumps([rows.steps(1.0), float(sum(map(sum, batches)) / padded)]))
        return
    if task["case"]["threads"] == 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    work = ours if task["case"]["who"] == "ours" else theirs
    print(json.dumps(work(task["case"], task["steps"], task["pairs"], task["seed"], Path(task["out"]))))


def measure(names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a case and number of threads: the best of the rounds, the losses of all seeds."""
    if args.model == "own":
        base()
    else:
        published(args.model)
    shutil.rmtree(WORK / "out", ignore_errors=True)
    if args.whole:
        whole_docstrings()
    data = str(WHOLE if args.whole else DATA)
    steps, share = child({"steps_of": args.pairs, "data": data})
    steps = args.steps or steps
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    folders: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for threads in [int(n) for n in args.threads.split(",")]:
        first = threads == int(args.threads.split(",")[0])
        for round_ in range(max(args.rounds, args.seeds if first else 1)):
            for name in names:
                case = CASES[name] | {"threads": threads}
                timed = round_ < (1 if case.get("once") else args.rounds)
                seeded = first and round_ < args.seeds and case.get("packing", True) and not case.get("once")
                if not timed and not seeded:
                    continue
                out = WORK / "out" / f"{name}-{threads}-{round_}"
                task = {
                    "case": case,
                    "steps": steps,
                    "pairs": args.pairs,
                    "seed": round_,
                    "out": str(out),
                    "data": data,
                }
                found = child(task, threads) | {"name": name, "threads": threads, "steps": steps, "share": share}
                print(f"{name}, {threads} threads, round {round_}: {found['rate']:.0f} tokens/CPU s", file=sys.stderr)
                before = rows.get((name, threads))
                if timed and (before is None or found["rate"] > before["rate"]):
                    rows[name, threads] = found
                if seeded or round_ == 0:
                    folders.setdefault((name, threads), []).append((str(case["kind"]), str(out)))
    for what in ("tokens", "loss_tokens"):
        seen = {row[what] for row in rows.values()}
        if len(seen) > 1:
            raise SystemExit(f"not the same data: {what} of an epoch are {sorted(seen)}")
    for key, made in folders.items():
        rows[key]["losses"] = child({"judge": made, "data": data})
    return list(rows.values())


def main() -> None:
    """Prints a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2400)
    parser.add_argument("--model", choices=SETUPS, default="own", help="what is trained")
    parser.add_argument("--steps", type=int, default=0, help="at most so many; 0: an epoch")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default="", help="names, separated by semicolons")
    parser.add_argument("--whole", action="store_true", help="whole docstrings as answers, of very unequal lengths")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(args.child)
    global SETUP
    SETUP = SETUPS[args.model]
    names = args.only.split(";") if args.only else list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"no such run: {', '.join(sorted(unknown))}; there are {'; '.join(CASES)}")
    rows = measure(names, args)
    if args.json:
        print("\n".join(json.dumps(row) for row in rows))
        return None
    steps, tokens, share = (rows[0][key] for key in ("steps", "tokens", "share"))
    print(
        f"{steps} steps of {SETUP.rows} x {SETUP.length}, {tokens} tokens an epoch; "
        f"of padded rows {share:.0%} are tokens\n"
    )
    print("| | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    for row in rows:
        print(f"| {row['name']} | " + " | ".join(of(row) for of in COLUMNS.values()) + " |")
    return None


if __name__ == "__main__":
    main()
