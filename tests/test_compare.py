"""`specjax compare`: its methods, how their values are tried, what is reported; here all in one process."""

import json
import multiprocessing
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import sizes
from run_fixtures import specjax, write_base, write_data

from specjax import build
from specjax.compare import aim, budget, child, course, facts, intervals, methods, record, scores, table
from specjax.config import get_config, merge
from specjax.data.read import read
from specjax.errors import NotFinite, UserError
from specjax.plan import targets


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    write_data(folder / "data")
    return write_base(folder / "base")


def config(**overrides):
    """A comparison of two methods on files that are not there."""
    both = {"sft": {}, "lora": {"trainable": "lora", "lora": {"rank": 4}}}
    given = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "compare": both}
    return merge(merge(get_config(), given), overrides)


def test_what_is_measured_is_split_off_and_shipped_unless_sets_are_named():
    one = methods.read(config())["sft"]
    assert one.domain == "heldout" and one.forgetting == one.shipped[::-1] == ("general_chats", "general_text")
    assert one.config.data.eval_beside and one.config.eval.best == "heldout"
    for name in one.shipped:
        assert one.config.data.eval[name] == f"specjax:{name}" and len(list(read(f"specjax:{name}"))) >= 20
    one = methods.read(config(data={"eval": {"mine": "m.jsonl"}}))["sft"]
    assert one.domain == "mine" and len(one.shipped) == 2 and not one.config.data.eval_beside
    one = methods.read(config(data={"eval": {"mine": "m.jsonl", "other": "o.jsonl"}}, eval={"best": "other"}))["sft"]
    assert (one.domain, one.forgetting, one.shipped) == ("other", ("mine",), ())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data": {"eval_fraction": 0.0}}, "nothing would be measured"),
        ({"compare": {"a b": {}}}, "a method named 'a b'"),
        ({"compare": {"x": {"rungs": (0.5,)}}}, "config.compare.x: config.rungs is"),
        ({"compare": {"x": {"sweep": {"optimizer": {"learning_rate": 0.1}}}}}, "give a list of values"),
        (
            {"compare": {"x": {"sweep": {"optimizer": {"learning_rate": [0.0]}}}}},
            "config.optimizer.learning_rate is 0.0",
        ),
        ({"compare": {"x": {"fleet": {"a": {}}}}}, "config.compare.x: config.fleet"),
        ({"seeds": 0}, "config.seeds is 0"),
        ({"data": {"loss": "some"}}, "config.data.loss is 'some'"),
        (
            {"data": {"eval": {"a": "a", "b": "b"}}, "compare": {"x": {"eval": {"best": "b"}}}},
            "different sets, a and b",
        ),
        ({"data": {"eval_beside": True, "eval": {"heldout": "a"}}}, "a set named 'heldout'"),
        ({"compare": {"x": {"data": {"train": "text.jsonl"}}}}, "hold out different rows"),
        ({"compare": {"x": {"data": {"eval_fraction": 0.1}}}}, "hold out different rows"),
        ({"compare": {"x": {"seed": 7}}}, "hold out different rows"),
        (
            {"data": {"eval": {"d": "d"}}, "eval": {"best": "d"}, "compare": {"x": {"data": {"eval": {"code": "c"}}}}},
            "measured on different sets",
        ),
        ({"data": {"eval": {"d": "d"}}, "compare": {"x": {"objective": "dpo"}}}, "are measured on different sets"),
        (
            {"data": {"eval": {"d": "d", "e": "e"}}, "compare": {"x": {"objective": "dpo"}}},
            "different objectives, whose losses are not one scale",
        ),
    ],
)
def test_a_mistake_of_any_method_is_said_before_the_first_run(overrides, said):
    with pytest.raises(UserError) as raised:
        methods.read(config(**overrides))
    assert said in str(raised.value)


