"""Small models and data for the tests that compare numbers."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from specjax import sharding
from specjax.data import Data
from specjax.hf.config import from_hf
from specjax.hf.families import FAMILIES
from specjax.hf.load import abstract
from specjax.models import Decoder, Origin
from specjax.train import optim, step
from specjax.train.objective import next_token
from specjax.train.step import TrainState, begin

PROMPT = 493  # long enough for a wrong rotary embedding to show, and no multiple of anything


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}

# What makes a tiny model of each family one of its kind, beside the sizes that all have.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral3": {"pad_token_id": 0, "head_dim": 24, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    # Six layers: a period of two delta networks and one of attention, twice.
    "qwen3_5_text": {
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 32,
        "num_hidden_layers": 6,
        "layer_types": [*["linear_attention"] * 2, "full_attention"] * 2,
    },
    "gemma": {"head_dim": 24, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 24, "sliding_window": 70, "query_pre_attn_scalar": 40},
    # Seven layers: a whole pattern of five windows and one without, and a rest.
    "gemma3_text": {"head_dim": 24, "sliding_window": 70, "query_pre_attn_scalar": 40, "num_hidden_layers": 7},
    # Six layers: two kinds, the last two of which take their keys and values from the two before.
    "gemma4_text": {
        "head_dim": 24,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "sliding_window": 70,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 20,
        "vocab_size_per_layer_input": 520,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "olmo3": {
        "sliding_window": 70,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": YARN | {"attention_factor": 1.1},
        },
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.6,
    },
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 80,
        "mamba_n_heads": 2,
        "position_embedding_type": "rope",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.6,
    },
    "glm4": {"pad_token_id": 0, "head_dim": 16},
    "apertus": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 70,
        "swiglu_limit": 1.0,
        "rope_parameters": YARN | {"truncate": False},
    },
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 48,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
}


# Multimodal kinds by their `model_type`: the language model inside, and what else their configuration has.
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3": (
        "ministral3",
        {
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14},
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "vision_config": _VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "depth": 1}
            | {"out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 16},
            "tie_word_embeddings": False,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "vision_config": _VISION
            | {"model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
        },
    ),
}


def sizes(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A `config.json` of a tiny model of a family (transformers' `model_type`), as transformers 5 writes it.

    Raises:
      ValueError: a key is none of the family's; `architectures` and `model_type` follow from `family`.
    """
    return {
        "architectures": [next(name for name, known in FAMILIES.items() if known.model_type == family)],
        "model_type": family,
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "dtype": "float32",
    } | of_its_kind(family, changes)


def of_its_kind(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """`KINDS[family] | changes`, where each key is one that the family's configuration has.

    transformers' configurations keep any key without a word, so that a Llama with `num_local_experts` is a Llama.

    Raises:
      ValueError: a key that is none of the family's.
    """
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]
    # head_dim: every family's model reads it, also where its configuration does not list it (Phi-3, Qwen 3 MoE).
    known = {*config().to_dict(), *config.attribute_map, *KINDS[family], "head_dim"} - {"architectures", "model_type"}
    if foreign := changes.keys() - known:
        raise ValueError(f"{sorted(foreign)} are no keys of {family}: give family=, or a key of {sorted(known)}")
    return KINDS[family] | changes


def model(
    family: str = "llama", *, mesh: Any = None, dtype: Any = "float32", param_dtype: Any = "float32", **changes: Any
) -> Decoder:
    """A random model of ours, drawn by NumPy: the same on every mesh, and nothing to compile."""
    config_json = sizes(family, **changes)
    shapes = abstract(from_hf(config_json), dtype=dtype, param_dtype=param_dtype)
    shapes.origin = Origin(config_json=config_json)
    places = sharding.of_module(shapes, mesh) if mesh is not None else {}
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    rng = np.random.default_rng(3)
    leaves = []
    for path, leaf in nnx.to_flat_state(nnx.state(shapes)):
        name = sharding.path_name(path)
        # Kernels are drawn with their inputs first: the golden losses are of before they lay last.
        inputs = (2 if "o_proj" in name else 1) if name.endswith("kernel") else 0
        lead = sum(axis in ("layers", "expert") for axis in leaf.get_metadata("axes"))
        shape = (*leaf.shape[:lead], *leaf.shape[leaf.ndim - inputs :], *leaf.shape[lead : leaf.ndim - inputs])
        values = rng.normal(1.0 if name.endswith("scale") else 0.0, 0.08, shape)
        values = np.moveaxis(values, range(lead, lead + inputs), range(leaf.ndim - inputs, leaf.ndim))
        leaves.append((path, jax.device_put(np.asarray(values, jnp.dtype(param_dtype)), places.get(path, single))))
    return nnx.merge(nnx.graphdef(shapes), nnx.from_flat_state(leaves))


