"""Generation: token for token transformers' own, drawn from the right distribution, compiled once."""

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

import specjax as sj
from demo.tokenizer import train_tokenizer
from specjax.data.chat import BUILT_IN, resolve
from specjax.errors import UserError
from specjax.generate import end_tokens, generate_tokens, sample
from specjax.models import Decoder

VOCAB, WINDOW, POSITIONS, NEW = 276, 24, 256, 72
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,  # wide, so that the likeliest token is told from the next
    "bos_token_id": 1,
    "eos_token_id": 3,
    "dtype": torch.float32,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=12, sliding_window=WINDOW),
}
torch.set_num_threads(1)
PROMPTS = [np.random.default_rng(i).integers(4, VOCAB, n).tolist() for i, n in enumerate((5, 61, 33, 1, 17))]


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
def family(request, tmp_path_factory, tokenizer_folder):
    """(transformers' model, its folder, ours, what transformers' continues PROMPTS with, ends of text ignored)."""
    torch.manual_seed(2)
    reference = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    model, _ = sj.load(folder, dtype="float32")
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    found = reference.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    first, second = torch.stack(found.scores).topk(2).values.unbind(-1)
    assert (first - second).min() > 1e-3, "two tokens are so near that rounding decides: take another seed"
    return SimpleNamespace(
        reference=reference, folder=folder, model=model, expected=found.sequences[:, longest:].tolist()
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama alone, for what is the same in every family."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("alone")
    transformers.LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=sj.load(folder, dtype="float32")[0])


@pytest.fixture
def sent(monkeypatch):
    """The prompts and end tokens that `generate` hands on, and what it then gets: `sent.answer`."""
    record = SimpleNamespace(answer=[], prompts=None, eos_ids=None)

    def fake(model, prompts, *, eos_ids, **options):
        record.prompts, record.eos_ids = prompts, eos_ids
        return [list(record.answer) for _ in prompts]

    monkeypatch.setattr(sys.modules["specjax.generate"], "generate_tokens", fake)
    return record


def speaking(model=None, generation=(), hf=()):
    return SimpleNamespace(config=SimpleNamespace(generation=dict(generation), hf=dict(hf)))


def test_greedy_equals_transformers_token_for_token_on_unequal_prompts(family):
    assert min(len(set(row)) for row in family.expected) > NEW // 2, "the reference repeats itself: it shows too little"
    assert generate_tokens(family.model, PROMPTS, max_new_tokens=NEW) == family.expected


def test_a_prompt_alone_continues_as_in_a_batch(family):
    for prompt, expected in list(zip(PROMPTS, family.expected, strict=True))[1:3]:
        assert generate_tokens(family.model, [prompt], max_new_tokens=NEW) == [expected]


def test_each_row_ends_at_its_own_end_token(family):
    eos = [family.expected[0][20], family.expected[1][40]]
    expected = []
    for row in family.expected:
        ends = [row.index(token) for token in eos if token in row]
        expected.append(row[: min(ends, default=NEW)])
    assert len(expected[0]) <= 20 and len({len(row) for row in expected}) > 2
    assert generate_tokens(family.model, PROMPTS, max_new_tokens=NEW, eos_ids=eos) == expected


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

    def counted(self, tokens, *others):
        jax.debug.callback(lambda: passes.append(tokens.shape[1]))
        return extend(self, tokens, *others)

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
    compiled = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 41)(1.0)
        assert len(compiled) == 1, "the count does not see compilations"
        again, _ = sj.load(llama.folder, dtype="float32")
        for some in options:
            for model in (llama.model, again):  # the weights are arguments
                for prompts in (PROMPTS, [[9] * n for n in (31, 40, 64, 7, 8, 9, 2)]):
                    generate_tokens(model, prompts, **{"max_new_tokens": 16, **some})
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


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


