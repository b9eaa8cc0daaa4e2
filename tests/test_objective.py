"""What is minimised is a value: objectives from outside, per-token scores, any optax rule, what is not finite."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same_bits, data, metrics, model, on_device, started, token_sums, weights

import specjax as sj
from specjax import sharding
from specjax.errors import UserError
from specjax.models.adapter import select
from specjax.train import chunks, moments
from specjax.train.step import begin, make_train_step, merge, split

CASES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "soft cap": {"family": "gemma2", "head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 16},
}


def definition(of, batch):
    """Log-probability and log-sum-exp of each token, from the whole logits."""
    logits = of.unembed(of.hidden(batch["tokens"], batch["positions"], batch["segment_ids"]))
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    return logprobs, jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == batch["targets"]


def some_loss(logprobs, logsumexp, batch):
    """Not linear in the scores, and of both."""
    return jnp.sum(jnp.tanh(logprobs / 5) * batch["loss_mask"]) + 1e-2 * jnp.sum(logsumexp**2)


@pytest.mark.rule(2)
@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=["one", "mesh"])
@pytest.mark.parametrize("trains", ["all", "head's factors"])
@pytest.mark.parametrize("case", CASES)
def test_scores_and_their_gradients_are_the_definition_by_chunks_too(monkeypatch, case, trains, mesh):
    mesh = sj.make_mesh(**mesh) if mesh else None
    made = model(vocab_size=136, mesh=mesh, **CASES[case])
    if trains != "all":
        if made.config.tied:
            pytest.skip("a tied output layer wears no factors")
        sj.lora.inject(made, rank=3, targets=["lm_head", "q_proj"], seed=0)
        for leaf in jax.tree.leaves(made, is_leaf=lambda x: isinstance(x, sj.LORA)):
            if isinstance(leaf, sj.LORA):
                leaf[...] = leaf[...] + 0.1
    graph, params, frozen = split(made, sj.ALL if trains == "all" else sj.LORA)
    batch = on_device(data(vocab_size=136, batch_size=4, answers=True).batch(0))

    def ours(params):
        scores = sj.token_logprobs(merge(graph, params, frozen), batch)
        return some_loss(scores.logprobs, scores.logsumexp, batch), scores

    def wanted(params):
        scores = definition(merge(graph, params, frozen), batch)
        return some_loss(*scores[:2], batch), scores

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        (value, scores), gradient = jax.jit(jax.value_and_grad(wanted, has_aux=True))(params)
        for elements in (2**25, 4 * 136 * 16):
            monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements // (mesh.size if mesh else 1))
            (got, made_scores), made_gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
            np.testing.assert_allclose(got, value, rtol=1e-5)
            for one, other in zip(made_scores[:3], scores, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
            for path, leaf in gradient.items():
                largest = float(jnp.abs(leaf).max())
                np.testing.assert_allclose(made_gradient[path], leaf, rtol=0, atol=1e-5 * largest, err_msg=str(path))


@pytest.mark.rule(11)
def test_the_whole_logits_are_in_neither_pass(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 4 * 131 * 16)
    graph, params, _ = split(model(vocab_size=131), sj.ALL)
    batch = on_device(data(vocab_size=131, batch_size=4).batch(0))
    run = lambda p: jnp.sum(jnp.square(sj.token_logprobs(merge(graph, p), batch).logprobs))  # noqa: E731
    text = jax.jit(jax.grad(run)).lower(params).compile().as_text()
    assert not any(f"[{shape}]" in text for shape in ("4,64,131", "256,131", "131,256"))


def z_loss(weight):
    """The ten lines that a user writes: next-token loss and the square of the logits' log-sum-exp."""

    def sums(model, batch, key):
        scores, mask = sj.token_logprobs(model, batch, key), batch["loss_mask"]
        count = sj.by_group(model, mask)
        nll, z = sj.by_group(model, -scores.logprobs * mask), sj.by_group(model, scores.logsumexp**2 * mask)
        return {"loss": (nll + weight * z, count), "nll": (nll, count), "z": (z, count)}

    return sj.Objective("z_loss", sj.next_token.columns, sums)


