"""DPO is TRL's: losses, rewards and gradient norms, LoRA and full; the reference stays what it was."""

import warnings
from functools import cache

import jax
import numpy as np
import pytest
from data_fixtures import TEXTS, tokenizer
from flax import nnx
from helpers import BASE, assert_same_bits, data, metrics, model, on_device, on_devices, torch_model, weights
from run_fixtures import PAIRS, flags, specjax, write_base, write_rows

import specjax as sj
from specjax.errors import UserError
from specjax.train.dpo import REFERENCE

pytestmark = pytest.mark.usefixtures("steps_made_once")

STEPS, MICRO_BATCHES, ROWS, LENGTH = 10, 2, 2, 96
RATES = {"full": 1e-3, "lora": 1e-2}
CASES = [
    ("lora", {}),
    ("full", {}),
    ("lora", {"loss": "robust", "label_smoothing": 0.2, "beta": 0.3}),
    ("full", {"loss": "sigmoid_norm", "beta": 2.0}),
    ("lora", {"loss": "ipo"}),
    ("lora", {"loss": "hinge", "beta": 0.2}),
]


def pairs(count=STEPS * MICRO_BATCHES * ROWS):
    """Prompts with a longer and a shorter answer; the longer one is often the chosen one."""
    rng = np.random.default_rng(0)
    words = TEXTS[0].split() + TEXTS[1].split()
    text = lambda size: " ".join(rng.choice(words, size))  # noqa: E731
    made = []
    for _ in range(count):
        sides = [" " + text(int(rng.integers(1, 12))) for _ in range(2)]
        chosen, rejected = sorted(sides, key=len, reverse=rng.random() < 0.8)
        made.append({"prompt": text(int(rng.integers(2, 16))), "chosen": chosen, "rejected": rejected})
    return made