def expected_probabilities(logits, temperature, top_k, top_p):
    """transformers' warpers in its own order."""
    warpers = [transformers.TemperatureLogitsWarper(float(temperature))]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
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


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (2.5, 0, 1.0), (1.5, 5, 1.0), (1.5, 100, 1.0), (1.0, 0, 0.7), (2.0, 8, 0.6)],
)
def test_draws_have_the_distribution_of_transformers_warpers(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=20).astype(np.float32) * 2
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = jax.jit(sample)(jnp.broadcast_to(logits, (len(keys), 20)), keys, temperature, top_k, top_p)
    assert_drawn_from(np.asarray(tokens), expected_probabilities(logits, temperature, top_k, top_p))


def test_a_models_draws_have_the_distribution_of_its_logits(llama):
    prompt, options = PROMPTS[0], {"temperature": 1.5, "top_k": 20, "top_p": 0.8}
    rows = generate_tokens(llama.model, [prompt] * 1024, max_new_tokens=1, batch_size=1024, **options)
    logits = llama.model(jnp.asarray([prompt]))[0, -1]
    assert_drawn_from(np.asarray([row[0] for row in rows]), expected_probabilities(logits, **options))


@pytest.mark.parametrize(("axes", "size"), [({"fsdp": 4, "tensor": 2}, 4), ({"data": 2, "fsdp": 4}, 8)], ids=str)
def test_a_mesh_gives_what_one_device_gives_with_rows_filled_up_to_divide(llama, axes, size, monkeypatch):
    expected = generate_tokens(llama.model, PROMPTS, max_new_tokens=16)
    model, _ = sj.load(llama.folder, mesh=sj.make_mesh(**axes), dtype="float32")
    assert len(model.layers.mlp.up_proj.kernel[...].sharding.device_set) == 8
    module, seen = sys.modules["specjax.generate"], []
    program = module._program

    def spy(state, rows, *settings, **static):
        seen.append((len(rows.tokens), dict(jax.sharding.get_abstract_mesh().shape)))
        return program(state, rows, *settings, **static)

    monkeypatch.setattr(module, "_program", spy)
    assert generate_tokens(model, PROMPTS[:3], max_new_tokens=16) == expected[:3]
    assert seen == [(size, {"data": 1, "fsdp": 1, "tensor": 1} | axes)]
    assert jax.sharding.get_abstract_mesh().empty


def test_an_adapter_is_chosen_by_name_for_the_call_alone(llama):
    model, _ = sj.load(llama.folder, dtype="float32")
    base = generate_tokens(model, PROMPTS, max_new_tokens=16)
    for name in ("hr", "tax"):
        sj.lora.inject(model, rank=2, targets=["q_proj", "down_proj"], name=name, seed=ord(name[0]))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "b":
            leaf[...] = jax.random.normal(jax.random.key(ord(path[-2][0])), leaf.shape)
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


@pytest.mark.parametrize("template", BUILT_IN)
def test_a_chat_ends_at_the_token_with_which_the_template_ends_a_turn(tokenizer, template):
    tokenizer.add_special_tokens({"eos_token": "</s>", "extra_special_tokens": ["<|eot_id|>"]})
    tokenizer.chat_template = resolve(tokenizer, template)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(template, "</s>")
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
        (["1 " * 120], {}, r"prompt 1 has 241 tokens and max_new_tokens is 64, together more than the model's 256 pos"),
        (["1", "2"], {"max_new_tokens": 255}, r"prompt 1 has 2 tokens and max_new_tokens is 255.*ask for fewer"),
        (["1"], {"max_new_tokens": 0}, r"max_new_tokens is 0: it must be at least 1"),
        (["1"], {"temperature": -0.1}, r"temperature is -0.1: it must be 0 \(greedy\) or more"),
        (["1"], {"temperature": float("nan")}, r"temperature is nan"),
        (["1"], {"top_k": -1}, r"top_k is -1: it must be 0 \(off\) or more"),
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
    with pytest.raises(UserError, match=r"no chat template: .*--raw.*built in are alpaca, chatml, llama3"):
        sj.generate(llama.model, tokenizer, ["1"], chat=True)
