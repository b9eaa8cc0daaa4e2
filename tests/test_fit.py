"""The loop: what is logged, saved and resumed, and that nothing of it shows in the numbers."""

import dataclasses
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fit_job
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from fit_job import STEPS, Hooked, Stop, job, stop, subject
from helpers import BASE, assert_same_bits, data, metrics, model, weights

import specjax as sj
from specjax import process, sharding
from specjax.errors import UserError
from specjax.models import layers
from specjax.train import fit, memory, session
from specjax.train.checkpoint import Checkpoints
from specjax.train.evaluate import evaluate
from specjax.train.session import Session
from specjax.train.step import split

pytestmark = pytest.mark.usefixtures("steps_made_once")

KINDS = ("full", "lora")
OWN = {"rms_norm_eps": 1e-3}  # of a model whose step no other test has made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> (metrics, weights, workdir) of the run that nothing interrupts."""
    found = {}
    for kind in KINDS:
        workdir = tmp_path_factory.mktemp(kind)
        _, trained = job(workdir, kind)
        found[kind] = (metrics(workdir), trained, workdir)
    return found


def assert_as_whole(workdir, trained, whole):
    assert metrics(workdir) == whole[0]
    assert_same_bits(trained, whole[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_job_learns_and_logs_what_it_should(whole, kind):
    rows, trained, _ = whole[kind]
    train = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train] == [1, *range(2, STEPS + 1, 2)]
    assert [row["step"] for row in rows if "eval/heldout/loss" in row] == [0, 8, 16, 24]
    assert {"loss", "loss_tokens", "accuracy", "grad_norm", "lr", "tokens"} <= set(train[0])
    assert train[-1]["loss"] < train[0]["loss"] - 0.05
    assert rows[-1]["eval/heldout/loss"] < rows[0]["eval/heldout/loss"] - 0.05


@pytest.mark.parametrize(("kind", "at"), [("full", 2), ("lora", 5), ("full", 16), ("lora", 23)])
def test_a_run_that_an_error_stopped_resumes_bit_for_bit(tmp_path, whole, kind, at):
    with pytest.raises(Stop):
        job(tmp_path, kind, Hooked(data(), at, stop))
    result, trained = job(tmp_path, kind)
    assert result.step == STEPS
    assert_as_whole(tmp_path, trained, whole[kind])


def test_a_finished_run_called_again_changes_nothing(whole):
    rows, trained, workdir = whole["full"]
    result, again = job(workdir)
    assert result.step == STEPS
    assert_as_whole(workdir, again, (rows, trained))


def test_evaluating_saving_and_logging_change_no_weight(whole):
    result, trained = job(None, eval_data={}, save_every=0, log_every=100)
    assert result.evals == {} and result.best_step is None
    assert_same_bits(trained, whole["full"][1])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the job as a program; the programs of this file share what they compile, and the runs in here do not."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}

    def begin(workdir, *more):
        command = [sys.executable, "-u", fit_job.__file__, str(workdir), *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def run_until_killed(process, lines, seconds):
    """SIGKILL, so many seconds after so many lines of the log; returns the exit status."""
    for line in process.stdout:
        lines -= line.startswith("step ")
        if lines == 0:
            break
    time.sleep(seconds)
    process.kill()
    process.stdout.close()
    return process.wait()


@pytest.mark.rule(8)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_moments_resumes_bit_for_bit(tmp_path, whole, start, kind):
    """Killed, gone on with by another process, killed again, and brought to its end in here."""
    last, drawn = [], random.Random(kind)
    for _ in range(int(os.environ.get("KILLS", 2))):
        status = run_until_killed(start(tmp_path, kind), drawn.randint(1, 5), drawn.random() / 3)
        last.append(Checkpoints(tmp_path / "checkpoints").latest())  # without one that it was killed while deleting
        if status == 0:  # it had come to its end
            break
        assert status == -signal.SIGKILL
    _, trained = job(tmp_path, kind)
    print("the last checkpoint at each kill:", last)
    assert_as_whole(tmp_path, trained, whole[kind])


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, whole, start):
    process = start(tmp_path, "full", "limit")
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 1, out
    [said] = [line for line in out.splitlines() if line.startswith("specjax.errors.UserError: ")]
    assert "could not be written (File too large); the checkpoint of step 9 is whole" in said
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest() == 9
    _, trained = job(tmp_path)
    assert_as_whole(tmp_path, trained, whole["full"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_run_goes_on_from_there(tmp_path, whole, number):
    before = signal.getsignal(number)
    result, stopped = job(tmp_path, "lora", Hooked(data(), 11, lambda: os.kill(os.getpid(), number)))
    assert result.stopped == "signal" and 11 <= result.step < STEPS
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest() == result.step
    assert signal.getsignal(number) == before
    result, trained = job(tmp_path, "lora")
    assert result.stopped == "" and result.step == STEPS
    assert_as_whole(tmp_path, trained, whole["lora"])


def test_a_second_ctrl_c_means_now_and_the_model_keeps_its_weights(tmp_path):
    made, before = model(), signal.getsignal(signal.SIGINT)

    def sample(of):
        """While the second evaluation goes on, in the thread that signals come to."""
        if (tmp_path / "checkpoints" / "2").exists():
            signal.raise_signal(signal.SIGTERM)  # one of each is not twice
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it went on")
        return []

    with pytest.raises(KeyboardInterrupt):
        quick(made, steps=12, save_every=2, eval_every=6, sample=sample, workdir=tmp_path)
    assert signal.getsignal(signal.SIGINT) == before
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest() is not None
    assert np.isfinite(np.asarray(made(data().batch(0)["tokens"]))).all()


@pytest.mark.parametrize("when", ["compiling", "evaluating"])
def test_a_signal_before_the_first_step_ends_at_once(tmp_path, monkeypatch, when):
    """It waits for no compiler, and the model has the weights that it had."""
    forever, (of, before) = threading.Event(), (model(), weights(model()))

    class Lowered:
        def compile(self, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            forever.wait()

    options = {"measure": lambda of: signal.raise_signal(signal.SIGTERM)}
    if when == "compiling":
        monkeypatch.setattr(session.steps_lib, "lower", lambda *given: Lowered())
        options = {"eval_data": {}}
    result, _ = quick(of, workdir=tmp_path, **options)
    forever.set()
    assert (result.stopped, result.step, result.tokens) == ("signal", 0, 0)
    assert not list((tmp_path / "checkpoints").iterdir()) and not list(tmp_path.glob("*.partial"))
    assert_same_bits(weights(of), before)


def test_a_loss_far_above_the_ones_before_names_its_rows(capsys):
    rows = data()

    class Odd:
        """At step 30 the labels are another's."""

        def __getattr__(self, name):
            return getattr(rows, name)

        def micro_batches(self, step, *given):
            batch = rows.micro_batches(step, *given)
            return batch | {"targets": (batch["targets"] + 64) % 128} if step == 30 else batch

    quick(rows=Odd(), steps=33, rate=2e-2, eval_data={}, log_every=100)
    [said] = [line for line in capsys.readouterr().out.splitlines() if "which `specjax data` shows" in line]
    ids = ",".join(map(str, sorted(rows.row_ids(30).tolist())))
    assert re.fullmatch(
        rf"step 31: the loss is \d+\.\d+, and was .* before; its rows, which `specjax data` shows: {ids}", said
    )


@pytest.mark.rule(11)
def test_the_step_compiles_once(tmp_path, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        job(tmp_path, steps=9, eval_every=3, save_every=2, log_every=1, of=(model(**OWN), sj.ALL))
    compiled = [record.getMessage().split()[1] for record in caplog.records if record.getMessage()[:10] == "Compiling "]
    assert compiled.count("jit(train_step)") == 1, compiled
    assert compiled.count("jit(eval_step)") == 1, compiled


def quick(of=None, rows=None, *, rate=5e-3, steps=12, trainable=sj.ALL, **options):
    """A run of the plain step: (result, model)."""
    of, options = of or model(), {"tensorboard": False, "eval_data": {"heldout": data(seed=1, documents=6)}} | options
    return sj.fit(of, rows or data(), sj.adamw(rate), steps=steps, trainable=trainable, **options), of


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path):
    turns = lambda step: jnp.where(step < 4, 5e-3, -5e-3)  # noqa: E731
    result, trained = quick(rate=turns, eval_every=4, save_every=3, workdir=tmp_path)
    assert result.best_step == 4
    kept = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert (kept.pick("best"), kept.pick("last"), kept.pick("4")) == (4, 12, 4)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [4, 12]
    with pytest.raises(UserError, match="no checkpoint '7': there are 4, 12"):
        kept.pick("7")
    best = kept.load(4, {"trainable": split(trained, sj.ALL)[1]})["trainable"]
    best = {sharding.path_name(path): value for path, value in best.items()}
    assert any(np.any(np.asarray(best[name]) != value) for name, value in weights(trained).items())


def test_a_run_that_gets_no_better_stops_early_and_stays_stopped(tmp_path):
    again = None
    for _ in range(2):
        result, trained = quick(rate=-1e-3, eval_every=2, patience=2, workdir=tmp_path)
        assert (result.stopped, result.step) == ("patience", 4)
        found = (metrics(tmp_path), weights(trained))
        if again:
            assert found[0] == again[0]
            assert_same_bits(found[1], again[1])
        again = found


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(tmp_path):
    breaks = lambda step: jnp.where(step < 6, 5e-3, jnp.inf)  # noqa: E731
    with pytest.raises(UserError, match=r"^step 8: the loss is nan .* the last good checkpoint is step 6: lower"):
        quick(rate=breaks, save_every=3, log_every=100, workdir=tmp_path)
    assert all(None not in row.values() for row in metrics(tmp_path))
    result, trained = quick(rate=lambda step: 5e-3, workdir=tmp_path)
    assert result.step == 12 and np.isfinite(np.asarray(trained(data().batch(0)["tokens"]))).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "step 0: the loss on 'heldout' is nan"), ({"eval_data": None}, "step 1: the loss is nan")],
)
def test_a_model_with_a_weight_that_is_not_a_number_does_not_train(tmp_path, options, said):
    poisoned = model()
    poisoned.norm.scale[...] = poisoned.norm.scale[...].at[3].set(np.nan)
    with pytest.raises(UserError, match=f"^{said}.*no checkpoint was saved yet"):
        quick(poisoned, workdir=tmp_path, **options)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
def test_checkpoints_hold_the_weights_of_their_step_though_buffers_are_donated_right_after(tmp_path, monkeypatch, mesh):
    saved, save = {}, Checkpoints.save

    def spy(self, step, state, *more):
        saved[step] = [np.array(x, copy=True) for x in jax.tree.leaves(state)]
        save(self, step, state, *more)

    latest = ocp.training.preservation_policies.LatestN
    monkeypatch.setattr(Checkpoints, "save", spy)
    monkeypatch.setattr(ocp.training.preservation_policies, "LatestN", lambda n: latest(100))
    wide = model(mesh=mesh and sj.make_mesh(**mesh), hidden_size=128, intermediate_size=512)  # seconds to write
    quick(wide, steps=8, save_every=1, eval_data={}, workdir=tmp_path)
    assert sorted(saved) == list(range(1, 9))
    kept, params = Checkpoints(tmp_path / "checkpoints", read_only=True), split(wide, sj.ALL)[1]
    like = {"trainable": params, "opt_state": sj.adamw(5e-3).init(params)}
    like = jax.tree.map(lambda x: x if hasattr(x, "sharding") else jnp.asarray(x), like)
    for step, wanted in saved.items():
        for found, value in zip(jax.tree.leaves(kept.load(step, like)), wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(found), value, err_msg=f"step {step}")


@pytest.mark.rule(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loras_base_is_bit_identical_afterwards_and_its_factors_moved(dtype):
    made = model(dtype=dtype, param_dtype=dtype)
    before = weights(made)
    sj.lora.inject(made, rank=4, seed=1)
    fresh = weights(made, sj.LORA)
    result, _ = quick(made, trainable=sj.LORA, steps=3)
    assert_same_bits(weights(made, BASE), before)
    factors = weights(made, sj.LORA)
    assert result.trainable_parameters == sum(value.size for value in factors.values())
    for name, value in factors.items():
        assert value.dtype == np.float32
        assert np.any(value != fresh[name]), name


@pytest.mark.rule(2)
def test_full_training_makes_float32_masters_of_every_weight():
    made = model(dtype="bfloat16", param_dtype="bfloat16")
    before = weights(made)
    quick(made, steps=2)
    for name, value in weights(made).items():
        assert value.dtype == np.float32
        assert np.any(value != before[name].astype(np.float32)), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: {"rows": data(seed=9)}, "another data fingerprint"),
        (lambda: {"of": rebased("another")}, "another base fingerprint"),
    ],
)
def test_a_run_on_other_data_or_another_base_is_not_resumed(tmp_path, change, said):
    quick(rebased("one"), steps=2, workdir=tmp_path)
    kept = weights(changed := change().get("of") or rebased("one"))
    with pytest.raises(UserError, match=f"{said}.*start in a new workdir"):
        quick(changed, **{k: v for k, v in change().items() if k != "of"}, steps=4, workdir=tmp_path)
    assert_same_bits(weights(changed), kept)


