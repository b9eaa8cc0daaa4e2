"""Generation: token for token transformers' own, drawn from the right distribution, compiled once."""

import dataclasses
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from flax import nnx
from helpers import YARN, compilations

import specjax as sj
from demo.tokenizer import train_tokenizer
from specjax.data.chat import BUILT_IN, END_OF_TURN, resolve
from specjax.errors import UserError
from specjax.generation.generate import LOOK_EVERY, end_tokens, generate_tokens
from specjax.generation.sampling import Sampling, sample
from specjax.models import Decoder, Origin
from specjax.sharding import MESH_AXES

VOCAB, WINDOW, POSITIONS, NEW, ORIGINAL = 276, 40, 512, 256, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "dtype": torch.float32,
    "attn_implementation": "eager",
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}
LONG |= {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama tied": transformers.LlamaConfig(**SIZES | {"tie_word_embeddings": True}),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=12, sliding_window=WINDOW),
    "ministral3": transformers.Ministral3Config(
        **SIZES, head_dim=12, rope_parameters=YARN | {"llama_4_scaling_beta": 0.3}
    ),
    "qwen2": transformers.Qwen2Config(**SIZES | SLIDING | {"num_hidden_layers": 3}, use_sliding_window=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3_5": transformers.Qwen3_5TextConfig(
        **SIZES | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
    ),
    "gemma": transformers.GemmaConfig(**SIZES | {"num_key_value_heads": 1}, head_dim=16),
    "gemma2": transformers.Gemma2Config(
        **SIZES | SLIDING | {"num_hidden_layers": 3}, head_dim=16, query_pre_attn_scalar=40
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | SLIDING | {"num_hidden_layers": 3}, head_dim=16, query_pre_attn_scalar=40
    ),
    "phi3": transformers.Phi3Config(**SIZES, sliding_window=WINDOW),
    "phi3 longrope": transformers.Phi3Config(**SIZES, rope_parameters=LONG, original_max_position_embeddings=ORIGINAL),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=WINDOW),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40
    ),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "granite": transformers.GraniteConfig(
        **SIZES, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=2.0
    ),
}
torch.set_num_threads(1)
PROMPTS = [np.random.default_rng(i).integers(4, VOCAB, n).tolist() for i, n in enumerate((5, 61, 33, 1, 17))]


SEEDS = {"gemma": 3, "gemma2": 3, "olmo2": 3, "granite": 3}  # whose likeliest tokens lead clearly; the others': 2


def random_model(name):
    """A model whose logits lie well apart and whose attention, norms and biases are none of them neutral."""
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(SEEDS.get(name, 2))
    for path, weight in made.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        spread = 0.1 if path.endswith("bias") else 0.3
        if "norm" in path:
            # Sharp attention where q and k are normed: else the text soon repeats itself, and shows little.
            weight.data = (4.0 if "q_norm" in path else 1.0) - ("gemma" in name) + 0.1 * noise
        elif "embed" in path and "gemma" in name:
            weight.data = noise * 0.03  # scaled up by the model and tied: a large one repeats itself as well
        else:
            weight.data = noise * spread
    return made


