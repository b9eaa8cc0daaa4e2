"""Attention's paths against the plain one: values and gradients."""

import importlib
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax import sharding
from specjax.models import attention, cudnn, splash

B, T, N, K, H = 2, 300, 4, 2, 32
MESHES = {"one device": None, "fsdp 2 x tensor 2 x context 2": {"fsdp": 2, "tensor": 2, "context": 2}}


@pytest.fixture(scope="module")
def inputs():
    """Queries, keys, values, the output's gradient; a packed row with padding and a whole one."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K, N))
    segments, positions = np.zeros((2, B, T), np.int32)
    segments[0, :120], segments[0, 120:290], segments[1] = 1, 2, 1
    positions[0, :120], positions[0, 120:290], positions[1] = np.arange(120), np.arange(170), np.arange(T)
    return (q, k, v), dy * (segments > 0)[:, :, None, None], jnp.asarray(segments), jnp.asarray(positions)


def both(function, qkv, dy, mesh=None):
    """(outputs, gradients) of sum(function(q, k, v) dy)."""

    def loss(qkv):
        y = function(*qkv)
        return jnp.sum(y * dy), y

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if mesh is None:
        (_, y), gradients = compiled(qkv)
    else:
        with jax.set_mesh(sj.make_mesh(**mesh)):
            (_, y), gradients = compiled(qkv)
    return y * (dy != 0), gradients


def plain(inputs, **how):
    _, _, segments, positions = inputs
    where = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
    return lambda q, k, v: attention.attend(q, k, v, scale=0.3, **where, **how)


def by_definition(inputs, *, window=None, softcap=None, sinks=None):
    """All scores at once, and JAX's own gradients of them."""
    _, _, segments, positions = inputs
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (distance >= 0) & (segments[:, :, None] == segments[:, None, :]) & (distance < (window or T))

    def attend(q, k, v):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * 0.3
        scores = scores if softcap is None else jnp.tanh(scores / softcap) * softcap
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        if sinks is not None:  # a key of its own for every query of a head
            column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, column], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :T]
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    return attend


@pytest.mark.rule(1)
@pytest.mark.parametrize("pieces", [1, 3, 4])
@pytest.mark.parametrize("how", [{}, {"window": 50}, {"softcap": 5.0}], ids=["all", "window", "soft cap"])
def test_the_plain_attention_and_its_gradients_are_the_definition(inputs, monkeypatch, how, pieces):
    qkv, dy, *_ = inputs
    monkeypatch.setattr(attention, "PIECES", pieces)
    found, wanted = both(plain(inputs, **how), qkv, dy), both(by_definition(inputs, **how), qkv, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, wanted)


@pytest.mark.rule(1)
def test_no_key_behind_a_piece_of_queries_is_looked_at(inputs, monkeypatch):
    qkv, dy, *_ = inputs
    text = {}
    for pieces in (1, 4):
        monkeypatch.setattr(attention, "PIECES", pieces)
        text[pieces] = jax.jit(plain(inputs)).lower(*qkv).as_text()
    assert f"{T}x{T}x" in text[1] and f"{T}x{T}x" not in text[4]


@pytest.mark.rule(1)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("how", [{}, {"window": 50}, {"softcap": 5.0}], ids=["all", "window", "soft cap"])
def test_the_splash_kernel_equals_the_plain_attention(inputs, how, mesh):
    qkv, dy, segments, _ = inputs
    given = {"window": None, "softcap": None} | how
    kernel = lambda q, k, v: splash.attend(  # noqa: E731
        q, k, v, q_segments=segments, k_segments=segments, scale=0.3, interpret=True, **given
    )
    found, wanted = both(kernel, qkv, dy, mesh), both(plain(inputs, **how), qkv, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, wanted)


def test_sinks_take_weight_from_the_keys_in_either_implementation(inputs):
    qkv, dy, segments, _ = inputs
    sinks = jnp.linspace(-1.0, 2.0, N)
    given = {"q_segments": segments, "k_segments": segments, "scale": 0.3, "window": 50, "softcap": None}
    wanted = both(lambda *qkvs: by_definition(inputs, window=50, sinks=qkvs[3])(*qkvs[:3]), (*qkv, sinks), dy)
    kernel = lambda q, k, v, s: splash.attend(q, k, v, sinks=s, interpret=True, **given)  # noqa: E731
    ours = lambda *x: plain(inputs, window=50, sinks=x[3])(*x[:3])  # noqa: E731
    for function, mesh in ((ours, None), (kernel, list(MESHES.values())[-1])):
        found = both(function, (*qkv, sinks), dy, mesh)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), found, wanted)


@pytest.mark.rule(1)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("size", [64, 100, 37])
def test_chunks_of_queries_equal_all_at_once(inputs, monkeypatch, size, mesh):
    qkv, dy, *_ = inputs
    wanted = both(plain(inputs, window=50), qkv, dy)
    monkeypatch.setattr(attention, "QUERY_CHUNK", size)
    found = both(plain(inputs, window=50), qkv, dy, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, wanted)


def test_a_window_picked_inside_a_scan_is_the_window(inputs):
    qkv, dy, *_ = inputs
    for which, width in enumerate((None, 50)):
        one = attention.OneOf((None, 50), jnp.int32(which))
        found, wanted = both(plain(inputs, window=one), qkv, dy), both(plain(inputs, window=width), qkv, dy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, wanted)


