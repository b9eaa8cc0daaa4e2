"""No dtype is promoted unseen: where two meet, the code says which. The programs are traced, not run.

bfloat16 and float32 give float32 unasked, and so does a bool or an int among them: twice the memory, or another number
than on the paper, without a word. What is meant is written as `astype`. The optimizer is left out: optax's Adam
raises a float to an int.
"""

import jax
import jax.numpy as jnp
import pytest
from helpers import KINDS, data, model, on_device

import specjax as sj
from specjax.generation.generate import generate_tokens
from specjax.hf.quantise import convert
from specjax.train.step import make_eval_step, merge, split

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def trace(made, trainable=sj.ALL):
    """The loss with its gradients, and an evaluation step."""
    graph, params, frozen = split(made, trainable)
    batch, key = on_device(data(batch_size=2).batch(0)), jax.random.key(0)
    loss = lambda params: jnp.sum(sj.next_token(merge(graph, params, frozen), batch, key)["loss"][0])  # noqa: E731
    jax.eval_shape(jax.grad(loss), params)
    jax.eval_shape(make_eval_step(graph), params, frozen, batch)


def test_a_mixture_is_refused_here():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)


@pytest.mark.rule(2)
@pytest.mark.parametrize("family", KINDS)
def test_every_familys_step_over_float32_masters(family):
    trace(model(family, dtype="bfloat16"))


def operations(jaxpr):
    """(what is computed, of which dtypes) of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, {str(value.aval.dtype) for value in equation.invars}
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from operations(inner)


@pytest.mark.rule(2)
@pytest.mark.parametrize("family", KINDS)
def test_softmax_norms_losses_and_sums_of_a_bfloat16_model_are_float32(family):
    graph, params, frozen = split(model(family, dtype="bfloat16", param_dtype="bfloat16"), sj.ALL)
    batch, key = on_device(data(batch_size=2).batch(0)), jax.random.key(0)
    loss = lambda params: sj.next_token(merge(graph, params, frozen), batch, key)  # noqa: E731
    found = list(operations(jax.make_jaxpr(loss)(params).jaxpr))
    names = {"exp", "log", "rsqrt", "reduce_sum", "cumsum"}
    assert {"exp", "rsqrt", "reduce_sum"} <= {name for name, _ in found}
    assert {name for name, dtypes in found if name in names and "bfloat16" in dtypes} == set()


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_adapters_over_a_bfloat16_base(family):
    made = model(family, dtype="bfloat16", param_dtype="bfloat16")
    sj.lora.inject(made, rank=4, dropout=0.1, targets="all-linear", seed=0)
    trace(made, trainable=sj.LORA)


def test_adapters_of_experts():
    made = model("mixtral", dtype="bfloat16", param_dtype="bfloat16")
    sj.lora.inject(made, rank=4, targets="all-linear", seed=0)
    trace(made, trainable=sj.LORA)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_over_a_quantised_base(kind):
    made = model(dtype="bfloat16", param_dtype="bfloat16", hidden_size=128, intermediate_size=256)
    convert(made, kind)
    sj.lora.inject(made, rank=4, dora=True, seed=0)
    trace(made, trainable=sj.LORA)


def test_sampling():
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    made = model("qwen3", dtype="bfloat16", param_dtype="bfloat16")
    assert [len(row) for row in generate_tokens(made, [[3, 5, 7], [1, 2]], max_new_tokens=3, **options)] == [3, 3]
