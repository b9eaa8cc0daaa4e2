import itertools
import json
import re
from pathlib import Path

import pytest

from specjax.config import (
    HOW,
    ConfigDict,
    check_length,
    differing,
    get_config,
    lora_settings,
    merge,
    resolved,
    settled,
    validate,
)
from specjax.config.checks import CHOICES, eval_names, flat, sources
from specjax.config.entries import methods
from specjax.config.source import load_config_file
from specjax.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def config(**changes) -> ConfigDict:
    """A valid config, with changes such as `data__length=8`."""
    made = get_config()
    made.model.path, made.data.train = "folder", "train.jsonl"
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (made[group.replace("__", ".")] if group else made)[name] = value
    return made


def refused(wrong: ConfigDict, device_count: int | None = None) -> str:
    with pytest.raises(UserError) as raised:
        validate(wrong, device_count)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_the_shipped_configs_are_valid_on_one_device():
    assert len(CONFIGS) >= 5
    for path in CONFIGS:
        loaded = load_config_file(str(path))
        for made in methods(loaded).values() if loaded.compare else [loaded]:
            validate(made, device_count=1)
            resolved(made)


def test_the_demo_compares_three_methods_in_the_order_of_its_file():
    demo = methods(load_config_file(str(CONFIGS[0].parent / "demo.py")))
    assert list(demo) == ["full", "sft", "lora"]
    assert [demo[name].trainable for name in demo] == ["all", "all", "lora"]
    assert demo["full"].data.train != demo["sft"].data.train == demo["lora"].data.train


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainable": "lorra"}, "config.trainable is 'lorra': choose one of 'all', 'lora'. Did you mean 'lora'?"),
        ({"optimizer__schedule": "cosin"}, "Did you mean 'cosine'?"),
        ({"optimizer__name": "sgd"}, "config.optimizer.name is 'sgd': choose one of 'adamw', 'lion'."),
        ({"model__dtype": "float16"}, "config.model.dtype is 'float16'"),
        ({"data__format": "instructs"}, "Did you mean 'instruct'?"),
        ({"data__overlong": "cut"}, "config.data.overlong is 'cut'"),
        ({"batch_size": 0}, "config.batch_size is 0: give it a value of at least 1."),
        ({"steps": -1}, "config.steps is -1: give it a value of at least 0."),
        ({"data__length": 1}, "config.data.length is 1: give it a value of at least 2."),
        ({"optimizer__learning_rate": 0.0}, "config.optimizer.learning_rate is 0.0: give it a value above 0."),
        ({"optimizer__learning_rate": float("nan")}, "config.optimizer.learning_rate is nan"),
        ({"optimizer__b2": 1.0}, "config.optimizer.b2 is 1.0: give it a value from 0 to below 1."),
        ({"optimizer__final_fraction": 1.5}, "config.optimizer.final_fraction is 1.5"),
        ({"data__eval_fraction": 1.0}, "config.data.eval_fraction is 1.0"),
        ({"seed": None}, "config.seed is None: it takes an integer."),
        ({"seed": True}, "config.seed is True: it takes an integer."),
        ({"model__path": ""}, "config.model.path is empty"),
        ({"data__train": ""}, "config.data.train is empty"),
        ({"data__train": [("a.jsonl", 1.0), ("b.jsonl", 0.0)]}, "or several with their shares"),
        ({"data__train": ["a.jsonl"]}, "or several with their shares"),
        ({"batch_size": 8, "accumulate": 3}, "config.batch_size is 8, which config.accumulate=3 does not divide"),
        ({"steps": 5, "epochs": 2.0}, "config.steps is 5 and config.epochs is 2.0"),
        ({"epochs": 0.0}, "config.epochs is 0.0 and config.steps is 0"),
        ({"steps": 5, "optimizer__warmup_steps": 5}, "config.optimizer.warmup_steps is 5 of config.steps=5"),
        ({"lora__rank": 8}, "config.lora.rank is 8, but config.trainable is 'all'"),
        ({"lora__rslora": False}, "config.lora.rslora is False, but config.trainable is 'all'"),
        ({"trainable": "lora"}, "config.lora.rank is not set"),
        ({"trainable": "lora", "lora__rank": 0}, "config.lora.rank is 0"),
        ({"trainable": "lora", "lora__rank": 4, "lora__alpha": 0.0}, "config.lora.alpha is 0.0"),
        ({"trainable": "lora", "lora__rank": 4, "lora__dropout": 1.0}, "config.lora.dropout is 1.0"),
        ({"trainable": "lora", "lora__rank": 4, "lora__targets": ()}, "config.lora.targets is ()"),
        ({"trainable": "lora", "lora__rank": 4, "lora__targets": 3}, "config.lora.targets is 3"),
        (
            {"trainable": "lora", "lora__rank": 4, "lora__rank_pattern": 3},
            "config.lora.rank_pattern is 3: give patterns",
        ),
        (
            {"trainable": "lora", "lora__rank": 4, "lora__rank_pattern": {"q_proj": 1.5}},
            "config.lora.rank_pattern gives 'q_proj' 1.5: give it a whole number of at least 1.",
        ),
        (
            {"trainable": "lora", "lora__rank": 4, "lora__alpha_pattern": {"q_proj": 0}},
            "config.lora.alpha_pattern gives 'q_proj' 0: give it a number above 0.",
        ),
        (
            {"trainable": "lora", "lora__rank": 4, "lora__layers_to_transform": (0, -1)},
            "config.lora.layers_to_transform is (0, -1): give layer numbers, from 0.",
        ),
        ({"trainable": "lora", "lora__rank": 4, "lora__modules_to_save": 3}, "config.lora.modules_to_save is 3"),
        (
            {"trainable": "lora", "lora__rank": 4, "lora__bias": "lora"},
            "config.lora.bias is 'lora': choose one of 'none', 'all', 'lora_only'.",
        ),
        (
            {"trainable": "lora", "lora__rank": 4, "lora__ensure_weight_tying": True},
            "config.lora.ensure_weight_tying is True, but config.lora.modules_to_save is not set",
        ),
        ({"data__eval": {"domain": ""}}, "config.data.eval.domain is ''"),
        ({"data__eval": {"a/b": "x"}}, "config.data.eval has a set named 'a/b'"),
        ({"data__eval": {"domain": "x"}, "eval__best": "domian"}, "choose one of domain. Did you mean 'domain'?"),
        ({"eval__best": "domain"}, "config.eval.best is 'domain', which names no eval set: choose one of heldout."),
        ({"eval__patience": 3}, "config.eval.patience is 3, but config.eval.every is 0"),
        ({"eval__every": 5, "data__eval_fraction": 0.0}, "config.eval.every is 5, but there is no eval set"),
        ({"eval__prompts": ("a", 3)}, "config.eval.prompts holds 3"),
    ],
)
def test_an_impossible_value_is_one_sentence_that_names_the_key_and_the_value(changes, said):
    assert said in refused(config(**changes))


