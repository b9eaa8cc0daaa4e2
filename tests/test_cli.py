import inspect
import io
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import specjax
from specjax import cli, compare, run
from specjax.chat import prompts as asked
from specjax.chat import terminal as chat
from specjax.cluster import launch
from specjax.config import ConfigDict, get_config, keys
from specjax.config.checks import CHOICES, FREE, flat
from specjax.errors import UserError
from specjax.plan import report
from specjax.report import page
from specjax.verbs import FLAGS, VERBS

ROOT = Path(__file__).parent.parent
CONFIG = f"--config={ROOT}/configs/lora.py"
TRAIN = ("train", CONFIG, "--workdir=w")


@pytest.fixture
def calls(monkeypatch):
    """Stands in for specjax.run and specjax.compare: what each of its functions was called with."""
    made: list[tuple[str, dict]] = []

    def record(name):
        return lambda **found: made.append((name, found))

    verbs = ("train", "evaluate", "generate", "export", "data", "compare")
    fake = SimpleNamespace(**{name: record(name) for name in verbs})
    monkeypatch.setattr(specjax, "run", fake, raising=False)
    monkeypatch.setitem(sys.modules, "specjax.run", fake)
    monkeypatch.setitem(sys.modules, "specjax.compare", fake)
    return made


def refused(capsys, *argv: str) -> str:
    """The one sentence that a command ends with."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("specjax: ")
    assert err.count("\n") == 1
    return err.removeprefix("specjax: ").rstrip("\n")


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_help_is_a_screen_with_every_verb(capsys, argv):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert re.search(rf"^  specjax {name} +{re.escape(verb.does)}$", out, re.MULTILINE)
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_has_its_own_flags_alone(capsys, name):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    verb = VERBS[name]
    listed = [line.split()[0].partition("=")[0][2:] for line in out.splitlines() if line.startswith("  --")]
    own = [flag for flag in listed if not flag.startswith("config.")]
    assert own == [*verb.needs, *verb.may]
    assert out.startswith(f"specjax {name}") and out.splitlines()[1].strip() == verb.does
    for flag in (FLAGS[each] for each in own):
        assert flag.type is bool or flag.default in (None, "") or f"default {flag.default}" in out, flag.name
    assert max(map(len, out.splitlines())) <= 120
    assert cli.main(["help", name]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("name", VERBS)
def test_the_examples_of_a_verbs_help_are_two_and_parse(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is VAT?"))
    verb = VERBS[name]
    assert len(verb.examples) == (2 if verb.needs or verb.may else 1)
    for example in verb.examples:
        cli.parse(name, shlex.split(example))


def test_help_of_the_config_has_each_key_once_with_its_default_and_meaning(capsys):
    assert cli.main(["help", "config"]) == 0
    out = capsys.readouterr().out
    names = re.findall(r"^--config\.([\w.]+)=", out, re.MULTILINE)
    groups = {*FREE, *(name for name, group in get_config().items() if isinstance(group, ConfigDict) and not group)}
    assert sorted(names) == sorted({name for name, _ in flat(get_config().to_dict())} | groups)
    assert all(key.means for key in keys.keys()), [key.name for key in keys.keys() if not key.means]
    for name, choices in CHOICES.items():  # a choice that is checked is a choice that is told
        [told] = [key.means for key in keys.keys() if key.name == name]
        assert [choice for choice in choices if choice not in told] == [], name
    assert cli.main(["help", "config.checkpoint"]) == 0
    group = capsys.readouterr().out
    assert group.count("--config.") == 2 and group in out
    assert "--config.checkpoint.keep=1" in group
    assert cli.main(["help", "config.lora.rnk"]) == 2
    assert "Did you mean 'config.lora.rank'?" in capsys.readouterr().err


def test_env_says_versions_devices_and_settings_and_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"specjax {specjax.__version__}, Python {sys.version.split()[0]}" in out
    assert f"jax {version('jax')}," in out and f"jaxlib {version('jaxlib')}" in out
    assert f"devices: {jax.device_count()} x cpu" in out
    assert "- HF_HUB_OFFLINE=1" in out and "hf_secret" not in out


def test_every_flag_is_some_verbs_and_every_verbs_function_takes_its_flags():
    assert set(FLAGS) == {flag for verb in VERBS.values() for flag in (*verb.needs, *verb.may)}
    functions = {"train": run.train, "eval": run.evaluate, "generate": run.generate, "export": run.export}
    functions |= {"data": run.data, "plan": report.report, "compare": compare.compare, "launch": launch.launch}
    functions |= {"report": page.report}
    renamed = {"adapter": "adapters", "prompt": "prompts", "prompt_file": "prompts", "for": "target", "price": "prices"}
    for name, function in functions.items():
        taken = inspect.signature(function).parameters.values()
        rest = {each.name for each in taken if each.kind is each.VAR_KEYWORD}
        given = {renamed.get(flag, flag) for flag in (*VERBS[name].needs, *VERBS[name].may)} - {"distributed"}
        named = {each.name for each in taken} - rest
        assert given >= named, name
        assert rest or given == named, name


@pytest.mark.parametrize("given", [["h100"], ["h100=x"], ["h100=1", "h100=2"], ["v5e=-1"], ["=1"]])
def test_a_price_is_a_number_for_each_family_once(given, tmp_path):
    assert cli._prices(["v5e=1.2", "h100=3"]) == {"v5e": 1.2, "h100": 3.0}
    with pytest.raises(UserError, match=f"--price={given[-1]}: give what a chip costs per hour"):
        cli._prices(given)
    with pytest.raises(UserError, match="--price=a100: --for looks for v5e and h100 alone"):
        compare.compare(get_config(), tmp_path / "out", target="m", prices={"a100": 1.0})
    with pytest.raises(UserError, match="--price is of the hardware that --for=MODEL looks for"):
        compare.compare(get_config(), tmp_path / "out", prices={"h100": 1.0})


def test_help_and_a_users_mistake_import_nothing_but_flags_and_configs():
    code = (
        "import sys; before = set(sys.modules); from specjax.cli import main; main(['--help']);"
        "assert main(['train', '--config=configs/lora.py', '--workdir=w', '--config.stepz=1']) == 2;"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(top for top in tops - sys.stdlib_module_names if 'cython' not in top))"  # PyYAML's
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "['absl', 'ml_collections', 'specjax', 'yaml']"
    assert "Did you mean 'config.steps'?" in done.stderr


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "specjax", "trian"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == (
        "specjax: There is no verb 'trian': it is one of train, eval, generate, chat, export, data, advise, combine, "
        "compare, report, plan, launch, families, env. Did you mean 'train'?\n"
    )


@pytest.mark.parametrize(
    ("argv", "name"),
    [(TRAIN, "train"), (("eval", *TRAIN[1:]), "evaluate"), (("compare", *TRAIN[1:]), "compare")],
)
def test_a_verb_calls_its_function_with_the_config_and_the_workdir(calls, argv, name):
    assert cli.main([*argv, "--config.seed=7", "--config.optimizer.learning_rate", "1e-3", "--noconfig.export"]) == 0
    [(called, found)] = calls
    assert called == name
    more = {"train": {"profile"}, "compare": {"budget", "steps", "target", "prices", "lang"}}
    assert set(found) == {"config", "workdir"} | more.get(name, set())
    assert found["workdir"] == "w"
    config = found["config"]
    assert (config.seed, config.optimizer.learning_rate, config.export) == (7, 1e-3, False)
    assert config.trainable == "lora"


def test_a_flags_value_may_be_the_next_argument(calls):
    assert cli.main(["train", "--config", CONFIG.partition("=")[2], "--workdir", "w", "-config.mesh.fsdp", "-1"]) == 0
    assert calls[0][1]["config"].mesh.fsdp == -1


def test_data_needs_no_workdir(calls):
    assert cli.main(["data", CONFIG]) == 0
    assert set(calls[0][1]) == {"config", "rows"}


def test_generate_takes_several_adapters_and_prompts(calls, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nstdin"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\u2028three\n", encoding="utf-8")
    adapters = ("--adapter=hr=a/x", "--adapter=b/legal", "--adapter", "c/tax")
    argv = ("generate", "--model=m", *adapters, "--prompt=Hi", "--prompt=-", f"--prompt_file={prompts}", "--top_p=0.9")
    argv += ("--stop=END", "--stop=\n", "--prompt=@tax Why?", "--prompt=@base @me", "--prompt=@@home")
    assert cli.main(argv) == 0
    assert calls == [
        (
            "generate",
            {
                "model": "m",
                "adapters": {"hr": "a/x", "legal": "b/legal", "tax": "c/tax"},
                "prompts": [
                    *(("Hi", ...), ("from\nstdin", ...), ("Why?", "tax"), ("@me", None), ("@home", ...)),
                    *(("one", ...), ("two\u2028three", ...)),
                ],
                "max_new_tokens": None,
                "temperature": None,
                "top_k": None,
                "top_p": 0.9,
                "min_p": None,
                "repetition_penalty": None,
                "generation_config": True,
                "stop": ["END", "\n"],
                "seed": 0,
                "raw": False,
                "system": "",
            },
        )
    ]


def test_a_file_of_rows_names_the_adapter_of_each_prompt(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "@ Hi"}\n\n{"prompt": "Hi", "adapter": "hr"}\n{"prompt": "Hi", "adapter": null}\n')
    assert asked.prompts([], str(file), ["hr"]) == [("@ Hi", ...), ("Hi", "hr"), ("Hi", None)]
    for line, said in {
        '{"prompt": "Hi", "adapter": "hx"}': "no adapter is named 'hx'; there are hr, and base for none.",
        '{"prompt": "Hi", "adaptor": "hr"}': 'write {"prompt": a text} and, where one adapter answers it, "adapter"',
        '{"prompt": "Hi", "adapter": 3}': "adapter is 3: give a name, or null for the base",
        "Hi": "is not JSON",
        "[" * 100_000: "is not JSON that can be read: it is nested too deeply",
    }.items():
        file.write_text("\n" + line)
        with pytest.raises(UserError, match=re.escape(f"{file}:2") + ".*" + re.escape(said)):
            asked.prompts([], str(file), ["hr"])


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "-"])
def test_prompts_that_are_no_utf8_are_one_sentence(tmp_path, monkeypatch, name):
    file = tmp_path / name
    file.write_bytes(b'{"prompt": "\xff"}\n')
    with file.open(encoding="utf-8") as stream, pytest.raises(UserError, match=r"is not UTF-8 text: .* at byte 12"):
        monkeypatch.setattr("sys.stdin", stream)
        asked.prompts(["-"] if name == "-" else [], "" if name == "-" else str(file), [])
    with file.open(encoding="utf-8") as stream, pytest.raises(UserError, match="the standard input is not UTF-8"):
        monkeypatch.setattr("sys.stdin", stream)
        list(chat._lines(None, terminal=False))


def test_export_passes_what_was_asked(calls):
    assert cli.main(["export", "--workdir=w", "--out=o", "--merge", "--step=0", "--dtype=float16"]) == 0
    given = {"workdir": "w", "out": "o", "merge": True, "step": 0, "overwrite": False, "dtype": "float16"}
    given["dequantise"] = False
    assert calls == [("export", given)]


def test_names_of_eval_sets_and_columns_are_the_users_own(calls):
    free = (
        "--config.data.eval.domain=a.jsonl",
        "--config.data.eval.general",
        "b.txt",
        "--config.data.columns.text=body",
    )
    assert cli.main([*TRAIN, *free]) == 0
    data = calls[0][1]["config"].data
    assert data.eval.to_dict() == {"domain": "a.jsonl", "general": "b.txt"}
    assert data.columns.to_dict() == {"text": "body"}


def test_prompts_of_an_eval_are_plain_texts(calls):
    assert cli.main([*TRAIN, "--config.eval.prompts=What is it, then?", "--config.eval.prompts=1"]) == 0
    assert calls[0][1]["config"].eval.prompts == ("What is it, then?", "1")


def test_a_methods_own_key_is_overridden(calls):
    demo = f"--config={ROOT}/configs/demo.py"
    assert cli.main(["compare", demo, "--workdir=w", "--config.compare.lora.lora.rank=4"]) == 0
    assert calls[0][1]["config"].compare.lora.lora.rank == 4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--workdir=w", "train"), "The verb comes first: it is one of train, eval"),
        (
            ("generate", "--model=m", "--adapter=hr=a", "--adapter=law=b", "--prompt=@hrr Who?"),
            "--prompt: no adapter is named 'hrr'; there are hr, law, and base for none; write @@ where the text itself "
            "begins with @. Did you mean 'hr'?",
        ),
        (("generate", "--model=m", "--adapter=hr=a", "--prompt=@hr "), "@hr names an adapter and asks it nothing"),
        (("chat", "--model=m", "--adapter=base=a"), "named 'base', which stands for the model without an adapter"),
        (("chat", "--model=m", "--adapter=hr=a", "--adapter=x/hr"), "Two adapters are named 'hr'"),
        (("train", CONFIG), "`specjax train` needs --workdir: the run's folder, such as --workdir=runs/lora."),
        (("train", "--workdir=w"), "`specjax train` needs --config: the file to start from"),
        (("train", "--workdir=w", "--config.seed=1"), "`specjax train` needs --config"),
        (("train", "--workdir=w", "--config=absent.py"), "There is no config file absent.py"),
        (("generate", "--model=m"), "`specjax generate` needs --prompt"),
        (("generate", "--model=m", "--prompt= "), "`specjax generate` needs --prompt"),
        (("generate", "--prompt=x"), "`specjax generate` needs --model"),
        (("generate", "--model=m", "--prompt_file=absent"), "There is no file absent"),
        (("generate", "--model=m", "--prompt_file=absent.jsonl"), "no such data file or folder: absent.jsonl"),
        (("generate", "--model=m", "--adapter=a/x", "--adapter=b/x", "--prompt=p"), "Two adapters are named 'x'"),
        (("export", "--workdir=w"), "`specjax export` needs --out"),
        (
            (*TRAIN, "--prompt=x"),
            "which takes --config, --workdir, --distributed, --profile.",
        ),
        (("export", "--workdir=w", "--out=o", CONFIG), "--config is no flag of `specjax export`"),
        ((*TRAIN, "more"), "`specjax train` takes flags alone, and 'more' is none."),
        (("data", "configs/lora.py"), "Did you mean --config=configs/lora.py?"),
        ((*TRAIN, "--wrokdir=x"), "There is no flag --wrokdir. Did you mean 'workdir'?"),
        (("train", "--configs=x", "--workdir=w"), "There is no flag --configs. Did you mean 'config'?"),
        (("train", CONFIG, "--workdir"), "Missing value for flag --workdir."),
        ((*TRAIN, "--config.seed"), "Missing value for flag --config.seed."),
        (
            (*TRAIN, "--config.data.lenght=3"),
            "--config.data.lenght is no key of the config. Did you mean 'config.data.length'?",
        ),
        ((*TRAIN, "--config.learning_rate=3"), "Did you mean 'config.optimizer.learning_rate'?"),
        ((*TRAIN, "--config.seed.x=3"), "--config.seed.x is no key of the config."),
        ((*TRAIN, "--config.steps=abc"), "--config.steps takes an integer, not 'abc'."),
        ((*TRAIN, "--config.batch_size=1.5"), "--config.batch_size takes an integer, not '1.5'."),
        ((*TRAIN, "--config.optimizer.eps=tiny"), "--config.optimizer.eps takes a number, not 'tiny'."),
        ((*TRAIN, "--config.data.packing=maybe"), "--config.data.packing takes true or false, not 'maybe'."),
        ((*TRAIN, "--config.lora.rank=many"), "--config.lora.rank takes an integer, not 'many'."),
        ((*TRAIN, "--config.model=x"), "--config.model is a group of keys: set one of them"),
        (("export", "--workdir=w", "--out=o", "--step=last"), "--step takes an integer, not 'last'."),
        (
            ("export", "--workdir=w", "--out=o", "--dtype=int8"),
            "--dtype=int8: value should be one of <bfloat16|float32|float16>",
        ),
        (("export", "--workdir=w", "--out=o", "--step=-1"), "Flag --step=-1: -1 is not a non-negative integer."),
    ],
)
def test_a_users_mistake_is_one_sentence_and_status_2(capsys, calls, argv, said):
    assert said in refused(capsys, *argv)
    assert not calls


def test_what_a_verb_raises_becomes_the_exit_status(capsys, calls, monkeypatch):
    def raising(error):
        def train(**_):
            raise error

        monkeypatch.setattr(specjax.run, "train", train)

    raising(UserError("No such thing: do the other."))
    assert refused(capsys, *TRAIN) == "No such thing: do the other."
    raising(OSError(28, "No space left on device", "w/metrics.jsonl"))
    assert "The disk is full (w/metrics.jsonl)" in refused(capsys, *TRAIN)
    raising(PermissionError(13, "Permission denied", "w/config.json"))
    assert "Permission denied (w/config.json): give another place" in refused(capsys, *TRAIN)
    raising(KeyboardInterrupt())
    assert cli.main(TRAIN) == 130
    raising(OSError(9, "Bad file descriptor"))  # nothing that the user can mend: a traceback
    with pytest.raises(OSError, match="Bad file"):
        cli.main(TRAIN)


def test_the_public_names_are_there_whatever_was_imported_first():
    import specjax.generation.generate
    import specjax.hf.load
    import specjax.train.fit

    for name in specjax.__all__:
        assert getattr(specjax, name) is not None
    assert specjax.generate.__name__ == "generate"
    for name in ("generate", "load", "export", "fit", "make_mesh", "adamw", "lion"):
        assert callable(getattr(specjax, name)), name
    assert set(specjax.__all__) <= set(dir(specjax))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = specjax.lode


def test_a_command_that_ctrl_c_ended_runs_into_no_end_of_the_interpreter(monkeypatch):
    """Threads that are at work then crash: the process leaves at once, with what a shell says of Ctrl-C."""
    left = []

    def interrupted(*argv, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupted)
    monkeypatch.setattr(cli.process, "ask_for_huge_pages", lambda: None)
    monkeypatch.setattr(cli.process, "leave", left.append)
    monkeypatch.setattr(sys, "argv", ["specjax", "train"])
    with pytest.raises(SystemExit):
        cli.entry()
    assert left == [130]
