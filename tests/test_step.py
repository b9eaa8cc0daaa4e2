"""What one step computes: torch's and peft's numbers, whatever the cut into micro-batches and chunks."""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from courses import RATE, assert_same_course, assert_same_movement, micro, our_losses, packed, torch_losses
from flax import nnx
from helpers import data, model, prompts, started, token_sums, torch_model, weights
from safetensors.numpy import load_file

import specjax as sj
from specjax import sharding
from specjax.errors import UserError
from specjax.hf.export import tensors
from specjax.hf.load import load
from specjax.train import chunks, optim
from specjax.train.evaluate import evaluate
from specjax.train.optim import Optimizer, schedule
from specjax.train.step import TrainState, _update_if, begin, make_eval_step, make_train_step, merge, split

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own


@pytest.mark.rule(2)
def test_full_training_follows_torch(tmp_path):
    reference, rows = torch_model(), packed()
    reference.save_pretrained(tmp_path)
    ours, _ = load(tmp_path, dtype="float32")
    start = dict(tensors(ours, np.float32))
    assert_same_course(our_losses(ours, sj.ALL, rows), torch_losses(reference, rows))
    theirs = {name: weight.detach().numpy() for name, weight in reference.named_parameters()}
    assert_same_movement(dict(tensors(ours, np.float32)), theirs, start)


@pytest.mark.rule(2)
def test_lora_training_follows_peft(tmp_path):
    import peft
    import torch

    reference, rows = torch_model(), packed()
    reference.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(reference, config)
    theirs.save_pretrained(tmp_path / "start")
    ours, _ = load(tmp_path / "base", dtype="float32")
    sj.lora.load(ours, tmp_path / "start")
    before = weights(ours, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    assert_same_course(our_losses(ours, sj.LORA, rows), torch_losses(theirs, rows))
    after = weights(ours)
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    sj.lora.save(ours, tmp_path / "end")
    theirs.save_pretrained(tmp_path / "theirs")
    found, wanted, start = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("end", "theirs", "start")
    )
    assert_same_movement(found, wanted, start)


def descent(rate=1.0):
    """Plain gradient descent: its update is the gradient."""
    return Optimizer(optax.sgd(rate), learning_rate=rate)