def test_an_objective_from_outside_trains_is_evaluated_and_chooses_the_best(tmp_path):
    rows, held = data(answers=True), data(seed=5, answers=True)

    def run(objective, folder):
        made = model()
        options = {"steps": 20, "workdir": tmp_path / folder, "log_every": 1, "tensorboard": False, "accumulate": 2}
        options |= {"eval_data": {"held": held}, "eval_every": 5, "objective": objective}
        return sj.fit(made, rows, sj.adamw(1e-2), **options), metrics(tmp_path / folder)

    result, lines = run(z_loss(1e-2), "z")
    steps = [line for line in lines if "grad_norm" in line]
    evals = [line for line in lines if "eval/held/loss" in line]
    for line in steps:
        np.testing.assert_allclose(line["loss"], line["nll"] + 1e-2 * line["z"], rtol=1e-5)
    assert set(result.evals["held"]) == {"loss", "nll", "z", "tokens"}  # perplexity is next_token's own
    assert result.best_step == min(evals, key=lambda line: line["eval/held/loss"])["step"]
    plain, zero = (
        [line for line in run(one, one.name)[1] if "grad_norm" in line] for one in (sj.next_token, z_loss(0))
    )
    np.testing.assert_allclose([line["loss"] for line in zero], [line["loss"] for line in plain], rtol=1e-4)
    assert steps[-1]["nll"] < steps[0]["nll"] - 0.3 and steps[-1]["z"] < 0.98 * zero[-1]["z"]


def test_next_token_is_written_from_the_same_scores():
    made, batch = model(), on_device(data(answers=True).batch(0))
    sums, (nll, count) = token_sums(made, batch), z_loss(0)(made, batch)["nll"]
    np.testing.assert_allclose(nll[0], sums["nll"], rtol=1e-6)
    assert count[0] == sums["count"]


def test_a_column_that_is_not_there_is_named():
    wants = dataclasses.replace(z_loss(0), columns=(*sj.next_token.columns, "weight"))
    with pytest.raises(UserError, match="objective z_loss reads the column 'weight', which the data lacks; there are"):
        sj.fit(model(), data(), sj.adamw(1e-3), steps=1, objective=wants)


def test_a_column_that_was_added_reaches_the_objective():
    rows = data(answers=True)
    half = rows.with_column("weight", np.full(rows.tokens.shape, 0.5))

    def weighted(model, batch, key):
        mask = batch["loss_mask"] * batch["weight"]
        scores = sj.token_logprobs(model, batch, key)
        return {"loss": (sj.by_group(model, -scores.logprobs * mask), sj.by_group(model, batch["loss_mask"]))}

    objective = sj.Objective("weighted", (*sj.next_token.columns, "weight"), weighted)
    found = [
        sj.fit(model(), given, sj.adamw(1e-3), steps=1, eval_data={"a": given}, objective=one).first_evals["a"]["loss"]
        for given, one in ((half, objective), (rows, sj.next_token))
    ]
    assert found[0] == pytest.approx(found[1] / 2, rel=1e-5)


def fitted(rule, folder=None, steps=4, **options):
    made = model()
    result = sj.fit(made, data(), rule, steps=steps, workdir=folder, tensorboard=False, log_every=1, **options)
    return result, weights(made)


@pytest.mark.rule(8)
def test_any_optax_rule_trains_and_resumes_bit_for_bit(tmp_path):
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(1e-2))
    _, whole = fitted(rule, tmp_path / "whole", steps=6)
    fitted(rule, tmp_path / "cut", steps=3)
    _, resumed = fitted(rule, tmp_path / "cut", steps=6)
    assert_same_bits(resumed, whole)
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"] and "lr" not in lines[0]  # a rule does not tell its rate


def test_our_rules_are_optax_rules(tmp_path):
    rate = 1e-2
    _, wanted = fitted(sj.adamw(rate, weight_decay=0.1, clip_norm=0.0))
    chained = optax.chain(sj.adamw(rate, weight_decay=0.1, clip_norm=0.0))
    _, found = fitted(chained)
    assert_same_bits(found, wanted)
    known = sj.optimizer(optax.adam(rate), learning_rate=rate, clip_norm=0.5)
    fitted(known, tmp_path)
    assert metrics(tmp_path)[0]["lr"] == pytest.approx(rate)