def test_the_defaults_with_a_model_and_data_are_valid():
    validate(config(), device_count=8)
    validate(config(trainable="lora", lora__rank=4, lora__targets=("q_proj",), optimizer__final_fraction=1.0))
    validate(config(data__eval={"domain": "x"}, eval__best="domain", eval__every=5, eval__patience=2))


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        ({"batch_size": 6}, 8, "make the batch size a multiple of 8."),
        ({"batch_size": 8, "accumulate": 2}, 8, "make the batch size a multiple of 16."),
        ({"mesh__tensor": 3}, 8, "8 devices"),
        ({"mesh__fsdp": 2}, 8, "8 devices"),
        ({"mesh__data": -1}, 8, "-1"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(changes, devices, said):
    assert said in refused(config(**changes), devices)


def test_tensor_parallel_devices_share_their_rows():
    validate(config(batch_size=2, mesh__tensor=4), device_count=8)
    validate(config(batch_size=2, mesh__tensor=2, mesh__context=2), device_count=8)
    assert "config.data.length is 1022, which config.mesh.context=4 devices" in refused(
        config(batch_size=2, mesh__context=4, data__length=1022), 8
    )
    assert "multiple of 2" in refused(config(batch_size=3, mesh__tensor=4), 8)


def test_length_over_the_models_positions_is_refused():
    check_length(512, 512)
    with pytest.raises(UserError, match=r"config\.data\.length is 513, but the model has 512 positions"):
        check_length(513, 512)


@pytest.mark.rule(5)
def test_an_unknown_key_is_refused_where_it_is_written():
    with pytest.raises(AttributeError):
        get_config().data.lenght = 3
    with pytest.raises(TypeError):
        get_config().steps = "many"
    grown = config()
    with grown.unlocked():
        grown.data.lenght = 3
    assert refused(grown) == "config.data.lenght is not a key. Did you mean 'config.data.length'?"


def test_resolved_is_json_with_the_dependent_defaults_filled_in():
    values = resolved(config(trainable="lora", lora__rank=4, lora__targets="q_proj,v_proj"))
    assert json.loads(json.dumps(values)) == values
    targets = ["q_proj", "v_proj"]
    plain = {
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "targets": targets,
        "rslora": False,
        "dora": False,
        "bias": "none",
    }
    plain |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "exclude_modules": None}
    assert values["lora"] == plain | {"layers_to_transform": None, "ensure_weight_tying": False}
    assert values["eval"]["best"] == "heldout"
    assert resolved(config(data__eval={"b": "x", "a": "y"}))["eval"]["best"] == "a"