def padded(rows, *, left):
    """(ids, attention mask) of rows of unequal length."""
    longest = max(map(len, rows))
    pad = [[0] * (longest - len(row)) for row in rows]
    ids = [[*p, *row] if left else [*row, *p] for p, row in zip(pad, rows, strict=True)]
    mask = [[*p, *[1] * len(row)] if left else [*[1] * len(row), *p] for p, row in zip(pad, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def continued(reference, rows, **options):
    """What transformers continues rows of ids with, padded on the left; ends of text ignored unless asked for."""
    ids, mask = padded(rows, left=True)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return reference.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [
        f"{a} and {b} make {a + b}, which is {'odd' if (a + b) % 2 else 'even'}." for a in range(30) for b in range(9)
    ]
    train_tokenizer(texts, folder, vocabulary=VOCAB)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory):
    """(transformers' model, ours, what transformers' continues PROMPTS with, ends of text ignored)."""
    reference, folder = random_model(request.param), tmp_path_factory.mktemp("family")
    reference.save_pretrained(folder)
    # In a batch, transformers chooses longrope's factors by the longest row: alone, each has its own.
    batches = [[prompt] for prompt in PROMPTS] if "longrope" in request.param else [PROMPTS]
    expected = [row for batch in batches for row in continued(reference, batch)]
    model, _ = sj.load(folder, dtype="float32")
    return SimpleNamespace(name=request.param, reference=reference, model=model, expected=expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama alone, for what is the same in every family."""
    reference, folder = random_model("llama"), tmp_path_factory.mktemp("alone")
    reference.save_pretrained(folder)
    expected = continued(reference, PROMPTS, max_new_tokens=72)
    model, _ = sj.load(folder, dtype="float32")
    return SimpleNamespace(reference=reference, folder=folder, model=model, expected=expected)


@pytest.fixture
def sent(monkeypatch):
    """The prompts, end tokens and options that `generate` hands on, and what it then gets: `sent.answer`."""
    record = SimpleNamespace(answer=[], prompts=None, eos_ids=None, options=None)

    def fake(model, prompts, *, eos_ids, **options):
        record.prompts, record.eos_ids, record.options = prompts, eos_ids, options
        return [list(record.answer) for _ in prompts]

    monkeypatch.setattr(sys.modules["specjax.generation.generate"], "generate_tokens", fake)
    return record


def speaking(generation=(), hf=()):
    return SimpleNamespace(
        config=SimpleNamespace(vocab_size=1000),
        origin=Origin(generation_config=dict(generation), config_json=dict(hf)),
    )


@pytest.mark.rule(10)
def test_greedy_equals_transformers_token_for_token_on_unequal_prompts(family):
    assert min(len(set(row)) for row in family.expected) > 30, "the reference repeats itself: it shows too little"
    assert generate_tokens(family.model, PROMPTS, max_new_tokens=NEW) == family.expected


# One pass over a finished text rotates all of it by longrope's long factors.
@pytest.mark.parametrize("family", [name for name in CONFIGS if "longrope" not in name], indirect=True)
def test_each_token_is_the_likeliest_by_a_margin_after_right_padded_texts_in_transformers(family):
    texts = [[*prompt, *row] for prompt, row in zip(PROMPTS, family.expected, strict=True)]
    ids, mask = padded(texts, left=False)
    with torch.no_grad():
        logits = family.reference(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).logits
    margins = []
    for row, prompt, expected in zip(logits, PROMPTS, family.expected, strict=True):
        two = row[len(prompt) - 1 : len(prompt) - 1 + NEW].topk(2)
        assert two.indices[:, 0].tolist() == expected
        margins.append((two.values[:, 0] - two.values[:, 1]).min())
    print(f"{family.name}: the likeliest leads by {min(margins):.1e} at least, logits' spread {logits.std():.2f}")
    assert min(margins) > 1e-4 * logits.std(), "two tokens are so near that rounding decides: take another seed"


def test_a_prompt_alone_continues_as_in_a_batch(llama):
    for prompt, expected in list(zip(PROMPTS, llama.expected, strict=True))[1:3]:
        assert generate_tokens(llama.model, [prompt], max_new_tokens=72) == [expected]


def test_a_cache_in_bfloat16_gives_the_logits_of_the_whole_text(llama):
    model, _ = sj.load(llama.folder, dtype="bfloat16")
    for prompts in (PROMPTS[:1], PROMPTS):
        for prompt, row in zip(prompts, generate_tokens(model, prompts, max_new_tokens=32), strict=True):
            logits = np.asarray(model(jnp.asarray([[*prompt, *row]])))[0, len(prompt) - 1 : -1]
            chosen = logits[np.arange(len(row)), row]
            # Rounding to bfloat16 may turn a near tie; what is chosen is never far from the likeliest.
            assert (logits.max(-1) - chosen).max() < 0.05 * logits.std()


@pytest.mark.rule(10)
def test_longropes_factors_are_chosen_anew_where_a_text_outgrows_the_short_ones(tmp_path):
    reference = random_model("phi3 longrope")
    reference.save_pretrained(tmp_path)
    model, _ = sj.load(tmp_path, dtype="float32")
    prompts = [[7] * n for n in (ORIGINAL - 16, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1)]
    expected = [row for prompt in prompts for row in continued(reference, [prompt], max_new_tokens=16)]
    assert generate_tokens(model, prompts, max_new_tokens=16) == expected
    [more] = continued(reference, prompts[:1], max_new_tokens=24)
    for end, batch_size in ((14, 1), (16, 4), (17, 4), (20, 1)):  # before, at and after the boundary
        eos = [more[end]]
        expected = [row[: row.index(eos[0])] if eos[0] in row else row for row in [more]]
        assert generate_tokens(model, prompts[:1], max_new_tokens=24, eos_ids=eos, batch_size=batch_size) == expected


def test_each_row_ends_at_its_own_end_token(llama):
    eos = [llama.expected[0][20], llama.expected[1][40]]
    expected = []
    for row in llama.expected:
        ends = [row.index(token) for token in eos if token in row]
        expected.append(row[: min(ends, default=72)])
    assert len(expected[0]) <= 20 and len({len(row) for row in expected}) > 2
    found = continued(llama.reference, PROMPTS, max_new_tokens=72, eos_token_id=eos)
    assert [row[: len(end)] for row, end in zip(found, expected, strict=True)] == expected
    assert all(set(row[len(end) :]) <= {0, *eos} for row, end in zip(found, expected, strict=True))
    assert generate_tokens(llama.model, PROMPTS, max_new_tokens=72, eos_ids=eos) == expected


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_is_transformers(llama, penalty):
    expected = continued(llama.reference, PROMPTS, max_new_tokens=72, repetition_penalty=penalty)
    assert expected != llama.expected
    assert generate_tokens(llama.model, PROMPTS, max_new_tokens=72, repetition_penalty=penalty) == expected


def test_the_limit_is_exact_within_a_bucket(llama):
    whole = generate_tokens(llama.model, PROMPTS, max_new_tokens=16)
    for limit in (1, 2, 15):
        assert generate_tokens(llama.model, PROMPTS, max_new_tokens=limit) == [row[:limit] for row in whole]


def test_batches_of_two_give_what_one_batch_gives_in_the_prompts_order(llama):
    options = {"max_new_tokens": 16, "temperature": 1.5, "top_k": 50, "seed": 3}
    whole = generate_tokens(llama.model, PROMPTS, **options)
    assert generate_tokens(llama.model, PROMPTS, batch_size=2, **options) == whole


def test_prompts_are_read_in_one_pass_and_decoding_stops_with_the_last_row(llama, monkeypatch):
    passes, extend = [], Decoder.extend

    def counted(self, tokens, *others, **named):
        jax.debug.callback(lambda: passes.append(tokens.shape[1]))
        return extend(self, tokens, *others, **named)

    monkeypatch.setattr(Decoder, "extend", counted)
    prompts = [[5] * (POSITIONS - 16), [6] * 10]  # a bucket that no other test has, and every position is used
    whole = generate_tokens(llama.model, prompts, max_new_tokens=16)
    jax.effects_barrier()
    assert list(map(len, whole)) == [16, 16] and passes == [POSITIONS] + [1] * 16
    passes.clear()
    rows = generate_tokens(llama.model, prompts, max_new_tokens=16, eos_ids=[row[4] for row in whole])
    jax.effects_barrier()
    assert max(map(len, rows)) <= 4 and passes == [POSITIONS] + [1] * (max(map(len, rows)) + 1)


def test_nothing_compiles_again_within_a_bucket(llama):
    options = [
        {},
        {"eos_ids": [7, 8]},
        {"max_new_tokens": 9},
        {"temperature": 0.7},
        {"temperature": 1, "top_k": 5, "max_new_tokens": 12},
        {"temperature": 2.0, "top_p": 0.9, "seed": 2**40, "eos_ids": [7]},
    ]
    generate_tokens(llama.model, PROMPTS, max_new_tokens=16)
    generate_tokens(llama.model, PROMPTS, max_new_tokens=16, temperature=1.0)
    generate_tokens(llama.model, PROMPTS, max_new_tokens=16, temperature=1.0, top_k=9)
    with compilations() as compiled:
        again, _ = sj.load(llama.folder, dtype="float32")
        for some in options:
            for model in (llama.model, again):  # the weights are arguments
                for prompts in (PROMPTS, [[9] * n for n in (31, 40, 64, 7, 8, 9, 2)]):
                    generate_tokens(model, prompts, **{"max_new_tokens": 16, **some})
        assert not compiled


def test_a_seed_gives_the_same_draws_and_another_seed_others(llama):
    def draw(seed, **options):
        return generate_tokens(llama.model, PROMPTS, max_new_tokens=16, temperature=1.5, seed=seed, **options)

    assert draw(1) == draw(1)
    assert all(one != two for one, two in zip(draw(1), draw(2), strict=True))
    twins = generate_tokens(llama.model, PROMPTS[1:2] * 5, max_new_tokens=16, temperature=1.5, seed=1)
    assert len(set(map(tuple, twins))) == 5, "the rows draw alike"
    hot = generate_tokens(llama.model, PROMPTS, max_new_tokens=16, temperature=1e4, seed=1)
    assert all(len(set(row)) > 8 for row in hot), "each step draws like the one before"


def test_the_likeliest_alone_is_drawn_with_top_k_one_and_with_a_tiny_top_p(llama):
    greedy = generate_tokens(llama.model, PROMPTS, max_new_tokens=16)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        drawn = generate_tokens(llama.model, PROMPTS, max_new_tokens=16, temperature=1.7, seed=5, **options)
        assert drawn == greedy


def expected_probabilities(logits, temperature, top_k, top_p, min_p=0.0):
    """transformers' warpers in its own order."""
    warpers = [transformers.TemperatureLogitsWarper(float(temperature))]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    scores = torch.tensor(np.array(logits, np.float32))[None]
    for warper in warpers:
        scores = warper(None, scores)
    return scores.double().softmax(-1)[0].numpy()


def assert_drawn_from(tokens, probabilities):
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any(), "a token that the filters exclude was drawn"
    expected = probabilities * len(tokens)
    common = expected >= 5  # the rest is counted as one
    counts, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    filled = expected > 0
    assert filled.sum() > 2
    assert scipy.stats.chisquare(counts[filled], expected[filled]).pvalue > 1e-3


WARPERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (2.5, 0, 1.0, 0.0),
    (1.5, 5, 1.0, 0.0),
    (1.5, 16, 1.0, 0.0),
    (1.0, 0, 0.7, 0.0),
    (2.0, 8, 0.6, 0.0),
    (1.5, 0, 1.0, 0.1),
    (1.5, 12, 0.9, 0.2),
]


@pytest.mark.rule(10)
@pytest.mark.parametrize(
    ("how", "few"), [(how, few) for how in WARPERS for few in ((0, 16, 64) if how[1] else (0,))], ids=str
)
def test_draws_have_the_distribution_of_transformers_warpers(how, few):
    logits = np.random.default_rng(0).normal(size=20).astype(np.float32) * 2
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = jax.jit(sample, static_argnames="few")(jnp.broadcast_to(logits, (len(keys), 20)), keys, *how, few=few)
    assert_drawn_from(np.asarray(tokens), expected_probabilities(logits, *how))


def test_a_models_draws_have_the_distribution_of_its_logits(llama):
    prompt, options = PROMPTS[0], {"temperature": 1.5, "top_k": 20, "top_p": 0.8}
    rows = generate_tokens(llama.model, [prompt] * 1024, max_new_tokens=1, batch_size=1024, **options)
    logits = llama.model(jnp.asarray([prompt]))[0, -1]
    assert_drawn_from(np.asarray([row[0] for row in rows]), expected_probabilities(logits, **options))


@pytest.mark.parametrize(("axes", "size"), [({"fsdp": 4, "tensor": 2}, 4), ({"data": 2, "fsdp": 4}, 8)], ids=str)
def test_a_mesh_gives_what_one_device_gives_with_rows_filled_up_to_divide(llama, axes, size, monkeypatch):
    expected = generate_tokens(llama.model, PROMPTS, max_new_tokens=16)
    model, _ = sj.load(llama.folder, mesh=sj.make_mesh(**axes), dtype="float32")
    assert len(model.layers[0].mlp.up_proj.kernel[...].sharding.device_set) == 8
    module, seen = sys.modules["specjax.generation.generate"], []
    prefill = module.decoding.prefill

    def spy(state, rows, **static):
        seen.append((len(rows.tokens), dict(jax.sharding.get_abstract_mesh().shape)))
        return prefill(state, rows, **static)

    monkeypatch.setattr(module.decoding, "prefill", spy)
    assert generate_tokens(model, PROMPTS[:3], max_new_tokens=16) == expected[:3]
    assert seen == [(size, dict.fromkeys(MESH_AXES, 1) | axes)]
    assert jax.sharding.get_abstract_mesh().empty


def test_an_adapter_is_chosen_by_name_for_the_call_alone(llama):
    model, _ = sj.load(llama.folder, dtype="float32")
    base = generate_tokens(model, PROMPTS, max_new_tokens=16)
    for name in ("hr", "tax"):
        sj.lora.inject(model, rank=2, targets=["q_proj", "down_proj"], name=name, seed=ord(name[0]))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "b":
            leaf[...] = jax.random.normal(jax.random.key(0), leaf.shape)  # other numbers in each adapter's row
    in_use = {}
    for name in ("hr", "tax"):
        sj.lora.use(model, name)
        in_use[name] = generate_tokens(model, PROMPTS, max_new_tokens=16)
    assert base != in_use["hr"] != in_use["tax"] != base
    for name in ("hr", "tax"):
        assert generate_tokens(model, PROMPTS, max_new_tokens=16, adapter=name) == in_use[name]
        assert generate_tokens(model, PROMPTS, max_new_tokens=16) == in_use["tax"], "the adapter in use changed"
    assert generate_tokens(model, PROMPTS, max_new_tokens=16, adapter=None) == base
    with pytest.raises(UserError, match=r"no adapter 'tex' is loaded.*Did you mean 'tax'"):
        generate_tokens(model, PROMPTS, max_new_tokens=16, adapter="tex")
    assert generate_tokens(model, PROMPTS, max_new_tokens=16) == in_use["tax"]


def test_text_in_gives_text_out(llama, tokenizer):
    prompts = ["1 and 2", "7 and 3 make"]
    rows = tokenizer(prompts)["input_ids"]
    found = generate_tokens(llama.model, rows, max_new_tokens=16, eos_ids=[tokenizer.eos_token_id])
    texts = sj.generate(llama.model, tokenizer, prompts, max_new_tokens=16)
    assert texts == [tokenizer.decode(row, skip_special_tokens=True) for row in found]
    assert all(texts) and texts[0] != texts[1]
    assert sj.generate(llama.model, tokenizer, []) == generate_tokens(llama.model, []) == []


def test_a_plain_prompt_keeps_the_tokenizers_special_tokens_once(llama, tokenizer, sent):
    ids = tokenizer("1 and 2", add_special_tokens=False)["input_ids"]
    sj.generate(llama.model, tokenizer, ["1 and 2", "<s>1 and 2", ""])
    assert sent.prompts == [[1, *ids], [1, *ids], [1]]
    tokenizer._tokenizer.post_processor = None
    sj.generate(llama.model, tokenizer, ["1 and 2"])
    assert sent.prompts == [ids]


def test_an_end_token_that_the_tokenizer_appends_is_taken_off_the_prompt(llama, tokenizer, sent):
    from tokenizers.processors import TemplateProcessing

    ids = tokenizer("1 and 2", add_special_tokens=False)["input_ids"]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 1), ("<|im_end|>", 3)]
    )
    sj.generate(llama.model, tokenizer, ["1 and 2"])
    assert sent.prompts == [[1, *ids]]


