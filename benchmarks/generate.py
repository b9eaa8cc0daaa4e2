"""Greedy generation against transformers' on the same machine: tokens/s, prefill and decoding apart.

    python benchmarks/generate.py [--rounds=5] [--new=128] [--dtype=float32] [BATCH ...]

A random Llama of 125M parameters (12 layers of 768, 12 heads, 4 kv heads, 32,000 tokens), the same weights, prompts of
128 tokens and threads for both, in turns; each figure is the best of the rounds, since what else runs on the machine
only slows them down. `prefill` is a call for one token, `step` what each further token takes. The first call of ours
compiles and is not counted: its seconds stand apart. On an accelerator it is ours there against transformers' on the
CPU, which says nothing.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
PROMPT = 128
COLUMNS = ("batch", "who", "tokens/s", "prefill ms", "step ms", "compile s", "times transformers'")


def models(folder: str, dtype: str, tied: bool) -> tuple[Any, Any]:
    """(transformers' model, ours), the same random weights."""
    import torch
    import transformers

    import specjax as sj

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    reference = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    reference.save_pretrained(folder)
    return reference, sj.load(folder, dtype=dtype)[0]


def callers(folder: str, dtype: str, tied: bool) -> dict[str, Callable[[list[list[int]], int], list[list[int]]]]:
    """What continues prompts by so many tokens, by name."""
    import torch

    from specjax.generation.generate import generate_tokens

    reference, model = models(folder, dtype, tied)

    def theirs(prompts: list[list[int]], new: int) -> list[list[int]]:
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = torch.tensor(prompts)
        return reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].tolist()

    def ours(prompts: list[list[int]], new: int) -> list[list[int]]:
        return generate_tokens(model, prompts, max_new_tokens=new)

    return {"transformers": theirs, "specjax": ours}


def main() -> None:
    """Prints the table; ends with status 1 where ours is slower at batch 1, or not faster at batch 8."""
    parser = argparse.ArgumentParser(description="Greedy generation against transformers on the same machine.")
    parser.add_argument("batches", nargs="*", type=int, metavar="BATCH", help="prompts at a time; default 1 and 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=128, help="tokens per prompt")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tied", action="store_true", help="one table for embedding and head")
    arguments = parser.parse_args()
    import numpy as np
    import torch
    from rich.console import Console
    from rich.table import Table

    table, slow, new = Table(*COLUMNS), [], arguments.new
    with tempfile.TemporaryDirectory() as folder:
        callers_by_name = callers(folder, arguments.dtype, arguments.tied)
    for batch in arguments.batches or (1, 8):
        prompts = np.random.default_rng(0).integers(10, 32000, (batch, PROMPT)).tolist()
        best = {name: {"one": np.inf, "all": np.inf, "compile": 0.0} for name in callers_by_name}
        texts: dict[str, list[list[int]]] = {}
        for number in range(arguments.rounds + 1):
            for name, call in callers_by_name.items():
                for kind, count in (("one", 1), ("all", new)):
                    began = time.perf_counter()
                    texts[name] = call(prompts, count)
                    seconds = time.perf_counter() - began
                    if number:
                        best[name][kind] = min(best[name][kind], seconds)
                    else:
                        best[name]["compile"] += seconds
        same = np.mean(np.array(texts["specjax"]) == np.array(texts["transformers"]))
        for name, found in best.items():
            ratio = best["transformers"]["all"] / found["all"]
            numbers = (found["one"] * 1e3, (found["all"] - found["one"]) / (new - 1) * 1e3)
            compiled = f"{found['compile'] - found['one'] - found['all']:.1f}" if name == "specjax" else "-"
            cells = (f"{batch * new / found['all']:.1f}", *(f"{x:.1f}" for x in numbers), compiled, f"{ratio:.2f}")
            table.add_row(str(batch), name, *cells)
            if name == "specjax" and (ratio < 1 or (batch >= 8 and ratio <= 1)):
                slow.append(batch)
        print(f"batch {batch}: {same:.1%} of the tokens are the same", flush=True)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads, {arguments.rounds} rounds, {new} new tokens")
    if slow:
        sys.exit(f"slower than transformers at batch {slow}")


if __name__ == "__main__":
    main()