def trl_course(kind, options, folder):
    """(TRL's log of each step, the base's folder, the fresh adapter's)."""
    import peft
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    transformers.utils.logging.disable_progress_bar()
    tok = tokenizer()
    torch_model(vocab_size=(len(tok) // 8 + 1) * 8).save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_length=None,
        train_sampling_strategy="sequential",
        learning_rate=RATES[kind],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        beta=options.get("beta", 0.1),
        loss_type=options.get("loss", "sigmoid"),
        label_smoothing=options.get("label_smoothing", 0.0),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {"train_dataset": Dataset.from_list(pairs()), "processing_class": tok}
    trainer = DPOTrainer(base, args=config, peft_config=lora if kind == "lora" else None, **given)
    if kind == "lora":
        trainer.model.save_pretrained(folder / "adapter")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.train()
    finally:
        torch.set_num_threads(threads)
    return [row for row in trainer.state.log_history if "loss" in row], folder / "base", folder / "adapter"


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    @cache
    def course(number):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trl_course(*CASES[number], tmp_path_factory.mktemp("dpo"))

    return course


def in_trls_order(data):
    """The same data with TRL's rows in each step and micro-batch: the file's order."""
    data.row_ids = lambda step: (step * data.batch_size + np.arange(data.batch_size)) % data.num_rows
    order = np.arange(MICRO_BATCHES * ROWS).reshape(MICRO_BATCHES, ROWS)

    def micro_batches(step, count, rows):
        batch = data.batch(step, order[:, rows].ravel())
        return {name: value.reshape(count, len(rows), -1) for name, value in batch.items()}

    data.micro_batches = micro_batches
    return data


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{kind}-{o.get('loss', 'sigmoid')}" for kind, o in CASES])
def test_ten_steps_are_trls(trl, number, tmp_path):
    (kind, options), (log, base, adapter) = CASES[number], trl(number)
    made, _ = sj.load(base, dtype="float32")
    if kind == "lora":
        sj.lora.load(made, adapter)
    before = weights(made, BASE)
    rows = sj.data.preference(pairs(), tokenizer(), length=LENGTH, batch_size=ROWS * MICRO_BATCHES, packing=False)
    wider = rows.with_column

    def with_column(*given):  # the copy that bears the reference is asked for in TRL's order too
        return in_trls_order(wider(*given))

    rows.with_column = with_column
    sj.fit(
        made,
        in_trls_order(rows),
        sj.adamw(RATES[kind], clip_norm=1.0),
        steps=STEPS,
        trainable=sj.LORA if kind == "lora" else sj.ALL,
        objective=sj.dpo(**options),
        accumulate=MICRO_BATCHES,
        workdir=tmp_path,
        log_every=1,
        tensorboard=False,
    )
    lines = metrics(tmp_path)
    assert len(lines) == len(log) == STEPS and lines[0]["loss_pairs"] == ROWS * MICRO_BATCHES
    names = ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen")
    for name in (*names, "rewards/accuracies"):
        found, wanted = (np.array([row[name] for row in rows]) for rows in (lines, log))
        scale = 1.0 if name.startswith("rewards/") else 0.0  # at the first step they are 0
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * scale * np.abs(wanted).max(), err_msg=name)
    assert max(abs(line["rewards/margins"]) for line in lines) > 0.05
    if kind == "lora":
        assert_same_bits(weights(made, BASE), before)


def small(kind="lora", **options):
    """(a tiny model, its trainable filter, data) of twelve pairs of the test tokenizer."""
    tok = tokenizer()
    made = model(vocab_size=(len(tok) // 8 + 1) * 8)
    if kind == "lora":
        sj.lora.inject(made, rank=4, seed=0)
    options = {"length": 128, "batch_size": 2} | options
    return made, sj.LORA if kind == "lora" else sj.ALL, sj.data.preference(pairs(12), tok, **options)


def first_eval(made, trainable, data, objective):
    options = {"steps": 1, "trainable": trainable, "objective": objective, "eval_data": {"held": data}}
    return sj.fit(made, data, sj.adamw(1e-2), **options)


def test_pairs_that_share_a_row_have_the_losses_that_they_have_alone():
    objective = sj.dpo(loss="ipo")
    made, trainable, packed = small()
    for path, leaf in made_factors(made):
        leaf[...] = leaf[...] + 0.02 * np.random.default_rng(len(path)).standard_normal(leaf.shape)
    alone = small(packing=False)[2]
    assert packed.num_rows < alone.num_rows == 12
    found = [first_eval(made, trainable, data, objective).first_evals["held"] for data in (packed,)]
    other, trainable, _ = small()
    for path, leaf in made_factors(other):
        leaf[...] = leaf[...] + 0.02 * np.random.default_rng(len(path)).standard_normal(leaf.shape)
    found.append(first_eval(other, trainable, alone, objective).first_evals["held"])
    assert found[0]["pairs"] == found[1]["pairs"] == 12
    for name, value in found[1].items():
        assert found[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def made_factors(made):
    return nnx.to_flat_state(nnx.state(made, nnx.LoRAParam))


def test_an_adapter_that_adds_something_already_is_its_own_reference():
    """As TRL keeps a copy of an adapter that it trains on: the rewards begin at 0."""
    made, trainable, data = small()
    for _, leaf in made_factors(made):
        leaf[...] = leaf[...] + 0.05
    found = first_eval(made, trainable, data, sj.dpo())
    assert found.first_evals["held"]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert found.first_evals["held"]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert found.evals["held"]["rewards/margins"] != pytest.approx(0, abs=1e-4)  # and stays where it was


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_resumes_bit_for_bit_and_a_mesh_has_its_losses(tmp_path, kind):
    def run(folder, steps, **given):
        made, trainable, data = small(kind, batch_size=8, packing=False)
        if given:
            made = model(vocab_size=made.config.vocab_size, **given)
            if kind == "lora":
                sj.lora.inject(made, rank=4, seed=0)
        options = {"trainable": trainable, "objective": sj.dpo(), "workdir": tmp_path / folder, "log_every": 1}
        sj.fit(made, data, sj.adamw(1e-2), steps=steps, save_every=2, tensorboard=False, **options)
        return metrics(tmp_path / folder), weights(made)

    whole = run("whole", 4)
    run("cut", 2)
    cut = run("cut", 4)
    assert cut[0] == whole[0]
    assert_same_bits(cut[1], whole[1])
    if kind == "full":
        mesh, _ = run("mesh", 4, mesh=sj.make_mesh(fsdp=4, tensor=2))
        for one, other in zip(mesh, whole[0], strict=True):
            for name in ("loss", "grad_norm", "logps/chosen"):
                assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_the_reference_is_asked_without_a_gradient_and_in_one_pass_where_it_is_a_column():
    made, _, data = small("full")
    wider = data.with_column(REFERENCE, np.zeros(data.tokens.shape))
    assert jax.eval_shape(lambda b: sj.dpo()(made, b)["loss"][0], wider.batch(0)).shape == (1,)
    fresh, _, _ = small()
    texts = [
        str(jax.make_jaxpr(lambda m, b=b: sj.dpo()(m, b)["loss"][0])(m))
        for m, b in ((made, on_device(wider.batch(0))), (fresh, on_device(data.batch(0))))
    ]
    assert texts[1].count("scan[") == 2 * texts[0].count("scan[")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "sigmod"}, "loss 'sigmod': choose one of sigmoid, .* Did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta 0.0: it must be above 0"),
        ({"label_smoothing": 0.1}, "label_smoothing 0.1: it is of loss 'robust'"),
        (
            {"label_smoothing": 0.5, "loss": "robust"},
            "label_smoothing 0.5: it is of loss 'robust', and from 0",
        ),
    ],
)
def test_what_cannot_be_is_said(options, said):
    with pytest.raises(UserError, match=said):
        sj.dpo(**options)


