"""Adapters trained together over one base are what they would be alone; one that breaks is no matter of the others'."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import assert_same_bits, contents, data, logged, model, started
from run_fixtures import specjax

import specjax as sj
from specjax import build, fleet, resume
from specjax.config import get_config
from specjax.config.entries import members, swept
from specjax.config.source import load_config_file
from specjax.errors import UserError
from specjax.fleet import job, member
from specjax.fleet.session import Fleet
from specjax.lora.adapters import DEFAULT, attach, collect, on_host
from specjax.train import evaluate as train_evaluate
from specjax.train.optim import schedule
from specjax.train.result import Result
from specjax.train.step import make_eval_step, make_train_step, split, write_back

STEPS = 5
RATE = schedule("cosine", learning_rate=1e-2, steps=STEPS, warmup_steps=2)
#: Ranks, targets, scales, rates, clips, lengths of data and steps differ.
ALONE = {
    "hr": (
        {"rank": 4, "alpha": 200, "dropout": 0.2, "targets": ["q_proj", "up_proj"]},
        {"rate": RATE, "decay": 0.1, "clip": 0.3, "documents": 20},
    ),
    "tax": ({"rank": 2, "targets": ["v_proj", "up_proj"]}, {"rate": 1e-3, "decay": 0.0, "clip": 0.0, "documents": 50}),
    "law": ({"rank": 8, "alpha": 64, "rslora": True}, {"rate": 2e-3, "decay": 0.0, "clip": 1.0, "documents": 40}),
}
TARGETS = ["q_proj", "v_proj", "up_proj"]  # of `law`
LORA = {
    name: {"targets": TARGETS} | told | {"seed": number} for number, (name, (told, _)) in enumerate(ALONE.items(), 1)
}


def mesh():
    return sj.make_mesh(data=3, fsdp=1, devices=jax.devices()[:3])


def rows(name):
    return data(
        batch_size=2, length=32, answers=True, documents=ALONE[name][1]["documents"], seed=len(name), longest=30
    )


def one_of(name, **changes):
    own = ALONE[name][1]
    given = {"learning_rate": own["rate"], "weight_decay": own["decay"], "clip_norm": own["clip"], "seed": 7}
    given |= {"data": rows(name), "lora": LORA[name], "steps": STEPS}
    return fleet.Member(**(given | changes))


@pytest.fixture(scope="module")
def once():
    """Programs of equal shapes are compiled once, whatever run asks for them."""
    programs, compile = {}, Fleet._compile

    def kept(self, batch, told):
        shapes = str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), (self.state, self._frozen, batch)))
        if shapes not in programs:
            programs[shapes] = compile(self, batch, told)
        return programs[shapes]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fleet, "_compile", kept)
        yield programs


@pytest.fixture(scope="module")
def trained(once, tmp_path_factory):
    """The fleet's base, its log and its results, each adapter on a device of its own."""
    base, workdir = model(mesh=mesh()), tmp_path_factory.mktemp("fleet")
    given = {"workdir": workdir, "accumulate": 2, "log_every": 1, "tensorboard": False}
    results = fleet.fit(base, {name: one_of(name) for name in ALONE}, **given)
    return base, logged(workdir), results


def by_adapter(lines, name):
    return [line for line in lines if line["adapter"] == name]


def factors(of, name):
    return values(on_host(collect(of, name)))


def values(adapter):
    return {f"{path}.{field}": value for path, one in adapter.factors.items() for field, value in one.values.items()}


def test_an_adapters_gradient_stays_on_the_devices_that_have_its_rows(trained, once):
    (program,) = (compiled.as_text() for compiled in once.values())
    assert "num_partitions=3" in program and "dot" in program
    assert not [
        name for name in ("all-reduce", "reduce-scatter") if f"{name}(" in program or f"{name}-start(" in program
    ]


