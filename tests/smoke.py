"""Import, train, export and reload, without pytest or torch: `python tests/smoke.py`, on any Python with specjax."""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import specjax as sj
from specjax.hf.config import from_hf
from specjax.hf.load import random
from specjax.hf.tokenizer import load_tokenizer
from specjax.models import Origin

sys.path.insert(0, str(Path(__file__).parent.parent))
from demo.tokenizer import train_tokenizer  # noqa: E402

TEXTS = [
    f"{a} and {b} make {a + b}, which is {'even' if (a + b) % 2 == 0 else 'odd'}." for a in range(30) for b in range(9)
]
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 276,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


def weights(model: nnx.Module) -> dict[str, np.ndarray]:
    found = nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in found}


def train(model: nnx.Module, tokenizer: object, trainable: object) -> None:
    data = sj.data.text(TEXTS, tokenizer, length=64, batch_size=4, seed=0)
    result = sj.fit(model, data, sj.adamw(1e-2), steps=3, trainable=trainable)
    assert result.step == 3, result


def main() -> None:
    tokens = np.arange(40, dtype=np.int32).reshape(1, 40)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(TEXTS, folder / "tokenizer", vocabulary=SIZES["vocab_size"])
        tokenizer = load_tokenizer(folder / "tokenizer")
        model = random(from_hf(SIZES), seed=0)
        model.origin = Origin(config_json=SIZES)

        before = weights(model)
        train(model, tokenizer, sj.ALL)
        assert all(np.any(before[key] != value) for key, value in weights(model).items()), "a weight did not train"
        sj.export(model, tokenizer, folder / "full")
        full, tokenizer = sj.load(folder / "full", dtype="float32")
        np.testing.assert_allclose(full(tokens), model(tokens), atol=1e-5)

        before = weights(full)
        sj.lora.inject(full, rank=4, targets="all-linear", seed=0)
        train(full, tokenizer, sj.LORA)
        assert all(np.array_equal(before[key], value) for key, value in weights(full).items()), "the base changed"
        tuned = full(tokens)
        assert np.max(np.abs(tuned - model(tokens))) > 1e-3, "the factors did not train"
        sj.lora.save(full, folder / "adapter")
        sj.lora.merge(full)
        sj.export(full, tokenizer, folder / "merged")
        merged, _ = sj.load(folder / "merged", dtype="float32")
        np.testing.assert_allclose(merged(tokens), tuned, atol=1e-4)

        again, _ = sj.load(folder / "full", dtype="float32")
        sj.lora.load(again, folder / "adapter", name="sums")
        np.testing.assert_allclose(again(tokens), tuned, atol=1e-4)
        [answer] = sj.generate(merged, tokenizer, ["1 and 2"], max_new_tokens=8)
        assert isinstance(answer, str)
    print(f"smoke: Python {sys.version.split()[0]}, JAX {jax.__version__}: imports, trains, exports and reloads.")


if __name__ == "__main__":
    main()
