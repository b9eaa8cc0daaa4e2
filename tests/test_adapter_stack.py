"""Adapters of one base are one stack: each row of a batch is answered, and trains, by the adapter that it bears."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_same_bits, data, model, prompts, token_sums, weights

import specjax as sj
from specjax.errors import UserError
from specjax.lora.targets import linears, parts
from specjax.models.adapter import select, without_adapters

TOKENS = prompts(rows=8, length=24, vocab_size=128)
#: name -> what `inject` is told: ranks, scales, maps and layers differ.
LORAS = {
    "v1.2": {"rank": 4, "alpha": 12},
    "hr": {"rank": 2, "targets": ["q_proj", "v_proj", "down_proj", "lm_head"], "rank_pattern": {"layers.1.*": 1}},
    "law": {"rank": 3, "targets": ["k_proj", "o_proj", "up_proj"], "rslora": True, "layers_to_transform": [1]},
}
OTHERS = {
    "LoRA and DoRA": ({}, {"v1.2": LORAS["v1.2"], "hr": {"rank": 2, "dora": True, "targets": ["q_proj", "up_proj"]}}),
    "experts": (
        {"family": "mixtral"},
        {"v1.2": {"rank": 4, "rslora": True}, "hr": {"rank": 2}, "law": {"rank": 3, "targets": ["down_proj"]}},
    ),
    "LoRA": ({}, LORAS),
}


def trained(changes, adapters):
    """A model that wears several adapters, their factors as after some training."""
    made = model(**changes)
    for seed, (name, options) in enumerate(adapters.items()):
        sj.lora.inject(made, name=name, seed=seed, **options)
        rng = np.random.default_rng(seed)
        for linear in linears(made).values():
            for stack in linear.updates.values():
                if stack.member(seed) is None:
                    continue
                member, lead = stack.member(seed), int(stack.b.get_metadata("axes")[0] == "layers")
                noise = np.zeros(stack.b.shape, np.float32)
                for layer, rank in enumerate(member.ranks):
                    row = (layer, stack.members.index(member))[1 - lead :]
                    noise[row][..., :rank] = 0.1 * rng.standard_normal(noise[row][..., :rank].shape)
                stack.b[...] = stack.b[...] + noise
    return made


def alone(made, name, tokens=TOKENS):
    """The logits that one adapter gives, or the base."""
    sj.lora.use(made, name)
    return np.asarray(made(tokens))


@pytest.fixture(scope="module", params=OTHERS)
def several(request):
    changes, adapters = OTHERS[request.param]
    made = trained(changes, adapters)
    return made, {name: alone(made, name) for name in (*adapters, None)}


@pytest.mark.rule(3)
def test_each_row_of_a_batch_is_answered_by_its_adapter(several):
    made, wanted = several
    names = [*wanted, *wanted][:4]  # four groups of two rows, one of them of the base
    found = made(TOKENS, adapters=sj.lora.slots(made, names))
    for group, name in enumerate(names):
        rows = slice(2 * group, 2 * group + 2)
        np.testing.assert_allclose(found[rows], wanted[name][rows], rtol=0, atol=1e-5, err_msg=str(name))
        others = [other for other in wanted if other != name]
        assert all(np.abs(found[rows] - wanted[other][rows]).max() > 1e-2 for other in others)


def test_all_rows_by_one_adapter_by_its_slot_or_by_the_base(several):
    made, wanted = several
    sj.lora.use(made, "hr")
    np.testing.assert_array_equal(made(TOKENS, adapters=None), wanted[None])
    np.testing.assert_array_equal(made(TOKENS, adapters=int(sj.lora.slots(made, ["v1.2"])[0])), wanted["v1.2"])
    np.testing.assert_array_equal(made(TOKENS), wanted["hr"])
    base = without_adapters(made)
    np.testing.assert_array_equal(base(TOKENS), wanted[None])
    assert [part.active for part in parts(made).values()] == [1] * len(parts(made))


def test_other_adapters_for_the_groups_compile_nothing(several):
    made, wanted = several
    graph, state = nnx.split(made)
    counted = []

    @jax.jit
    def answer(state, slots):
        counted.append(1)
        chosen = select(nnx.merge(graph, state), slots)
        return chosen.unembed(chosen.hidden(jnp.asarray(TOKENS)))

    both = [answer(state, jnp.asarray(slots, jnp.int32)) for slots in ([0, 1], [-1, 0])]
    assert len(counted) == 1  # traced once
    np.testing.assert_allclose(both[0][:4], wanted["v1.2"][:4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(both[1][4:], wanted["v1.2"][4:], rtol=0, atol=1e-5)
    assert np.abs(both[0][:4] - both[1][:4]).max() > 1e-2


def rows_of(batch, rows):
    return {name: jnp.asarray(value[rows]) for name, value in batch.items()}


def gradients(graph, state, rest, batch, slots):
    """Of the summed loss, by the adapters of the groups."""

    def loss(state):
        return token_sums(select(nnx.merge(graph, state, rest), slots), batch)["nll"]

    return jax.jit(jax.grad(loss))(state)


def rows_by_slot(made, grads):
    """(path, slot) -> that adapter's part of the gradients of a stack."""
    found = {}
    flat = dict(nnx.to_flat_state(grads))
    for path, linear in linears(made).items():
        for variant, stack in linear.updates.items():
            for field in stack.fields:
                at = getattr(stack, field).get_metadata("axes").index("adapter")
                for row, member in enumerate(stack.members):
                    value = np.asarray(flat[*path, "updates", variant, field][...])
                    found[*path, variant, field, member.slot] = np.take(value, row, axis=at)
    return found


