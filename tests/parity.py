"""How near specjax is to transformers and PEFT, family by family: the figures that `make parity` prints.

A row is a published kind of model, drawn small and at random. `measure` compares one row; `main` measures all of them
and writes the table into `docs/parity.md` and `specjax/parity.json`, which `specjax families` prints.
"""

import argparse
import copy
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import KINDS, MULTIMODAL, contents, prompts, token_sums, torch_logits, torch_model

import specjax as sj
from specjax.generation.generate import generate_tokens
from specjax.hf import names
from specjax.hf.families import FAMILIES
from specjax.hf.load import load
from specjax.hf.multimodal import ARCHITECTURES
from specjax.models import Decoder
from specjax.parity import rows as shipped_rows
from specjax.train.step import merge, split

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def longrope(original: int, dim: int, **more: Any) -> dict[str, Any]:
    """The config keys of Phi-3's longrope."""
    half = dim // 2
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + i for i in range(half)],
        "original_max_position_embeddings": original,
        **more,
    }
    return {"rope_parameters": scaling, "original_max_position_embeddings": original}


# The published models a row speaks for -> transformers' model_type and what of the tiny default changes.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 1, 2; TinyLlama, OpenHermes, Yi": ("llama", {}),
    "Llama 3.1, 3.3": ("llama", {"rope_parameters": LLAMA3}),
    "Llama 3.2; SmolLM (tied)": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Mistral 0.1; Zephyr, OpenChat (window)": ("mistral", {"sliding_window": 50}),
    "Mistral 0.2, 0.3, Nemo (own head_dim)": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "Ministral 3 (text)": ("ministral3", {}),
    "Mistral Small 3.1, Ministral 3 (vision kept)": ("mistral3", {}),
    "SmolLM 3": ("smollm3", {"tie_word_embeddings": True}),
    "Qwen 2, 2.5": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen 2 with window": ("qwen2", {"use_sliding_window": True, "sliding_window": 60, "max_window_layers": 1}),
    "Qwen 3": ("qwen3", {}),
    "Qwen 3.5, dense (text)": ("qwen3_5_text", {}),
    "Qwen 3.5, dense (vision kept)": ("qwen3_5", {}),
    "Gemma 1": ("gemma", {}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3 text": ("gemma3_text", {}),
    "Gemma 3 4B to 27B (vision kept)": ("gemma3", {}),
    "Gemma 4 E2B, E4B (text)": ("gemma4_text", {}),
    "Gemma 4 31B (text)": (
        "gemma4_text",
        {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
    ),
    "Gemma 4 (vision kept)": ("gemma4", {}),
    "Phi-3, Phi-4": ("phi3", {"sliding_window": 100}),
    "Phi-3 128k (longrope)": ("phi3", longrope(256, 8)),
    "Phi-4-mini (partial rotation, tied)": (
        "phi3",
        {"head_dim": 16, "num_attention_heads": 4, "tie_word_embeddings": True}
        | longrope(256, 12, partial_rotary_factor=0.75),
    ),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "Granite 3": ("granite", {}),
    "Granite 4, dense": ("granitemoehybrid", {}),
    "GLM-4": ("glm4", {}),
    "Apertus": ("apertus", {}),
    "Mixtral": ("mixtral", {}),
    "Qwen 3 MoE": ("qwen3_moe", {}),
    "gpt-oss": ("gpt_oss", {}),
}

TOLERANCE = 1e-4  # of every float32 figure
BF16_TOLERANCE = 0.02
LENGTHS = (120, 1, 63, 200)  # documents side by side in a packed row
NEW_TOKENS = 256


class Pair:
    """A random model of transformers, and what specjax loads from its files."""

    def __init__(self, folder: str | Path, family: str, changes: dict[str, Any], **settings: Any):
        self.folder, self.kind = Path(folder), (family, changes)
        self.theirs = torch_model(family, **changes, **settings)
        self.theirs.generation_config.eos_token_id = None
        self.theirs.save_pretrained(self.folder / "in")
        self.tokens = prompts()
        self.wanted = torch_logits(self.theirs, self.tokens)

    @functools.cached_property
    def loaded(self) -> Decoder:
        """What specjax makes of the files, to be read alone."""
        return self.ours()

    def ours(self, **settings: Any) -> Decoder:
        """A fresh load, to be changed."""
        return load(self.folder / "in", **{"dtype": "float32"} | settings)[0]


def logits(pair: Pair) -> dict[str, float]:
    """Greatest difference of the logits, and greatest KL divergence (nats) of the next token's distributions."""
    found = np.asarray(pair.loaded(pair.tokens))
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (pair.wanted, found))
    kl = float(jnp.max(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))
    return {"logits": float(np.abs(found - pair.wanted).max()), "kl": max(kl, 0.0)}


