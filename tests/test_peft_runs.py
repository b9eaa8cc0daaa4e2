"""What an adapter trains beside its factors goes through checkpoints, resumes, exports and the command line too."""

import json

import numpy as np
import pytest
from fit_job import Hooked, Stop, job, stop
from helpers import BASE, assert_same_bits, data, model, prompts, torch_logits, weights
from run_fixtures import flags, specjax, write_base, write_data

import specjax as sj
from specjax import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's own
    pytest.mark.usefixtures("steps_made_once"),
]

OPTIONS = {
    "rank": 4,
    "targets": ["q_proj", "up_proj"],
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "layers_to_transform": [0],
    "dora": True,
    "modules_to_save": ["norm", "embed_tokens"],
    "bias": "all",
}


def subject():
    made = model(attention_bias=True, mlp_bias=True)
    sj.lora.inject(made, dropout=0.1, seed=1, **OPTIONS)
    return made, sj.LORA


@pytest.mark.rule(3)
def test_a_run_resumes_bit_for_bit_and_leaves_its_base(tmp_path):
    before = weights(subject()[0])
    of = subject()
    _, whole = job(tmp_path / "whole", steps=5, of=of, eval_every=0)
    with pytest.raises(Stop):
        job(tmp_path / "parts", steps=5, of=subject(), eval_every=0, rows=Hooked(data(), 4, stop))
    result, parts = job(tmp_path / "parts", steps=5, of=subject(), eval_every=0)
    assert result.step == 5
    assert_same_bits(parts, whole)
    assert_same_bits(weights(of[0], BASE), {name: before[name] for name in weights(of[0], BASE)})
    trained = [name for name in whole if ".own." in name or ".updates." in name]
    assert len(trained) == 2 * 3 + 7 + 3 + 1  # factors and magnitudes, biases, norms, the embedding
    for name in trained:
        assert whole[name].tobytes() != before[name].tobytes(), name


def test_the_command_line_trains_exports_and_merges_it(tmp_path):
    import peft
    import transformers

    base = write_base(tmp_path / "base", attention_bias=True, mlp_bias=True)
    write_data(tmp_path / "data")
    run = tmp_path / "run"
    told = {key: value for key, value in OPTIONS.items() if key != "rank"}
    keys = {f"lora.{key}": value for key, value in told.items()} | {"lora.rank": 4}
    argv = flags(base, run, "lora", **keys | {"lora.modules_to_save": "model.norm,lm_head"})
    assert specjax("train", *argv) == 0
    assert specjax("train", *argv) == 0  # it is done, and says so
    settings = json.loads((run / "config.json").read_text())["lora"]
    assert settings["modules_to_save"] == ["model.norm", "lm_head"] and settings["rank_pattern"]
    trained, _ = build.load_run(run, "best", sj.make_mesh())
    tokens = prompts(vocab_size=300, length=100)
    wanted = np.asarray(trained(tokens))
    reference = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert np.abs(torch_logits(reference, tokens) - wanted).max() > 0.05
    theirs = peft.PeftModel.from_pretrained(reference, run / "export")
    np.testing.assert_allclose(torch_logits(theirs, tokens), wanted, rtol=0, atol=1e-4)
    assert specjax("export", f"--workdir={run}", f"--out={tmp_path / 'merged'}", "--merge") == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(merged, tokens), wanted, rtol=0, atol=1e-4)