def test_a_chat_prompt_is_the_templates_users_turn_with_one_begin_token(llama, tokenizer, sent):
    sj.generate(llama.model, tokenizer, ["1 and 2"], chat=True, system="Add.")
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 and 2"}]
    assert sent.prompts == [tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]]
    assert sent.prompts[0].count(tokenizer.bos_token_id) == 1
    sj.generate(llama.model, tokenizer, ["1 and 2"], chat=True)
    assert tokenizer.decode(sent.prompts[0]) == "<s><|im_start|>user\n1 and 2<|im_end|>\n<|im_start|>assistant\n"


def test_end_tokens_are_the_generation_configs_then_the_configs_and_the_tokenizers(tokenizer):
    assert end_tokens(speaking(generation={"eos_token_id": [9, 8]}, hf={"eos_token_id": 7}), tokenizer) == [3, 8, 9]
    assert end_tokens(speaking(generation={"eos_token_id": 9}), tokenizer) == [3, 9]
    assert end_tokens(speaking(hf={"eos_token_id": 7}), tokenizer) == [3, 7]
    tokenizer.eos_token = None
    assert end_tokens(speaking(), tokenizer) == []
    assert end_tokens(speaking(generation={"eos_token_id": 0}, hf={"eos_token_id": 7}), tokenizer) == [0]
    with pytest.raises(UserError, match=r"eos_token_id\) token 1000 ends a text, but its embedding has 1000 rows"):
        end_tokens(speaking(generation={"eos_token_id": [3, 1000]}), tokenizer)


