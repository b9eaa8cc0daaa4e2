"""A quantised base: bitsandbytes' numbers, the same model as one of its dequantised floats, and few bytes of it."""

import contextlib
import functools
import hashlib
import re
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same_bits, data, model, on_devices, prompts, sizes, started, weights
from jax.sharding import NamedSharding
from run_fixtures import flags, specjax, write_base, write_data

import specjax as sj
from specjax import build, sharding
from specjax.errors import UserError
from specjax.hf import quantise as hq
from specjax.hf.config import from_hf
from specjax.hf.load import abstract
from specjax.models.quantised import DYNAMIC, NF4, QuantisedParam, dequantise, quantise
from specjax.train.step import begin, make_train_step, split

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
MOE = {"family": "mixtral", "num_hidden_layers": 2}
KINDS = ("nf4", "int8")
# bitsandbytes 0.50.2 on CPU, `quantize_4bit(compress_statistics=True, quant_type="nf4")` of `drawn(8, 64)`.
CODES = (
    "7b131edeab3d3564a676c569259b85c678759356478769db0b2283ca428c7d9a6961f68d8893d94b938799a2739205fc7f66b9757c24df19"
    "d65c54520ce8696139522b2c936898db563570776254706943afaa7aa39b49cb7ec616857dbd27d4e24d0b2277a66280a8dd2a45b997834a"
    "24b748d3183553783bd68d2356a81cc39454d369366d2786c75ac4ba74ba35d4168a5e58c70a84cc5216560725e7b9a86c2498e7792d6a42"
    "76a5f837d835bd4d4e6267aca375854f515c94ce27ac8b3d418735954a93748ab584a869137c58c495e8a485c3e8a5887920a2925ed75b1d"
    "43843c739ab53d6c1289ade57c98fd145f1a84b512e4d8019e65667454616b82"
)
ABSMAX, SCALE, OFFSET = "fa3ba336bf42d500", 0.010756980627775192, 0.05260515213012695
# The same of `drawn(128, 256)`; its `create_dynamic_map()`; its `int8_vectorwise_quant` of `drawn(24, 64)` in float16.
CODES_SHA = "a330f962bc01a6e784c9738e411c56dbbb64a679436a60c01bbccde2507562b7"
DYNAMIC_SHA = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
INT8_SHA = "d4d1e4ea6ef3cb0f867377dea43571d6bcdfa2a026fdcf2ac46df851b13f1b5f"


def drawn(out, inputs):
    return np.random.RandomState(out).randn(out, inputs).astype(np.float32) * np.float32(0.02)


def sha(array):
    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


@functools.cache
def converted(kind, floats, **changes):
    made = model(**SIZES | changes)
    hq.convert(made, kind)
    if floats:
        hq.dequantise_base(made)
    assert hq.is_quantised(made) == (not floats)
    return made


def quantised(kind, **changes):
    return nnx.clone(converted(kind, False, **changes))