@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q|v)_proj", "q_proj", ("q_proj", "v_proj")])
def test_lora_targets_are_names_a_list_or_a_pattern(targets):
    made = config(trainable="lora", lora__rank=2, lora__targets=targets)
    validate(made)
    expected = list(targets) if isinstance(targets, tuple) else targets or "all-linear"
    assert lora_settings(made)["targets"] == expected


def test_a_resolved_config_read_back_is_the_same_config():
    original = config(trainable="lora", lora__rank=4, data__eval={"domain": "x"}, eval__prompts=("a", "b"))
    again = merge(get_config(), json.loads(json.dumps(resolved(original))))
    validate(again)
    assert resolved(again) == resolved(original)


def test_a_mixture_is_read_back_and_its_sources_have_names():
    made = config(data__train=[("a/mine.v2.jsonl", 3), ("s3://b/mine.jsonl", 1.0), ("org/my set", 0.5)])
    validate(made)
    again = merge(get_config(), json.loads(json.dumps(resolved(made))))
    validate(again)
    assert differing(resolved(made), resolved(again)) == []
    assert sources(again) == {"mine": ("a/mine.v2.jsonl", 3), "mine-2": ("s3://b/mine.jsonl", 1.0),
                              "my-set": ("org/my set", 0.5)}  # fmt: skip
    assert eval_names(again) == ["heldout-mine", "heldout-mine-2", "heldout-my-set"]
    assert resolved(again)["eval"]["best"] == "heldout-mine"


def test_only_keys_that_change_the_result_differ():
    old = resolved(config())
    for key, value in flat(old):
        new = json.loads(json.dumps(old))
        group, _, name = key.rpartition(".")
        (new[group] if group else new)[name] = "another"
        harmless = key.startswith("log.") or key in (
            *("export", "checkpoint.every", "checkpoint.keep", "data.cache"),
            *("seeds", "eval.answers"),  # of a comparison
        )
        assert differing(old, new) == ([] if harmless else [key]), (key, value)
    assert differing(old, resolved(config(data__eval={"a": "x"}))) == ["eval.best", "data.eval.a"]
    assert differing(resolved(config(compare={"a": {"seed": 1}})), old) == []


def test_what_says_how_a_batch_is_computed_is_told_apart():
    how = {"accumulate", "model.remat", "optimizer.offload", *(f"mesh.{axis}" for axis in get_config().mesh)}
    assert {key for key, _ in flat(resolved(config())) if HOW.match(key)} == how


def test_merge_leaves_its_argument_alone_and_types_what_it_writes():
    base = config()
    made = merge(base, {"optimizer": {"learning_rate": 1}, "data": {"eval": {"domain": "x"}}, "lora": {"rank": 2}})
    assert made.optimizer.learning_rate == 1.0
    assert isinstance(made.optimizer.learning_rate, float)
    assert made.data.eval.domain == "x"
    assert (base.optimizer.learning_rate, len(base.data.eval), base.lora.rank) == (1e-4, 0, None)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data": {"lenght": 3}}, "config.compare.x.data.lenght is not a key. Did you mean 'config.data.length'?"),
        (
            {"learning_rate": 3},
            "config.compare.x.learning_rate is not a key. Did you mean 'config.optimizer.learning_rate'?",
        ),
        ({"data": 3}, "config.compare.x.data is 3: it is a group of keys, so give a dict."),
        ({"steps": "many"}, "config.compare.x.steps is 'many': it takes an integer."),
        ({"lora": {"rank": 1.5}}, "config.compare.x.lora.rank is 1.5: it takes an integer."),
    ],
)
def test_a_methods_wrong_override_is_named(overrides, said):
    with pytest.raises(UserError, match=re.escape(said)):
        methods(config(compare={"x": overrides}))


