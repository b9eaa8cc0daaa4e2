"""Mixture of experts against transformers' blocks, and its layout over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import PROMPT
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import sharding
from specjax.lora.variants import ExpertLoRA
from specjax.models.grouped import _kernels_in_blocks, _kernels_ragged, _rows_in_blocks, _rows_ragged, grouped_matmul
from specjax.models.moe import MoE, load_balancing_loss
from specjax.models.stack import Member, Stack

SIZES = {"embed_dim": 32, "mlp_dim": 24, "num_experts": 8, "experts_per_token": 2, "normalise": True}


def torch_block(family="mixtral", seed=0, dtype=torch.float32, **changes):
    """A random sparse block of transformers; the wide router makes its choices far from uniform."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    s = SIZES | changes
    shared = {"hidden_size": s["embed_dim"], "num_experts_per_tok": s["experts_per_token"]}
    shared["experts_implementation"] = "eager"
    if family == "mixtral":
        config = MixtralConfig(intermediate_size=s["mlp_dim"], num_local_experts=s["num_experts"], **shared)
        block = MixtralSparseMoeBlock(config)
    else:
        config = Qwen3MoeConfig(
            moe_intermediate_size=s["mlp_dim"], num_experts=s["num_experts"], norm_topk_prob=s["normalise"], **shared
        )
        block = Qwen3MoeSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in block.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return block.to(dtype)


def random_moe(layers=None, seed=0, **changes):
    return MoE(**SIZES | changes, layers=layers, rngs=nnx.Rngs(seed))


def to_numpy(tensor):
    return tensor.detach().float().numpy().copy()


def kernels(block, values=None):
    """Our names -> arrays, of a torch block's weights or of their gradients."""
    values = values or (lambda weight: weight)
    gate_up, down = to_numpy(values(block.experts.gate_up_proj)), to_numpy(values(block.experts.down_proj))
    gate, up = np.split(gate_up, 2, axis=1)
    return {
        "gate.kernel": to_numpy(values(block.gate.weight)),
        "experts.gate_proj.kernel": gate,
        "experts.up_proj.kernel": up,
        "experts.down_proj.kernel": down,
    }


def set_kernels(moe, values, dtype=jnp.float32):
    for path, leaf in nnx.to_flat_state(nnx.state(moe, nnx.Param)):
        array = values[sharding.path_name(path)]
        assert array.shape == leaf.shape, path
        leaf[...] = jnp.asarray(array, dtype)
    return moe


def ours(block, family="mixtral", dtype=jnp.float32, **changes):
    return set_kernels(random_moe(round_weights=family == "qwen3", **changes), kernels(block), dtype)


def forward_and_gradients(moe, x, dy, valid=None, aux=0.0):
    """(y, stats, gradient of sum(y dy) + aux * balancing loss by dotted name, that of x)."""
    graph, state = nnx.split(moe)

    def loss(state, x):
        y, stats = nnx.merge(graph, state)(x, valid)
        return jnp.sum(y * dy) + aux * load_balancing_loss(stats), (y, stats)

    (dstate, dx), (y, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(state, x)
    return y, stats, {sharding.path_name(path): leaf[...] for path, leaf in nnx.to_flat_state(dstate)}, dx


def tokens(seed=1, rows=1, length=PROMPT, size=32):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, rows, length, size)).astype(np.float32)
    return x, dy


