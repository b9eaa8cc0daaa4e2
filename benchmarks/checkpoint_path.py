"""A real checkpoint's path through specjax: a Llama-3.2-1B, its weights random, from folder to folder.

    python benchmarks/checkpoint_path.py [--layers=16] [--folder=TMP]

transformers writes the folder (2.5 GB, bfloat16); specjax loads it, trains LoRA for 3 steps, saves the adapter, merges,
exports and reads the export back; transformers opens the export. Each of the three is a process of its own. Printed
are each part's seconds and peak memory (resident, the mapped pages of weight files included); it fails where specjax
took more than 12 GB, or where the logits of the export are others than those of the merged model.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
MOST_MEMORY = 12e9  # bytes
MOST_ERROR = 0.05  # of bfloat16 logits, root mean square, relative
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TOKENS = (np.arange(64, dtype=np.int32)[None] * 7919) % LLAMA_1B["vocab_size"]

Part = tuple[str, float, float]  # what, seconds, peak bytes


class Parts(list[Part]):
    """The parts of one process."""

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Times a part and takes its peak memory."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
        self.append((what, seconds, peak))
        print(f"{what:<32} {seconds:7.1f} s  {peak / 1e9:5.2f} GB", flush=True)


def write(folder: Path, layers: int) -> Parts:
    """The base, by transformers."""
    parts = Parts()
    with parts.part("write the base (transformers)"):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        ids = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}  # those of the demo's tokenizer
        config = transformers.LlamaConfig(**LLAMA_1B | ids | {"num_hidden_layers": layers})
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model = model.to_empty(device="cpu")
        model.tie_weights()
        torch.manual_seed(0)
        noise = 0.02 * torch.randn(LLAMA_1B["vocab_size"] * LLAMA_1B["hidden_size"] // 64).to(torch.bfloat16)
        for number, (name, weight) in enumerate(model.named_parameters()):
            if name.endswith("norm.weight"):
                weight.data.fill_(1)
            else:  # one draw, turned on for each tensor: drawing them all takes minutes
                turned = noise.roll(7919 * number)
                weight.data.view(-1).copy_(turned.repeat(-(-weight.numel() // len(noise)))[: weight.numel()])
        model.save_pretrained(folder / "base")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            copy(ROOT / "demo" / "base" / file, folder / "base")
    return parts


def specialise(folder: Path) -> Parts:
    """Everything that specjax does with it."""
    sys.path.insert(0, str(ROOT))
    parts = Parts()
    with parts.part("import"):
        import jax

        import specjax as sj
        import specjax.run  # and all that a run needs
    with parts.part("load"):
        model, tokenizer = sj.load(folder / "base", mesh=sj.make_mesh(), dtype="bfloat16")
        jax.block_until_ready(jax.tree.leaves(model))
    with parts.part("inject LoRA, first logits"):
        before = np.asarray(model(TOKENS))
        sj.lora.inject(model, rank=16, alpha=32, targets="all-linear", seed=0)
    with parts.part("3 LoRA steps of 2 x 256 tokens"):
        rows = [{"instruction": f"What is {a} and {a}?", "response": f"It is {a + a}. " * 9} for a in range(400)]
        data = sj.data.instruct(rows, tokenizer, length=256, batch_size=2, seed=0)
        # A high rate, so that what is merged weighs something.
        result = sj.fit(model, data, sj.adamw(3e-3), steps=3, trainable=sj.LORA)
    print(f"    compile {result.compile_seconds:.1f} s, {result.tokens / result.seconds:.0f} tokens/s")
    with parts.part("save the adapter"):
        sj.lora.save(model, folder / "adapter")
    with parts.part("merge"):
        worn = np.asarray(model(TOKENS))
        sj.lora.merge(model)
        merged = np.asarray(model(TOKENS))
    with parts.part("export"):
        sj.export(model, tokenizer, folder / "merged")
    del model
    with parts.part("reload"):
        again, _ = sj.load(folder / "merged", mesh=sj.make_mesh(), dtype="bfloat16")
        np.testing.assert_array_equal(np.asarray(again(TOKENS)), merged)
    print(
        f"    LoRA moved the logits by {error(worn, before):.1%}; merging its float32 into bfloat16, by another ",
        end="",
    )
    print(f"{error(merged, worn):.1%}")
    assert error(worn, before) > 2 * MOST_ERROR > 2 * error(merged, worn)
    np.save(folder / "merged.npy", merged)
    return parts


def reopen(folder: Path) -> Parts:
    """The export, in transformers."""
    parts = Parts()
    with parts.part("open the export (transformers)"):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.bfloat16)
        transformers.AutoTokenizer.from_pretrained(folder / "merged")
        with torch.no_grad():
            found = model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()
    wrong = error(found, np.load(folder / "merged.npy"))
    print(f"    its logits differ by {wrong:.2%} from those of the merged model in specjax")
    assert wrong < MOST_ERROR
    return parts


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative root mean square difference."""
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def alone(what: Callable[..., Parts], *arguments: Any) -> Parts:
    """Calls a function in a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(what, *arguments).result()


def main() -> None:
    """Runs the three processes one after the other and cleans up."""
    parser = argparse.ArgumentParser(description="A real checkpoint's path through specjax.")
    parser.add_argument("--layers", type=int, default=LLAMA_1B["num_hidden_layers"], help="fewer for a quick trial")
    parser.add_argument("--folder", type=Path, help="where 6 GB are free; default the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        alone(write, folder, arguments.layers)
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        print(f"    {size / 1e9:.2f} GB of weights")
        peak = max(part[2] for part in alone(specialise, folder))
        alone(reopen, folder)
    print(f"specjax's peak: {peak / 1e9:.2f} GB, {peak / size:.1f} times the weights")
    if peak > MOST_MEMORY:
        sys.exit(f"more than {MOST_MEMORY / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
