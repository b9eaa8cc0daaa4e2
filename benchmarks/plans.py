"""What real jobs need on TPU slices and GPUs that are not here, by `specjax plan` from the shipped configs.

    python benchmarks/plans.py [--only=TEXT]

Writes the shapes of Llama-3 8B and 70B and of Mixtral 8x7B, a config.json each and no weights, and compiles the
training step of every job below for its target, a process a job. A minute or two each on two quiet cores and 2.5 GiB of
host memory. `asked` is what the job was to stay within (GiB per device), or "fits". Nothing is run on a TPU or a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GIB = 2**30
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "8x7b": LLAMA
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
}
# A config file, because no flag gives an adapter its own values.
FLEET = """
from specjax.config import get_config as defaults

def get_config():
    config = defaults()
    config.trainable, config.lora.rank, config.data.train = "lora", 16, "never read"
    config.fleet = {f"adapter{n}": {"optimizer": {"learning_rate": 1e-4 * (n + 1)}} for n in range(16)}
    return config
"""
# name, shapes, config, target, what was asked for, overrides
JOBS: list[tuple[str, str, str, str, str, dict[str, Any]]] = [
    ("8B LoRA r16", "8b", "lora", "v5e:4x4", "3.5", {"batch_size": 16, "data.length": 2048}),
    ("8B full", "8b", "full", "v5p:2x2x4", "11.1", {"batch_size": 32, "data.length": 2048}),
    ("8B LoRA r16", "8b", "lora", "h100:8", "fits", {"batch_size": 16, "data.length": 2048}),
    ("8B full", "8b", "full", "h100:8", "fits", {"batch_size": 32, "data.length": 2048}),
    (
        "70B LoRA r16",
        "70b",
        "lora",
        "v5p:4x4x4",
        "13.5",
        {"batch_size": 64, "data.length": 4096, "mesh.tensor": 4},
    ),
    (
        "70B full",
        "70b",
        "full",
        "v5p:8x8x8",
        "50.2",
        {"batch_size": 512, "data.length": 4096, "mesh.tensor": 8},
    ),
    ("8B, fleet of 16 LoRA r16", "8b", "fleet", "v5e:4x4", "fits", {"batch_size": 1, "data.length": 2048}),
    ("8B, fleet of 16 LoRA r16", "8b", "fleet", "h100:1", "fits", {"batch_size": 1, "data.length": 2048}),
    (
        "8B LoRA r16, nf4 base",
        "8b",
        "lora",
        "v5e:2x2",
        "fits",
        {"batch_size": 4, "data.length": 2048, "model.quantise": "nf4"},
    ),
    (
        "8B LoRA r16, one row of 131072",
        "8b",
        "lora",
        "v5p:2x2x4",
        "fits",
        {"batch_size": 1, "data.length": 131072, "mesh.context": 16, "mesh.fsdp": 1},
    ),
    (
        "Mixtral 8x7B LoRA r16",
        "8x7b",
        "lora",
        "v5p:2x2x4",
        "fits",
        {"batch_size": 16, "data.length": 2048, "mesh.expert": 8},
    ),
]


def main() -> None:
    """Prints a table, a row a job, as each is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="jobs whose name or target holds this text")
    only = parser.parse_args().only
    print("| job | target | mesh | GiB per device | asked | step at least | by | collectives GiB | compile s |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, shapes, config, target, asked, changes in JOBS:
            if only in name or only in target:
                print(row(Path(folder) / shapes, SHAPES[shapes], name, config, target, asked, changes), flush=True)


def row(
    path: Path, shapes: dict[str, Any], name: str, config: str, target: str, asked: str, changes: dict[str, Any]
) -> str:
    """One job's row."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(shapes))
    keys = {"model.path": path, "model.remat": "full"} | changes
    file = Path(f"configs/{config}.py")
    if config == "fleet":
        file = path / "fleet.py"
        file.write_text(FLEET)
    command = [sys.executable, "-m", "specjax", "plan", f"--config={file}", f"--target={target}", "--json"]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"| {name} | {target} | failed: {done.stderr.strip().splitlines()[-1]} |"
    found = json.loads(done.stdout.splitlines()[-1])
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    total = found["bytes_per_device"]["total"]
    if not found["fits"]:
        return f"| {name} | {target} | {mesh} | does not fit: {total and round(total / GIB, 1)} | {asked} | | | | |"
    moved, seconds = found["collective_bytes"] / GIB, found["step_seconds_bound"]
    return (
        f"| {name} | {target} | {mesh} | {total / GIB:.1f} of {found['limit_bytes'] / GIB:.2f} | {asked} | "
        f"{seconds:.2f} s | {found['bound_by']} | {moved:.0f} | {found['compile_seconds']:.0f} |"
    )


if __name__ == "__main__":
    main()