def torch_model(
    family: str = "llama", *, seed: int = 0, dtype: Any = None, attention: float = 0.2, **changes: Any
) -> Any:
    """A random model of transformers, its logits of size 1 to 5 and none of its norms or biases the neutral one.

    `family` is transformers' `model_type`, also of `MULTIMODAL`, where `changes` are the language model's.
    `attention` is the spread of the weights of q and k: wide, so that attention is far from uniform and its mask and
    positions show in the logits.
    """
    import torch
    import transformers

    common = {
        "vocab_size": 517,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    if family in MULTIMODAL:
        inside, rest = MULTIMODAL[family]
        text = common | of_its_kind(inside, changes) | {"model_type": inside}
        config, auto = transformers.CONFIG_MAPPING[family](text_config=text, **rest), "AutoModelForImageTextToText"
    else:
        config = transformers.CONFIG_MAPPING[family](**common | of_its_kind(family, changes))
        auto = "AutoModelForCausalLM"
    made = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in made.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            from_zero = family.startswith("gemma") and not family.startswith("gemma4")
            from_zero |= family.startswith("qwen3_5") and "linear_attn" not in name
            neutral = 0 if from_zero else 1
            weight.data = neutral + 0.1 * noise
            if family.startswith("gemma4") and "q_norm" in name:
                weight.data *= 1.5 * attention  # its scores have no other scale
        elif name.endswith("bias"):
            weight.data = 0.1 * noise
        elif name.endswith("A_log"):
            weight.data = noise - 3  # a head remembers from some tokens to some hundred
        elif name.endswith("conv1d.weight"):
            weight.data = 3 * noise  # what silu gives is then seldom near 0, where heads are normed
        elif family.startswith("qwen3_5") and name.endswith("embed_tokens.weight"):
            weight.data = 2 * noise  # twice what a block adds, or rounding would grow from layer to layer
        elif name.endswith("linear_attn.out_proj.weight"):
            weight.data = 0.75 * attention * noise
        else:
            wide = "q_proj" in name or "k_proj" in name or "qkv_proj" in name
            weight.data = noise * (attention if wide else 0.15)
    for name, buffer in made.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.7, 1.3, generator=generator)
    return made.to(dtype or torch.float32)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows by one with each program that is compiled in here."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 41)(1.0)
        assert len(found) == 1, "the count does not see compilations"
        found.clear()
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def started(optimizer: Any, trainable: Any) -> TrainState:
    """`begin`'s state where `fit` would have it: arrays that lie anywhere are another program than those of a step."""
    mesh = sharding.mesh_of(next(iter(trainable.values())))
    whole = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
    state = begin(optimizer, trainable)
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding if x.ndim or whole is None else whole), state)


