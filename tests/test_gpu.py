"""What only a GPU shows: its kernels' numbers against this machine's CPU. Skipped where there is none.

JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpu.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import KINDS, data, model, token_sums

import specjax as sj
from specjax.generation.generate import generate_tokens
from specjax.hf.quantise import convert
from specjax.models import attention, cudnn
from specjax.train import chunks
from specjax.train.step import begin, make_train_step, merge, split

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU, and JAX_PLATFORMS=cuda,cpu")
B, T = 3, 512


def relative(found, wanted):
    """||found - wanted|| / ||wanted||, in float64."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@functools.cache
def on_cpu():
    return jax.local_devices(backend="cpu")[0]


def rows(documents):
    """Segments and positions: so many documents of unequal lengths with padding behind, fewer, and one alone."""
    rng, segments, positions = np.random.default_rng(documents), *np.zeros((2, B, T), np.int32)
    for row, (count, end) in enumerate([(documents, T - 37), (max(1, documents // 2), T), (1, T)]):
        bounds = [0, *np.sort(rng.choice(np.arange(1, end), count - 1, replace=False)), end]
        for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            segments[row, start:stop], positions[row, start:stop] = number + 1, np.arange(stop - start)
    return jnp.asarray(segments), jnp.asarray(positions)


@pytest.mark.rule(1)
@pytest.mark.parametrize(("dim", "kv_heads"), [(64, 2), (128, 2), (256, 8)])
@pytest.mark.parametrize("how", [{}, {"window": 100}, {"known": True}], ids=["mask", "window", "known documents"])
@pytest.mark.parametrize("documents", [1, 5, 40])
def test_cudnns_attention_is_the_plain_one(documents, how, dim, kv_heads):
    segments, positions = rows(documents)
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.normal(size=(B, T, h, dim)), jnp.bfloat16) for h in (8, kv_heads, kv_heads, 8))
    dy = dy * (segments > 0)[:, :, None, None].astype(dy.dtype)
    given = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
    given |= {"scale": dim**-0.5, "window": how.get("window")}

    def both(dtype, **more):
        def run(q, k, v):
            y, pull = jax.vjp(lambda *qkv: attention.attend(*qkv, **given, **more), q, k, v)
            return jnp.where((segments > 0)[:, :, None, None], y, 0), *pull(dy.astype(dtype))

        return jax.jit(run)(*(x.astype(dtype) for x in (q, k, v)))

    assert cudnn.takes(q, k, None)
    found = both(jnp.bfloat16, **({"documents": documents} if "known" in how else {}))
    with jax.set_mesh(sj.make_mesh(fsdp=1, devices=[on_cpu()])):
        q, k, v, dy, segments = jax.device_put((q, k, v, dy, segments), on_cpu())
        given |= {name: np.asarray(value) for name, value in given.items() if isinstance(value, jax.Array)}
        wanted = both(jnp.float32)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert relative(a, b) < 6e-3, name


@pytest.mark.rule(1)
@pytest.mark.parametrize("family", KINDS)
def test_float32_logits_are_those_of_the_cpu(family):
    made = model(family)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, made.config.vocab_size, (2, 250), np.int32)
    graph, state = nnx.split(made)
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    found = np.asarray(run(state, tokens))
    with jax.set_mesh(sj.make_mesh(fsdp=1, devices=[on_cpu()])):
        wanted = np.asarray(run(*jax.device_put((state, tokens), on_cpu())))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.rule(2)
@pytest.mark.parametrize("method", ["full", "lora", "nf4", "int8"])
def test_ten_float32_steps_are_those_of_the_cpu(method):
    made = model(hidden_size=64, intermediate_size=128)
    if method in ("nf4", "int8"):
        convert(made, method)
    if method != "full":
        sj.lora.inject(made, rank=4, alpha=8, targets="all-linear", seed=0)
    graph, trainable, frozen = split(made, sj.ALL if method == "full" else sj.LORA)
    batches = data(vocab_size=made.config.vocab_size, batch_size=4)
    optimizer = sj.adamw(3e-3, clip_norm=1.0)
    found = {}
    for name, device in (("gpu", jax.devices()[0]), ("cpu", on_cpu())):
        with jax.set_mesh(sj.make_mesh(fsdp=1, devices=[device])):
            step = jax.jit(make_train_step(graph, optimizer, documents=batches.most_documents))
            params, rest = jax.device_put((trainable, frozen), device)
            state = jax.device_put(begin(optimizer, params), device)
            found[name] = []
            for number in range(10):
                batch = {key: value[None] for key, value in batches.batch(number).items()}
                batch = jax.device_put(batch, device)
                state, metrics = step(state, rest, batch, np.int32(number))
                found[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(found["gpu"], found["cpu"], rtol=1e-5)


@pytest.mark.rule(2)
def test_the_loss_in_chunks_is_the_loss(monkeypatch):
    made = model()
    made.dtype = jnp.dtype("bfloat16")
    graph, params, _ = split(made, sj.ALL)
    batch = data(vocab_size=made.config.vocab_size, batch_size=4).batch(0)
    run = lambda p: token_sums(merge(graph, p), batch)["nll"]  # noqa: E731
    whole = jax.jit(jax.value_and_grad(run))(params)
    monkeypatch.setattr(chunks, "GPU_CHUNK_ELEMENTS", 2**14)
    parts = jax.jit(jax.value_and_grad(run))(params)
    assert relative(parts[0], whole[0]) < 1e-4
    for path in params:
        assert relative(parts[1][path], whole[1][path]) < 2e-2, path


@pytest.mark.rule(10)
def test_greedy_texts_are_those_of_the_cpu():
    made = model()
    prompts = [[3, 5, 7], [11, 13, 17, 19, 23]]
    found = generate_tokens(made, prompts, max_new_tokens=20)
    with jax.set_mesh(sj.make_mesh(fsdp=1, devices=[on_cpu()])):
        state = jax.device_put(nnx.state(made), on_cpu())
        nnx.update(made, state)
        assert generate_tokens(made, prompts, max_new_tokens=20) == found


@pytest.mark.parametrize("kept", ["opt_state", "attention"])
def test_what_waits_in_the_hosts_memory_changes_nothing(kept):
    found = []
    for there in (False, True):
        made = model()
        made.remat = "offload" if there and kept == "attention" else "none"
        optimizer = sj.adamw(1e-2, offload=there and kept == "opt_state")
        rows = data(vocab_size=made.config.vocab_size, batch_size=4)
        result = sj.fit(made, rows, optimizer, steps=5, tensorboard=False, eval_data={"train": rows})
        found.append(result.evals["train"]["loss"])
    np.testing.assert_allclose(*found, rtol=1e-6)