def rebased(fingerprint):
    made = model()
    made.origin = dataclasses.replace(made.origin, fingerprint=fingerprint)
    return made


def test_a_filter_that_selects_nothing_is_refused():
    with pytest.raises(UserError, match="selects no parameter: inject LoRA first, or train specjax.ALL"):
        quick(trainable=sj.LORA)


def test_several_adapters_at_once_are_refused():
    made = model()
    sj.lora.inject(made, rank=2, name="hr")
    sj.lora.inject(made, rank=2, name="law")
    with pytest.raises(UserError, match="adapters hr, law are loaded: unload all but the one to train"):
        quick(made, trainable=sj.LORA)


def test_a_batch_that_does_not_divide_into_micro_batches_is_refused():
    with pytest.raises(UserError, match="8 rows does not divide into 3 micro-batches"):
        quick(accumulate=3)


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_error_the_model_has_the_weights_of_its_last_step(tmp_path, kind):
    made, trainable = subject(kind)
    with pytest.raises(Stop):
        quick(made, Hooked(data(), 3, stop), trainable=trainable, workdir=tmp_path, save_every=3)
    kept, params = Checkpoints(tmp_path / "checkpoints", read_only=True), split(made, trainable)[1]
    found = kept.load(3, {"trainable": params})["trainable"]
    found = {sharding.path_name(path): value for path, value in found.items()}
    assert_same_bits(weights(made, trainable), {name: np.asarray(value) for name, value in found.items()})
    assert np.isfinite(np.asarray(made(data().batch(0)["tokens"]))).all()