@pytest.mark.rule(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_float32_is_multiplied_as_float32_where_that_must_be_asked_for(monkeypatch, method, dtype):
    """A GPU would take TF32, a TPU bfloat16. A CPU needs no asking."""
    made = model(dtype=dtype)
    if method == "lora":
        sj.lora.inject(made, rank=3, targets=["q_proj", "lm_head"], seed=0)
    graph, params, frozen = split(made, sj.LORA if method == "lora" else sj.ALL)
    optimizer = sj.adamw(RATE)
    given = (begin(optimizer, params), frozen, micro(data(batch_size=2).batch(0), 1), np.int32(0))
    traced = lambda: str(jax.make_jaxpr(make_train_step(graph, optimizer))(*given))  # noqa: E731
    asked = {}
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(sharding, "platform", lambda platform=platform: platform)
        text = traced()
        asked[platform] = (text.count("Precision.HIGHEST"), text.count("= dot_general["))
    assert asked["cpu"][0] == 0
    assert asked["gpu"][0] == (2 * asked["gpu"][1] if dtype == "float32" else 0), asked
    with jax.default_matmul_precision("default"):  # who sets it is obeyed
        assert "Precision.HIGHEST" not in traced()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_gpu_lays_each_gradient_as_its_weight_lies(monkeypatch, kind):
    """Before the update is selected: or the old state is moved to where the gradient lay (docs/log.md)."""
    mesh = sj.make_mesh(fsdp=4, tensor=2)
    made = model(mesh=mesh)
    if kind == "lora":
        sj.lora.inject(made, rank=4)
    graph, params, frozen = split(made, sj.LORA if kind == "lora" else sj.ALL)
    optimizer = sj.adamw(RATE)
    given = (begin(optimizer, params), frozen, micro(data(batch_size=8).batch(0), 1), np.int32(0))
    laid = {}
    for platform in ("tpu", "gpu"):
        monkeypatch.setattr(sharding, "platform", lambda platform=platform: platform)
        with jax.set_mesh(mesh):
            text = str(jax.make_jaxpr(make_train_step(graph, optimizer))(*given))
        laid[platform] = text.count("sharding_constraint[")
    assert laid["gpu"] == laid["tpu"] + len(params)


@pytest.mark.rule(2)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_micro_batches_add_up_to_the_whole_batch(kind):
    ours = model()
    if kind == "lora":
        sj.lora.inject(ours, rank=4)
        for path, leaf in nnx.to_flat_state(nnx.state(ours, nnx.LoRAParam)):
            leaf[...] = leaf[...] + 0.05 * np.random.default_rng(len(path[2])).standard_normal(leaf.shape)
    graph, params, frozen = split(ours, sj.LORA if kind == "lora" else sj.ALL)
    batch = data(answers=True, longest=30).batch(0)
    batch["loss_mask"][:2] *= np.arange(64) < 9  # the first micro-batches count fewer tokens
    counts = batch["loss_mask"].reshape(4, -1).sum(1)
    assert counts.max() > 3 * counts.min()
    found = {}
    for parts in (1, 4):
        step = jax.jit(make_train_step(graph, descent()))
        after, metrics = step(begin(descent(), params), frozen, micro(batch, parts), np.int32(0))
        found[parts] = {path: np.asarray(params[path] - after.trainable[path]) for path in params}, metrics
    assert float(found[1][1]["loss_tokens"]) == batch["loss_mask"].sum()
    for name in ("loss", "loss_tokens", "accuracy", "grad_norm"):
        np.testing.assert_allclose(found[4][1][name], found[1][1][name], rtol=1e-6, err_msg=name)
    for name, wanted in found[1][0].items():
        np.testing.assert_allclose(
            found[4][0][name], wanted, rtol=0, atol=1e-6 * max(1, np.abs(wanted).max()), err_msg=str(name)
        )


def shapes(jaxpr):
    """The shapes of all that a jaxpr computes, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (tuple(out.aval.shape) for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from shapes(inner)


@pytest.mark.rule(4)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_frozen_weight_has_no_gradient_and_no_optimizer_state(kind, parts):
    ours = model(intermediate_size=80, vocab_size=136)  # no activation has a weight's shape
    sj.lora.inject(ours, rank=3)
    graph, params, frozen = split(ours, sj.LORA if kind == "lora" else nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    optimizer, batch = sj.adamw(RATE), micro(data(vocab_size=136).batch(0), parts)
    state = optimizer.init(params)
    base = weights(ours, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    matrices = {value.shape for name, value in base.items() if not name.endswith("scale")}
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= {value.shape for value in params.values()} | {()}
    given = (begin(optimizer, params), frozen, batch, np.int32(0))
    traced = jax.make_jaxpr(make_train_step(graph, optimizer))(*given)
    made = set(shapes(traced.jaxpr))
    assert made & matrices == (set() if kind == "lora" else matrices)
    one_layer = {shape[1:] for shape in matrices if len(shape) > 2}
    products = {shape for shape in made if shape in one_layer or shape[::-1] in one_layer}
    assert bool(products) == (kind == "full"), products


@pytest.mark.rule(4)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_parameters_and_optimizer_state_are_donated(kind):
    ours = model()
    if kind == "lora":
        sj.lora.inject(ours, rank=4)
    rows = data()
    graph, params, frozen = split(ours, sj.LORA if kind == "lora" else sj.ALL)
    optimizer = sj.adamw(RATE)
    state = begin(optimizer, params)
    step = jax.jit(make_train_step(graph, optimizer), donate_argnums=0)
    compiled = step.lower(state, frozen, micro(rows.batch(0), 2), np.int32(0)).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    memory = compiled.memory_analysis()
    # All but the optimizer's counts of steps (a few bytes each).
    assert held - 64 <= memory.alias_size_in_bytes <= held
    assert memory.output_size_in_bytes < held + 4096
    compiled(state, frozen, micro(rows.batch(0), 2), np.int32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.size > 1)
    assert not any(leaf.is_deleted() for leaf in frozen.values())


@pytest.mark.skipif("AS_SHIPPED" not in os.environ, reason="compiled without fusions, every update holds copies")
def test_an_update_that_may_be_refused_takes_no_more_memory_as_shipped():
    optimizer = sj.adamw(1e-3, weight_decay=0.1)
    params = {("kernel",): jnp.ones((512, 1024)), ("head",): jnp.ones((256, 1024))}
    state = begin(optimizer, params)

    def always(state, grads, good):
        updates, moved = optimizer.update(grads, state.opt_state, state.trainable)
        return TrainState(optax.apply_updates(state.trainable, updates), moved, state.step + 1)

    def guarded(state, grads, good):
        return _update_if(good, optimizer, state, lambda: grads)

    def temporaries(function):
        compiled = jax.jit(function, donate_argnums=0).lower(state, params, jnp.bool_(True)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(guarded) < temporaries(always) + 1024


@pytest.mark.rule(11)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_program_does_not_grow_with_the_number_of_layers(kind):
    lines = []
    for layers in (2, 12):
        ours = model(num_hidden_layers=layers)
        if kind == "lora":
            sj.lora.inject(ours, rank=4)
        graph, params, frozen = split(ours, sj.LORA if kind == "lora" else sj.ALL)
        optimizer = sj.adamw(RATE)
        args = (begin(optimizer, params), frozen, micro(data().batch(0), 2), np.int32(0))
        lowered = jax.jit(make_train_step(graph, optimizer)).lower(*args)
        # Instructions alone: the tables of stack frames beside them depend on who called.
        texts = lowered.as_text(), lowered.compile().as_text()
        lines.append([sum(" = " in line for line in text.splitlines()) for text in texts])
    assert lines[0] == pytest.approx(lines[1], rel=0.02)


def reference_sums(ours, batch):
    """From the whole logits."""
    logits = ours(batch["tokens"], batch["positions"], batch["segment_ids"])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    hits = jnp.argmax(logits, axis=-1) == batch["targets"]
    return {
        "nll": -jnp.sum(picked * batch["loss_mask"]),
        "correct": jnp.sum(hits * batch["loss_mask"]),
        "count": jnp.sum(batch["loss_mask"]),
    }


@pytest.mark.rule(2)
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_by_chunks_is_the_loss_of_the_whole_logits(monkeypatch, tied):
    ours = model(vocab_size=131, tie_word_embeddings=tied)
    batch = data(vocab_size=131, batch_size=4, answers=True).batch(0)
    graph, params, _ = split(ours, sj.ALL)

    def value_and_gradient(sums):
        def nll(params):
            found = sums(merge(graph, params), batch)
            return found["nll"], found

        return jax.jit(jax.value_and_grad(nll, has_aux=True)).lower(params).compile()

    wanted = value_and_gradient(reference_sums)(params)
    for elements, whole in ((4 * 131 * 16, False), (2**25, True))[: 1 if tied else 2]:
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        compiled = value_and_gradient(token_sums)
        text = compiled.as_text()
        assert any(f"[{shape}]" in text for shape in ("4,64,131", "256,131", "131,256")) == whole
        (_, sums), gradient = compiled(params)
        for name in ("nll", "correct", "count"):
            np.testing.assert_allclose(sums[name], wanted[0][1][name], rtol=1e-6, err_msg=name)
        for name, value in wanted[1].items():
            scale = float(jnp.abs(value).max())
            np.testing.assert_allclose(gradient[name], value, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.rule(11)
@pytest.mark.parametrize(("method", "products"), [("lora", 2), ("full", 3)])
def test_no_logits_are_made_twice(monkeypatch, method, products):
    """Logits, the hidden states' gradient and, where it trains, the table's: each once a chunk."""
    ours = model(vocab_size=131)
    sj.lora.inject(ours, rank=3)
    graph, params, frozen = split(ours, sj.LORA if method == "lora" else nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    batch = data(vocab_size=131, batch_size=4).batch(0)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 4 * 131 * 16)
    program = jax.make_jaxpr(jax.grad(lambda p: token_sums(merge(graph, p, frozen), batch)["nll"]))(params)
    assert sum(131 in shape for shape in products_of(program.jaxpr)) == products


def products_of(jaxpr):
    """The sizes that each matrix product of a jaxpr takes and makes, inner ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield {n for value in (*equation.invars, *equation.outvars) for n in value.aval.shape}
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from products_of(inner)


@pytest.mark.rule(2)
def test_the_tables_gradient_is_summed_over_chunks_in_float32(monkeypatch):
    ours = model(vocab_size=131, dtype="bfloat16")
    graph, params, _ = split(ours, sj.ALL)
    batch = data(vocab_size=131, batch_size=4).batch(0)
    found = []
    for elements in (2**25, 4 * 131):  # all at once, and a token of each row at a time
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        gradient = jax.jit(jax.grad(lambda p: token_sums(merge(graph, p), batch)["nll"]))(params)
        found.append(np.asarray(gradient["lm_head", "kernel"], np.float64))
    # 2e-3 of it is the rounding of the result; summed in bfloat16 it would be 1e-2.
    assert np.linalg.norm(found[1] - found[0]) < 5e-3 * np.linalg.norm(found[0])


@pytest.mark.rule(2)
def test_evaluation_is_weighted_by_tokens_and_sees_every_row_once():
    ours, rows = model(), data(documents=23, answers=True)  # the last batch is not full
    graph, params, frozen = split(ours, sj.ALL)
    step = jax.jit(make_eval_step(graph))
    sums = [reference_sums(ours, batch) for batch in rows.once()]
    count = sum(float(part["count"]) for part in sums)
    assert len(sums) > 1 and count == rows.report["loss_tokens"]
    found = evaluate(step, params, frozen, rows, None)
    assert found["tokens"] == count
    np.testing.assert_allclose(found["loss"], sum(float(part["nll"]) for part in sums) / count, rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], sum(float(part["correct"]) for part in sums) / count, rtol=1e-6)
    assert found["perplexity"] == math.exp(found["loss"])
    first = evaluate(step, params, frozen, rows, None, batches=1)
    np.testing.assert_allclose(first["loss"], float(sums[0]["nll"]) / float(sums[0]["count"]), rtol=1e-6)


