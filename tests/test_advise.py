"""The advice: each rule's number at its boundary, memory against compiled steps, the config that is written."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from specjax import build
from specjax.advise import facts, here, memory, report, rules
from specjax.cli import main, parse, read_config
from specjax.config import validate
from specjax.errors import UserError
from specjax.hf.config import from_hf

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "demo" / "base_config")  # config.json and tokenizer alone
GIB = 2**30
PAIRS = [{"instruction": f"What is {n}?", "response": f"The number {n}."} for n in range(18)]
ROWS = {
    "pairs": [*PAIRS, PAIRS[0], {"instruction": "And?", "response": " "}],
    "chats": [{"messages": [{"role": role, "content": f"{n}?"} for role in ("user", "assistant")]} for n in range(9)],
    "preference pairs": [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(9)],
    "raw text": [{"text": f"The number {n} is a number. " * 60} for n in range(9)],
}  # fmt: skip
LLAMA_8B = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096},
    **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False},
}
PARAMETERS, FACTORS = 8_030_261_248, 41_943_040  # of it, and of rank 16 on all its maps


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Data of every kind, and no cache of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for kind, rows in ROWS.items():
        Path(f"{kind.split()[0]}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_rank_holds_two_bits_a_parameter_and_none_holds_too_much():
    assert [rules.rank(tokens, 1000) for tokens in (1, 32_000, 32_001, 512_000, 512_001)] == [16, 16, 32, 256, None]


@pytest.mark.parametrize(
    "family, width, changes, wanted",
    [
        ("llama", 2000, {}, 5e-4),
        ("llama", 2000, {"steps": 99}, 7.5e-4),
        ("llama", 2000, {"adapter": False}, 5e-5),
        ("llama", 2000, {"adapter": False, "steps": 99}, 5e-5),
        ("llama", 4096, {}, 2.9e-4),
        ("qwen3", 4096, {}, 4.7e-4),
        ("gemma2", 4096, {}, 2e-4),
        ("llama", 4096, {"dpo": True, "steps": 99}, 1e-5),
        ("llama", 4096, {"dpo": True, "adapter": False}, 1e-6),
    ],
)
def test_the_rate_is_by_width_ten_times_for_lora_and_fifteen_times_under_a_hundred_steps(
    family, width, changes, wanted
):
    assert rules.rate(family, width, **({"adapter": True, "steps": 100} | changes)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    "rows, per_row, groups, wanted",
    [
        (16_000, 1.0, 1, (16, 1, 1000)),  # 1,000 steps are enough
        (15_984, 1.0, 1, (16, 2, 1998)),  # 999 are not
        (7_000, 1.0, 1, (16, 3, 1312)),
        (533, 1.0, 1, (16, 3, 100)),  # 100 steps are enough
        (530, 1.0, 1, (8, 3, 199)),  # 99 are not: a smaller batch
        (10, 1.0, 1, (1, 10, 100)),  # then more passes
        (6, 1.0, 1, (1, 15, 90)),  # but not more than that
        (16_000, 1.99, 1, (16, 1, 1000)),
        (16_000, 2.0, 1, (8, 1, 2000)),  # 32 examples are too many
        (10, 1.0, 16, (16, 15, 9)),  # a device has a row at least
    ],
)
def test_the_course_is_a_small_batch_and_a_hundred_to_a_thousand_steps(rows, per_row, groups, wanted):
    assert rules.course(rows, per_row, groups) == wanted


def test_length_and_held_out_share():
    lengths = [rules.length(np.array([3, n]), 8192, text=False) for n in (10, 256, 257, 4097)]
    assert lengths == [256, 256, 384, 4096]
    assert rules.length(np.array([9000]), 512, text=False) == 512
    assert [rules.length(np.array([9000]), most, text=True) for most in (512, 8192)] == [512, 1024]
    assert [rules.held_out(n) for n in (1, 2, 500, 1000, 2500, 10_000)] == [0.0, 0.1, 0.1, 0.05, 0.02, 0.02]


# What a compiled step needs: `python benchmarks/advise.py`, docs/measurements.md. Sizes, hardware, devices, rows of
# a device, tokens, trained parameters, bytes of the frozen base and of a device, by how much the estimate is off.
QWEN = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
QWEN |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
GEMMA = {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "head_dim": 256, "vocab_size": 256000}
GEMMA |= {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "query_pre_attn_scalar": 256}
GLM = {"hidden_size": 6144, "num_hidden_layers": 61, "num_attention_heads": 48, "num_key_value_heads": 2}
GLM |= {"head_dim": 128, "intermediate_size": 23040, "vocab_size": 151552, "pad_token_id": 151329}
GLM |= {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}
APERTUS = {"architectures": ["ApertusForCausalLM"], "model_type": "apertus", "hidden_act": "xielu"}
APERTUS |= {"intermediate_size": 21504, "vocab_size": 131072}
ONE_B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
COMPILED = [
    ({}, "v5e", 16, 1, 2048, FACTORS, 16_060_522_496, 2_958_127_104, -0.01),
    ({}, "v5p", 16, 2, 2048, PARAMETERS, 0, 11_060_235_456, -0.01),
    ({"quantised": True}, "v5e", 4, 1, 2048, FACTORS, 5_707_410_944, 4_803_381_760, -0.05),
    (ONE_B, "v5e", 1, 2, 1024, 11_272_192, 2_471_628_800, 2_955_749_376, 0.02),
    (QWEN, "v6e", 8, 2, 4096, 33_030_144, 8_045_065_216, 4_684_052_704, -0.10),
    (GEMMA, "v5p", 8, 1, 4096, 9_241_705_984, 0, 23_416_013_504, -0.08),
    (GLM, "v5p", 4, 2, 2048, 115_933_184, 65_135_411_200, 24_815_646_912, -0.06),
    (APERTUS, "v5e", 4, 2, 2048, 39_845_888, 16_106_726_400, 7_257_050_112, -0.01),
    ({}, "h100", 8, 2, 2048, FACTORS, 16_060_522_496, 7_387_020_392, -0.06),
    ({}, "h100", 8, 4, 2048, PARAMETERS, 0, 25_896_136_656, -0.12),
    (ONE_B, "h100", 1, 4, 4096, 1_235_814_400, 0, 31_654_914_256, -0.22),
    ({"accumulated": True}, "h100", 1, 1, 1024, FACTORS, 16_060_522_496, 17_799_130_264, 0.02),
]  # fmt: skip


@pytest.mark.parametrize("changes, family, devices, rows, length, trained, frozen, compiled, off", COMPILED)
def test_memory_is_within_a_tenth_of_steps_compiled_for_tpus_and_as_far_as_told_from_those_for_h100(
    changes, family, devices, rows, length, trained, frozen, compiled, off
):
    how = {key: changes[key] for key in ("quantised", "accumulated") if key in changes}
    sizes = from_hf(LLAMA_8B | {key: value for key, value in changes.items() if key not in how})
    placed = {"devices": devices, "rows": rows, "length": length, "family": family} | how
    need = memory.need(sizes, trained=trained, frozen=frozen, **placed)
    assert need.more is not None
    estimated = need.state + need.more
    assert family == "h100" or estimated == pytest.approx(compiled, rel=0.1)
    assert estimated / compiled - 1 == pytest.approx(off, abs=0.006)


def test_what_surely_fits_what_surely_does_not_and_what_must_be_compiled():
    assert [memory.Need(60, 20).fits(n) for n in (59, 60, 103, 104)] == [False, None, None, True]
    assert [memory.Need(60, None).fits(n) for n in (59, 60, 6000)] == [False, None, None]
    sizes = from_hf(LLAMA_8B)
    placed = {"frozen": 0, "devices": 1, "rows": 1, "length": 1}
    assert memory.need(sizes, trained=10, family="cpu", **placed) == (240, None)
    assert memory.need(sizes, trained=10, family="v5e", **placed).state == 160
    assert memory.need(sizes, trained=10, family="v5e", **placed | {"frozen": 40, "devices": 4}).state == 170
    at_once = memory.need(sizes, trained=10**9, family="v5e", **placed | {"frozen": 40, "rows": 8, "length": 8192})
    apart = memory.need(sizes, trained=10**9, family="v5e", accumulated=True, **placed | {"frozen": 40, "length": 8})
    assert at_once.more > 0 and apart.more == 2 * 32 * 8 * 4096 + 8 * 8 * 128256  # the logits, beside all gradients
    experts = dataclasses.replace(sizes, num_experts=8)
    assert memory.need(experts, trained=10, family="v5e", **placed) == (160, None)


@pytest.mark.parametrize(
    "text, tokens, rank, full, lora, wanted, said",
    [
        (False, 10, 16, True, True, "LoRA", ""),
        (False, 10**6, None, True, True, "every", "no rank up to 256"),
        (False, 10**6, None, False, True, "LoRA", "every weight should train"),
        (True, 10**9 - 1, 256, True, True, "LoRA", "thin"),
        (True, 10**9, 256, True, True, "every", ""),
        (True, 10**9, 256, False, None, "LoRA", "every weight should train"),
        (False, 10, 16, False, False, "nf4", "nothing fits"),
    ],
)
def test_the_method_is_lora_until_the_tokens_are_too_many_and_fit(text, tokens, rank, full, lora, wanted, said):
    names = [("every", full), ("LoRA", lora), *([] if lora else [("nf4", False)])]
    tried = [SimpleNamespace(name=name, fits=fits) for name, fits in names]
    found = SimpleNamespace(text=text, loss_tokens=tokens, sizes=range(9))
    method, note = report._method(found, rank, tried)
    assert method.name == wanted
    assert said in note and bool(said) == bool(note)


@pytest.mark.parametrize("kind", ROWS)
def test_the_facts_are_of_the_tokens_that_train(kind):
    config = parse("advise", ["--data=x", "--model=y"])["start"]
    config.data.train, config.model.path = f"{kind.split()[0]}.jsonl", BASE
    _, tokenizer = build.tokenizer_of(config, weights=False)
    found = facts.facts(config, tokenizer)
    assert found.kind == kind and found.rows == len(ROWS[kind])
    assert (found.rows - found.distinct, found.blank) == ((1, 1) if kind == "pairs" else (0, 0))
    config.data.eval_fraction = 0.0
    packed = build.train_data_of(config, tokenizer)
    assert (found.loss_tokens, found.tokens) == (packed.report["loss_tokens"], packed.report["tokens"])
    assert len(found.sizes) == packed.report["documents"] // packed.together
    assert found.over(int(found.sizes.max())) == (0, 0)
    longest = int((found.sizes == found.sizes.max()).sum())
    assert found.over(int(found.sizes.max()) - 1)[0] == (0 if kind == "raw text" else longest)


def test_advice_for_too_few_pairs_is_written_and_says_what_is_missing(capsys):
    argv = ("advise", "--data=pairs.jsonl", f"--model={BASE}", "--hardware=h100:1", "--out=advised.py", "--explain")
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "20, of which 1 say what another says" in out
    for said in (
        "19 different rows are few",
        "2 held-out rows are too few",
        "without one nothing shows what is forgot",
    ):
        assert said in " ".join(out.split())
    for rule in rules.RULES.values():  # --explain
        assert rule.source.split(",")[0] in " ".join(out.split())
    [plan] = [line for line in out.splitlines() if "specjax plan --config=configs/lora.py --target=h100:1" in line]
    config = read_config("advised.py")
    validate(config, 1)
    assert (config.data.train, config.model.path) == ("pairs.jsonl", BASE)
    assert (config.trainable, config.lora.rank, config.lora.alpha, config.lora.targets) == (
        *("lora", 16, 32.0, "all-linear"),
    )
    assert (config.model.remat, config.epochs, config.data.length) == ("full", 15.0, 256)
    assert f"--config.batch_size={config.batch_size} " in plan
    assert re.search(r"\n  time +[\d.e-]+ s to [\d.e-]+ s for [\d,]+ steps on h100:1\n", out)
    before = Path("advised.py").read_text()
    assert main(argv) == 2
    assert "--out=advised.py is there already" in capsys.readouterr().err
    assert Path("advised.py").read_text() == before


@pytest.mark.parametrize(
    "listed, wanted",
    [
        (None, "cpu"),
        ("", "cpu"),
        ("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)\n", "h100:2"),
        (
            "GPU 0: NVIDIA L4 (UUID: GPU-1)\n",
            "this machine has NVIDIA L4, of which no figures are known: give --hardware",
        ),
        ("NVIDIA-SMI has failed.\n", r"nvidia-smi ends with status 9 \(NVIDIA-SMI has failed.\): give --hardware"),
    ],
)
def test_what_this_machine_has_is_found_without_asking_for_it(listed, wanted, tmp_path, monkeypatch):
    if listed is not None:
        Path("nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s' '{listed}'\nexit {9 * listed.startswith('NVIDIA')}\n")
        Path("nvidia-smi").chmod(0o755)
    monkeypatch.setattr(here, "shutil", SimpleNamespace(which=lambda name: listed is not None and str(tmp_path / name)))
    monkeypatch.setattr(here.process, "tpu_devices", list)
    if not re.fullmatch(r"cpu|h100:\d", wanted):
        with pytest.raises(UserError, match=wanted):
            here.found()
    else:
        assert here.found() == wanted


def test_pairs_of_answers_are_advised_dpo_and_named_sets_are_kept(capsys):
    argv = ("--data=preference.jsonl", f"--model={BASE}", "--out=dpo.py", "--config.data.eval.domain=pairs.jsonl")
    assert main(("advise", *argv)) == 0
    out = capsys.readouterr().out
    assert "set domain        20 rows" in out and "held out" not in out
    assert out.count(" --config.objective=dpo ") == 2  # in the plans too
    config = read_config("dpo.py")
    assert (config.objective, config.dpo.beta, config.optimizer.learning_rate) == ("dpo", 0.1, 1e-5)
    assert config.data.eval.to_dict() == {"domain": "pairs.jsonl"}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hardware": "a100:1"}, "--hardware=a100:1 is no target: give one such as v5e:4x4, "),
        ({"model": "nowhere"}, "model 'nowhere': no such folder"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"out": "advised.txt"}, "--out=advised.txt is no Python file"),
        ({"out": "no/advised.py"}, "there is no folder no"),
        ({"config.lora.rank": "8"}, "--config.lora.rank is none of the keys that `specjax advise` takes"),
        ({"data": "raw.jsonl", "config.data.template": "chatml"}, "which goes through no template"),
        ({"config.data.columns.response": "reply"}, "config.data.columns.response is 'reply', a column that"),
        ({"config": "dpo.py"}, "--config is no flag of `specjax advise`"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_status_2(capsys, changes, said):
    given = {"data": "pairs.jsonl", "model": BASE} | changes
    assert main(["advise", *(f"--{name}={value}" for name, value in given.items())]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("specjax: ") and err.count("\n") == 1
    assert said in err