@pytest.mark.rule(3)
def test_each_group_trains_its_adapter_and_no_other(several):
    made, wanted = several
    count = len([name for name in wanted if name is not None])
    graph, state, rest = nnx.split(made, nnx.LoRAParam, ...)
    batch = data(batch_size=8).batch(0)
    slots = [1, -1, 0, -1]  # of three adapters the last answers no row
    together = rows_by_slot(made, gradients(graph, state, rest, rows_of(batch, slice(0, 8)), slots))
    apart = {
        slots[group]: rows_by_slot(
            made, gradients(graph, state, rest, rows_of(batch, slice(2 * group, 2 * group + 2)), slots[group])
        )
        for group in (0, 2)
    }
    assert {key[-1] for key in together} == set(range(count))
    for key, found in together.items():
        slot = key[-1]
        if slot not in apart:
            assert not found.any(), key
            continue
        alone, scale = apart[slot][key], np.abs(apart[slot][key]).max()
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5 * max(scale, 1.0), err_msg=str(key))
        other = apart[1 - slot][key]
        assert not other.any()  # alone, an adapter has no gradient of another's
    assert sum(found.any() for found in together.values()) > len(together) / (2 * count)


@pytest.mark.rule(3)
def test_what_stands_behind_a_rank_stays_zero():
    made = trained({}, LORAS)
    graph, state, rest = nnx.split(made, nnx.LoRAParam, ...)
    rule = optax.adam(1e-2)
    kept, start = rule.init(state), state
    batch = rows_of(data(batch_size=8).batch(0), slice(0, 6))

    @jax.jit
    def step(state, kept):
        loss = lambda state: token_sums(select(nnx.merge(graph, state, rest), [0, 1, 2]), batch)["nll"]  # noqa: E731
        updates, kept = rule.update(jax.grad(loss)(state), kept)
        return optax.apply_updates(state, updates), kept

    for _ in range(3):
        state, kept = step(state, kept)
    behind = moved = 0
    for path, linear in linears(made).items():
        for stack in linear.updates.values():
            flat = dict(nnx.to_flat_state(state))
            for field, first in (("a", dict(nnx.to_flat_state(start))), ("b", None)):
                leaf = flat[*path, "updates", "lora", field]
                axes = getattr(stack, field).get_metadata("axes")
                value = np.moveaxis(np.asarray(leaf[...]), axes.index("lora_rank"), -1)
                for row, member in enumerate(stack.members):
                    for layer, rank in enumerate(member.ranks):
                        one = value[layer, row] if axes[0] == "layers" else value[row]
                        behind += one[..., rank:].size
                        assert not one[..., rank:].any(), (path, field, member.slot, layer)
                if first is not None:
                    moved += not np.array_equal(leaf[...], first[*path, "updates", "lora", field][...])
    assert behind > 1000 and moved == 8


def test_an_adapter_that_is_taken_off_leaves_the_others_as_they_were():
    made = trained({}, LORAS)
    wanted = {name: alone(made, name) for name in (*LORAS, None)}
    alike = trained({}, {"v1.2": LORAS["v1.2"]})
    sj.lora.unload(made, "hr")
    assert sj.lora.names(made) == ["v1.2", "law"]
    np.testing.assert_allclose(alone(made, "law"), wanted["law"], rtol=0, atol=1e-5)
    sj.lora.inject(made, rank=5, name="new")
    assert sj.lora.slots(made, ["new", None, "law"]).tolist() == [1, -1, 2]  # the slot that was free
    np.testing.assert_allclose(alone(made, "v1.2"), wanted["v1.2"], rtol=0, atol=1e-5)
    for name in ("new", "law"):
        sj.lora.unload(made, name)
    assert made.adapters == ("v1.2",)
    assert_same_bits(weights(made), weights(alike))  # the largest rank left is the stack's
    sj.lora.unload(made, "v1.2")
    assert made.adapters == () and not nnx.to_flat_state(nnx.state(made, nnx.LoRAParam))
    np.testing.assert_array_equal(made(TOKENS), wanted[None])