def test_a_clip_goes_with_any_rule():
    rule = sj.optimizer(optax.sgd(1.0), clip_norm=1e-3)
    graph, params, frozen = split(model(), sj.ALL)
    batch = {name: value[None] for name, value in data().batch(0).items()}
    state, told = jax.jit(make_train_step(graph, rule))(begin(rule, params), frozen, batch, np.int32(0))
    moved = math.sqrt(sum(float(jnp.sum((params[p] - state.trainable[p]) ** 2)) for p in params))
    assert float(told["grad_norm"]) > 0.1 and moved == pytest.approx(1e-3, rel=1e-3)


def test_moments_in_fewer_bits_are_of_rules_that_have_them(monkeypatch):
    monkeypatch.setattr(moments, "SMALL", 128)
    _, params, _ = split(model(), sj.ALL)
    state = sj.optimizer(optax.nadam(1e-3), moments="bfloat16").init(params)  # Adam's moments, another rule
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state))
    held = sj.optimizer(optax.inject_hyperparams(optax.adamw)(learning_rate=0.5), moments="8bit").init(params)
    assert float(held.hyperparams["learning_rate"]) == 0.5
    for rule in (optax.adafactor(1e-3), optax.sgd(1e-3, momentum=0.9), optax.sgd(1e-3)):
        made = model()
        before = weights(made)
        with pytest.raises(UserError, match="moments '8bit' are of rules that keep Adam's or Lion's moments"):
            sj.fit(made, data(), sj.optimizer(rule, moments="8bit"), steps=1)
        assert_same_bits(weights(made), before)  # nothing was donated yet


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        (lambda model, batch, key: {}, "objective mine gives nothing: it must give `loss` too"),
        (
            lambda model, batch, key: {"loss": (jnp.sum(batch["loss_mask"]), jnp.ones(1))},
            r"mine: loss is .*float32 .G. each",
        ),
    ],
)
def test_an_objective_that_gives_no_sums_is_told_what_to_give(sums, said):
    with pytest.raises(UserError, match=said):
        sj.fit(model(), data(), sj.adamw(1e-3), steps=1, objective=sj.Objective("mine", sj.next_token.columns, sums))


def test_what_is_no_rule_is_refused():
    with pytest.raises(UserError, match="optimizer 0.001: give an optax rule"):
        fitted(1e-3)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_not_finite_never_reaches_the_state_nor_does_what_follows(parts):
    made = model()
    graph, params, frozen = split(made, sj.ALL)
    rule = sj.adamw(1e-2)
    step = jax.jit(make_train_step(graph, rule))
    rows = data()
    batches = [
        {name: value.reshape(parts, -1, value.shape[1]) for name, value in rows.batch(number).items()}
        for number in range(4)
    ]
    batches[2] = batches[2] | {"loss_mask": batches[2]["loss_mask"] * np.float32(np.nan)}
    state = started(rule, params)
    for number in range(2):
        state, _ = step(state, frozen, batches[number], np.int32(number))
    good = jax.tree.map(np.asarray, state)
    for number in (2, 3):  # the step after it was given to the device before the host knew
        state, told = step(state, frozen, batches[number], np.int32(number))
        assert math.isfinite(float(told["loss"])) == (number == 3)
    for after, before in zip(jax.tree.leaves(state), jax.tree.leaves(good), strict=True):
        np.testing.assert_array_equal(after, before)
    assert int(state.step) == 2


def test_a_run_that_meets_what_is_not_finite_names_step_and_rows_and_keeps_the_weights_before(tmp_path):
    rows, made = data(), model()
    good, bad = (rows.with_column("weight", np.ones(rows.tokens.shape)) for _ in range(2))
    plain = bad.micro_batches
    bad.micro_batches = lambda step, *more: {
        name: np.full_like(value, np.nan) if step == 3 and name == "weight" else value
        for name, value in plain(step, *more).items()
    }

    def weighted(model, batch, key):
        sums = dict(sj.next_token(model, batch, key))
        factor = jnp.sum(batch["weight"]) / batch["weight"].size
        return sums | {"loss": (sums["loss"][0] * jnp.where(jnp.isnan(factor), factor, 1.0), sums["loss"][1])}

    objective = sj.Objective("weighted", (*sj.next_token.columns, "weight"), weighted)
    listed = ", ".join(map(str, sorted(rows.row_ids(3))))
    said = f"step 4: the loss is nan .*on the rows {listed} of the packed data; the weights are those before this step"
    with pytest.raises(UserError, match=said):
        sj.fit(made, bad, sj.adamw(1e-2), steps=6, objective=objective)
    sj.fit(other := model(), good, sj.adamw(1e-2), steps=3, objective=objective)
    assert_same_bits(weights(made), weights(other))