@pytest.mark.rule(3)
@pytest.mark.parametrize("name", ["hr", "law"])
def test_an_adapter_of_a_fleet_is_the_adapter_trained_alone(trained, name):
    base, lines, results = trained
    own, alone = ALONE[name][1], model()
    sj.lora.inject(alone, **LORA[name])
    rule = sj.adamw(own["rate"], weight_decay=own["decay"], clip_norm=own["clip"])
    graph, params, frozen = split(alone, sj.LORA)
    start = {path: np.array(value, copy=True) for path, value in params.items()}
    step, state, packed = jax.jit(make_train_step(graph, rule, seed=7)), started(rule, params), rows(name)
    mine, norms = by_adapter(lines, name), []
    assert [line["step"] for line in mine] == [*range(1, STEPS + 1)] and results[name].step == STEPS
    for number, line in enumerate(mine):
        state, wanted = step(state, frozen, packed.micro_batches(number, 2), np.int32(number))
        for key, value in wanted.items():
            np.testing.assert_allclose(line[key], value, rtol=1e-5, err_msg=f"{key} of step {number + 1}")
        norms.append(float(wanted["grad_norm"]))
    assert max(norms) > own["clip"]  # or the clip is not seen
    assert line["tokens"] == sum(packed.tokens_in(number) for number in range(STEPS))
    write_back(alone, state.trainable)
    found, wanted = factors(base, name), factors(alone, "default")
    assert found.keys() == wanted.keys() and results[name].trainable_parameters == sum(x.size for x in wanted.values())
    for key, value in wanted.items():
        # Taken together: Adam divides by small gradients, which rounding alone makes.
        np.testing.assert_array_less(np.linalg.norm(found[key] - value), 1e-5 * np.linalg.norm(value), err_msg=key)
    assert any(not np.array_equal(state.trainable[path], value) for path, value in start.items())


def poisoned(name):
    """Its rows are NaN at the third step."""
    packed, plain = rows(name), rows(name).micro_batches
    packed.micro_batches = lambda step, *more: {
        key: np.full_like(value, np.nan) if step == 2 and key == "loss_mask" else value
        for key, value in plain(step, *more).items()
    }
    return packed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"data": "NaN"},
            r"1 of 3 adapters stopped: tax: step 3: the loss is nan and the gradient norm nan, on the rows",
        ),
        ({"learning_rate": 1e38}, r"1 of 3 adapters stopped: tax: step \d: "),
    ],
)
def test_one_that_is_poisoned_stops_alone_and_no_other_changes_by_a_bit(once, trained, tmp_path, changes, said):
    base, (healthy, lines, _) = model(mesh=mesh()), trained
    changes = {"data": poisoned("tax")} if changes.get("data") else changes
    fleets = {name: one_of(name, **(changes if name == "tax" else {})) for name in ALONE}
    with pytest.raises(UserError, match=said) as told:
        fleet.fit(base, fleets, workdir=tmp_path, accumulate=2, log_every=1, tensorboard=False)
    assert "the others are not touched by it" in str(told.value) and len(once) == 1
    assert sj.lora.names(base) == ["hr", "law"]
    assert len(by_adapter(logged(tmp_path), "tax")) < STEPS
    timeless = lambda found: [{k: v for k, v in line.items() if "_per_s" not in k} for line in found]  # noqa: E731
    for name in ("hr", "law"):
        assert_same_bits(factors(base, name), factors(healthy, name))
        assert timeless(by_adapter(logged(tmp_path), name)) == timeless(by_adapter(lines, name))