def bfloat16(pair: Pair) -> dict[str, float]:
    """Relative error of the bfloat16 logits against transformers' float32 ones, and transformers' own.

    Attention is narrower here than elsewhere: very peaked, it would turn any rounding into another choice of keys. For
    the same reason a token takes all experts: in bfloat16 transformers' own choices differ, and its logits by 7 %.
    """
    family, changes = pair.kind
    if "num_local_experts" in KINDS.get(family, {}):
        changes = changes | {"num_experts_per_tok": KINDS[family]["num_local_experts"]}
    calm = Pair(pair.folder / "calm", family, changes, attention=0.1)
    size = np.linalg.norm(calm.wanted)
    found = np.asarray(calm.ours(dtype="bfloat16")(calm.tokens))
    theirs = torch_logits(calm.theirs.bfloat16(), calm.tokens)
    return {
        "bf16": float(np.linalg.norm(found - calm.wanted) / size),
        "bf16_theirs": float(np.linalg.norm(theirs - calm.wanted) / size),
    }


def gradients(pair: Pair) -> dict[str, float]:
    """Greatest difference of the gradients of five weights, in all layers, by the greatest element of each.

    transformers computes them in float64: its float32 ones are up to 6e-4 from those, where ours are 6e-6 (gpt-oss).
    """
    import torch

    targets = prompts(seed=1)
    tokens = np.maximum(pair.tokens, 2)  # 0 and 1 are padding tokens of some families, to which torch gives no gradient
    ones = np.ones_like(targets)
    positions = np.broadcast_to(np.arange(targets.shape[1], dtype=np.int32), targets.shape)
    batch = dict(tokens=tokens, targets=targets, loss_mask=ones, positions=positions, segment_ids=ones)
    ours = pair.loaded
    graph, params, rest = split(ours, nnx.Param)
    found = jax.jit(jax.grad(lambda params: token_sums(merge(graph, params, rest), batch)["nll"]))(params)
    exact = copy.deepcopy(pair.theirs).double()
    exact.set_experts_implementation("eager")  # the others know no float64
    theirs = exact(torch.tensor(tokens, dtype=torch.long)).logits
    torch.nn.functional.cross_entropy(
        theirs.flatten(0, 1), torch.tensor(targets).flatten().long(), reduction="sum"
    ).backward()
    wanted = hf_gradients(exact)
    differs = 0.0
    for entry in names.entries(ours.config, five_weights(list(params))):
        gradient = np.asarray(found[entry.path])
        for place, name in entry.tensors(gradient.shape):
            value = names.to_hf(gradient[place], entry.kind)
            differs = max(differs, float(np.abs(value - wanted[name]).max() / np.abs(wanted[name]).max()))
    return {"gradients": differs}