def dequantised(kind, **changes):
    """The float model whose kernels are what the quantised ones stand for."""
    return nnx.clone(converted(kind, True, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("float") / "base"
    sj.export(model(**SIZES), None, out)
    return out


def train(of, steps=10, **options):
    """The losses of some steps of LoRA."""
    sj.lora.inject(of, rank=4, **options)
    graph, params, frozen = split(of, sj.LORA)
    optimizer, rows = sj.adamw(1e-2), data()
    state, found = started(optimizer, params), []
    step = jax.jit(make_train_step(graph, optimizer))
    for number in range(steps):
        batch = sharding.put_batch(rows.batch(number), sharding.mesh_of(next(iter(params.values()))), rows.batch_size)
        batch = {name: value[None] for name, value in batch.items()}
        state, metrics = step(state, frozen, batch, np.int32(number))
        found.append(float(metrics["loss"]))
    return np.array(found)


def test_the_tables_are_the_published_ones():
    ppf = NormalDist().inv_cdf  # the paper's appendix E: quantiles of a normal, 8 below zero and 9 above, and zero
    above = [ppf(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-ppf(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    np.testing.assert_allclose(NF4, np.sort([*above, *below, 0.0]) / max(above), atol=2e-7)
    assert sha(DYNAMIC) == DYNAMIC_SHA


@pytest.mark.rule(9)
def test_codes_and_statistics_are_bitsandbytes():
    found = quantise(drawn(8, 64), "nf4", 1)
    assert np.asarray(found["codes"]).tobytes().hex() == CODES
    assert np.asarray(found["absmax"]).tobytes().hex() == ABSMAX
    np.testing.assert_allclose(found["scale"], [SCALE], rtol=1e-6)
    np.testing.assert_allclose(found["offset"], OFFSET, rtol=1e-6)
    assert sha(quantise(drawn(128, 256), "nf4", 1)["codes"]) == CODES_SHA
    assert sha(quantise(drawn(24, 64).astype(np.float16), "int8", 1)["codes"]) == INT8_SHA


def test_what_codes_stand_for_is_the_definition():
    codes = np.frombuffer(bytes.fromhex(CODES), np.uint8)
    absmax = DYNAMIC[np.frombuffer(bytes.fromhex(ABSMAX), np.uint8)] * np.float32(SCALE) + np.float32(OFFSET)
    wanted = NF4[np.stack([codes >> 4, codes & 15], -1).reshape(8, 64)] * absmax[:, None]
    np.testing.assert_allclose(dequantise(quantise(drawn(8, 64), "nf4", 1), "nf4", 1), wanted, rtol=1e-6)
    # A stack is its tensors, each by itself, and inputs of two axes are one row.
    stack = np.stack([drawn(96, 64 * 7), 3 * drawn(96, 64 * 7)])
    leaves = quantise(stack.reshape(2, 96, 14, 32), "nf4", 2, lead=1)
    assert leaves["scale"].shape == (2, 3)
    both = dequantise(leaves, "nf4", 2, lead=1)
    for found, tensor in zip(both, stack, strict=True):
        alone = dequantise(quantise(tensor, "nf4", 1), "nf4", 1)
        np.testing.assert_allclose(found.reshape(96, -1), alone, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_and_reports_bits_and_errors(kind, folder):
    loaded, _ = sj.load(folder, dtype="float32", quantise=kind)
    report = loaded.origin.quantisation
    assert_same_bits(weights(loaded), weights(quantised(kind)))
    shapes = abstract(loaded.config, dtype="float32", param_dtype="float32", quantise=kind)
    wanted = {sharding.path_name(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(shapes))}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in weights(loaded).items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in wanted.items()
    }
    stored = sum(leaf.nbytes for leaf in weights(loaded, QuantisedParam).values())
    floats, rounded = weights(model(**SIZES)), weights(dequantised(kind))
    kernels = [path for path in floats if path.startswith("layers.") and path.endswith("kernel")]
    assert report.parameters == sum(floats[path].size for path in kernels)
    assert report.bits == 8 * stored / report.parameters <= (4.5 if kind == "nf4" else 8.5)
    assert {name for name, _ in report.relative} == {path.split(".")[-2] for path in kernels}
    for path in kernels:
        wrong = floats[path] - rounded[path]
        relative = np.linalg.norm(wrong) / np.linalg.norm(floats[path])
        np.testing.assert_allclose(dict(report.relative)[path.split(".")[-2]], relative, rtol=1e-4)
        np.testing.assert_allclose(dict(report.largest)[path.split(".")[-2]], np.abs(wrong).max(), rtol=1e-4)
        assert 0.05 < relative < 0.11 if kind == "nf4" else relative < 0.01


@pytest.mark.parametrize("changes", [{}, MOE], ids=["llama", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_floats(kind, changes):
    tokens = jnp.asarray(prompts(128, 2, 100))
    logits = quantised(kind, **changes)(tokens)
    np.testing.assert_allclose(logits, dequantised(kind, **changes)(tokens), atol=1e-5)
    assert np.abs(logits - model(**SIZES | changes)(tokens)).max() > 1e-3


@pytest.mark.rule(9)
def test_training_is_that_over_the_dequantised_floats():
    """DoRA and dropout, which take the weights in other places than LoRA does."""
    options = {"dora": True, "dropout": 0.1}
    base = quantised("nf4")
    before = weights(base, QuantisedParam)
    losses = train(base, **options)
    assert losses[-1] < losses[0] - 0.1
    assert_same_bits(weights(base, QuantisedParam), before)
    np.testing.assert_allclose(losses, train(dequantised("nf4"), **options), rtol=1e-5)


def test_training_on_a_mesh_is_that_over_the_dequantised_floats(folder):
    mesh = sj.make_mesh(data=2, fsdp=2, tensor=2)
    there, _ = sj.load(folder, mesh=mesh, dtype="float32", quantise="nf4")
    codes = there.layers[0].mlp.down_proj.kernel.codes[...]
    assert codes.addressable_shards[0].data.shape == (3, 64, 64)
    with jax.set_mesh(mesh):
        losses = train(there)
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(losses, train(dequantised("nf4")), rtol=1e-5)


def abstract_step(mesh=None, dtype="float32", rows=8, length=64, remat="none", **changes):
    """The lowered LoRA step of an nf4 base, from shapes alone."""
    config = from_hf(sizes(**SIZES | changes))

    def adapted(base):
        sj.lora.inject(base, rank=16)
        return base

    shapes = abstract(config, dtype=dtype, param_dtype=dtype, remat=remat, quantise="nf4")
    graph, *parts = nnx.split(nnx.eval_shape(adapted, shapes), sj.LORA, ...)

    def placed(path, leaf):
        axes = leaf.get_metadata("axes")
        place = None if mesh is None else sharding.named_sharding(mesh, axes, leaf.shape, sharding.path_name(path))
        return path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    trained, frozen = (dict(placed(*found) for found in nnx.to_flat_state(part)) for part in parts)
    place = None if mesh is None else NamedSharding(mesh, sharding.partition_spec((None, "batch", "length")))
    batch = {
        name: jax.ShapeDtypeStruct((1, rows, length), value.dtype, sharding=place)
        for name, value in data().batch(0).items()
    }
    optimizer = sj.adamw(1e-4)
    step = jax.jit(make_train_step(graph, optimizer), donate_argnums=0)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        state = jax.eval_shape(lambda trained: begin(optimizer, trained), trained)
        return step.lower(state, frozen, batch, jax.ShapeDtypeStruct((), np.int32)), frozen


@pytest.mark.rule(9)
@pytest.mark.parametrize("changes", [{}, MOE], ids=["llama", "mixtral"])
def test_the_floats_of_all_layers_are_never_there_together(changes):
    lowered, _ = abstract_step(**changes)
    compiled = lowered.compile().as_text()
    layers = (SIZES | changes)["num_hidden_layers"]
    assert re.search(rf"\bu8\[{layers},(4,)?256,64\]", compiled)  # the codes, as they were given
    kernels = (rf"{layers},(4,)?256,128", rf"{layers},(4,)?128,256", rf"{layers},4,32,128", rf"{layers},128,4,32")
    for kernel in kernels:
        assert not re.search(rf"\b(f32|bf16|s32)\[{kernel}\]", compiled), kernel
    assert not re.search(rf"\b\w+\[{layers},(4,)?(256|128),[24],64\]", compiled)  # nor of their blocks


def test_merging_and_export_take_the_dequantised_weights_only_where_they_are_chosen(tmp_path):
    tokens = jnp.asarray(prompts(128, 2, 50))
    made = quantised("nf4")
    with pytest.raises(UserError, match=r"base is quantised.*save the adapter"):
        sj.export(made, None, tmp_path / "none")
    train(made, steps=2)
    for name, leaf in nnx.to_flat_state(nnx.state(made, sj.LORA)):
        leaf[...] = leaf[...] + 0.05 * (name[-1] == "b")
    wanted, factors = made(tokens), weights(made, sj.LORA)
    sj.lora.save(made, tmp_path / "adapter")
    over_floats = model(**SIZES)
    sj.lora.load(over_floats, tmp_path / "adapter")
    assert_same_bits(weights(over_floats, sj.LORA), factors)
    with pytest.raises(UserError, match=r"base is quantised.*dequantise=True"):
        sj.lora.merge(made)
    sj.lora.merge(made, dequantise=True)
    np.testing.assert_allclose(made(tokens), wanted, atol=2e-5)
    sj.export(made, None, tmp_path / "merged")
    again, _ = sj.load(tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(again(tokens), made(tokens), atol=1e-6)
    plain = model(**SIZES)
    sj.lora.inject(plain, rank=2)
    with pytest.raises(UserError, match="base is not quantised"):
        sj.lora.merge(plain, dequantise=True)


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match=r"its 32 inputs are no multiple of nf4's blocks of 64"):
        quantised("nf4", hidden_size=32)
    with pytest.raises(UserError, match=r"absmax: its axis 'embed' of size 2 cannot be split 8 ways .* fsdp"):
        sharding.of_module(quantised("nf4"), sj.make_mesh(fsdp=8))
    with pytest.raises(UserError, match=r"base is quantised and can't train"):
        sj.fit(quantised("int8"), data(), sj.adamw(1e-3), steps=1, trainable=sj.ALL)


@on_devices(1)
def test_the_command_line_trains_over_it_generates_and_merges(tmp_path, capsys):
    base = write_base(tmp_path / "base", hidden_size=64, intermediate_size=64, attention=0.02)
    write_data(tmp_path / "data")
    run = tmp_path / "run"
    argv = flags(base, run, "lora", **{"model.quantise": "nf4", "lora.rank": 4, "steps": 3})
    assert specjax("train", *argv) == 0
    assert re.search(r"base weights in nf4: 4\.\d+ bits .* q_proj 0\.\d+", capsys.readouterr().out)
    assert specjax("generate", f"--model={run}", "--prompt=What?", "--max_new_tokens=4") == 0
    merge = ("export", f"--workdir={run}", f"--out={tmp_path / 'merged'}", "--merge")
    assert specjax(*merge) == 2
    assert "--dequantise" in capsys.readouterr().err
    assert specjax(*merge, "--dequantise") == 0
    trained, _ = build.load_run(run, "best", sj.make_mesh())
    merged, _ = sj.load(tmp_path / "merged", mesh=sj.make_mesh(), dtype="float32")
    tokens = jnp.asarray(prompts(300, 2, 50))
    np.testing.assert_allclose(merged(tokens), trained(tokens), atol=1e-4)
    assert specjax("train", *flags(base, tmp_path / "all", "full", **{"model.quantise": "nf4"})) == 2
    assert "what is quantised can't train" in capsys.readouterr().err