def test_evaluations_and_the_best_weights_are_each_adapters_own(once, trained, monkeypatch, capsys):
    """Another one has its least loss at step 2, 5 and 4; the first has no patience for more than two worse ones.

    A step far above the ones before names the rows of its adapter.
    """
    best, seen, found, evaluate = {"hr": 2, "tax": 5, "law": 4}, {}, {}, Fleet.evaluate

    def told(self, lane):
        seen[lane.name, lane.step] = values(self.end(lane)[0])
        found[lane.name] = evaluate(self, lane)["set"]["loss"]
        return {"set": {"loss": float(lane.step != best[lane.name])}}

    monkeypatch.setattr(Fleet, "evaluate", told)
    monkeypatch.setattr(Result, "spike", lambda self, loss: 0.125 if self.step == 3 else None)
    fleets = {name: one_of(name, eval_data={"set": rows("law")}, eval_every=1) for name in ALONE}
    fleets["hr"] = dataclasses.replace(fleets["hr"], patience=2)
    ended = {}
    results = fleet.fit(
        model(mesh=mesh()), fleets, accumulate=2, ended=lambda name, of, _: ended.update({name: factors(of, DEFAULT)})
    )
    assert len(set(found.values())) == len(ALONE)
    assert (results["hr"].stopped, results["hr"].step) == ("patience", 4)
    said = [line for line in capsys.readouterr().out.splitlines() if "was 0.125 before" in line]
    wanted = [",".join(map(str, sorted(rows(name).row_ids(2).tolist()))) for name in ALONE]
    assert [line.rpartition(" ")[2] for line in said] == wanted and len(set(wanted)) == len(ALONE)
    for name, step in best.items():
        if name != "hr":
            assert_same_bits(seen[name, STEPS], factors(trained[0], name))
        assert results[name].best_step == step
        assert_same_bits(ended[name], seen[name, step])
    alone = model()
    attach(alone, DEFAULT, on_host(collect(trained[0], "tax")))
    sj.lora.use(alone, DEFAULT)
    graph, params, frozen = split(alone, sj.LORA)
    wanted = train_evaluate.evaluate(jax.jit(make_eval_step(graph)), params, frozen, rows("law"), None)
    assert found["tax"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_the_worse_ones_stop_at_a_rung_and_the_others_go_on_as_if_they_had_not_waited(
    once, trained, tmp_path, monkeypatch
):
    """Three slots, five adapters: by turns to the second step, then the best three to the end; also after a kill."""
    losses = {"worse1": 9.0, "hr": 1.0, "worse2": 8.0, "tax": 2.0, "law": 3.0}
    monkeypatch.setattr(Fleet, "evaluate", lambda self, lane: {"set": {"loss": losses[lane.name]}})
    fleets = {
        name: one_of(name.replace("worse1", "tax").replace("worse2", "hr"), eval_data={"set": rows("tax")})
        for name in losses
    }
    given = {"slots": 3, "rungs": (0.4,), "accumulate": 2, "log_every": 1, "tensorboard": False, "keep": 9}
    results = fleet.fit(model(mesh=mesh()), fleets, workdir=tmp_path / "whole", **given)
    assert {name: (one.step, one.stopped) for name, one in results.items()} == {
        name: (2, "halved") if "worse" in name else (STEPS, "") for name in losses
    }
    lines = logged(tmp_path / "whole")
    for name in ALONE:
        mine = [line for line in by_adapter(lines, name) if "loss" in line]
        for line, wanted in zip(mine, by_adapter(trained[1], name), strict=True):
            np.testing.assert_allclose(line["loss"], wanted["loss"], rtol=1e-5)
            np.testing.assert_allclose(line["grad_norm"], wanted["grad_norm"], rtol=1e-5)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    for folder in (folder for folder in (again / "checkpoints").iterdir() if folder.name.isdigit()):
        if int(folder.name) > 2:  # three of the five wait at the rung
            shutil.rmtree(folder)
    fleet.fit(model(mesh=mesh()), fleets, workdir=again, **given)
    assert timeless(again) == timeless(tmp_path / "whole") and len(once) == 1  # nothing was compiled for another slot


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_fleets_rule_is_the_one_of_a_lone_run(name):
    params = {("layers", 0, "q_proj", "kernel"): np.ones((2, 3), np.float32), ("norm", "scale"): np.ones(3, np.float32)}
    rng, updates = np.random.default_rng(0), []
    gradients = [{path: rng.standard_normal(x.shape, np.float32) for path, x in params.items()} for _ in range(2)]
    for rule in (getattr(member, name)()(1e-2, 0.1), getattr(sj, name)(1e-2, weight_decay=0.1, clip_norm=0.0)):
        state = rule.init(params)
        for each in gradients:
            update, state = rule.update(each, state, params)
        updates.append(update)
    for path in params:
        np.testing.assert_allclose(*(update[path] for update in updates), rtol=1e-6)


def test_a_sweep_is_a_fleet_of_every_combination():
    config = get_config()
    config.sweep.optimizer = {"learning_rate": [1e-4, 0.5]}
    config.sweep.lora = {"rank": [8]}
    made = swept(config)
    assert made.fleet.to_dict() == {
        "learning_rate-0_0001--rank-8": {"optimizer": {"learning_rate": 1e-4}, "lora": {"rank": 8}},
        "learning_rate-0_5--rank-8": {"optimizer": {"learning_rate": 0.5}, "lora": {"rank": 8}},
    }
    assert [one.lora.rank for one in members(made).values()] == [8, 8] and not config.fleet
    config.sweep.data = {"length": 64}
    with pytest.raises(UserError, match="config.sweep.data.length is 64: give a list of values"):
        swept(config)


@pytest.fixture(scope="module")
def config(base):
    """A config file of three adapters in two slots, over the tiny base."""
    own, path = base.parent / "data", base.parent / "fleet.py"
    path.write_text(f"""
from specjax.config import get_config as defaults

def get_config():
    c = defaults()
    c.trainable, c.lora.rank, c.model.path, c.data.train = "lora", 4, "{base}", "{own}/pairs.jsonl"
    c.data.length, c.batch_size, c.steps, c.slots = 64, 4, 4, 2
    c.optimizer.learning_rate, c.log.tensorboard, c.eval.exact, c.eval.every = 2e-2, False, (), 2
    c.checkpoint.keep, c.log.every = 9, 1
    c.fleet.hr = {{}}
    c.fleet.tax = {{"lora": {{"rank": 8, "targets": "q_proj,v_proj"}}, "steps": 3, "seed": 3}}
    c.fleet.law = {{"data": {{"train": "{own}/text.jsonl"}}, "lora": {{"dropout": 0.1}}, "steps": 2}}
    return c
""")
    return path


def timeless(workdir):
    return [{k: v for k, v in line.items() if "_per_s" not in k} for line in logged(workdir)]


def test_the_command_trains_saves_exports_and_resumes_bit_for_bit(config, once, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # programs for one device are quickly compiled
    monkeypatch.setattr(job.sharding, "make_mesh", lambda **axes: None)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert specjax("train", f"--config={config}", f"--workdir={whole}") == 0
    lines = timeless(whole)
    assert [line["step"] for line in by_adapter(lines, "law") if "lr" in line] == [1, 2]  # in the slot that was freed
    assert {line["adapter"] for line in lines} == {"hr", "tax", "law"}
    assert all(key in line for line in lines if line["step"] == 0 for key in ("eval/heldout/loss", "adapter"))
    shutil.copytree(whole, parts)  # as if it had been killed after three steps
    for step in (folder for folder in (parts / "checkpoints").iterdir() if folder.name.isdigit()):
        if int(step.name) > 3:
            shutil.rmtree(step)
    (parts / "summary.json").unlink()
    compiled = len(once)
    assert specjax("train", f"--config={config}", f"--workdir={parts}") == 0
    assert timeless(parts) == lines and len(once) == compiled
    for name, rank in (("hr", 4), ("tax", 8), ("law", 4)):
        export = whole / "adapters" / name / "export"
        assert_same_bits(contents(parts / "adapters" / name / "export"), contents(export))
        told = json.loads((export / "adapter_config.json").read_text())
        assert told["r"] == rank and ("k_proj" in told["target_modules"]) == (name != "tax")
        summary = json.loads((whole / "adapters" / name / "summary.json").read_text())
        assert summary["evals"]["heldout"]["after"] < summary["evals"]["heldout"]["before"]
    capsys.readouterr()
    assert specjax("train", f"--config={config}", f"--workdir={parts}") == 0
    assert "the run was complete" in capsys.readouterr().out
    one = parts / "adapters" / "tax"  # is the folder of a run
    assert resume.finished(one, load_config_file(f"{one}/config.json")).step == 3
    loaded, again = build.load_run(one, "best", None)[0], build.load_run(one, "best", None)[0]
    sj.lora.unload(again, "default")
    sj.lora.load(again, one / "export", name="default")
    assert_same_bits(factors(loaded, "default"), factors(again, "default"))
    assert specjax("train", f"--config={config}", f"--workdir={parts}", "--config.lora.rank=2") == 2
    assert "holds a run with another config: lora.rank (was 4, now 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "c.slots, c.batch_size = 1, 4",
            "config.slots 1 x config.batch_size 4 gives each of config.accumulate=1 micro-ba",
        ),
        ("c.fleet.hr = {}", r"fleet.py:\d+: c.fleet.hr is given a second time: give one of them another name"),
        ("c.fleet.new = {'lora': {'rank': 2}, 'lora': {'rank': 3}}", r"fleet.py:\d+: 'lora' is given a second time"),
        (
            "c.fleet.new = {'model': {'path': 'elsewhere'}}",
            "config.fleet.new.model.path is 'elsewhere', but all adapters",
        ),
        (
            "c.fleet.new = {'mesh': {'fsdp': 2}}",
            "config.fleet.new.mesh.fsdp is 2, but all adapters of a fleet share one",
        ),
        ("c.fleet.new = {'batch_size': 2}", "config.fleet.new.batch_size is 2, but all adapters"),
        ("c.fleet.new = {'data': {'train': ''}}", "config.fleet.new: config.data.train is empty: give a file"),
        (
            "c.fleet.new = {'lora': {'rnk': 4}}",
            "config.fleet.new.lora.rnk is not a key. Did you mean 'config.lora.rank'",
        ),
        (
            "c.fleet.new = {'lora': {'rank': 0}}",
            "config.fleet.new: config.lora.rank is 0: give it a value of at least 1",
        ),
        (
            "c.fleet.new = {'lora': {'dora': True}}",
            "config.fleet.new: config.lora.dora is set: a fleet trains plain LoRA",
        ),
        ("c.fleet['../x'.replace('.', '')] = {}", "config.fleet has an adapter named '/x': use letters, digits"),
        (
            "c.trainable = 'all'; c.lora.rank = None",
            "config.fleet.hr: config.trainable is 'all': a fleet trains adapters",
        ),
        ("c.optimizer.moments = '8bit'", "config.optimizer.moments is '8bit', which a fleet does not know"),
    ],
)
def test_what_a_fleet_cannot_be_is_said_in_one_sentence(config, tmp_path, line, said):
    path = tmp_path / "fleet.py"
    path.write_text(config.read_text().replace("    return c", f"    {line}\n    return c"))
    with pytest.raises(UserError, match=said) as told:
        job.train(load_config_file(str(path)), tmp_path / "run")
    assert not (tmp_path / "run").exists() and str(told.value).count(". ") <= 1


