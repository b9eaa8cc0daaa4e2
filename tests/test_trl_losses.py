"""The losses that `fit` logs are those that TRL's SFTTrainer logs, step by step: SFT and LoRA, unpacked and packed.

Both start from the same rows of text. The only thing ours takes from TRL is the order: which documents share a row, and
which rows share a micro-batch.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_fixtures import TEXTS, tokenizer
from helpers import metrics, torch_model

import specjax as sj
from specjax.data.pack import Plan

STEPS, MICRO_BATCHES, ROWS = 20, 4, 2  # ROWS of a micro-batch
LENGTH = 64
WARMUP, DECAY, CLIP = 4, 0.1, 1.0
RATES = {"sft": 2e-3, "lora": 1e-2}
CASES = [(kind, packing) for kind in RATES for packing in (False, True)]
NAMES = [f"{kind}-{'packed' if packing else 'unpacked'}" for kind, packing in CASES]
named = pytest.mark.parametrize(("kind", "packing"), CASES, ids=NAMES)


def pairs():
    """Prompts and completions: long and short ones, whose next word can mostly be told from the last."""
    rng = np.random.default_rng(0)
    words = TEXTS[0].split() + TEXTS[1].split()
    follows = rng.permutation(len(words))

    def text(count):
        at, found = int(rng.integers(len(words))), []
        for _ in range(count):
            found.append(words[at])
            at = int(follows[at]) if rng.random() < 0.9 else int(rng.integers(len(words)))
        return " ".join(found)

    sizes = [(28, 1), (9, 3), (4, 9), (1, 28)] * (STEPS * ROWS)
    return [{"prompt": text(asked), "completion": " " + text(answered)} for asked, answered in sizes]


def unequal(rows):
    """An order of whole steps, in each of which one micro-batch has the fewest loss tokens and one the most."""
    counts = np.array([sum(label >= 0 for label in labels) for labels in rows["labels"]])
    steps = len(counts) // (MICRO_BATCHES * ROWS)
    quarters = np.argsort(counts, kind="stable")[: steps * MICRO_BATCHES * ROWS].reshape(MICRO_BATCHES, steps, ROWS)
    return np.random.default_rng(1).permutation(np.moveaxis(quarters, 0, 1)).ravel()


@dataclass
class Course:
    """What TRL did: its log, the rows it trained on, and (summed nll, loss tokens, divisor) of each micro-batch."""

    log: list
    rows: list
    micro: np.ndarray
    base: str
    adapter: str


def trl_course(kind, packing, folder):
    """A run of SFTTrainer: its own preparation, packing, collator, loss, optimizer and schedule."""
    import peft
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Watched(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            count = int((inputs["labels"][:, 1:] != -100).sum())
            watched.append((loss.item() * num_items_in_batch.item(), count, num_items_in_batch.item()))
            return loss

    transformers.utils.logging.disable_progress_bar()
    watched, tok = [], tokenizer()
    model = torch_model(vocab_size=(len(tok) // 8 + 1) * 8)  # more than the tokenizer has, and even for the mesh
    model.save_pretrained(folder / "base")
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=MICRO_BATCHES,
        packing=packing,
        max_length=LENGTH,
        train_sampling_strategy="sequential",
        learning_rate=RATES[kind],
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Watched(
        model,
        config,
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tok,
        peft_config=lora if kind == "lora" else None,
    )
    trainer.train_dataset = trainer.train_dataset.select(unequal(trainer.train_dataset))
    if kind == "lora":
        trainer.model.save_pretrained(folder / "adapter")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are tiny, and on busy cores two threads wait for each other
    try:
        trainer.train()
    finally:
        torch.set_num_threads(threads)
    return Course(
        [row for row in trainer.state.log_history if "loss" in row],
        list(trainer.train_dataset),
        np.array(watched).reshape(STEPS, MICRO_BATCHES, 3),
        str(folder / "base"),
        str(folder / "adapter"),
    )


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """A function from a case to TRL's course, which is run once."""
    import warnings

    @cache
    def course(kind, packing):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trl_course(kind, packing, tmp_path_factory.mktemp(kind))

    return course