def test_every_trial_holds_the_same_rows_out_and_dpo_is_given_no_set_that_is_no_pairs():
    one = methods.read(config(seed=5, compare={"x": {"sweep": {"seed": [1, 2]}}}))["x"]
    assert [trial.data.eval_seed for trial in one.trials.values()] == [5, 5]
    assert [trial.seed for trial in one.trials.values()] == [1, 2]
    alone = merge(config(), {"objective": "dpo"})
    assert methods.read(alone)["sft"].shipped == ()


def test_on_raw_text_the_method_that_learns_answers_is_the_one_that_learns_all():
    full, sft = (config(data={"loss": loss}) for loss in ("all", "answers"))
    assert methods.twins(sft, full) and not methods.twins(full, sft) and not methods.twins(sft, sft)
    assert not methods.twins(merge(sft, {"optimizer": {"learning_rate": 1e-3}}), full)


def test_rates_that_are_automatic_are_tried_with_what_else_is_swept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(sizes()))
    sweep = {"optimizer": {"learning_rate": "auto", "weight_decay": [0.0, 0.1]}}
    one = methods.read(config(model={"path": str(tmp_path)}, compare={"x": {"sweep": sweep}}))["x"]
    assert len(one.trials) == 6 and {trial.optimizer.weight_decay for trial in one.trials.values()} == {0.0, 0.1}


def test_steps_are_scaled_with_warmup_and_evaluations():
    made = methods.scaled(config(steps=100, optimizer={"warmup_steps": 10}, eval={"every": 25}), 8)
    assert (made.steps, made.optimizer.warmup_steps, made.eval.every) == (8, 0, 2)
    made = methods.scaled(config(epochs=3.0, optimizer={"warmup_steps": 50}), 20)
    assert (made.steps, made.epochs, made.optimizer.warmup_steps, made.eval.every) == (20, 1.0, 9, 0)


def test_a_budget_is_shared_out_and_too_small_a_one_says_what_is_needed(tmp_path):
    made = methods.read(config(steps=10, eval={"every": 5}))
    speeds = {"sft": budget.Speed(2.0, 1.0, 30.0), "lora": budget.Speed(1.0, 1.0, 30.0)}
    # 5 s were spent; around: 2 x 30; three evaluations each, of which one is in `around`'s run: 2 x (1 + 2) x 1.
    assert budget.steps(5 + 60 + 6 + 30, 5.0, made, speeds) == 10
    with pytest.raises(UserError, match=r"at least --budget=40s, and lora come on top"):
        budget.steps(1.0, 5.0, {"sft": made["sft"]}, speeds, ["lora"])
    with pytest.raises(UserError, match=r"--budget=1s is too small .* at least --budget=74s"):
        budget.steps(1.0, 5.0, made, speeds)
    (tmp_path / "steps.json").write_text('{"steps": 7, "seconds": 60.0}')
    assert budget.probed(made, tmp_path, 60.0) == 7
    with pytest.raises(UserError, match="begun with --budget=60s, by which its methods have 7 steps each"):
        budget.probed(made, tmp_path, 61.0)
    for text in ("soon", "0", "-1s", "1d"):
        with pytest.raises(UserError, match="is no time"):
            budget.seconds(text)


def test_the_interval_is_students():
    from scipy import stats

    assert np.allclose(intervals.T, [stats.t.ppf(0.975, df) for df in range(1, intervals.MOST)], atol=1e-4)
    values = [1.0, 1.5, 1.25]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert np.allclose(intervals.interval(values), (np.mean(values), low, high), atol=1e-4)


def made_up(trainable: int, loss: float, lost: float, high: float | None = None) -> dict:
    measure = lambda before, after: {  # noqa: E731
        "before": {"loss": before, "exact": None, "chrf": None},
        "after": {"loss": after, "exact": None, "chrf": None},
        "low": None,
        "high": high,
    }
    return {
        "status": "done",
        "trainable": trainable,
        "measures": {"d": measure(3.0, loss), "g": measure(2.0, 2 + lost)},
    }