def test_data_without_pairs_is_refused():
    made = model()
    sj.lora.inject(made, rank=2)
    with pytest.raises(UserError, match="dpo wants pairs"):
        sj.fit(made, data(), sj.adamw(1e-3), steps=1, trainable=sj.LORA, objective=sj.dpo())


@on_devices(1)
@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_the_command_trains_evaluates_and_exports_pairs(tmp_path, capsys, trainable):
    base, rows = write_base(tmp_path / "base"), []
    for row, other in zip(PAIRS, PAIRS[7:] + PAIRS[:7], strict=True):
        sides = {"chosen": row["response"], "rejected": other["response"]}
        said = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
        rows.append({"prompt": [{"role": "user", "content": row["instruction"]}], **said})
    train, held = write_rows(tmp_path / "train.jsonl", rows[:-16]), write_rows(tmp_path / "held.jsonl", rows[-16:])
    more = {"data.eval.held": held, "data.length": 128, "objective": "dpo"}
    given = flags(base, tmp_path / "run", "dpo" if trainable == "lora" else "sft", train, **more)
    assert specjax("train", *given) == 0
    lines = [line for line in metrics(tmp_path / "run") if "eval/held/loss" in line]
    assert lines[0]["eval/held/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert abs(lines[-1]["eval/held/loss"] - lines[0]["eval/held/loss"]) > 0.01
    capsys.readouterr()
    assert specjax("eval", *given) == 0
    shown = capsys.readouterr().out
    assert f"{lines[-1]['eval/held/loss']:.4f}" in shown and "rewards/margins" in shown and "perplexity" not in shown
    name = "adapter_model.safetensors" if trainable == "lora" else "model.safetensors"
    assert (tmp_path / "run" / "export" / name).is_file()
    # Pairs and the next token's loss: the rejected answers would be learnt.
    assert (
        specjax("train", *given[:1], f"--workdir={tmp_path / 'other'}", *given[2:], "--config.objective=next_token")
        == 2
    )
    assert "set config.objective=dpo" in capsys.readouterr().err
