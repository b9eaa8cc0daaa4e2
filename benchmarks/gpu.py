"""A training step on one GPU, by specjax and by transformers with PEFT and flash attention, side by side.

    python benchmarks/gpu.py [--steps=12] [--rows=4] [--length=4096] [--only=NAME;...] [--json]

Both train Llama-3.2-1B's shapes with random weights on random tokens, a document a row (which is what flash attention
without a mask knows), in bfloat16: LoRA of rank 16 on every linear map over a bfloat16 base, and full training with
float32 masters. `theirs` is transformers' model under `torch.autocast`, PyTorch's flash attention alone, the fused
AdamW and the clipped norm of transformers' Trainer, in micro-batches of so many rows as fit, with or without gradient
checkpointing. Each run is a process of its own, in turns.

Times are of the steps after the third, compiling and loading apart. MFU counts the same operations for both
(`specjax.flops`), of the device's dense bfloat16 peak. Memory is what either's allocator gave out at most.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SKIP = 3  # steps that are not timed
RANK, RATE = 16, 1e-4
HEAD = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
CASES: dict[str, dict[str, Any]] = {
    "specjax LoRA": {"who": "ours", "kind": "lora"},
    "transformers + PEFT LoRA, 2 rows at once": {"who": "theirs", "kind": "lora", "micro": 2},
    "transformers + PEFT LoRA, checkpointing": {"who": "theirs", "kind": "lora", "checkpointing": True},
    "specjax full": {"who": "ours", "kind": "full"},
    "transformers full, 2 rows at once": {"who": "theirs", "kind": "full", "micro": 2},
    "transformers full, checkpointing": {"who": "theirs", "kind": "full", "checkpointing": True},
    "specjax LoRA, remat full": {"who": "ours", "kind": "lora", "remat": "full"},
    "specjax LoRA, 16 documents a row": {"who": "ours", "kind": "lora", "documents": 16},
    "specjax full, moments offloaded": {"who": "ours", "kind": "full", "offload": True},
}
COLUMNS = {
    "ms per step": lambda row: f"{row['ms']:.0f}",
    "tokens/s": lambda row: f"{row['rate']:,.0f}",
    "MFU": lambda row: f"{row['mfu']:.1%}",
    "GiB": lambda row: f"{row['peak'] / 2**30:.1f}",
    "compile s": lambda row: f"{row['compile']:.0f}",
    "last loss": lambda row: f"{row['loss']:.3f}",
}


def sizes(folder: Path, changes: dict[str, Any]) -> Any:
    """The model's sizes, by way of the file that both read."""
    from benchmarks.checkpoint_path import LLAMA_1B
    from specjax.hf.config import from_folder

    (folder / "config.json").write_text(json.dumps(HEAD | LLAMA_1B | changes))
    return from_folder(folder)