@pytest.mark.parametrize("template", BUILT_IN)
def test_a_chat_ends_at_the_token_with_which_the_template_ends_a_turn(tokenizer, template):
    extra = sorted({end for end in END_OF_TURN.values() if end} - {"<|im_end|>"})
    tokenizer.add_special_tokens({"eos_token": "</s>", "extra_special_tokens": extra})
    tokenizer.chat_template = resolve(tokenizer, template)
    end = END_OF_TURN[template] or "</s>"
    wanted = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    assert set(end_tokens(speaking(), tokenizer, chat=True)) == wanted
    assert end_tokens(speaking(), tokenizer) == [tokenizer.eos_token_id]


def test_a_template_that_does_not_tell_its_end_of_turn_leaves_the_eos_token(tokenizer):
    thinking = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    tokenizer.chat_template = thinking  # the prompt for an answer is no prefix of the answer's rendering
    assert end_tokens(speaking(), tokenizer, chat=True) == [tokenizer.eos_token_id]
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"  # opens, never closes
    assert end_tokens(speaking(), tokenizer, chat=True) == [tokenizer.eos_token_id]


def test_text_is_cut_at_the_first_stop_string_and_special_tokens_stop_the_computation(llama, tokenizer, sent):
    sent.answer = tokenizer("3, which is odd.", add_special_tokens=False)["input_ids"]
    assert sj.generate(llama.model, tokenizer, ["1 and 2"]) == ["3, which is odd."]
    assert sj.generate(llama.model, tokenizer, ["1 and 2"], stop=["odd", ", wh", "xyz"]) == ["3"]
    assert sent.eos_ids == [3]
    sj.generate(llama.model, tokenizer, ["1 and 2"], stop=["<|im_start|>", "odd"])
    assert sent.eos_ids == [3, tokenizer.convert_tokens_to_ids("<|im_start|>")]


