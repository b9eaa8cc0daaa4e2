"""The gated delta rule by chunks is the rule token by token, also where documents begin within a chunk."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import assert_same_bits, contents, data, model, token_sums, torch_model
from safetensors.numpy import load_file, save_file

from specjax import sharding
from specjax.hf.export import export
from specjax.hf.load import load
from specjax.models import delta
from specjax.train.step import merge, split

B, K, V, HK, HV = 2, 2, 4, 8, 6


def tokens(length, *, seed=0, decay=0.2, alike=0.0):
    """Random tokens, their keys `alike` (0: at random, 1: all the same), and segments with padding around them."""
    rng = np.random.default_rng(seed)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    q, k = rng.normal(size=(2, B, length, K, HK))
    k = unit((1 - alike) * k + alike * np.ones(HK))
    segments = np.zeros((B, length), np.int32)
    for row in range(B):  # documents of one token to more than two chunks
        cuts = np.sort(rng.choice(np.arange(4, length - 3), 6, replace=False))
        first = 3 * row  # one row begins with a document, the other with padding
        for number, (a, b) in enumerate(zip([first, *cuts], [*cuts, length - 3], strict=True), 1):
            segments[row, a:b] = number
    real = segments[..., None] > 0
    g = -decay * rng.random((B, length, V)) * real
    beta = rng.random((B, length, V)) ** (1 - alike) * real
    x = (unit(q) * HK**-0.5, k, rng.normal(size=(B, length, V, HV)), g, beta)
    return delta.Tokens(*(jnp.asarray(one, jnp.float32) for one in x)), jnp.asarray(segments)


def one_by_one(x, state, segments):
    """The rule as the module's head has it, in float64: a document behind another starts with a state of zeros."""
    q, k, v, g, beta = (np.asarray(one, np.float64) for one in x)
    q, k = (np.repeat(one, V // K, axis=2) for one in (q, k))
    state, segments = np.array(state, np.float64), np.asarray(segments)
    out = np.zeros_like(v)
    for row in range(B):
        for t in range(v.shape[1]):
            if t and segments[row, t] and segments[row, t] != segments[row, t - 1]:
                state[row] = 0
            for head in range(V):
                s = state[row, head] * np.exp(g[row, t, head])
                new = beta[row, t, head] * (v[row, t, head] - s.T @ k[row, t, head])
                s = s + np.outer(k[row, t, head], new)
                out[row, t, head], state[row, head] = s.T @ q[row, t, head], s
    return out, state


@pytest.mark.parametrize("length", [150, 64, 20])
@pytest.mark.parametrize("kind", [{}, {"decay": 20.0}, {"decay": 0.0, "alike": 1.0}], ids=["", "forgets", "repeats"])
def test_chunks_are_the_rule_token_by_token(length, kind):
    x, segments = tokens(length, **kind)
    before = jnp.asarray(np.random.default_rng(1).normal(size=(B, V, HK, HV)), jnp.float32)
    wanted, end = one_by_one(x, before, segments)
    found, state = jax.jit(delta.delta_rule)(x, before, delta.starts(segments))
    assert np.abs(wanted).max() > 0.5 and found.dtype == state.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(state, end, rtol=0, atol=2e-5)


def test_spans_go_on_from_each_other_in_values_and_gradients(monkeypatch):
    x, segments = tokens(300)
    begins, before = delta.starts(segments), jnp.ones((B, V, HK, HV))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=x.v.shape), jnp.float32)

    def loss(x, before):
        out, state = delta.delta_rule(x, before, begins)
        return jnp.sum(out * weights) + jnp.sum(state**2)

    def plain(x, before):
        def step(state, at):
            token, begins = at
            state = jnp.where(begins[:, None, None, None], 0.0, state)
            out, state = delta.one_step(jax.tree.map(lambda one: one[:, None], token), state)
            return state, out[:, 0]

        by_token = jax.tree.map(lambda one: jnp.moveaxis(one, 1, 0), (x, begins))
        state, out = jax.lax.scan(step, before, by_token)
        return jnp.sum(jnp.moveaxis(out, 0, 1) * weights) + jnp.sum(state**2)

    wanted = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, before)
    for span in (16, 2):  # one span, three
        monkeypatch.setattr(delta, "SPAN", span)
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, before)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_a_text_goes_on_from_the_state_that_its_beginning_left():
    x, _ = tokens(90)
    begins, state = jnp.zeros((B, 90), bool), jnp.zeros((B, V, HK, HV))
    whole, end = delta.delta_rule(x, state, begins)
    parts = []
    for a, b in ((0, 70), (70, 89), (89, 90)):
        part = jax.tree.map(lambda one, a=a, b=b: one[:, a:b], x)
        out, state = delta.delta_rule(part, state, begins[:, a:b]) if b - a > 1 else delta.one_step(part, state)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(state, end, rtol=0, atol=1e-5)