def test_the_advice_takes_the_smallest_of_what_is_as_good():
    records = {"full": made_up(100, 1.0, 0.3), "r16": made_up(16, 1.01, 0.1), "r8": made_up(8, 1.5, 0.0)}
    records["broken"] = {"status": "failed", "why": "x"}
    said = facts.advice(records, "d", ["g"])
    assert said["best"] == "r16" and said["lowest_loss"] == "full"
    assert np.isclose(said["nats_apart"], 0.01) and np.isclose(said["forgets_of"], 1 / 3)
    records["full"] = made_up(100, 1.0, 0.3, high=1.6)  # seeds that scatter so much tell none of them apart
    assert facts.advice(records, "d", ["g"])["best"] == "r8"
    assert facts.advice({"broken": records["broken"]}, "d", ["g"]) is None
    assert facts.advice({"worse": made_up(8, 3.1, 0.0)}, "d", ["g"]) is None
    # A set that became better makes up for no other.
    records = {"full": made_up(100, 1.0, 0.1), "r8": made_up(8, 1.01, 0.6)}
    for name, change in (("full", 0.2), ("r8", -0.5)):
        records[name]["measures"]["h"] = made_up(1, 1.0, change)["measures"]["g"]
    assert np.isclose(facts.advice(records, "d", ["g", "h"])["forgets_of"], 2.0)


def test_every_token_trains_where_it_is_asked_for_and_answers_are_measured_either_way(base):
    given = {"model": {"path": str(base)}, "data": {"train": str(base.parent / "data" / "pairs.jsonl"), "length": 64}}
    held = {}
    for loss in ("answers", "all"):
        one = merge(merge(get_config(), given), {"data": {"loss": loss, "eval_fraction": 0.2}})
        _, tokenizer = build.tokenizer_of(one)
        data, sets = build.data_of(one, tokenizer)
        ends = data.offsets[1:] - 1
        assert data.loss_mask.sum() == len(data.tokens) - len(ends) if loss == "all" else data.loss_mask.sum() < 1500
        held[loss] = sets["heldout"].fingerprint
    assert held["all"] == held["answers"]
    other = merge(one, {"seed": 5, "data": {"eval_seed": 0}})
    assert build.data_of(other, tokenizer)[1]["heldout"].fingerprint == held["all"]
    assert build.data_of(merge(other, {"data": {"eval_seed": -1}}), tokenizer)[1]["heldout"].fingerprint != held["all"]


def test_further_seeds_train_the_best_values_on_the_same_rows(monkeypatch, tmp_path):
    trained = {}
    monkeypatch.setattr(course.run, "train", lambda one, place: trained.update({place.name: one}))
    given = config(seed=3, seeds=3, optimizer={"learning_rate": 0.5})
    best = course.Trial("best", given, tmp_path, [])
    assert [one.name for one in course.seeded(best, given, tmp_path)] == ["seed-4", "seed-5"]
    assert [(one.seed, one.data.eval_seed) for one in trained.values()] == [(4, 3), (5, 3)]
    assert all(one.optimizer.learning_rate == 0.5 and not one.export for one in trained.values())


def test_values_are_tried_one_after_another_and_each_rungs_choice_is_kept(monkeypatch, tmp_path):
    one = methods.read(
        config(compare={"x": {"sweep": {"optimizer": {"learning_rate": [1.0, 2.0, 3.0, 4.0]}}, "rungs": (0.25, 0.5)}})
    )["x"]
    calls = []

    def train(given, place, share=1.0):
        rate = given.optimizer.learning_rate
        calls.append((rate, share))
        if rate == 3.0:
            raise NotFinite("step 2: the loss is nan.")
        if stop == (rate, share):
            raise SystemExit(143)
        (place / "checkpoints").mkdir(parents=True, exist_ok=True)
        step = round(8 * share)
        with (place / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "eval/heldout/loss": rate + share}) + "\n")
        return SimpleNamespace(step=step)

    monkeypatch.setattr(course.run, "train_part", train)
    monkeypatch.setattr(course.run, "train", train)
    stop = (2.0, 0.5)
    with pytest.raises(SystemExit):
        course.trained(one.config, one.trials, tmp_path, "heldout")
    assert calls == [(1.0, 0.25), (2.0, 0.25), (3.0, 0.25), (4.0, 0.25), (1.0, 0.5), (2.0, 0.5)]
    calls.clear()
    stop = None
    made, shared = course.trained(one.config, one.trials, tmp_path, "heldout")
    assert calls == [(1.0, 0.5), (2.0, 0.5), (1.0, 1.0)] and not shared
    assert [trial.stopped for trial in made] == ["", "halving", "failed", "halving"]
    assert made[0].best("heldout") == (2, 1.25) and "loss is nan" in made[2].why
    assert [(trial.folder / "checkpoints").exists() for trial in made] == [True, False, False, False]