@pytest.mark.rule(10)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_stop_string_of_several_tokens_ends_a_text_where_transformers_ends_it(llama, tokenizer, batch_size):
    prompts = ["1 and 2", "7 and 3 make", "4"]
    ids, mask = padded(tokenizer(prompts)["input_ids"], left=True)
    options = {"max_new_tokens": 72, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = llama.reference.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in whole]
    # Each from the middle of one text: it spans tokens and cuts them; and one that comes again and again.
    stop = [decoded[0][60:66], decoded[2][25:30], "never to be seen"]
    assert all(len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 1 for text in stop)
    options |= {"stop_strings": stop, "tokenizer": tokenizer}
    found = llama.reference.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    found = [tokenizer.decode(row, skip_special_tokens=True) for row in found]
    steps, decode = [], sys.modules["specjax.generation.generate"].decoding.decode
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda *given, **static: steps.append(result := decode(*given, **static)) or result  # noqa: E731
        patch.setattr(sys.modules["specjax.generation.generate"].decoding, "decode", spy)
        patch.setattr(sys.modules["specjax.generation.generate"], "end_tokens", lambda *_, **__: [])
        texts = sj.generate(llama.model, tokenizer, prompts, max_new_tokens=72, stop=stop, batch_size=batch_size)
    for text, theirs, all_of_it in zip(texts, found, decoded, strict=True):
        cut = min((at for at in map(all_of_it.find, stop) if at >= 0), default=len(all_of_it))
        assert text == all_of_it[:cut] and theirs.startswith(text)
        assert cut == len(all_of_it) or any(one in theirs for one in stop)
    if batch_size == 1:
        assert len(steps) < 3 * math.ceil(72 / LOOK_EVERY), "no text ended early"