SHAPES = {
    ("layers", 0, "mlp", "up_proj", "kernel"): (3, 4),
    ("layers", 0, "norm", "scale"): (4,),
    ("layers", 0, "mlp", "up_proj", "bias"): (4,),
    ("layers", 0, "self_attn", "sinks"): (4,),
    ("layers", 0, "mlp", "alpha_p"): (1,),
    ("layers", 0, "mlp", "alpha_n"): (1,),
}


def course(optimizer, gradients):
    """The parameters after each update, from ones."""
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    state, found = optimizer.init(params), []
    for gradient in gradients:
        factor = optimizer.factor(optax.tree.norm(gradient))  # as the training step clips
        gradient = {name: value * factor for name, value in gradient.items()}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append({name: np.asarray(value) for name, value in params.items()})
    return found


@pytest.fixture(scope="module")
def gradients():
    rng = np.random.default_rng(0)
    scales = (0.01, 3.0, 0.3, 1.0, 1e-6)  # some are clipped, some are not
    return [{name: rng.standard_normal(shape).astype(np.float32) * s for name, shape in SHAPES.items()} for s in scales]


@pytest.mark.rule(2)
@pytest.mark.parametrize("options", [{}, {"b1": 0.8, "b2": 0.95, "eps": 1e-3}, {"clip_norm": 0.0}], ids=str)
def test_adamw_is_torchs_and_spares_norms_and_biases(gradients, options):
    import torch

    found = course(sj.adamw(0.1, weight_decay=0.5, **options), gradients)
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    kernel, *spared = params.values()
    betas = (options.get("b1", 0.9), options.get("b2", 0.999))
    groups = [{"params": [kernel], "weight_decay": 0.5}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=betas, eps=options.get("eps", 1e-8))
    for gradient, after in zip(gradients, found, strict=True):
        for name, weight in params.items():
            weight.grad = torch.tensor(gradient[name])
        if options.get("clip_norm", 1.0):
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        for name, weight in params.items():
            np.testing.assert_allclose(after[name], weight.detach().numpy(), rtol=0, atol=1e-5, err_msg=str(name))