def test_a_last_update_that_breaks_the_weights_is_said_and_not_saved(tmp_path):
    breaks = lambda step: jnp.where(step < 3, 1e-3, jnp.inf)  # noqa: E731
    with pytest.raises(UserError, match="step 4: an update made the weights infinite or NaN; the last good checkpoint"):
        fitted(sj.adamw(breaks), tmp_path, steps=4, save_every=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["3"]


def test_groups_of_rows_have_sums_of_their_own_and_one_group_is_all():
    made, batch = model(), on_device(data(answers=True, batch_size=4).batch(0))
    whole = jax.jit(lambda b: sj.next_token(made, b))(batch)
    made.groups = 2
    halves = jax.jit(lambda b: sj.next_token(made, b))(batch)
    made.groups = 1
    for half in range(2):
        part = {name: value[2 * half : 2 * half + 2] for name, value in batch.items()}
        alone = sj.next_token(made, part)
        for name, (total, count) in alone.items():
            np.testing.assert_allclose(halves[name][0][half], total[0], rtol=1e-6)
            assert halves[name][1][half] == count[0]
    np.testing.assert_allclose(halves["loss"][0].sum(), whole["loss"][0][0], rtol=1e-6)


def test_the_batch_lies_where_the_mesh_wants_it_whatever_its_columns():
    mesh = sj.make_mesh(fsdp=8)
    rows = data(answers=True).with_column("weight", np.ones(data(answers=True).tokens.shape))
    placed = sharding.put_batch(rows.batch(0, sharding.held_rows(mesh, 8)), mesh, 8)
    assert placed["weight"].dtype == jnp.float32 and placed["weight"].sharding.spec[0] == ("data", "fsdp", "expert")


def test_groups_of_rows_are_clipped_and_trained_each_as_if_alone():
    """Two adapters over one base: one division, one norm and one clip per group. Their axis is told by its name."""
    rule, rows = sj.adamw(1e-2, clip_norm=0.3), data(answers=True, batch_size=8)
    batches = [rows.batch(number) for number in range(3)]

    def both(model, batch, key):
        model = select(model, [0, 1])
        model.groups = 2
        return sj.next_token(model, batch, key)

    def course(names, objective, part):
        made = model()
        for name in names:
            sj.lora.inject(made, rank=3, alpha=200, targets=["q_proj", "up_proj"], seed=int(name), name=name)
        graph, params, frozen = split(made, sj.LORA)
        step, state, told = jax.jit(make_train_step(graph, rule, objective)), started(rule, params), []
        for number, batch in enumerate(batches):
            state, numbers = step(state, frozen, {k: v[None, part] for k, v in batch.items()}, np.int32(number))
            told.append(numbers)
        return state.trainable, told

    found, told = course("12", sj.Objective("both", sj.next_token.columns, both), slice(None))
    norms = []
    for group, name in enumerate("12"):
        alone, wanted = course(name, sj.next_token, slice(4 * group, 4 * group + 4))
        for numbers, other in zip(told, wanted, strict=True):
            for each in ("loss", "grad_norm", "accuracy", "loss_tokens"):
                np.testing.assert_allclose(numbers[each][group], other[each], rtol=1e-5, err_msg=each)
        norms += [float(other["grad_norm"]) for other in wanted]
        for path, value in alone.items():
            mine = np.asarray(found[path])[:, group : group + 1]
            np.testing.assert_allclose(mine, value, rtol=0, atol=2e-5 * float(jnp.abs(value).max()), err_msg=str(path))
    assert min(norms) > 0.3  # or the clip is not seen


def test_what_all_groups_would_train_is_refused():
    def both(model, batch, key):
        model.groups = 2
        return sj.next_token(model, batch, key)

    rule, (graph, params, frozen) = sj.adamw(1e-2), split(model(), sj.ALL)
    step = make_train_step(graph, rule, sj.Objective("both", sj.next_token.columns, both))
    batch = {name: value[None] for name, value in data().batch(0).items()}
    with pytest.raises(ValueError, match="groups"):
        jax.eval_shape(step, begin(rule, params), frozen, batch, np.int32(0))
