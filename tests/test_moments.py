"""Moments in fewer bits: what is stored, that its mean is right, that training goes on as with float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, data, metrics, model, weights
from jax.sharding import NamedSharding, PartitionSpec

import specjax as sj
from specjax.errors import UserError
from specjax.train import moments
from specjax.train.checkpoint import Checkpoints
from specjax.train.step import opt_shardings, split

pytestmark = pytest.mark.usefixtures("steps_made_once")

LOW = ("bfloat16", "8bit")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The tests' arrays are tiny: all but the norms' scales are to be packed."""
    monkeypatch.setattr(moments, "SMALL", 128)


def held(state):
    """The parts of an optimizer's state that are as large as parameters."""
    adam = next(part for part in state if hasattr(part, "mu"))
    return adam.mu, adam.nu


@pytest.mark.rule(2)
@pytest.mark.parametrize("kind", LOW)
def test_what_is_stored_has_the_right_mean(kind):
    """Of 4000 roundings of the same numbers, over seven decades and both signs."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.choice([-1.0, 1.0], (2, 96)) * 10.0 ** rng.uniform(-5, 2, (2, 96)), jnp.float32)
    pack = moments._pack8 if kind == "8bit" else moments._round_bfloat16
    whole = moments.unpack if kind == "8bit" else lambda y: y.astype(jnp.float32)
    for signed in (True, False):
        values = x if signed else jnp.square(x)
        draw = jax.jit(
            jax.vmap(lambda seed, v=values, s=signed: whole(pack(v, moments._noise(v.shape, seed), signed=s)))
        )
        drawn = np.asarray(draw(moments._mixed(jnp.arange(4000, dtype=jnp.uint32))), np.float64)
        mean, error = drawn.mean(0), drawn.std(0) / np.sqrt(4000)
        # A second moment is never 0, where the least code would be chosen more often than is right.
        fair = np.abs(values) > 1e-8 * np.abs(values).max(axis=-1, keepdims=True)
        assert fair.mean() > 0.4
        off = np.abs(mean - np.asarray(values, np.float64))[fair]
        assert (off <= 5 * error[fair] + 1e-6 * np.abs(values)[fair]).all(), kind
        if not signed:
            assert (drawn[:, np.asarray(values) > 0] > 0).all()


def test_what_is_exact_stays_and_zero_is_zero():
    x = jnp.asarray([[0.0] * 8, [4.0, -4.0, 1.0, 0.0, -1.0, 4.0, 0.0, 0.0]])
    noise = moments._noise(x.shape, jnp.uint32(0))
    for signed in (True, False):
        found = moments.unpack(moments._pack8(jnp.abs(x) if not signed else x, noise, signed=signed))
        largest = np.abs(x) == np.abs(x).max(axis=-1, keepdims=True)
        np.testing.assert_allclose(found[largest], (x if signed else jnp.abs(x))[largest], rtol=1e-6)
        np.testing.assert_array_equal(found[x == 0], 0)
    np.testing.assert_array_equal(moments._round_bfloat16(x, noise, signed=True), x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(rule, kind, folder, steps) -> losses and weights of a run; the same call is one run."""

    @functools.cache
    def trained(rule, kind, folder, steps):
        made, workdir, make = model(), home / rule / folder, getattr(sj, rule)
        options = {"steps": steps, "workdir": workdir, "tensorboard": False, "log_every": 1}
        sj.fit(made, data(), make(3e-3 if rule == "adamw" else 3e-4, moments=kind), **options, save_every=10)
        return [row["loss"] for row in metrics(workdir)], weights(made)

    home = tmp_path_factory.mktemp("runs")
    return trained


@pytest.mark.rule(2)
@pytest.mark.parametrize("kind", LOW)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_a_run_follows_that_of_float32_and_resumes_bit_for_bit(run, kind, rule):
    wanted, _ = run(rule, "float32", "float32", 30)
    found, trained = run(rule, kind, kind, 30)
    fallen = wanted[0] - wanted[-1]
    assert fallen > 0.3
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * fallen)
    assert found != wanted
    run(rule, kind, f"{kind} cut", 20)
    losses, again = run(rule, kind, f"{kind} cut", 30)
    assert losses == found
    assert_same_bits(again, trained)