def test_lion_is_the_papers_and_spares_norms_and_biases(gradients):
    found = course(optim.lion(0.1, weight_decay=0.5, b1=0.9, b2=0.99, clip_norm=0.0), gradients)
    params = {name: np.ones(shape) for name, shape in SHAPES.items()}
    moment = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for gradient, after in zip(gradients, found, strict=True):
        for name, g in gradient.items():
            decay = 0.5 * params[name] if name[-1] == "kernel" else 0.0
            params[name] = params[name] - 0.1 * (np.sign(0.9 * moment[name] + 0.1 * g) + decay)
            moment[name] = 0.99 * moment[name] + 0.01 * g
            np.testing.assert_allclose(after[name], params[name], rtol=0, atol=1e-6, err_msg=str(name))


def test_schedules_warm_up_and_decay_to_their_fraction():
    options = {"learning_rate": 2.0, "steps": 14, "warmup_steps": 4, "final_fraction": 0.1}
    warm = [0.5, 1.0, 1.5, 2.0]
    wanted = {
        "constant": [2.0] * 12,
        "linear": [2.0 - 1.8 * min(k, 10) / 10 for k in range(12)],
        "cosine": [0.2 + 1.8 * (1 + math.cos(math.pi * min(k, 10) / 10)) / 2 for k in range(12)],
    }
    for name, values in wanted.items():
        rate = schedule(name, **options)
        np.testing.assert_allclose([float(rate(step)) for step in range(16)], warm + values, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(float(jax.jit(rate)(np.int32(7))), values[3], rtol=1e-6)
    assert float(schedule("constant", learning_rate=2.0, steps=3)(0)) == 2.0
    with pytest.raises(UserError, match="'cosin': choose one of cosine, linear, constant. Did you mean 'cosine'"):
        schedule("cosin", **options)


def test_lion_trains_by_the_rate_that_is_logged_and_keeps_one_moment():
    rows, (graph, params, frozen) = data(), split(model(), sj.ALL)
    rate = schedule("linear", learning_rate=4e-3, steps=10, warmup_steps=2, final_fraction=0.0)
    optimizer = optim.lion(rate)
    step, state, found = jax.jit(make_train_step(graph, optimizer)), started(optimizer, params), []
    size = sum(leaf.size for leaf in params.values())
    assert size <= sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 1.1 * size
    for number in range(11):
        before = state.trainable
        state, metrics = step(state, frozen, micro(rows.batch(number), 1), np.int32(number))
        wanted = 4e-3 * (0.5 if number == 0 else min(1.0, (10 - number) / 8))
        np.testing.assert_allclose(float(metrics["lr"]), wanted, rtol=1e-6)
        for path, value in state.trainable.items():  # Lion's step is the rate itself
            moved = float(jnp.abs(value - before[path]).max())
            np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=1e-7, err_msg=str(path))
        found.append(float(metrics["loss"]))
    assert found[-1] < found[0] - 0.1