def close(ours, theirs, tolerance=1e-4, name=""):
    """Within `tolerance` of the largest value, or of 1."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, np.abs(theirs).max()), err_msg=name)


def assert_same_as_torch(block, moe, x, dy):
    tx = torch.tensor(x, requires_grad=True)
    ty = block(tx)
    (ty * torch.tensor(dy)).sum().backward()
    y, stats, gradients, dx = forward_and_gradients(moe, x, dy)
    close(y, to_numpy(ty), name="y")
    close(dx, to_numpy(tx.grad), name="x")
    for name, gradient in kernels(block, lambda weight: weight.grad).items():
        close(gradients[name], gradient, name=name)
    return stats


@pytest.mark.rule(1)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("mixtral", {"experts_per_token": 8}),
        ("qwen3", {"experts_per_token": 3}),
        ("qwen3", {"experts_per_token": 3, "normalise": False}),
        ("qwen3", {"experts_per_token": 1, "normalise": False}),
    ],
)
def test_block_and_its_gradients_equal_those_of_transformers(family, changes):
    block = torch_block(family, **changes)
    assert_same_as_torch(block, ours(block, family, **changes), *tokens())


def test_experts_without_a_token_and_with_nearly_all_are_no_special_case():
    block, (x, dy) = torch_block(), tokens()
    x[..., 0] = 1.0
    with torch.no_grad():
        block.gate.weight[:, 0] = torch.tensor([30.0, 0, -60, 0, -60, 0, 0, 0])
    stats = assert_same_as_torch(block, ours(block), x, dy)
    assert stats["chosen"][0] == PROMPT and stats["chosen"][2] == stats["chosen"][4] == 0
    assert jnp.sum(stats["chosen"]) == 2 * PROMPT  # none is dropped


def test_of_equally_probable_experts_the_lower_ones_are_chosen():
    block, (x, _) = torch_block(experts_per_token=3), tokens()
    with torch.no_grad():
        block.gate.weight[:] = 0
        index = torch.arange(3).expand(PROMPT, 3).contiguous()
        wanted = block.experts(torch.tensor(x[0]), index, torch.full((PROMPT, 3), 1 / 3))
    y, stats = ours(block, experts_per_token=3)(jnp.asarray(x))
    close(y[0], to_numpy(wanted))
    np.testing.assert_array_equal(stats["chosen"], [PROMPT] * 3 + [0] * 5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_bfloat16_is_within_two_percent(family):
    block = torch_block(family, dtype=torch.bfloat16, experts_per_token=4)
    moe = ours(block, family, jnp.bfloat16, experts_per_token=4)
    x = jnp.asarray(tokens()[0], jnp.bfloat16)
    with torch.no_grad():
        wanted = to_numpy(block(torch.tensor(np.asarray(x, np.float32)).bfloat16()))
    y = moe(x)[0]
    assert y.dtype == jnp.bfloat16
    y = np.asarray(y, np.float32)
    # Two equal logits in bfloat16 may go to either expert: such tokens aside, and few.
    alike = np.linalg.norm(y - wanted, axis=-1) < 0.02 * np.linalg.norm(wanted, axis=-1)
    assert alike.mean() > 0.97


@pytest.mark.parametrize("padded", [False, True])
def test_balancing_loss_and_its_gradient_equal_those_of_transformers(padded):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng, layers = np.random.default_rng(5), 3
    x = rng.normal(size=(2, 101, 32)).astype(np.float32)
    valid = rng.random((2, 101)) > 0.3 if padded else np.ones((2, 101), bool)
    gates = rng.normal(size=(layers, 8, 32)).astype(np.float32) * 0.3
    theirs = torch.tensor(gates, requires_grad=True)
    logits = tuple(torch.tensor(x).reshape(-1, 32) @ gate.T for gate in theirs)
    wanted = load_balancing_loss_func(logits, 8, 2, torch.tensor(valid).long() if padded else None)
    wanted.backward()

    moe = random_moe(layers=layers)
    moe.gate.kernel[...] = jnp.asarray(gates)
    graph, state = nnx.split(moe)

    @jax.jit
    def loss_of(state, x, valid):
        # As `Decoder` does: a scan over the layers, whose statistics come out stacked.
        _, stats = jax.lax.scan(lambda _, layer: (None, nnx.merge(graph, layer)(x, valid)[1]), None, state)
        return load_balancing_loss(stats), stats

    (found, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(state, x, valid)
    assert stats["chosen"].shape == (layers, 8) and stats["tokens"].shape == (layers,)
    np.testing.assert_allclose(found, wanted.item(), rtol=1e-6)
    close(gradient["gate"]["kernel"][...], to_numpy(theirs.grad), 1e-6)
    # The sums of two batches are those of one.
    halves = [loss_of(state, x[i : i + 1], valid[i : i + 1])[1] for i in range(2)]
    np.testing.assert_allclose(load_balancing_loss(jax.tree.map(jnp.add, *halves)), found, rtol=1e-6)


def test_padding_changes_nothing_and_is_not_counted():
    moe, (x, dy) = random_moe(), tokens(rows=2, length=61)
    valid = np.random.default_rng(2).random((2, 61)) > 0.4
    dy[~valid] = 0
    other = np.where(valid[..., None], x, 7.0).astype(np.float32)
    a, b = (forward_and_gradients(moe, each, dy, jnp.asarray(valid), aux=1.0) for each in (x, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.any(a[0][~valid]) and not np.any(a[3][~valid])
    assert a[1]["tokens"] == valid.sum() and jnp.sum(a[1]["chosen"]) == 2 * valid.sum()
    alone = forward_and_gradients(moe, x, dy)
    np.testing.assert_allclose(a[0][valid], alone[0][valid], atol=1e-6)


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_blocks_of_any_sizes_equal_those_of_transformers(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    changes = {"embed_dim": draw(1, 24), "mlp_dim": draw(1, 24), "num_experts": draw(1, 9)}
    changes |= {"experts_per_token": draw(1, changes["num_experts"]), "normalise": data.draw(st.booleans())}
    block = torch_block("qwen3", seed=draw(0, 9), **changes)
    x, dy = tokens(rows=draw(1, 3), length=draw(1, 50), size=changes["embed_dim"])
    assert_same_as_torch(block, ours(block, "qwen3", **changes), x, dy)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 6), st.integers(1, 6))
def test_grouped_products_equal_plain_ones(sizes, beyond, inputs, outputs):
    rows = max(1, sum(sizes) + beyond)
    rng = np.random.default_rng(rows)
    x, kernel = rng.normal(size=(rows, inputs)), rng.normal(size=(len(sizes), outputs, inputs))
    dy = rng.normal(size=(rows, outputs))
    y, dx, dkernel = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(kernel)
    start = 0
    for group, size in enumerate(sizes):
        mine = slice(start, start := start + size)
        y[mine], dx[mine], dkernel[group] = x[mine] @ kernel[group].T, dy[mine] @ kernel[group], dy[mine].T @ x[mine]
    x, kernel, dy = (jnp.asarray(array, jnp.float32) for array in (x, kernel, dy))
    sizes = jnp.asarray(sizes, jnp.int32)

    @jax.jit
    def all_of_them(x, kernel, dy):
        found, backward = jax.vjp(lambda x, kernel: grouped_matmul(x, kernel, sizes), x, kernel)
        on_tpu = _rows_ragged(2, x, kernel, sizes), _rows_ragged(1, dy, kernel, sizes), _kernels_ragged(0, dy, x, sizes)
        return (found, *backward(dy)), on_tpu

    for found in all_of_them(x, kernel, dy):
        for ours, theirs in zip(found, (y, dx, dkernel), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_grouped_products_accumulate_in_float32():
    rng = np.random.default_rng(0)
    sizes = jnp.asarray([300, 0, 211], jnp.int32)
    x, kernel, dy = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((511, 64), (3, 8, 64), (511, 8)))
    wide = [array.astype(jnp.float32) for array in (x, kernel, dy)]
    for found, wanted in (
        (_rows_in_blocks(2, x, kernel, sizes), _rows_in_blocks(2, wide[0], wide[1], sizes)),
        (_kernels_in_blocks(0, dy, x, sizes), _kernels_in_blocks(0, wide[2], wide[0], sizes)),
    ):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(found), wanted, rtol=2**-8, atol=1e-3)  # rounded once


def compiled_gradient(moe, x, of):
    graph, state = nnx.split(moe)

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x)[0] ** 2)

    return jax.jit(jax.grad(loss, of)).lower(state, x).compile().as_text()


def elements(shape):
    return int(np.prod([int(n) for n in shape.split(",")]))


@pytest.mark.rule(11)
def test_no_buffer_has_tokens_times_experts_times_features():
    moe = random_moe(num_experts=16)
    x = tokens(rows=2, length=256)[0]
    text = compiled_gradient(moe, x, (0, 1))
    buffers = re.findall(r"(?:f32|bf16|s32|pred|f16)\[([\d,]+)\]", text)
    largest = max(map(elements, buffers))
    assert largest >= 512 * 2 * 32  # one row a chosen expert: the expression found them
    assert largest < 512 * 16 * 24 / 2


def test_frozen_experts_have_no_gradient_in_the_program():
    moe, x = random_moe(), tokens(length=64)[0]
    loops = [compiled_gradient(moe, x, of).count(" while(") for of in ((0, 1), 1)]
    assert loops[0] - loops[1] == 3  # those of the three kernels


def with_lora(moe, rank=3):
    """Puts random factors beside each of the experts' maps."""
    rng = np.random.default_rng(8)
    for linear in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj):
        _, out, into = (None if name == "embed" else name for name in linear.kernel.get_metadata("axes"))
        experts, outputs, inputs = linear.kernel.shape
        a = jnp.asarray(rng.normal(size=(experts, rank, inputs)), jnp.float32)
        b = jnp.asarray(rng.normal(size=(experts, outputs, rank)), jnp.float32)
        factors = {
            "a": nnx.LoRAParam(a[None], axes=("adapter", "expert", "lora_rank", into)),
            "b": nnx.LoRAParam(b[None], axes=("adapter", "expert", out, "lora_rank")),
        }
        member = Member(0, (rank,), (0.5 * rank,), 0.0, False)
        linear.updates["experts"] = Stack(ExpertLoRA(), factors, (member,), 0.5)
        linear.active = 0
    return moe