def test_compare_wants_methods():
    with pytest.raises(UserError, match=r"config\.compare is empty"):
        methods(config())
    with pytest.raises(UserError, match=r"config\.compare\.x is 3"):
        methods(config(compare={"x": 3}))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("c.data.lenght = 3", "8: 'lenght' is not a key of the config. Did you mean 'config.data.length'?"),
        ("c.steps = 'many'", "8: 'steps' takes an integer, not 'many'."),
        ("c.steps = 1 // 0", "8: ZeroDivisionError: integer division or modulo by zero."),
        ("import nowhere", "8: ModuleNotFoundError: No module named 'nowhere'."),
        ("c = = 3", "8: SyntaxError: invalid syntax"),
        ("c = None", " has no get_config() that returns a config"),
    ],
)
def test_a_config_file_that_fails_is_one_sentence_at_its_line(tmp_path, body, said):
    path = tmp_path / "mine.py"
    head = "import specjax.config\n\n# A comment.\n\n\ndef get_config():\n    c = specjax.config.get_config()\n"
    path.write_text(f"{head}    {body}\n    return c\n")
    with pytest.raises(UserError) as raised:
        load_config_file(str(path))
    assert re.fullmatch(rf"{re.escape(str(path))}:?{re.escape(said)}.*", str(raised.value)), raised.value


def test_config_files_that_are_not_there_or_not_configs(tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "bad.json").write_text('{"seed": 1,\n oops}')
    (tmp_path / "wrong.json").write_text('{"sead": 1}')
    for name, said in {
        "absent.py": "There is no config file",
        "empty.py": "has no get_config",
        "bad.json": "bad.json is not JSON (Expecting property name enclosed in double quotes: line 2 column 2",
        "wrong.json": "wrong.json: config.sead is not a key. Did you mean 'config.seed'?",
    }.items():
        with pytest.raises(UserError, match=re.escape(said)):
            load_config_file(str(tmp_path / name))


def test_a_runs_saved_config_is_a_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(resolved(config(seed=7))))
    assert load_config_file(str(path)).seed == 7


def test_every_choice_is_accepted():
    for key, choice in itertools.chain.from_iterable(((k, c) for c in choices) for k, choices in CHOICES.items()):
        made = config(**{key.replace(".", "__"): choice})
        if choice == "lora" or (key == "model.quantise" and choice):  # what is quantised can't train
            made.trainable, made.lora.rank = "lora", 2
        validate(made)


def test_the_losses_of_dpo_that_a_config_may_name_are_those_that_there_are():
    from specjax.train.dpo import LOSSES

    assert CHOICES["dpo.loss"] == tuple(LOSSES)


def test_a_run_that_did_not_know_a_key_goes_on_at_its_default():
    now = resolved(get_config())
    old = {key: value for key, value in now.items() if key not in ("objective", "dpo")}
    assert differing(old, now) == []
    assert differing(old, now | {"objective": "dpo"}) == ["objective"]


@pytest.mark.parametrize(
    "length, batch, devices, mesh, platform, found",
    [
        (512, 8, 1, {}, "cpu", ("float32", 8)),
        (128, 8, 1, {}, "cpu", ("float32", 4)),
        (16, 8, 1, {}, "cpu", ("float32", 1)),
        (512, 8, 4, {"tensor": 2}, "cpu", ("float32", 4)),
        (512, 8, 1, {}, "tpu", ("bfloat16", 1)),
    ],
)
def test_what_is_chosen_automatically_goes_by_the_platform(length, batch, devices, mesh, platform, found):
    config = get_config()
    config.data.length, config.batch_size, config.accumulate = length, batch, 0
    config.mesh.update(mesh)
    made = settled(config, platform, devices)
    assert (made.model.dtype, made.accumulate) == found
    config.model.dtype, config.accumulate = "bfloat16", 2  # what is said stays
    assert settled(config, platform, devices).to_dict() == config.to_dict()