def test_a_conversation_is_a_prompt(llama, tokenizer, sent):
    sj.generate(llama.model, tokenizer, [[{"role": "user", "content": "Hi"}], "Hi"], chat=True)
    assert sent.prompts[0] == sent.prompts[1]
    with pytest.raises(UserError, match="a prompt is a conversation, which a chat template renders: give chat=True"):
        sj.generate(llama.model, tokenizer, [[{"role": "user", "content": "Hi"}]])


def test_a_text_is_told_as_it_grows(llama, tokenizer):
    told = {0: [], 1: []}
    options = {"max_new_tokens": 9, "said": lambda row, text: told[row].append(text)}
    whole = sj.generate(llama.model, tokenizer, ["1 and 2", "7 and 3 make"], **options)
    for row, texts in told.items():
        assert len(texts) == 8 and len(set(texts)) > 4
        assert all(whole[row].startswith(text) for text in texts)
        assert [len(text) for text in texts] == sorted(len(text) for text in texts)


def test_a_repeated_stop_string_cuts_at_the_first(llama, tokenizer, sent):
    sent.answer = tokenizer("3; 4; 5; 6", add_special_tokens=False)["input_ids"]
    assert sj.generate(llama.model, tokenizer, ["1 and 2"], stop=[";"]) == ["3"]
    assert sent.options["ended"](0, sent.answer) and not sent.options["ended"](0, sent.answer[:1])
    assert sj.generate(llama.model, tokenizer, ["1 and 2"]) == ["3; 4; 5; 6"]
    assert sent.options["ended"] is None