def test_the_convolution_sees_no_other_document():
    rng = np.random.default_rng(0)
    x, taps = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 3 + 12, 5), (5, 4)))
    segments = jnp.array([[1] * 5 + [2] * 2 + [3] * 5], jnp.int32)
    found = delta.convolve(x, taps, segments)[0]
    for a, b in ((0, 5), (5, 7), (7, 12)):
        alone = x[:, 3 + a : 3 + b]
        before = x[:, :3] if a == 0 else jnp.zeros((1, 3, 5))
        wanted = delta.convolve(jnp.concatenate([before, alone], 1), taps, jnp.ones((1, b - a), jnp.int32))
        np.testing.assert_allclose(found[a:b], wanted[0], rtol=0, atol=1e-6)


def test_the_inverse_is_exact_where_a_text_repeats_itself():
    """All keys the same, nothing forgotten: powers of the matrix would be as large as 10^17."""
    lower = jnp.tril(jnp.ones((64, 64)), -1)
    np.testing.assert_array_equal(delta._inverse(lower) @ (lower + jnp.eye(64)), jnp.eye(64))


def test_rematerialised_layers_have_the_gradients_of_kept_ones():
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    kept, batch = model("qwen3_5_text", **layers), data(batch_size=2).batch(0)

    def gradient(of):
        graph, params, rest = split(of, ...)
        return jax.jit(jax.grad(lambda params: token_sums(merge(graph, params, rest), batch)["nll"]))(params)

    wanted = gradient(kept)
    kept.remat = "full"
    for path, value in gradient(kept).items():
        assert np.abs(wanted[path]).max() > 0, path
        np.testing.assert_allclose(value, wanted[path], rtol=0, atol=1e-4 * np.abs(wanted[path]).max(), err_msg=path)


def test_padding_changes_no_state():
    made, size = model("qwen3_5_text"), 16
    tokens = np.random.default_rng(0).integers(0, 128, (2, size)).astype(np.int32)
    positions = np.broadcast_to(np.arange(size, dtype=np.int32), (2, size))
    real = np.zeros((2, size), np.int32)
    real[0, :9], real[1, 7:9] = 1, 1  # padding behind a text, and on both sides of one
    tokens, positions, real = map(jnp.asarray, (tokens, positions, real))
    caches = []
    for length in (size, 9):
        given = (made.empty_cache(2, size), positions, real, 0)
        caches.append(made.extend(tokens[:, :length], positions[:, :length], *given)[1])
    (padded, _), (alone, _) = caches
    for found, wanted in zip(padded, alone, strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    _, (again, _) = made.extend(tokens[:, :3], positions[:, :3], caches[1], positions, 0 * real, 0)
    for found, wanted in zip(again, alone, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5"])
def test_published_files_come_back_with_the_bytes_of_their_two_dtypes(family, tmp_path):
    """A_log and the heads' norm are float32 there, all else bfloat16; heads of further tokens are kept."""
    torch_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    (file,) = (tmp_path / "in").glob("*.safetensors")
    rng, held = np.random.default_rng(0), load_file(file)
    for name in held:
        if name.endswith(("A_log", "linear_attn.norm.weight")):
            held[name] = rng.normal(size=held[name].shape).astype(np.float32)
    held["mtp.fc.weight"] = np.ones((4, 8), ml_dtypes.bfloat16)
    save_file(held, file, {"format": "pt"})
    for dtype in ("bfloat16", "float32"):
        made, _ = load(tmp_path / "in", dtype=dtype)
        export(made, None, tmp_path / dtype)
        assert_same_bits(contents(tmp_path / dtype), held)
    export(made, None, tmp_path / "wide", dtype="float32")
    assert contents(tmp_path / "wide")["mtp.fc.weight"].dtype == held["mtp.fc.weight"].dtype
    assert len({value.dtype for name, value in contents(tmp_path / "wide").items() if "layers" in name}) == 1
    # A config.json that says no dtype has float32, and an export in it rounds nothing to what the file had.
    path = tmp_path / "in" / "config.json"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"dtype"' not in line))
    save_file({name: value.astype(ml_dtypes.bfloat16) for name, value in held.items()}, file, {"format": "pt"})
    export(load(tmp_path / "in", dtype="float32")[0], None, tmp_path / "silent", dtype="float32")
    of_layers = {value.dtype for name, value in contents(tmp_path / "silent").items() if ".layers." in name}
    assert of_layers == {np.dtype(np.float32)}


def test_every_product_is_float32_where_that_must_be_asked_for(monkeypatch):
    """Those of the backward pass too, which is traced where the rule's own context has ended."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    x, segments = tokens(70)
    state = jnp.zeros((B, V, HK, HV), jnp.float32)

    def total(x):
        return jnp.sum(delta.delta_rule(x, state, delta.starts(segments))[0])

    text = str(jax.make_jaxpr(jax.grad(total))(x))
    assert text.count("= dot_general[") > 10
    assert text.count("Precision.HIGHEST") == 2 * text.count("= dot_general[")