def hf_gradients(model: Any) -> dict[str, np.ndarray]:
    """The gradients under the names that the model's files have."""
    found = {
        name.replace("model.language_model.", "model."): weight.grad.numpy()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    # transformers keeps experts in one tensor per layer, and its files one per expert.
    expert = {"mixtral": "block_sparse_moe.experts.{}.w2", "qwen3_moe": "mlp.experts.{}.down_proj"}
    apart = model.config.model_type in expert  # gpt-oss' files have them together too
    for name in [name for name in found if apart and name.endswith("mlp.experts.down_proj")]:
        for number, value in enumerate(found.pop(name)):
            at = expert[model.config.model_type].format(number)
            found[name.replace("mlp.experts.down_proj", at) + ".weight"] = value
    return found


def five_weights(paths: list[names.Path]) -> list[names.Path]:
    """Embedding, a query map, an output map, an MLP's last map, a norm, sinks, a delta network's, of every segment."""
    ends = {
        ("embed_tokens", "embedding"),
        ("q_proj", "kernel"),
        ("qkv_proj", "kernel"),
        ("o_proj", "kernel"),
        ("down_proj", "kernel"),
        ("in_proj_qkv", "kernel"),
        ("linear_attn", "A_log"),
        ("linear_attn", "conv1d"),
        ("post_attention_layernorm", "scale"),
        ("self_attn", "sinks"),
    }
    assert len({path[-2:] for path in paths if path[-2:] in ends}) >= 5
    return [path for path in paths if path[-2:] in ends]


def packed(pair: Pair) -> dict[str, float]:
    """Greatest difference between the logits of documents in one row, with padding behind them, and alone."""
    ours = pair.loaded
    documents = [prompts(rows=1, length=length, seed=length)[0] for length in LENGTHS]
    padding = np.zeros(7, np.int32)
    numbers = [np.full(n, i, np.int32) for i, n in enumerate(LENGTHS, 1)]
    parts = documents, [np.arange(n, dtype=np.int32) for n in LENGTHS], numbers
    tokens, positions, segments = (np.concatenate([*part, padding])[None] for part in parts)
    found, start, differs = np.asarray(ours(tokens, positions, segments)), 0, 0.0
    assert np.isfinite(found).all()
    for document in documents:
        alone = torch_logits(pair.theirs, document[None])
        differs = max(differs, float(np.abs(found[:, start : start + len(document)] - alone).max()))
        start += len(document)
    return {"packed": differs}


def greedy(pair: Pair, count: int = NEW_TOKENS) -> dict[str, float]:
    """The fraction of greedily generated tokens that are transformers' own."""
    import torch

    prompt = prompts(rows=1, length=101, seed=101)[0].tolist()
    (found,) = generate_tokens(pair.loaded, [prompt], max_new_tokens=count)
    with torch.no_grad():
        theirs = pair.theirs.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    wanted = theirs[0, len(prompt) :].tolist()
    assert len(found) == len(wanted) == count
    return {"greedy": float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))}


def round_trip(pair: Pair) -> dict[str, bool]:
    """Whether an export holds the bytes of the files that were loaded."""
    sj.export(pair.loaded, None, pair.folder / "out", overwrite=True)
    found, wanted = (contents(pair.folder / side) for side in ("out", "in"))
    bits = [{name: (x.dtype, x.shape, x.tobytes()) for name, x in held.items()} for held in (found, wanted)]
    return {"round_trip": bits[0] == bits[1]}