def test_what_cannot_share_a_batch_is_refused():
    made = trained({}, LORAS)
    with pytest.raises(UserError, match="8 rows do not divide into 3 groups of adapters"):
        made(TOKENS, adapters=[0, 1, 2])
    with pytest.raises(UserError, match="no adapter 'v1.3' is loaded; loaded are: v1.2, hr, law. Did you mean 'v1.2'"):
        sj.lora.slots(made, ["v1.3"])
    with pytest.raises(UserError, match="no adapter has the slot 3"):
        made(TOKENS, adapters=3)
    sj.lora.inject(made, rank=2, name="whole", modules_to_save=["norm"], targets=["q_proj"])
    with pytest.raises(UserError, match="adapter 'whole' has copies of whole modules or of rows, which cannot share"):
        made(TOKENS, adapters=[0, 3])
    with pytest.raises(UserError, match="adapters hr, law, v1.2, whole are loaded: unload all but the one to train"):
        sj.fit(made, data(), sj.adamw(1e-3), steps=1, trainable=sj.LORA)


@pytest.mark.parametrize(
    ("kind", "axes"), [("LoRA", {"fsdp": 2, "tensor": 2}), ("experts", {"fsdp": 1, "expert": 2, "tensor": 2})]
)
def test_a_mesh_answers_a_mixed_batch_as_one_device_does(kind, axes):
    changes, adapters = OTHERS[kind]
    slots, answers = [1, -1, 0, 2], []
    for mesh in (None, sj.make_mesh(**axes, devices=jax.devices()[:4])):
        made = trained(changes | {"mesh": mesh}, adapters)
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            answers.append(np.asarray(made(TOKENS, adapters=slots)))
    np.testing.assert_allclose(*answers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rates", [(0.0, 0.9), (0.9, 0.9)])
def test_each_group_drops_at_its_adapters_rate(rates):
    made = model(dtype="bfloat16")
    for rate, name in zip(rates, ("v1.2", "hr"), strict=True):
        sj.lora.inject(made, rank=2, name=name, dropout=rate, targets=["q_proj", "v_proj"])
    for linear in linears(made).values():
        for stack in linear.updates.values():
            stack.b[...] = jnp.ones_like(stack.b[...])
    hidden = jax.jit(lambda key: select(made, [0, 1]).hidden(jnp.asarray(TOKENS), dropout_key=key))
    first, second = (np.asarray(hidden(jax.random.key(seed)).astype(jnp.float32)) for seed in (0, 1))
    assert hidden(jax.random.key(0)).dtype == jnp.bfloat16
    moves = [not np.array_equal(first[rows], second[rows]) for rows in (slice(0, 4), slice(4, 8))]
    assert moves == [rate > 0 for rate in rates]


@pytest.mark.usefixtures("steps_made_once")
def test_a_name_with_a_dot_trains_saves_resumes_and_comes_back(tmp_path):
    def subject():
        made = model()
        sj.lora.inject(made, rank=2, name="v1.2", dropout=0.1)
        return made

    def train(made, steps, workdir):
        sj.fit(made, data(), sj.adamw(1e-2), steps=steps, trainable=sj.LORA, workdir=workdir, save_every=1)
        return made

    whole = train(subject(), 3, tmp_path / "whole")
    train(subject(), 2, tmp_path / "parts")
    parts = train(subject(), 3, tmp_path / "parts")
    assert_same_bits(weights(parts), weights(whole))
    assert not np.array_equal(alone(whole, "v1.2"), alone(whole, None))
    assert sj.lora.save(whole, tmp_path / "adapter", name="v1.2") == []
    again = model()
    sj.lora.load(again, tmp_path / "adapter", name="v1.2")
    assert sj.lora.names(again) == ["v1.2"]
    np.testing.assert_array_equal(alone(again, "v1.2"), alone(whole, "v1.2"))
    sj.lora.merge(again, "v1.2")
    np.testing.assert_allclose(again(TOKENS), alone(whole, "v1.2"), rtol=0, atol=1e-4)