def test_samples_are_taken_from_the_weights_of_the_moment(tmp_path):
    tokens, seen = data().batch(0)["tokens"], []

    def sample(of):
        seen.append(np.asarray(of(tokens)))
        return [("a prompt", f"answer {len(seen)}")]

    made = model()
    first = np.asarray(made(tokens))
    quick(made, steps=4, eval_every=2, sample=sample, workdir=tmp_path)
    assert len(seen) == 3
    np.testing.assert_array_equal(seen[0], first)
    np.testing.assert_array_equal(seen[2], np.asarray(made(tokens)))
    assert np.abs(seen[1] - seen[2]).max() > 1e-3
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [(row["step"], row["text"]) for row in lines] == [(0, "answer 1"), (2, "answer 2"), (4, "answer 3")]


@pytest.mark.rule(11)
def test_a_steps_numbers_are_read_once_the_next_one_was_given_to_the_device(monkeypatch):
    """So the device never waits for the host: not in the steps between two evaluations or saves."""
    events = []

    class Number(float):
        def __new__(cls, value, step):
            made = super().__new__(cls, value)
            made.step = step
            return made

        def __float__(self):
            events.append(("read", self.step))
            return super().__add__(0.0)

    class Spied(Session):
        def step(self, step, *more):
            events.append(("given", step + 1))
            found = super().step(step, *more)
            return {k: v if k == "tokens" else Number(np.asarray(v).item(), step + 1) for k, v in found.items()}

    monkeypatch.setattr(fit, "Session", Spied)
    sj.fit(model(), data(), sj.adamw(1e-3), steps=6, log_every=1)
    for step in range(1, 6):
        assert events.index(("read", step)) > events.index(("given", step + 1))