def asked(sent, llama, tokenizer, generation, **options):
    """What generate_tokens is asked for under that generation_config.json."""
    model = speaking(generation)
    sj.generate(model, tokenizer, ["1"], **options)
    return Sampling(**{field.name: sent.options[field.name] for field in dataclasses.fields(Sampling)})


def test_the_generation_config_gives_the_defaults_and_arguments_win(llama, tokenizer, sent):
    qwen = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    assert asked(sent, llama, tokenizer, {}) == Sampling()
    assert asked(sent, llama, tokenizer, {"do_sample": True}) == Sampling(temperature=1, top_k=50)
    assert asked(sent, llama, tokenizer, {}, temperature=0.5) == Sampling(temperature=0.5, top_k=50)
    assert asked(sent, llama, tokenizer, {}, temperature=0.5, top_k=0) == Sampling(temperature=0.5)
    full = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    assert asked(sent, llama, tokenizer, qwen) == full
    assert asked(sent, llama, tokenizer, qwen, top_k=5, max_new_tokens=9) == dataclasses.replace(
        full, top_k=5, max_new_tokens=9
    )
    assert asked(sent, llama, tokenizer, qwen, temperature=0) == Sampling(repetition_penalty=1.1)
    assert asked(sent, llama, tokenizer, qwen | {"do_sample": False}) == Sampling(repetition_penalty=1.1)
    assert asked(sent, llama, tokenizer, qwen | {"min_p": 0.1, "max_new_tokens": 7}) == dataclasses.replace(
        full, min_p=0.1, max_new_tokens=7
    )
    assert asked(sent, llama, tokenizer, qwen, generation_config={}) == Sampling()
    assert asked(sent, llama, tokenizer, {"num_beams": 1, "typical_p": 0.5, "min_length": 0}) == Sampling()


def test_stop_strings_of_the_generation_config_end_a_text(llama, tokenizer, sent):
    sent.answer = tokenizer("3, which is odd.", add_special_tokens=False)["input_ids"]
    model = speaking({"stop_strings": ["odd"]})
    assert sj.generate(model, tokenizer, ["1"]) == ["3, which is "]
    assert sj.generate(model, tokenizer, ["1"], stop=[]) == ["3, which is odd."]
    model = speaking({"stop_strings": "which"})
    assert sj.generate(model, tokenizer, ["1"]) == ["3, "]


@pytest.mark.parametrize(
    ("generation", "sentence"),
    [
        (
            {"num_beams": 4, "no_repeat_ngram_size": 3},
            r"sets num_beams = 4, no_repeat_ngram_size = 3, which specjax does",
        ),
        (
            {"do_sample": True, "typical_p": 0.9},
            r"sets typical_p = 0.9, which specjax does not do: remove it there, or",
        ),
        ({"suppress_tokens": [1]}, r"suppress_tokens = \[1\]"),
        ({"do_sample": True, "top_p": 3}, r"top_p is 3: it must be above 0"),
        ({"max_new_tokens": "ten"}, r"max_new_tokens is ten: it must be a whole number"),
    ],
)
def test_a_generation_config_that_cannot_be_honoured_is_told(llama, tokenizer, sent, generation, sentence):
    with pytest.raises(UserError, match=sentence):
        asked(sent, llama, tokenizer, generation)
    assert asked(sent, llama, tokenizer, generation, generation_config={}) == Sampling()


