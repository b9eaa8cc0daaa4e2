"""A mesh is a layout: it changes where numbers lie and not what they are."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import BASE, assert_same_bits, data, metrics, model, weights

import specjax as sj
from specjax.errors import UserError
from specjax.sharding import MESH_AXES, fill_sizes, named_sharding, of_module
from specjax.train.session import Session

pytestmark = pytest.mark.usefixtures("steps_made_once")

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "fsdp 2 x tensor 2 x context 2": {"fsdp": 2, "tensor": 2, "context": 2},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
}
STEPS = 10


def run(kind, mesh, workdir, steps=STEPS, **changes):
    """Ten steps on packed rows with accumulation: (rows of the log, trained weights)."""
    made = model(mesh=mesh, **changes)
    if kind == "lora":
        sj.lora.inject(made, rank=4, dropout=0.1, seed=1)
    rows, optimizer = data(batch_size=16, answers=True), sj.adamw(5e-3, weight_decay=0.1)
    options = {"accumulate": 2, "log_every": 1, "tensorboard": False, "eval_data": {"held": data(seed=1)}}
    before = weights(made, BASE)
    trainable = sj.LORA if kind == "lora" else sj.ALL
    sj.fit(made, rows, optimizer, steps=steps, trainable=trainable, workdir=workdir, **options)
    if kind == "lora":
        assert_same_bits(weights(made, BASE), before)
    return metrics(workdir), weights(made, trainable), made


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """kind -> the run on one device."""
    return {kind: run(kind, None, tmp_path_factory.mktemp(kind))[:2] for kind in ("full", "lora")}


@pytest.mark.rule(2)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("sizes", MESHES)
def test_training_on_a_mesh_follows_training_on_one_device(tmp_path, single, kind, sizes):
    mesh = sj.make_mesh(**MESHES[sizes])
    found, trained, made = run(kind, mesh, tmp_path)
    wanted, reference = single[kind]
    assert len(found) == len(wanted) == STEPS + 2
    steps = [row["loss"] for row in found if "loss" in row]
    assert steps[-1] < steps[0] - 0.05
    worst = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # The gradient's norm is no loss: a square root of sums of squares in another order.
            np.testing.assert_allclose(ours[key], value, rtol=1e-4 if key == "grad_norm" else 1e-5, err_msg=key)
        worst = max([worst, *(abs(ours[key] / theirs[key] - 1) for key in theirs if key.endswith("loss"))])
    print(f"{kind} on {sizes}: losses differ by at most {worst:.1e} of themselves")
    for name, value in reference.items():
        np.testing.assert_allclose(trained[name], value, rtol=0, atol=5e-4, err_msg=name)
    places = of_module(made, mesh)
    for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        assert leaf[...].sharding.is_equivalent_to(places[path], leaf.ndim), path


def flat(made):
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.Param))}


def test_a_run_on_a_mesh_resumes_bit_for_bit(tmp_path):
    mesh = sj.make_mesh(fsdp=4, tensor=2)
    wanted = run("full", mesh, tmp_path / "whole", steps=6)
    run("full", mesh, tmp_path / "cut", steps=3)
    found = run("full", mesh, tmp_path / "cut", steps=6)
    # The first part ended, and was evaluated, at its own last step.
    at_its_end = [row for row in found[0] if row["step"] == 3 and "eval/held/loss" in row]
    assert [row for row in found[0] if row not in at_its_end] == wanted[0]
    assert_same_bits(found[1], wanted[1])


def test_optimizer_moments_lie_like_their_parameters(tmp_path):
    mesh = sj.make_mesh(fsdp=4, tensor=2)
    options = {"trainable": sj.ALL, "eval_data": {}, "workdir": None, "keep": 1, "accumulate": 1, "seed": 0}
    with Session(model(mesh=mesh), data(), sj.adamw(1e-3), sj.next_token, **options) as session:
        state = session.state
        parts = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        adam = next(part for part in parts if hasattr(part, "mu"))
        for moments in (adam.mu, adam.nu):
            for name, value in moments.items():
                assert value.dtype == np.float32
                assert value.sharding == state.trainable[name].sharding, name


def test_each_device_holds_its_share_of_the_weights():
    made = flat(model(mesh=sj.make_mesh(fsdp=4, tensor=2)))
    held = sum(array.addressable_shards[0].data.nbytes for array in made.values())
    whole = sum(array.nbytes for array in made.values())
    assert whole / 8 <= held < whole / 8 * 1.1  # norms are not split over tensor


@pytest.mark.parametrize(
    ("changes", "sizes", "said"),
    [
        (
            {"hidden_size": 36, "head_dim": 8},
            {"fsdp": 8},
            "embed_tokens.embedding: its axis 'embed' of size 36 cannot be split 8 ways over mesh axis fsdp",
        ),
        (
            {"num_key_value_heads": 2},
            {"fsdp": 2, "tensor": 4},
            "layers.0.self_attn.k_proj.kernel: its axis 'kv_heads' of size 2 cannot be split 4 ways over",
        ),
        (
            {"vocab_size": 131},
            {"fsdp": 4, "tensor": 2},
            "embed_tokens.embedding: its axis 'vocab' of size 131 cannot be split 2 ways over mesh axis tensor",
        ),
    ],
)
def test_a_size_that_does_not_divide_is_named_with_both_numbers(changes, sizes, said):
    with pytest.raises(UserError) as refused:
        of_module(model(**changes), sj.make_mesh(**sizes))
    assert str(refused.value).startswith(said)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    mesh = sj.make_mesh(fsdp=8)
    with pytest.raises(UserError, match="'batch' of size 4 cannot be split 8 ways"):
        named_sharding(mesh, ("batch", "length"), (4, 64), "tokens")


@pytest.mark.parametrize(
    ("sizes", "filled"),
    [
        ({"fsdp": -1, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
        ({"fsdp": 2, "tensor": -1}, {"fsdp": 2, "tensor": 4}),
        ({"data": -1, "fsdp": 1}, {"data": 8}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"fsdp": 2, "expert": -1}, {"fsdp": 2, "expert": 4}),
        ({"fsdp": -1, "expert": 2}, {"fsdp": 4, "expert": 2}),
        ({}, {"fsdp": 8}),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(sizes, filled):
    assert dict(sj.make_mesh(**sizes).shape) == dict.fromkeys(MESH_AXES, 1) | filled


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"fsdp": 3}, "mesh data 1 x fsdp 3 x expert 1 x context 1 x tensor 1 does not fit 8 devices"),
        ({"fsdp": 4}, "mesh data 1 x fsdp 4 x expert 1 x context 1 x tensor 1 does not fit 8 devices"),
        ({"fsdp": -1, "tensor": 3}, "does not fit 8 devices"),
        ({"fsdp": -1, "tensor": -1}, "at least 1, or -1 for one of them"),
        ({"fsdp": 0}, "at least 1, or -1 for one of them"),
        ({"fsdp": 4, "expert": 4}, "mesh data 1 x fsdp 4 x expert 4 x context 1 x tensor 1 does not fit 8 devices"),
        ({"fsdp": 8, "tensor": -2}, "at least 1, or -1 for one of them"),
    ],
)
def test_mesh_sizes_that_make_no_mesh_are_refused(sizes, said):
    with pytest.raises(UserError) as refused:
        sj.make_mesh(**sizes)
    assert said in str(refused.value)


def test_a_mesh_of_some_devices():
    mesh = sj.make_mesh(fsdp=-1, devices=jax.devices()[:2])
    assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | {"fsdp": 2}
    assert fill_sizes({"a": -1, "b": 2}, 2) == {"a": 1, "b": 2}