class InTrlsOrder:
    """Our tokens and masks of the same texts, with TRL's documents in each row and TRL's rows in each micro-batch."""

    def __init__(self, course):
        self.batch_size = ROWS * MICRO_BATCHES
        self.data = sj.data.load(pairs(), tokenizer(), length=LENGTH, batch_size=self.batch_size, packing=False)
        self.fingerprint = self.data.fingerprint
        tokens, mask, offsets = self.data.tokens, self.data.loss_mask, self.data.offsets.tolist()
        place = {}
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
            labels = np.where(mask[start : stop - 1], tokens[start + 1 : stop], -100)
            place[tuple(tokens[start:stop].tolist()), tuple(labels.tolist())] = start
        starts, sizes, rows = [], [], [0]
        for row in course.rows:
            ids, labels = row["input_ids"], row["labels"]
            for size in row.get("seq_lengths", [len(ids)]):
                starts.append(place[tuple(ids[:size]), tuple(labels[1:size])])  # or the ids and masks are not TRL's
                sizes.append(size)
                ids, labels = ids[size:], labels[size:]
            rows.append(len(starts))
        self.data.plan, self.num_rows = Plan(np.array(starts), np.array(sizes), np.array(rows)), len(course.rows)

    def row_ids(self, step):
        return (step * self.batch_size + np.arange(self.batch_size)) % self.num_rows

    def batch(self, step, rows=slice(None)):
        return self.data._assemble(self.row_ids(step)[rows])

    def micro_batches(self, step, count, rows):
        """TRL's micro-batches are neighbours."""
        order = np.arange(self.batch_size).reshape(count, -1)[:, rows].ravel()
        return {name: value.reshape(count, len(rows), -1) for name, value in self.batch(step, order).items()}

    def tokens_in(self, step):
        return int(np.count_nonzero(self.batch(step)["segment_ids"]))


def trls_rate(peak):
    """transformers' linear schedule: the first update is at 0."""

    def rate(step):
        return peak * jnp.where(step < WARMUP, step / WARMUP, (STEPS - step) / (STEPS - WARMUP))

    return rate


def our_course(course, kind, workdir, mesh=None):
    """The rows that `fit` logs."""
    model, _ = sj.load(course.base, dtype="float32", mesh=mesh)
    if kind == "lora":
        sj.lora.load(model, course.adapter)
    optimizer = sj.adamw(trls_rate(RATES[kind]), weight_decay=DECAY, clip_norm=CLIP)
    sj.fit(
        model,
        InTrlsOrder(course),
        optimizer,
        steps=STEPS,
        trainable=sj.LORA if kind == "lora" else sj.ALL,
        accumulate=MICRO_BATCHES,
        workdir=workdir,
        log_every=1,
        tensorboard=False,
    )
    return metrics(workdir)


def columns(rows, *names):
    """float64 [steps, names] of a log."""
    return np.array([[row[name] for name in names] for row in rows], np.float64)


def assert_same_course(found, course):
    """Losses and gradient norms within 1e-4 of themselves, the same rates and counts of loss tokens, at each step."""
    ours, trls = (columns(log, "loss", "grad_norm") for log in (found, course.log))
    furthest = np.abs(ours / trls - 1).max(0)
    print(f"losses differ by {furthest[0]:.1e} of themselves, gradient norms by {furthest[1]:.1e}")
    assert [row["step"] for row in found] == [row["step"] for row in course.log] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(ours, trls, rtol=1e-4)
    np.testing.assert_allclose(columns(found, "lr"), columns(course.log, "learning_rate"), rtol=1e-6)
    np.testing.assert_array_equal(columns(found, "loss_tokens")[:, 0], course.micro[..., 1].sum(1))


@pytest.mark.rule(2)
@named
def test_twenty_logged_losses_are_trls(trl, tmp_path, kind, packing):
    course = trl(kind, packing)
    trls = columns(course.log, "loss", "grad_norm")
    assert trls[-4:, 0].mean() < trls[:4, 0].mean() - 0.5  # it learns: the updates show in the losses
    assert trls[:, 1].max() > 1.5 * CLIP  # and so does the clip
    assert max(len(row.get("seq_lengths", "1")) for row in course.rows) > 2 * packing
    assert_same_course(our_course(course, kind, tmp_path), course)


@pytest.mark.rule(2)
@named
def test_trls_loss_is_the_mean_over_the_global_batch_and_no_mean_of_means(trl, kind, packing):
    course = trl(kind, packing)
    nll, counts, divisors = np.moveaxis(course.micro, -1, 0)
    np.testing.assert_array_equal(divisors, np.broadcast_to(counts.sum(1, keepdims=True), divisors.shape))
    logged = columns(course.log, "loss")[:, 0]
    np.testing.assert_allclose(nll.sum(1) / counts.sum(1), logged, rtol=1e-6)
    wrong = np.abs((nll / counts).mean(1) / logged - 1)
    print(f"a mean of means differs by {np.median(wrong):.1e} of the loss in the median")
    assert np.all(counts.max(1) > 4 * counts.min(1)) and np.median(wrong) > 3e-3


@pytest.mark.rule(2)
def test_a_mesh_of_devices_logs_trls_losses_too(trl, tmp_path):
    course = trl("sft", True)
    mesh = sj.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    assert_same_course(our_course(course, "sft", tmp_path, mesh), course)