def test_the_step_is_told_how_many_documents_a_row_has(monkeypatch):
    told, plain = set(), layers.attend
    monkeypatch.setattr(layers, "attend", lambda *qkv, **how: told.add(how["documents"]) or plain(*qkv, **how))
    rows = data()
    sj.fit(model(**OWN), rows, sj.adamw(1e-3), steps=1, tensorboard=False)
    assert told == {rows.most_documents} and rows.most_documents > 1


def test_what_compiling_took_goes_back_to_the_system_before_the_first_step(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(process, "return_freed_memory", lambda: asked.append(0))
    compiled = Session._compile

    def compile_(run, batch):
        found = compiled(run, batch)
        assert run.result.step == 0 and asked == [0]
        return found

    monkeypatch.setattr(Session, "_compile", compile_)
    quick(steps=2)
    assert asked == [0]


def test_a_batch_of_which_nothing_counts_is_told_and_counted_and_makes_no_nan(tmp_path, capsys):
    rows = data()
    first = rows.row_ids(0)
    pieces = np.concatenate([np.arange(*rows.plan.rows[row : row + 2]) for row in first])
    for start, size in zip(rows.plan.starts[pieces], rows.plan.sizes[pieces], strict=True):
        rows._trained[start : start + size] = False
    result, trained = job(tmp_path, rows=rows, steps=2, log_every=1, eval_data={})
    assert result.empty_steps == 1 and all(np.isfinite(value).all() for value in trained.values())
    one, two = metrics(tmp_path)
    assert "loss" not in one and one["loss_tokens"] == 0 and two["loss"] > 0
    listed = ", ".join(map(str, sorted(first.tolist())))
    assert f"step 1: nothing of its rows ({listed} of the packed data) counts for the loss" in capsys.readouterr().out
    rows.loss_mask[:] = False
    nothing = lambda *_: {"loss": (np.zeros(1, np.float32), np.zeros(1, np.float32))}  # noqa: E731
    with pytest.raises(UserError, match="the data set: nothing of it counts for the loss"):
        evaluate(nothing, {}, {}, rows, None)


@pytest.mark.parametrize("where", ["the data", "the set 'heldout'"])
def test_a_token_beyond_the_embedding_is_refused_before_anything_trains(where):
    rows, good = data(), data(seed=1, documents=6)
    rows.tokens[[5, 9]] = 128, 130
    sets = (rows, {"heldout": good}) if where == "the data" else (good, {"heldout": rows})
    match = rf"^{where} has token 128.*embedding of 128 rows has none \(2 such tokens in all\)"
    with pytest.raises(UserError, match=match):
        sj.fit(model(), sets[0], sj.adamw(1e-3), steps=1, eval_data=sets[1])


@pytest.mark.parametrize("when", ["compiling", "training", "evaluating"])
def test_memory_that_does_not_do_is_answered_with_figures_and_what_to_change(tmp_path, monkeypatch, when):
    """As XLA says it; no device here has a limit."""

    def full(*given, **more):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nAll of it.")

    if when == "training":
        real = Session._compile
        monkeypatch.setattr(Session, "_compile", lambda self, batch: Full(real(self, batch), full))
    else:
        monkeypatch.setattr(Session, "_compile" if when == "compiling" else "evaluate", full)
    with pytest.raises(UserError) as raised:
        quick(workdir=tmp_path)
    needs = "RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"
    if when == "training":
        needs = (
            r"a training step takes 0\.0\d GiB for weights, optimizer and batch and 0\.0\d GiB for the rest of the step"
        )
    assert re.search(rf"does not do: {needs}.*; take more micro-batches", str(raised.value))
    assert "\n" not in str(raised.value)
    several = memory.too_much(raised.value.__cause__, jax.devices()[0], slots=4)
    assert "take fewer adapters at once (slots, now 4), more micro-batches" in str(several)


class Full:
    """A compiled step that takes more memory than there is."""

    def __init__(self, inner, do):
        self.memory_analysis, self.do = inner.memory_analysis, do

    def __call__(self, *given):
        self.do()