@pytest.mark.rule(2)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_trains_on_transformers_loss_with_its_balancing_part(family, tmp_path):
    import torch

    reference = torch_model(family, output_router_logits=True, router_aux_loss_coef=0.5)
    reference.save_pretrained(tmp_path)
    ours, _ = load(tmp_path, dtype="float32")
    rows = prompts(rows=2, length=101)
    ids = torch.tensor(rows, dtype=torch.long)
    theirs = reference(input_ids=ids, labels=ids)
    theirs.loss.backward()
    # The last token of a row has no target, and is routed all the same; padding after it is not.
    width = rows.shape[1] + 19
    held = np.broadcast_to(np.arange(width) < rows.shape[1], (2, width)).astype(np.int32)
    padded = np.pad(rows, ((0, 0), (0, 19)), constant_values=7)
    batch = {
        "tokens": padded,
        "targets": np.roll(padded, -1, axis=1),
        "loss_mask": np.broadcast_to(np.arange(width) < rows.shape[1] - 1, held.shape).astype(np.int32),
        "positions": np.arange(width, dtype=np.int32)[None] * held,
        "segment_ids": held,
    }
    graph, params, frozen = split(ours, nnx.Param)
    step = jax.jit(make_train_step(graph, descent()))
    after, metrics = step(begin(descent(), params), frozen, micro(batch, 1), np.int32(0))
    loss = float(metrics["loss"]) + 0.5 * float(metrics["router_loss"])
    np.testing.assert_allclose(loss, float(theirs.loss.detach()), rtol=1e-5)
    np.testing.assert_allclose(metrics["router_loss"], float(theirs.aux_loss.detach()), rtol=1e-5)
    for layer in range(2):
        wanted = reference.get_parameter(f"model.layers.{layer}.mlp.gate.weight").grad.numpy()
        router = ("layers", 0, "mlp", "gate", "kernel")
        found = np.asarray(params[router] - after.trainable[router])[layer]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    # Each micro-batch balances by itself, and weighs as many tokens as it has losses.
    batch["loss_mask"][1, 30:] = 0
    _, both = step(begin(descent(), params), frozen, micro(batch, 2), np.int32(0))
    sums = [token_sums(ours, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(2)]
    np.testing.assert_allclose(both["router_loss"], sum(x["router"] for x in sums) / 130, rtol=1e-5)
    alone = [float(x["router"] / x["count"]) for x in sums]
    assert abs(alone[0] - alone[1]) > 1e-3
