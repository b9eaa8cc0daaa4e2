"""Adapters side by side: each prompt of a batch is answered by its own, and switching compiles and copies nothing."""

from contextlib import nullcontext

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import BASE, compilations, model, prompts

import specjax as sj
from specjax.errors import UserError
from specjax.generation.generate import generate_tokens
from specjax.generation.pools import pools
from specjax.lora import bank
from specjax.lora.targets import linears, maps_of

PROMPTS = [[5, 6, 7], [9] * 9, [3, 4], [8, 7, 6, 5], [1, 2], [4] * 5]
NEW = 8
TOKENS = prompts(rows=6, length=24, vocab_size=128)
#: name -> what `inject` is told: ranks, scales, maps and layers differ; the last two share no batch.
ADAPTERS = {
    "hr": {
        "rank": 2,
        "targets": ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"],
        "rank_pattern": {"layers.1.*": 1},
    },
    "tax": {"rank": 4, "alpha": 12},
    "law": {"rank": 8, "targets": ["k_proj", "o_proj", "up_proj"], "rslora": True, "layers_to_transform": [1]},
    "dora": {"rank": 2, "targets": ["q_proj", "up_proj"], "dora": True},
    "whole": {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["norm"], "trainable_token_indices": [5, 9]},
}
SHARING = ["hr", "tax", "law"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> the folder of an adapter as after some training."""
    out = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        made, rng = model(), np.random.default_rng(seed)
        sj.lora.inject(made, name=name, seed=seed, **options)
        for linear in linears(made).values():
            for stack in linear.updates.values():
                noise = np.zeros(stack.b.shape, np.float32)
                for layer, rank in enumerate(stack.members[0].ranks):
                    noise[layer if len(stack.members[0].ranks) > 1 else ...][..., :rank] = 0.15
                stack.b[...] = noise * rng.standard_normal(noise.shape).astype(np.float32)
        if name == "whole":
            made.norm.own["0"].scale[...] = made.norm.own["0"].scale[...] * 2 - 1
            made.embed_tokens.own["0"].embedding[...] *= -2
        if name == "hr":
            a = made.embed_tokens.updates["embedding"].a
            a[...] = 0.1 * rng.standard_normal(a.shape).astype(np.float32)
        sj.lora.save(made, out / name)
    return {name: out / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def alone(folders):
    """Name -> a model into which this adapter, and no other, is merged."""
    made = {name: several(folders, *([] if name is None else [name])) for name in (*ADAPTERS, None)}
    for name in ADAPTERS:
        sj.lora.merge(made[name])
    logits = [np.asarray(one(TOKENS)) for one in made.values()]
    assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(logits) for b in logits[:i])
    return made


def assert_answered(alone, chosen, answers):
    """Each answer is, token for token, what the model that has its adapter alone finds likeliest."""
    texts = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    tokens = np.array([[*text, *[0] * (TOKENS.shape[1] - len(text))] for text in texts], np.int32)
    likeliest = {name: np.asarray(alone[name](tokens)).argmax(-1) for name in set(chosen)}
    for row, (name, prompt, text) in enumerate(zip(chosen, PROMPTS, texts, strict=True)):
        assert len(text) == len(prompt) + NEW
        assert text[len(prompt) :] == likeliest[name][row, len(prompt) - 1 : len(text) - 1].tolist(), (row, name)


def room(made):
    sj.lora.reserve(made, slots=8, rank=8, targets=sorted({path[-1] for path in maps_of(made)}))


def several(folders, *names, **changes):
    made = model(**changes)
    for name in names:
        sj.lora.load(made, folders[name], name=name)
    return made


@pytest.mark.rule(3)
@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 2}], ids=["one device", "mesh"])
def test_a_mixed_batch_has_the_logits_of_each_adapter_alone(folders, alone, axes):
    mesh = sj.make_mesh(**axes, devices=jax.devices()[:4]) if axes else None
    made = bank.serving(several(folders, *SHARING, mesh=mesh))
    for chosen in (["tax", "hr", None, "law", "hr", "tax"], ["law", "law", "tax", None, None, "hr"]):
        bank.bear(made, np.array([-1 if name is None else SHARING.index(name) for name in chosen]))
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            found = np.asarray(made(TOKENS))
        for row, name in enumerate(chosen):
            wanted = np.asarray(alone[name](TOKENS))[row]
            np.testing.assert_allclose(found[row], wanted, rtol=0, atol=1e-5, err_msg=f"{row} {name}")


def test_adapters_that_share_no_batch_answer_in_batches_of_their_own(folders, alone):
    made = several(folders, *ADAPTERS)
    assert [name for name in ADAPTERS if bank.shares(made, name)] == SHARING
    first, *own = pools(made, ["dora", "hr", None, "whole", "dora", "tax"], 6)
    assert [first.prompts, *(pool.prompts for pool in own)] == [[1, 2, 5], [0, 4], [3]]
    np.testing.assert_allclose(own[0].model(TOKENS), alone["dora"](TOKENS), rtol=0, atol=1e-5)
    room(made)
    chosen = ["law", "hr", None, "whole", "hr", "tax"]
    assert_answered(alone, chosen, generate_tokens(made, PROMPTS, max_new_tokens=NEW, adapter=chosen))


@pytest.mark.rule(11)
def test_loading_unloading_and_switching_compile_nothing_and_copy_no_base(folders, alone):
    made = several(folders, "hr")
    room(made)

    def assert_mixed(*chosen):
        found = generate_tokens(made, PROMPTS, max_new_tokens=NEW, adapter=[*chosen])
        assert_answered(alone, ["hr" if name == "again" else name for name in chosen], found)

    assert_mixed("hr", None, "hr", None, "hr", None)
    base = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(made, BASE))}
    with compilations() as compiled:
        sj.lora.load(made, folders["tax"], name="tax")
        assert_mixed("tax", "hr", None, "hr", "tax", "tax")
        sj.lora.load(made, folders["law"], name="law")
        assert_mixed("tax", "law", None, "hr", "law", "law")
        sj.lora.unload(made, "hr")
        assert_mixed("tax", None, None, "law", "law", "tax")
        sj.lora.load(made, folders["hr"], name="again")
        assert_mixed("again", "again", "law", "tax", "again", None)
        for name in ("tax", "law"):  # one name for all; then the one in use
            found = generate_tokens(made, PROMPTS, max_new_tokens=NEW, adapter=name)
            sj.lora.use(made, name)
            assert generate_tokens(made, PROMPTS, max_new_tokens=NEW) == found
            assert_answered(alone, [name] * len(PROMPTS), found)
        assert not compiled
    served = dict(nnx.to_flat_state(nnx.state(bank.serving(made), BASE)))
    assert served.keys() == base.keys() and all(served[path][...] is value for path, value in base.items())
    # What was trained, or written into, since the bank was made is what answers.
    stack = made.layers[0].mlp.up_proj.updates["lora"]
    stack.b[...] = 0 * stack.b[...]
    assert generate_tokens(made, PROMPTS, max_new_tokens=NEW) != found


def test_what_cannot_be_chosen_is_told(folders):
    made = several(folders, "hr", "tax")
    with pytest.raises(UserError, match="adapter has 2 names for 6 prompts: give one for each"):
        generate_tokens(made, PROMPTS, adapter=["hr", "tax"])
    with pytest.raises(UserError, match=r"no adapter 'hrr' is loaded.*Did you mean 'hr'"):
        generate_tokens(made, PROMPTS[:1], adapter=["hrr"])
    with pytest.raises(UserError, match="slots is 0: it must be at least 1"):
        sj.lora.reserve(made, slots=0, rank=8)