def test_what_the_base_lacks_is_said_with_the_adapters_name(once):
    with pytest.raises(UserError, match=r"adapter tax: .*'nope_proj'"):
        fleet.fit(model(), {"hr": one_of("hr"), "tax": one_of("tax", lora={"rank": 2, "targets": ["nope_proj"]})})
    with pytest.raises(UserError, match="adapter tax: its data has length 64, the first adapter's 32"):
        fleet.fit(model(), {"hr": one_of("hr"), "tax": one_of("tax", data=data(batch_size=2))})
    with pytest.raises(
        UserError, match="adapter hr: it has copies of whole modules, rows or biases, which cannot share"
    ):
        fleet.fit(model(), {"hr": one_of("hr", lora={"rank": 2, "targets": ["q_proj"], "modules_to_save": ["norm"]})})


def test_the_folder_of_a_run_that_is_no_fleet_is_refused(tmp_path):
    lone = model()
    sj.lora.inject(lone, rank=2, targets=["q_proj"])
    sj.fit(lone, rows("tax"), sj.adamw(1e-3), steps=1, trainable=sj.LORA, workdir=tmp_path)
    with pytest.raises(UserError, match="is of one run and not of a fleet: start in a new workdir"):
        fleet.fit(model(), {"tax": one_of("tax")}, workdir=tmp_path)