class Rows:
    """Random tokens; `documents` of one length a row. Notes when each batch was asked for."""

    def __init__(self, rows: int, length: int, vocab: int, documents: int):
        self.batch_size, self.length, self.vocab, self.documents = rows, length, vocab, documents
        self.fingerprint, self.most_documents = "random", documents
        self.times: list[float] = []

    def batch(self, step: int, rows: Any = slice(None)) -> dict[str, Any]:
        """The batch of this step."""
        import numpy as np

        tokens = np.random.default_rng(step).integers(0, self.vocab, (self.batch_size, self.length + 1), np.int32)
        place = np.broadcast_to(np.arange(self.length, dtype=np.int32), (self.batch_size, self.length))
        each = self.length // self.documents
        last = (place + 1) % each == 0
        return {
            "tokens": tokens[rows, :-1],
            "targets": tokens[rows, 1:],
            "loss_mask": np.where(last & (self.documents > 1), 0, 1)[rows].astype(np.float32),
            "positions": (place % each)[rows],
            "segment_ids": (place // each + 1)[rows],
        }

    def micro_batches(self, step: int, count: int, rows: Any) -> dict[str, Any]:
        """The batch of this step in micro-batches."""
        import numpy as np

        batch = self.batch(step, (np.arange(count)[:, None] + count * rows).ravel())
        return {name: values.reshape(count, len(rows), self.length) for name, values in batch.items()}

    def row_ids(self, step: int) -> Any:
        """Rows are made up: their numbers in the batch."""
        import numpy as np

        return np.arange(self.batch_size)

    def tokens_in(self, step: int) -> int:
        """All of them. It is asked for once a step."""
        self.times.append(time.perf_counter())
        return self.batch_size * self.length


def ours(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run of `specjax.fit`."""
    import jax

    import specjax as sj
    from specjax.hf import load as hf_load
    from specjax.train import fit as fit_lib

    config, lora = sizes(folder, case["changes"]), case["kind"] == "lora"
    model = hf_load.random(
        config, dtype="bfloat16", param_dtype="bfloat16" if lora else "float32", remat=case.get("remat", "none")
    )
    if lora:
        sj.lora.inject(model, rank=RANK, alpha=2 * RANK, targets="all-linear", seed=0)
    data = Rows(case["rows"], case["length"], config.vocab_size, case.get("documents", 1))
    optimizer = sj.adamw(RATE, clip_norm=1.0, offload=case.get("offload", False))
    losses: list[float] = []
    report = fit_lib._report

    def note(log: Any, step: int, metrics: dict[str, Any], *rest: Any) -> None:
        report(log, step, metrics, *rest)
        losses.append(float(metrics["loss"]))

    # Without a workdir, whose last checkpoint would be 15 GB, the loss is on the screen alone.
    setattr(fit_lib, "_report", note)  # noqa: B010
    result = sj.fit(
        model,
        data,
        optimizer,
        steps=case["steps"],
        trainable=sj.LORA if lora else sj.ALL,
        log_every=case["steps"],
    )
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    seconds = sorted(b - a for a, b in zip(data.times[SKIP:-1], data.times[SKIP + 1 :], strict=True))
    return {
        "seconds": seconds[len(seconds) // 2],
        "peak": stats.get("peak_bytes_in_use", 0),
        "compile": result.compile_seconds,
        "loss": losses[-1],
        "device": device.device_kind,
    }


def theirs(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The step of transformers' Trainer, by hand."""
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sizes(folder, case["changes"])
    where, lora = "cuda" if torch.cuda.is_available() else "cpu", case["kind"] == "lora"
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16 if lora else torch.float32)
    with torch.device(where):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if lora:
        import peft

        settings = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "target_modules": "all-linear"}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    if case.get("checkpointing"):
        if lora:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=where == "cuda")
    data, micro = Rows(case["rows"], case["length"], config.vocab_size, 1), case.get("micro", case["rows"])
    seconds, loss = [], math.nan
    kernels = [SDPBackend.FLASH_ATTENTION] if where == "cuda" else [SDPBackend.MATH]
    with sdpa_kernel(kernels):
        for step in range(case["steps"]):
            batch = data.batch(step, slice(None))
            tokens, targets = (torch.from_numpy(batch[name]).long().to(where) for name in ("tokens", "targets"))
            began = time.perf_counter()
            total = 0.0
            for part in range(0, case["rows"], micro):
                some = slice(part, part + micro)
                with torch.autocast(where, dtype=torch.bfloat16):
                    out = model(input_ids=tokens[some], labels=targets[some], shift_labels=targets[some])
                    one = out.loss * micro / case["rows"]
                one.backward()
                total = total + one.detach()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = float(total)
            seconds.append(time.perf_counter() - began)
    timed = sorted(seconds[SKIP:])
    return {
        "seconds": timed[len(timed) // 2],
        "peak": torch.cuda.max_memory_allocated() if where == "cuda" else 0,
        "compile": 0.0,
        "loss": loss,
        "device": torch.cuda.get_device_name() if where == "cuda" else "cpu",
    }


def operations(config: Any, case: dict[str, Any]) -> float:
    """Of a step, whoever makes it."""
    import jax

    from specjax import flops

    c = config
    maps = [(c.embed_dim, heads * c.head_dim) for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads, c.num_heads)]
    maps += [(c.embed_dim, c.mlp_dim)] * 3
    factors = {
        f"{i}.lora.x.a": jax.ShapeDtypeStruct((c.num_layers, RANK, a + b), "float32") for i, (a, b) in enumerate(maps)
    }
    trainable = factors if case["kind"] == "lora" else {"everything": jax.ShapeDtypeStruct((), "float32")}
    documents = case.get("documents", 1)
    return documents * flops.of_step(c, trainable, rows=case["rows"], length=case["length"] // documents)


def run_child(case: dict[str, Any]) -> None:
    """Prints the JSON of one run."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        found = (ours if case["who"] == "ours" else theirs)(case, Path(folder))
        config = sizes(Path(folder), case["changes"])
    from specjax import flops

    count = operations(config, case)
    peak = flops.peak(found["device"]) or math.nan
    found |= {"ms": 1000 * found["seconds"], "rate": case["rows"] * case["length"] / found["seconds"]}
    print(json.dumps(found | {"mfu": count / found["seconds"] / peak, "flops": count}))


def main() -> str | None:
    """Prints a table, or JSON lines; what failed, where something did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", default="", help="names, separated by semicolons")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: what differs from Llama-3.2-1B's config")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
        return None
    names = args.only.split(";") if args.only else list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"no such run: {', '.join(sorted(unknown))}; there are {'; '.join(CASES)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        task = {"steps": args.steps, "rows": args.rows, "length": args.length, "changes": args.config} | CASES[name]
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(task)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{name}: {done.stderr.strip()[-1500:]}", file=sys.stderr, flush=True)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]) | {"name": name})
        print(name, {k: rows[-1][k] for k in ("ms", "mfu", "peak", "compile", "loss")}, file=sys.stderr, flush=True)
    if args.json:
        print("\n".join(json.dumps(row) for row in rows))
    else:
        show(rows)
    return f"{len(names) - len(rows)} of {len(names)} runs failed" if len(rows) < len(names) else None


def show(rows: list[dict[str, Any]]) -> None:
    """A table, under the name of the device."""
    print(", ".join(sorted({row["device"] for row in rows})), end="\n\n")
    print("| | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    for row in rows:
        print(f"| {row['name']} | " + " | ".join(of(row) for of in COLUMNS.values()) + " |")


if __name__ == "__main__":
    sys.exit(main())