def adapters(pair: Pair) -> dict[str, float]:
    """Greatest differences of the logits: PEFT's adapter here, ours in PEFT, ours merged in transformers."""
    import peft
    import torch

    def fresh(folder: str = "in") -> Any:
        return type(pair.theirs).from_pretrained(pair.folder / folder, attn_implementation="eager").eval()

    inside = pair.kind[0] in MULTIMODAL  # then all linear maps of the language model alone
    targets = r"model\.language_model\.layers\..*(_proj|in_proj_\w+)" if inside else "all-linear"
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    worn = peft.get_peft_model(fresh(), config)
    for name, weight in worn.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn(weight.shape)
    worn.save_pretrained(pair.folder / "theirs")
    wanted = torch_logits(worn.eval(), pair.tokens)
    ours = pair.ours()
    sj.lora.load(ours, pair.folder / "theirs")
    read = np.abs(np.asarray(ours(pair.tokens)) - wanted).max()

    ours = pair.ours()
    sj.lora.inject(ours, rank=4, alpha=12, targets="all-linear", seed=1)
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(ours, nnx.LoRAParam)):
        if path[-1] == "b":
            leaf[...] = jnp.asarray(0.05 * rng.standard_normal(leaf.shape), jnp.float32)
    nnx.update(ours, nnx.state(ours))
    with_adapter = np.asarray(ours(pair.tokens))
    sj.lora.save(ours, pair.folder / "ours", overwrite=True)
    again = peft.PeftModel.from_pretrained(fresh(), pair.folder / "ours").eval()
    written = np.abs(torch_logits(again, pair.tokens) - with_adapter).max()
    assert np.abs(with_adapter - pair.wanted).max() > 100 * TOLERANCE  # or nothing was compared
    sj.lora.merge(ours)
    sj.export(ours, None, pair.folder / "merged", overwrite=True)
    differs = np.abs(torch_logits(fresh("merged"), pair.tokens) - with_adapter).max()
    return {"adapter": float(max(read, written)), "merge": float(differs)}


CHECKS = (logits, bfloat16, gradients, packed, greedy, round_trip, adapters)


def measure(row: str, folder: str | Path) -> dict[str, Any]:
    """All figures of one row."""
    pair = Pair(folder, *ROWS[row])
    figures: dict[str, Any] = {"size": float(np.abs(pair.wanted).max())}
    for check in CHECKS:
        figures |= check(pair)
    return figures


HEADER = """\
| models | logits | KL | bf16 | gradients | packed | greedy | round trip | adapter | merge |
|---|---|---|---|---|---|---|---|---|---|
"""


def line(row: str, f: dict[str, Any]) -> str:
    """One row of the table, Markdown."""
    numbers = [f"{f['logits']:.1e} of {f['size']:.0f}", f"{f['kl']:.0e}", f"{f['bf16']:.1%} ({f['bf16_theirs']:.1%})"]
    numbers += [f"{f[name]:.1e}" for name in ("gradients", "packed")]
    numbers += [f"{f['greedy']:.1%}", "same bits" if f["round_trip"] else "DIFFERS"]
    numbers += [f"{f[name]:.1e}" for name in ("adapter", "merge")]
    return f"| {row} | " + " | ".join(numbers) + " |\n"


def architecture(model_type: str) -> str:
    """The name that `config.json` has."""
    known = {family.model_type: name for name, family in FAMILIES.items()}
    return (known | {kind: name for name, (kind, _) in ARCHITECTURES.items()})[model_type]


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of two digits, which another machine may well confirm."""
    return {name: value if isinstance(value, bool) else float(f"{value:.1e}") for name, value in figures.items()}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a Markdown file whose table is replaced; default: printed only")
    parser.add_argument("--json", help="the file that `specjax families` reads")
    parser.add_argument("--only", default="", help="rows whose name has this, and new ones; others stay as seen")
    given = parser.parse_args()
    print(HEADER, end="", flush=True)
    lines, kept = [], []
    seen = {row["models"]: row for row in shipped_rows()}
    began = time.time()
    for row in ROWS:
        if given.only.lower() in row.lower() or row not in seen:
            with tempfile.TemporaryDirectory() as folder:
                figures = rounded(measure(row, folder))
            print(line(row, figures), end="", flush=True)
        else:
            figures = seen[row]
        lines.append(line(row, figures))
        kept.append({"models": row, "architecture": architecture(ROWS[row][0])} | figures)
    print(f"{time.time() - began:.0f} s")
    if given.out:
        path = Path(given.out)
        before, mark, rest = path.read_text().partition(HEADER)
        assert mark, f"{path} has no table to replace"
        after = rest.partition("\n\n")[2]
        path.write_text(before + HEADER + "".join(lines) + "\n" + after)
    if given.json:
        Path(given.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