def test_lora_of_each_expert_equals_the_merged_kernel():
    moe, x = with_lora(random_moe()), jnp.asarray(tokens(length=61)[0])
    found = moe(x)[0]
    for linear in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj):
        stack = linear.updates["experts"]
        linear.kernel[...] += 0.5 * jnp.einsum("eri,eor->eoi", stack.a[0], stack.b[0])
        linear.active = None
    close(found, moe(x)[0])


@pytest.fixture(scope="module")
def on_one_device():
    """rows -> (inputs, forward and gradients) of a block with LoRA, on one device."""
    moe, made = with_lora(random_moe(embed_dim=16)), {}
    for rows in (8, 3):
        x, dy = (part[..., :16] for part in tokens(rows=rows, length=24))
        valid = np.random.default_rng(4).random((rows, 24)) > 0.2
        made[rows] = (x, dy, valid), forward_and_gradients(moe, x, dy, jnp.asarray(valid), aux=1.0)
    return moe, made


MESHES = {
    "expert 4": {"fsdp": 1, "expert": 4},
    "fsdp 2 x tensor 2 x expert 2": {"fsdp": 2, "tensor": 2, "expert": 2},
    "data 2 x expert 4": {"data": 2, "fsdp": 1, "expert": 4},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
}


@pytest.mark.rule(2)
@pytest.mark.parametrize("rows", [8, 3])  # 3 rows divide over no mesh
@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_computes_what_one_device_does(on_one_device, sizes, rows):
    moe, made = on_one_device
    (x, dy, valid), wanted = made[rows]
    count = int(np.prod(list(MESHES[sizes].values())))
    mesh = sharding.make_mesh(**MESHES[sizes], devices=jax.devices()[:count])
    places = sharding.of_module(moe, mesh)
    graph, state = nnx.split(moe)
    leaves = nnx.to_flat_state(state)
    placed = [(path, jax.device_put(leaf[...], places[path])) for path, leaf in leaves]
    with jax.set_mesh(mesh):
        found = forward_and_gradients(nnx.merge(graph, nnx.from_flat_state(placed)), x, dy, jnp.asarray(valid), aux=1.0)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(ours, theirs, 1e-5)


