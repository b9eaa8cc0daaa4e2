"""By how much the memory that `specjax advise` estimates differs from what the compiler says, job by job.

    python benchmarks/advise.py [--only=TEXT]

Writes the shapes of published models, a config.json each and no weights, compiles each job's step for its target by
`specjax plan`, a process a job, and holds the arithmetic of `specjax/advise/memory.py` against it. A few minutes and
2.5 GiB of host memory a job; a job that was compiled before is found again. For H100 `plan` needs JAX's CUDA compiler
on the path. Nothing is run on a TPU or a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.plans import LLAMA, SHAPES  # noqa: E402
from specjax.advise import memory  # noqa: E402
from specjax.hf.config import from_hf  # noqa: E402
from specjax.plan import targets  # noqa: E402

GIB = 2**30
BASES: dict[str, dict[str, Any]] = {
    "Llama-3 8B": SHAPES["8b"],
    "Llama-3.2 1B": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"head_dim": 64, "tie_word_embeddings": True},
    "Qwen3 4B": {
        **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560},
        **{"intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
        "tie_word_embeddings": True,
    },
    "Gemma 2 9B": {
        **{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584},
        **{"intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256},
        "tie_word_embeddings": True,
    },
    "GLM-4 32B": {
        **{"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "vocab_size": 151552, "hidden_size": 6144},
        **{"intermediate_size": 23040, "num_hidden_layers": 61, "num_attention_heads": 48, "num_key_value_heads": 2},
        **{"head_dim": 128, "max_position_embeddings": 32768, "tie_word_embeddings": False, "pad_token_id": 151329},
    },
    "Apertus 8B": {
        **{"architectures": ["ApertusForCausalLM"], "model_type": "apertus", "vocab_size": 131072},
        **{"hidden_size": 4096, "intermediate_size": 21504, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "max_position_embeddings": 65536, "hidden_act": "xielu"},
        "tie_word_embeddings": False,
    },
}
# Base, config, target, rows a device, tokens a row, overrides.
JOBS: list[tuple[str, str, str, int, int, dict[str, Any]]] = [
    ("Llama-3 8B", "lora", "v5e:4x4", 1, 2048, {}),
    ("Llama-3 8B", "full", "v5p:2x2x4", 2, 2048, {}),
    ("Llama-3 8B", "lora", "v5e:2x2", 1, 2048, {"model.quantise": "nf4"}),
    ("Llama-3.2 1B", "lora", "v5e:1x1", 2, 1024, {}),
    ("Qwen3 4B", "lora", "v6e:2x4", 2, 4096, {}),
    ("Gemma 2 9B", "full", "v5p:2x2x2", 1, 4096, {}),
    ("GLM-4 32B", "lora", "v5p:2x2x1", 2, 2048, {}),
    ("Apertus 8B", "lora", "v5e:2x2", 2, 2048, {}),
    ("Llama-3 8B", "lora", "h100:8", 2, 2048, {}),
    ("Llama-3 8B", "full", "h100:8", 4, 2048, {}),
    ("Llama-3.2 1B", "full", "h100:1", 4, 4096, {}),
    ("Llama-3 8B", "lora", "h100:1", 4, 1024, {"accumulate": 4}),
]


def main() -> None:
    """Prints a table, a row a job, as each is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="jobs whose base or target holds this text")
    only = parser.parse_args().only
    print("| job | target | compiled GiB | estimated | off by |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for base, config, target, rows, length, changes in JOBS:
            if only in base or only in target:
                print(row(Path(folder) / base, base, config, target, rows, length, changes), flush=True)


def row(path: Path, base: str, config: str, target: str, rows: int, length: int, changes: dict[str, Any]) -> str:
    """One job's row."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(BASES[base]))
    devices = targets.count(targets.parse(target))
    keys = {"model.path": path, "model.remat": "full", "batch_size": rows * devices, "data.length": length} | changes
    command = [sys.executable, "-m", "specjax", "plan", f"--config=configs/{config}.py", f"--target={target}", "--json"]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    more = "".join(f", {key.rpartition('.')[2]} {value}" for key, value in changes.items())
    name = f"{base} {'LoRA r16' if config == 'lora' else config}, {rows} x {length} a device{more}"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"| {name} | {target} | failed: {done.stderr.strip().splitlines()[-1]} |"
    held = json.loads(done.stdout.splitlines()[-1])["bytes_per_device"]
    need = memory.need(
        from_hf(BASES[base]),
        trained=held["trained"] // 4 * (devices if config == "full" else 1),
        frozen=held["frozen"] * devices,
        devices=devices,
        rows=rows // changes.get("accumulate", 1),
        length=length,
        family=target.partition(":")[0],
        quantised="model.quantise" in changes,
        accumulated=changes.get("accumulate", 1) > 1,
    )
    assert need.more is not None
    total = need.state + need.more
    off = total / held["total"] - 1
    return f"| {name} | {target} | {held['total'] / GIB:.2f} | {total / GIB:.2f} | {100 * off:+.0f} % |"


if __name__ == "__main__":
    main()