@pytest.mark.rule(10)
def test_the_files_own_sampling_is_transformers_with_the_same_file(tmp_path, tokenizer_folder):
    """Draws of the first token under a generation_config.json, against transformers' processed scores."""
    reference = random_model("llama")
    reference.generation_config.update(do_sample=True, temperature=1.3, top_k=12, top_p=0.9, repetition_penalty=1.4)
    reference.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = sj.load(tmp_path, dtype="float32")
    prompt = "1 and 2 make"
    ids = torch.tensor(tokenizer([prompt])["input_ids"])
    found = reference.generate(ids, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    probabilities = found.scores[0].double().softmax(-1)[0].numpy()
    given = model.origin.generation_config
    how = vars(Sampling.of(given)) | {"max_new_tokens": 1}
    rows = generate_tokens(model, ids.tolist() * 1024, batch_size=1024, **how)
    assert 1 < (probabilities > 0).sum() <= 12
    assert_drawn_from(np.asarray([row[0] for row in rows]), probabilities)


def test_a_continuation_keeps_its_first_space_where_the_tokenizer_drops_a_texts_first(llama, sent):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{{ messages[0].content }}"
    sent.answer = [1]
    assert tokenizer.decode([1]) == "two"
    assert sj.generate(llama.model, tokenizer, ["one"]) == [" two"]
    assert sj.generate(llama.model, tokenizer, ["one"], chat=True) == ["two"]


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        (["1 " * 240], {}, r"prompt 1 has 481 tokens and max_new_tokens is 128, together more than the model's 512 p"),
        (["1", "2"], {"max_new_tokens": 511}, r"prompt 1 has 2 tokens and max_new_tokens is 511.*ask for fewer"),
        (["1"], {"max_new_tokens": 0}, r"max_new_tokens is 0: it must be a whole number of at least 1"),
        (["1"], {"temperature": -0.1}, r"temperature is -0.1: it must be 0 \(greedy\) or more"),
        (["1"], {"temperature": float("nan")}, r"temperature is nan"),
        (["1"], {"top_k": -1}, r"top_k is -1: it must be a whole number, 0 \(off\) or more"),
        (["1"], {"top_k": 5}, r"top_k is 5, and no token is drawn: give a temperature above 0 with it"),
        (["1"], {"temperature": 0, "top_p": 0.5}, r"top_p is 0.5, and no token is drawn"),
        (["1"], {"min_p": 2}, r"min_p is 2: it must be from 0 \(off\) to 1"),
        (["1"], {"repetition_penalty": 0}, r"repetition_penalty is 0: it must be above 0; 1 is off"),
        (["1"], {"top_p": 0.0}, r"top_p is 0.0: it must be above 0"),
        (["1"], {"top_p": 1.1}, r"top_p is 1.1: it must be above 0"),
        (["1"], {"batch_size": 0}, r"batch_size is 0: it must be at least 1"),
        (["1"], {"stop": [""]}, r"stop is \[''\]: it must be a list of strings, none of them empty"),
        (["1"], {"stop": "ab"}, r"stop is 'ab': it must be a list of strings"),
        (["1"], {"system": "Add."}, r"a system text needs a chat"),
        ("1", {}, r"prompts is one string where a list of strings is wanted"),
    ],
)
def test_bad_options_and_prompts_are_told(llama, tokenizer, prompts, options, sentence):
    with pytest.raises(UserError, match=sentence):
        sj.generate(llama.model, tokenizer, prompts, **options)


def test_an_unfit_tokenizer_is_told(llama, tokenizer):
    with pytest.raises(UserError, match=r"the model has no tokenizer"):
        sj.generate(llama.model, None, ["1"])
    with pytest.raises(UserError, match=r"prompt 2 has token 276 and the model knows 276: give the model's own token"):
        tokenizer.add_tokens(["brand-new"])
        sj.generate(llama.model, tokenizer, ["1", "brand-new"])
    tokenizer._tokenizer.post_processor = None
    with pytest.raises(UserError, match=r"prompt 2 is empty, and no begin-of-text token stands before it"):
        sj.generate(llama.model, tokenizer, ["1", ""])


def test_a_chat_without_a_template_or_against_it_is_told(llama, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('only even questions') }}"
    with pytest.raises(UserError, match=r"chat template refuses the prompt: only even questions"):
        sj.generate(llama.model, tokenizer, ["1"], chat=True)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template: .*chat=False.*built in are alpaca, chatml, gemma"):
        sj.generate(llama.model, tokenizer, ["1"], chat=True)
