"""The same run on every mesh; the same gradients whatever is computed again."""

import contextlib

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import data, metrics, model, token_sums

import specjax as sj
from specjax import sharding
from specjax.models.decoder import POLICIES
from specjax.train import chunks
from specjax.train.step import merge, split

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "fsdp 2 x tensor 2 x context 2": {"fsdp": 2, "tensor": 2, "context": 2},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
}


def losses(method, axes, workdir):
    made = model(mesh=sj.make_mesh(**axes) if axes else None)
    if method == "lora":
        sj.lora.inject(made, rank=4, alpha=16, targets="all-linear", seed=0)
    rows = data(answers=True, seed=2, batch_size=16)
    trainable = sj.LORA if method == "lora" else sj.ALL
    how = {"steps": 10, "accumulate": 2, "log_every": 1, "tensorboard": False}
    sj.fit(made, rows, sj.adamw(1e-2, weight_decay=0.1), trainable=trainable, workdir=workdir, **how)
    return [(row["loss"], row["grad_norm"]) for row in metrics(workdir)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {method: losses(method, None, tmp_path_factory.mktemp("alone")) for method in ("full", "lora")}


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_ten_steps_on_a_mesh_are_those_of_one_device(alone, method, axes, tmp_path):
    found = losses(method, axes, tmp_path)
    assert found[-1][0] < found[0][0] - 0.05
    np.testing.assert_allclose([loss for loss, _ in found], [loss for loss, _ in alone[method]], rtol=1e-5)
    np.testing.assert_allclose([norm for _, norm in found], [norm for _, norm in alone[method]], rtol=1e-3)


@pytest.mark.parametrize("rows, wanted", [(4, ("loss_batch", "loss_vocab")), (16, ("batch", "vocab"))])
def test_the_vocabulary_or_the_rows_are_split_whichever_is_less_to_gather(rows, wanted):
    """Few rows are gathered, and the words split over tensor x fsdp; many rows stay, and the table is gathered.

    256 tokens at most: a gradient's rounding grows with the sum's length, and 512 come to 1.2e-6 of the largest.
    """
    found = []
    for axes in ({"fsdp": 4, "tensor": 2}, None):
        mesh = sj.make_mesh(**axes) if axes else None
        batch = data(batch_size=rows, length=16, vocab_size=264, answers=True).batch(0)
        graph, params, frozen = split(model(vocab_size=264, mesh=mesh), nnx.Param)
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            assert chunks._axes(rows, 16, 264) == (wanted if mesh else ("batch", "vocab"))
            held = sharding.put_batch(batch, mesh, rows)
            gradient = jax.jit(jax.value_and_grad(lambda p, b, g=graph, f=frozen: token_sums(merge(g, p, f), b)["nll"]))
            found.append(gradient(params, held))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    for name, value in found[1][1].items():
        np.testing.assert_allclose(found[0][1][name], value, rtol=0, atol=1e-6 * np.abs(value).max(), err_msg=name)


@pytest.fixture(scope="module")
def gradients():
    """remat -> (gradients of a batch's loss, bytes of temporaries), of six layers."""
    batch, found = data(batch_size=4).batch(0), {}

    def of(remat):
        if remat not in found:
            made = model(num_hidden_layers=6)
            made.remat = remat
            graph, params, frozen = split(made, nnx.Param)
            gradient = jax.jit(jax.grad(lambda p: token_sums(merge(graph, p, frozen), batch)["nll"]))
            compiled = gradient.lower(params).compile()
            found[remat] = compiled(params), compiled.memory_analysis().temp_size_in_bytes
        return found[remat]

    return of


@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "offload"])
def test_what_is_computed_again_changes_no_gradient(gradients, remat):
    for name, value in gradients(remat)[0].items():
        wanted = gradients("none")[0][name]
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max(), err_msg=name)


def test_what_is_computed_again_is_not_kept(gradients):
    assert gradients("none")[1] > gradients("dots")[1] > gradients("full")[1]
    assert gradients("none")[1] > gradients("attention")[1] > gradients("full")[1]