def torch_logits(of: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B,T,V] of a transformers model."""
    import torch

    with torch.no_grad():
        return of(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def prompts(vocab_size: int = 517, rows: int = 2, length: int = PROMPT, seed: int = 0) -> np.ndarray:
    """int32 [rows, length] of random tokens."""
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length)).astype(np.int32)


def data(
    *,
    documents: int = 40,
    shortest: int = 5,
    longest: int = 60,
    vocab_size: int = 128,
    length: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    answers: bool = False,
) -> Data:
    """Packed documents that can be learnt: each token follows from the one before, with some noise.

    With `answers` the first half of each document is a question, which the loss does not count.
    """
    rng = np.random.default_rng(1000 + seed)
    follows = np.random.default_rng(0).permutation(vocab_size)
    counts = rng.integers(shortest, longest + 1, documents)
    tokens, trained = [], []
    for count in counts:
        ids = [int(rng.integers(vocab_size))]
        while len(ids) < count:
            ids.append(int(follows[ids[-1]]) if rng.random() < 0.9 else int(rng.integers(vocab_size)))
        tokens += ids
        trained += [not answers or place >= count // 2 for place in range(count)]
    offsets = np.cumsum([0, *counts])
    flags = np.array(trained, bool)
    ids = np.array(tokens, np.int32)
    return Data(ids, flags, offsets, tokenizer=None, length=length, batch_size=batch_size, seed=seed)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many fake devices, which compiles as quickly as the suite does (conftest.py)."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last of a flag counts


@contextmanager
def on_devices(count: int) -> Iterator[None]:
    """In here the command, and processes that are started, see the first so many of the fake devices.

    A program for one device is traced, partitioned and compiled in half of the time that one for eight takes.
    """
    import pytest

    there = jax.local_devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: there)
        patch.setattr(jax, "device_count", lambda: count)
        patch.setenv("XLA_FLAGS", xla_flags(count))
        patch.setenv("PJRT_NPROC", str(jax.local_device_count()))  # as many threads as here add up alike, to the bit
        yield


@contextmanager
def steps_made_once() -> Iterator[None]:
    """In here an equal model, rule, objective and seed have one step, which JAX traces and compiles once.

    Not for a test that replaces a part of what a step computes: it would be given the step from before.
    """
    import pytest

    import specjax

    made: dict[Any, Any] = {}

    def once(make: Callable[..., Any]) -> Callable[..., Any]:
        def kept(graph: Any, *given: Any, **more: Any) -> Any:
            told = [(one, getattr(one, "clip_norm", None), getattr(one, "learning_rate", None)) for one in given]
            key = (make, graph, *told, *more.items())
            if key not in made:
                made[key] = make(graph, *given, **more)
            return made[key]

        return kept

    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_train_step", "make_eval_step"):
            patch.setattr(step, name, once(getattr(step, name)))
        for name in ("adamw", "lion"):
            patch.setattr(optim, name, functools.cache(getattr(optim, name)))
            patch.setattr(specjax, name, getattr(optim, name))
        patch.setattr(optim, "schedule", functools.cache(optim.schedule))
        patch.setattr(specjax, "dpo", functools.cache(specjax.dpo))
        yield


def weights(of: nnx.Module, kind: Any = nnx.Param) -> dict[str, np.ndarray]:
    """A copy of the parameters by dotted path."""
    leaves = nnx.to_flat_state(nnx.state(of, kind))
    return {sharding.path_name(path): np.array(leaf[...], copy=True) for path, leaf in leaves}


def on_device(batch: dict[str, Any]) -> dict[str, jax.Array]:
    """The data's batch as arrays of JAX, which a loss takes."""
    return jax.tree.map(jnp.asarray, batch)


def token_sums(of: Decoder, batch: dict[str, Any], key: Any = None) -> dict[str, jax.Array]:
    """The sums of `next_token` over a batch, float32 scalars: `nll`, `correct`, `count`, `router`."""
    sums = next_token(of, on_device(batch), key)
    (nll, count), (correct, _) = sums["loss"], sums["accuracy"]
    router = sums["router_loss"][0] if "router_loss" in sums else jnp.zeros(1)
    return {"nll": nll[0], "correct": correct[0], "count": count[0], "router": router[0]}


BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


def assert_same_bits(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


def contents(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's safetensors by name, whichever files it lies in."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, folder  # two empty folders would hold the same
    return {name: value for file in files for name, value in load_file(file).items()}


def logged(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """They without what measures time."""
    return [{key: x for key, x in row.items() if not key.startswith("tokens_per_s")} for row in logged(workdir)]
