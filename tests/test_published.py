"""The demo's reader of GGUF files gives what transformers' own gives, on small files of either kind."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install --editable '.[test]'")

from demo import published  # noqa: E402

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(33, 127)), "Ġ", "in", "Ġin"]
MERGES = ["i n", "Ġ in"]


def write(path, kind: str, rng: np.random.Generator) -> None:
    """A GGUF file of random weights in 4, 8 and 32 bits, as llama.cpp's converter lays them out."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(TOKENS))
    if kind == "gemma3":
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_sliding_window(70)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    width = {"llama": 64, "gemma3": 128}[kind]  # of all heads together
    maps = {"attn_q": (width, 64), "attn_k": (width // 2, 64), "attn_v": (width // 2, 64), "attn_output": (64, width)}
    maps |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    norms = {"attn_norm": 64, "ffn_norm": 64}
    if kind == "gemma3":
        norms |= {"post_attention_norm": 64, "post_ffw_norm": 64, "attn_q_norm": 32, "attn_k_norm": 32}
    shapes = {"token_embd": (len(TOKENS), 64), "output_norm": (64,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in maps.items()}
        shapes |= {f"blk.{layer}.{name}": (size,) for name, size in norms.items()}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        bits = gguf.GGMLQuantizationType
        how = bits.F32 if len(shape) == 1 else bits.Q8_0 if name == "token_embd" else bits.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_gguf_files_weights_and_config_are_those_of_transformers_reader(kind, tmp_path):
    import transformers

    write(tmp_path / "model.gguf", kind, np.random.default_rng(1))
    published.convert(tmp_path / "model.gguf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    read = {name: value.numpy() for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    assert ours.keys() == read.keys()
    for name, value in read.items():
        assert np.array_equal(ours[name].view(np.uint16), value.astype(ml_dtypes.bfloat16).view(np.uint16)), name
    # Its config says the same as ours, but for what it takes as the file has it: eps in float32, and the bits.
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    for key, value in theirs.config.to_dict().items():
        if key not in ("quantization_config", "dtype", "_name_or_path", "architectures", "unk_token_id"):
            assert config[key] == pytest.approx(value, rel=1e-6) if isinstance(value, float) else config[key] == value


def test_its_tokenizer_splits_digits_and_has_the_special_tokens_and_the_template(tmp_path):
    import transformers

    write(tmp_path / "model.gguf", "llama", np.random.default_rng(1))
    published.convert(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("a in 12<|im_end|>") == ["a", "Ġin", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("a in 12<|im_end|>").input_ids, skip_special_tokens=True) == "a in 12"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (TOKENS[1], TOKENS[2], TOKENS[2])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-5