def test_no_device_gathers_all_experts_or_all_tokens():
    mesh = sharding.make_mesh(fsdp=2, tensor=1, expert=4)
    moe = random_moe(num_experts=12, mlp_dim=40)
    places = sharding.of_module(moe, mesh)
    graph, state = nnx.split(moe)
    shapes = [
        (path, jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=places[path]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    rows = jax.sharding.NamedSharding(mesh, sharding.partition_spec(("batch", "length", None)))
    x = jax.ShapeDtypeStruct((16, 10, 32), jnp.float32, sharding=rows)

    def loss(state, x):
        y, stats = nnx.merge(graph, state)(x)
        return jnp.sum(y**2) + load_balancing_loss(stats)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(nnx.from_flat_state(shapes), x).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)
    shapes = {tuple(map(int, shape.split(","))) for shape in gathered}
    # Over fsdp a device gathers its 3 experts and the router; over expert the tokens of its group: 8 rows of 16.
    assert (8, 10, 32) in shapes
    for shape in shapes:
        assert sorted(shape) in [[3, 32, 40], [12, 32], [8, 10, 32], [2, 8, 10]], shape


def test_more_experts_a_token_than_there_are_is_refused():
    with pytest.raises(ValueError, match="9 experts a token of 8"):
        random_moe(experts_per_token=9)