@pytest.mark.rule(1)
def test_on_a_tpu_the_kernel_takes_over_with_the_window_of_each_layer(inputs, monkeypatch):
    qkv, dy, *_ = inputs
    wanted = [both(plain(inputs, window=width), qkv, dy) for width in (None, 50)]
    kernel = splash.attend
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "attend", lambda *qkv, **how: kernel(*qkv, **how, interpret=True))
    for which, expected in enumerate(wanted):
        found = both(plain(inputs, window=attention.OneOf((None, 50), jnp.int32(which))), qkv, dy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, expected)


@pytest.mark.rule(1)
def test_on_a_gpu_cudnn_takes_over_with_the_window_of_each_layer(inputs, monkeypatch):
    qkv, dy, *_ = inputs
    wanted = [both(plain(inputs, window=width), qkv, dy) for width in (None, 50)]
    kernel, asked = cudnn.attend, []

    def on_xla(*qkv, **how):
        asked.append(how["documents"])
        return kernel(*qkv, **how, implementation="xla")

    monkeypatch.setattr(cudnn, "takes", lambda *_: True)
    monkeypatch.setattr(cudnn, "attend", on_xla)
    for which, expected in enumerate(wanted):
        one = attention.OneOf((None, 50), jnp.int32(which))
        found = both(plain(inputs, window=one, documents=4), qkv, dy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, expected)
    assert set(asked) == {None}
    plain(inputs, documents=4)(*qkv)
    assert asked[-1] == 4


@pytest.mark.parametrize("how", [{}, {"window": 50}])
def test_what_cudnn_is_asked_equals_the_plain_attention(inputs, how):
    """The kernel itself runs on GPUs alone; here XLA does what it is asked for."""
    qkv, dy, segments, _ = inputs
    given = {"segments": segments, "scale": 0.3, "implementation": "xla", "window": None} | how
    ours = lambda q, k, v: cudnn.attend(q, k, v, **given)  # noqa: E731
    found, wanted = both(ours, qkv, dy), both(plain(inputs, **how), qkv, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, wanted)


def test_one_document_a_row_needs_no_mask(inputs):
    (q, k, v), dy, segments, positions = inputs
    one = (segments == 1).astype(np.int32)
    dy = dy * one[:, :, None, None]
    asked = {"segments": one, "scale": 0.3, "implementation": "xla", "documents": 1, "window": None}
    found = both(lambda q, k, v: cudnn.attend(q, k, v, **asked), (q, k, v), dy)
    wanted = both(plain(((q, k, v), dy, one, positions)), (q, k, v), dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, wanted)


def test_where_documents_lie_is_told_row_by_row():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], jnp.int32)
    starts, sizes = cudnn._extents(segments, 4)
    lie = [
        [(at, size) for at, size in zip(row, each, strict=False) if size > 0]
        for row, each in zip(starts.tolist(), sizes.tolist(), strict=True)
    ]
    assert lie == [[(0, 2), (2, 3), (5, 1)], [(0, 1), (1, 1), (2, 4)], [(0, 6)], [(0, 6)]]
    for row, each in zip(starts.tolist(), sizes.tolist(), strict=True):  # and nothing else
        used = sum(size > 0 for size in each)
        assert row[used:] == [-1] * (6 - used) and each[used:] == [-1] * (5 - used)


def test_cudnn_is_told_of_documents_where_they_are_few_and_it_is_new(monkeypatch):
    asked = []
    q, segments = jnp.zeros((1, 64, 4, 32), jnp.bfloat16), jnp.ones((1, 64), jnp.int32)
    monkeypatch.setattr(cudnn, "_generation", lambda: 9)
    monkeypatch.setattr(cudnn, "_packed", lambda q, *rest: asked.append(rest[-1]) or q)
    for documents in (None, 1, 2, 63, 64):
        how = {"segments": segments, "scale": 1.0, "documents": documents, "implementation": "xla"}
        cudnn.attend(q, q, q, window=None, **how)
        cudnn.attend(q, q, q, window=10, **how)
        with jax.set_mesh(sj.make_mesh(fsdp=8)):  # of how several devices share them nothing was seen
            cudnn.attend(q, q, q, window=None, **how)
    assert asked == [2, 63]
    monkeypatch.setattr(cudnn, "_generation", lambda: 8)
    assert not cudnn._packed_is_known()


def test_the_kernel_for_packed_rows_is_where_it_is_looked_for():
    beneath = importlib.import_module(cudnn.PACKED)
    taken = inspect.signature(beneath.dot_product_attention).parameters
    assert {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"} <= set(taken)
    assert beneath.MaskType.CAUSAL


def test_cudnn_is_asked_on_a_gpu_for_what_it_knows(monkeypatch):
    q = jnp.zeros((1, 64, 4, 32), jnp.bfloat16)
    assert not cudnn.takes(q, q, None)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert not cudnn.takes(q, q, None)  # compiled for, and not here
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not cudnn.takes(q, q, None)  # no GPU of NVIDIA's
    for capability, widest in (("7.5", 0), ("8.0", 128), ("9.0", 256)):  # T4, A100, H100
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        for dim in (32, 128, 256):
            wide = jnp.zeros((1, 64, 4, dim), jnp.bfloat16)
            assert cudnn.takes(wide, wide, None) == (dim <= widest)
    assert not cudnn.takes(q, q, 30.0)
    assert not cudnn.takes(q.astype(jnp.float32), q, None)
    assert not cudnn.takes(q[:, :63], q[:, :63], None)
    assert not cudnn.takes(q[:, :8], q, None)