@pytest.mark.rule(2)
@pytest.mark.parametrize("kind", LOW)
def test_a_mesh_stores_what_one_device_stores(kind):
    """Moments and the scales of their blocks lie like the parameters."""
    mesh = sj.make_mesh(fsdp=4, tensor=2)
    shapes = {"hidden_size": 64, "intermediate_size": 128}
    _, params, _ = split(model(**shapes), sj.ALL)
    gradients = {path: np.random.default_rng(0).standard_normal(x.shape) for path, x in params.items()}
    found = {}
    for name, on in (("one", None), ("many", mesh)):
        _, params, _ = split(model(mesh=on, **shapes), sj.ALL)
        optimizer = sj.adamw(1e-3, moments=kind)
        places = opt_shardings(optimizer, params, on)
        state = jax.jit(optimizer.init, out_shardings=places)(params)
        grads = {name: jnp.asarray(value, jnp.float32) for name, value in gradients.items()}
        _, found[name] = jax.jit(optimizer.update, out_shardings=(None, places))(grads, state, params)
    for one, many in zip(held(found["one"]), held(found["many"]), strict=True):
        for name, value in many.items():
            place = params[name].sharding
            leaves = zip(jax.tree.leaves(value), jax.tree.leaves(one[name]), strict=True)
            for leaf, wanted in leaves:
                np.testing.assert_array_equal(leaf, wanted, err_msg=str(name))
                assert leaf.shape != params[name].shape or leaf.sharding == place
            if kind == "8bit" and name[-2:] == ("up_proj", "kernel"):
                assert value.codes.sharding == place and value.codes.dtype in (np.int8, np.uint8)
                assert value.scales.sharding.spec[1] == place.spec[1] == "tensor"


def test_the_draws_are_even_and_have_nothing_to_do_with_each_other():
    draws = [np.asarray(moments._noise((300, 400), moments._mixed(jnp.uint32(step)))) / 2**32 for step in (7, 8)]
    for draw in draws:
        assert abs(draw.mean() - 0.5) < 0.004 and abs(np.var(draw) - 1 / 12) < 0.002
        counts, _ = np.histogram(draw, 64, (0, 1))
        assert counts.min() > 1875 - 5 * 43 and counts.max() < 1875 + 5 * 43
    pairs = [(draws[0], draws[1]), (draws[0][:-1], draws[0][1:]), (draws[0][:, :-1], draws[0][:, 1:])]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.015


@pytest.mark.parametrize(("kind", "bytes_each"), [("float32", 4.0), ("bfloat16", 2.0), ("8bit", 1.07)])
def test_they_take_the_bytes_that_they_say(kind, bytes_each):
    _, params, _ = split(model(hidden_size=64, intermediate_size=128), sj.ALL)
    big = {name: value for name, value in params.items() if value.size >= moments.SMALL}
    size = sum(value.size for value in big.values())
    for moment in held(sj.adamw(1e-3, moments=kind).init(params)):
        taken = sum(leaf.nbytes for name in big for leaf in jax.tree.leaves(moment[name]))
        assert taken / size == pytest.approx(bytes_each, rel=0.02)
        small = [leaf for name in params.keys() - big.keys() for leaf in jax.tree.leaves(moment[name])]
        assert small and all(leaf.dtype == np.float32 for leaf in small)


def test_moments_in_the_hosts_memory_are_saved_and_read_back_there(tmp_path):
    mesh = sj.make_mesh(fsdp=8)
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    there = place.with_memory_kind("pinned_host")
    trained = {"w": jax.device_put(np.ones((8, 8), np.float32), place)}
    state = {"mu": {"w": jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8), there)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": trained, "opt_state": state}, {}, 0.0)
    checkpoints.wait()
    found = checkpoints.load(1, {"trainable": trained, "opt_state": state})["opt_state"]
    checkpoints.close()
    assert found["mu"]["w"].sharding == there
    np.testing.assert_array_equal(found["mu"]["w"], state["mu"]["w"])


def test_what_there_is_not_is_said():
    with pytest.raises(UserError, match="moments '8bits': choose one of float32, bfloat16, 8bit. Did you mean '8bit'"):
        sj.adamw(1e-3, moments="8bits")
    with pytest.raises(UserError, match="offload=True: a CPU has no memory apart from the host's"):
        sj.fit(model(), data(), sj.adamw(1e-3, offload=True), steps=1)
    made = model()
    made.remat = "offload"
    with pytest.raises(UserError, match="remat=offload: a CPU has no memory apart from the host's"):
        sj.fit(made, data(), sj.adamw(1e-3), steps=1)
