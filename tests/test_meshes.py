"""The same gradients whichever way the loss is split over a mesh, and whatever is computed again."""

import contextlib

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import data, model, token_sums

import specjax as sj
from specjax import sharding
from specjax.models.decoder import POLICIES
from specjax.train import chunks
from specjax.train.step import merge, split


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