def test_the_least_hardware_for_another_model_and_the_time_that_it_takes_at_best(tmp_path):
    shapes = sizes(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    (tmp_path / "config.json").write_text(json.dumps(shapes | {"vocab_size": 128256, "head_dim": 128}))
    configs = {name: one.config for name, one in methods.read(config()).items()}
    found = aim.aimed(configs, str(tmp_path), {"v5e": 3.6})
    full, lora = found["rows"]
    assert (full["tpu"], full["gpu"], lora["tpu"], lora["gpu"]) == ("v5e:4x4", "h100:4", "v5e:2x2", "h100:1")
    for place, family in aim.FAMILIES.items():
        chips = {one["method"]: targets.count(targets.parse(one[place])) for one in found["rows"]}
        flops = targets.CHIPS[family].flops
        work = {
            name: row["seconds_per_million_tokens"][place] * chips[name] * flops
            for name, row in (("sft", full), ("lora", lora))
        }
        assert work["sft"] == pytest.approx(6e6 * found["parameters"], rel=0.1)
        assert work["lora"] == pytest.approx(work["sft"] * 2 / 3, rel=0.1)
    for row, chips in ((full, 16), (lora, 4)):
        seconds = row["seconds_per_million_tokens"]["tpu"]
        assert row["cost_per_million_tokens"] == {"tpu": pytest.approx(seconds * chips * 3.6 / 3600)}
        assert table._fits(row).startswith(f"{row['tpu']} ({seconds * chips / 1000:.3g} per million tokens) or h100")


def test_the_known_answer_scores_all_and_another_less():
    found = scores.scores(["The cat.", "a dog"], ["the cat", "a bird"])
    assert found["exact"] == 0.5
    absent = {scores.LIBRARIES[one] for one in scores.missing()}
    assert found["rouge_l"] == (None if "ROUGE-L" in absent else 0.75)
    assert ("chrF" in absent) == (found["chrf"] is None)


@pytest.fixture
def here(monkeypatch):
    """Methods run in this process; `stops`: the names of those that a signal stops once."""
    stops: list[str] = []

    def run(target, *given):
        settings, workdir, name, twin = given
        if name in stops:
            stops.remove(name)
            raise SystemExit(143)
        try:
            record.record(merge(get_config(), settings), Path(workdir), name, twin)
        except UserError as error:
            return 2, "failed", str(error)
        return 0, "done", ""

    monkeypatch.setattr(child, "run", run)
    return SimpleNamespace(stops=stops)


@pytest.mark.slow
def test_values_are_tried_failures_are_rows_and_a_stopped_comparison_goes_on(base, tmp_path, capfd, here):
    path = tmp_path / "c.py"
    path.write_text(
        "from specjax.config import get_config as defaults\n\n\n"
        "def get_config():\n"
        "    config = defaults()\n"
        "    rates = lambda *r: {'sweep': {'optimizer': {'learning_rate': list(r)}}, 'rungs': (0.5,)}\n"
        "    config.compare.sft = rates(1e-2)\n"
        "    config.compare.broken = {'trainable': 'lora', 'lora': {'rank': 2, 'targets': ['nowhere']}}\n"
        "    config.compare.lora = {'trainable': 'lora', 'lora': {'rank': 4}, **rates(1e-5, 2e-2)}\n"
        "    return config\n"
    )
    data = base.parent / "data"
    keys = {"model.path": base, "model.dtype": "float32", "data.train": data / "pairs.jsonl", "data.length": 64}
    keys |= {"data.eval.domain": data / "pairs_eval.jsonl", "data.eval.general": data / "text_eval.jsonl"}
    keys |= {"steps": 4, "log.tensorboard": "False", "eval.answers": 2, "eval.max_new_tokens": 4, "log.every": 2}
    argv = [f"--config={path}", f"--workdir={tmp_path / 'out'}", *(f"--config.{k}={v}" for k, v in keys.items())]
    here.stops.append("lora")
    assert specjax("compare", *argv) == 143
    assert "peak memory" in capfd.readouterr().out  # the figures of what is done, while the others train
    first = (tmp_path / "out" / "sft" / "method.json").read_bytes()
    assert specjax("compare", *argv) == 0
    out = capfd.readouterr().out
    assert (tmp_path / "out" / "sft" / "method.json").read_bytes() == first
    assert "sft was complete" in out and "Take " in out and "report.json" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {one["name"]: one for one in report["methods"]}
    assert [one["status"] for one in found.values()] == ["done", "failed", "done"]
    assert "'nowhere' matches no linear map" in found["broken"]["why"]
    trials = {name: {one["rate"]: one for one in found[name]["trials"]} for name in ("sft", "lora")}
    assert trials["lora"][1e-5]["stopped"] == "halving" and trials["lora"][1e-5]["steps"] == 2
    for name, rate in (("sft", 1e-2), ("lora", 2e-2)):
        one, trial = found[name], trials[name][rate]
        assert one["rate"] == rate and not trial["stopped"]
        assert [each["step"] for each in trial["curve"]] == [0, 2, 4]
        measure = one["measures"]["domain"]
        assert measure["after"]["loss"] == min(each["loss"]["domain"] for each in trial["curve"][1:])
        assert measure["before"]["loss"] == trial["curve"][0]["loss"]["domain"] > measure["after"]["loss"]
        assert measure["after"]["exact"] is not None and one["seconds"] > 0 and one["saved_bytes"] > 0
        assert (tmp_path / "out" / one["config"]).is_file()
    assert not found["lora"]["shared_process"]
    assert {row["set"] for row in report["answers"]} == {"domain"} and len(report["answers"]) == 2
    assert set(report["answers"][0]["said"]) == {"sft", "lora"}
    assert report["data"]["kind"] == "pairs" and report["data"]["split"] == "given"
    assert found["sft"]["total"] == report["base"]["parameters"] < found["lora"]["total"]
    assert specjax("compare", *argv, "--config.batch_size=4") == 2
    assert "holds the method sft with another batch_size" in capfd.readouterr().err
    with (data / "pairs.jsonl").open("a") as file:
        file.write("\n")
    assert specjax("compare", *argv) == 2
    assert "pairs.jsonl is not what it was when" in capfd.readouterr().err
    lines = list(table.answers(report))
    assert sum("known" in line for line in lines) == 2
    assert course.losses([]) == {}


@pytest.mark.parametrize(("status", "ends"), [(-signal.SIGABRT, 143), (-signal.SIGTERM, 143), (143, 143), (0, 143)])
def test_a_method_that_was_told_to_stop_stops_the_comparison_however_it_ended(monkeypatch, status, ends):
    """A signal that is sent while it compiles, or before it hears of signals."""
    told = []

    class Asked:
        exitcode, pid = status, 1

        def __init__(self, **given):
            pass

        def start(self):
            pass

        def join(self):
            signal.raise_signal(signal.SIGTERM)

        def terminate(self):
            told.append("stop")

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Asked)
    monkeypatch.setattr(child.multiprocessing, "get_context", lambda kind: context)
    with pytest.raises(SystemExit) as raised:
        child.run(child.train)
    assert (raised.value.code, told) == (ends, ["stop"])
