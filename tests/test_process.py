"""The command owns its process and says what it does there; importing specjax, and its Python API, change nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from specjax import cli, process
from specjax.errors import UserError

ROOT = Path(__file__).parent.parent

# Imports every module of specjax, in an interpreter where all that they import from elsewhere is there already: what is
# different afterwards is specjax's own doing.
IMPORT_ALL = """
import contextlib, importlib, json, logging, os, pkgutil, sys, warnings
for name in json.loads(sys.argv[1]):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
import jax

def state():
    names = ("", "absl", "asyncio", "jax", "transformers", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    found = {"environment": dict(os.environ), "hook": sys.unraisablehook is sys.__unraisablehook__, "levels": levels}
    found |= {"excepthook": sys.excepthook is sys.__excepthook__, "stdout": sys.stdout is sys.__stdout__}
    found |= {"handlers": len(logging.getLogger().handlers), "warnings": list(map(str, warnings.filters))}
    found |= {"jax": {name: str(value) for name, value in jax.config.values.items()}}
    return found | {"left out": [name for name, module in sys.modules.items() if module is None]}

before = state()
import specjax
for module in pkgutil.walk_packages(specjax.__path__, "specjax."):
    if module.name != "specjax.__main__":
        importlib.import_module(module.name)
after = state()
changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
ours = [name for name in sys.modules if name.partition(".")[0] == "specjax"]
own_class = [name for name in ours if type(sys.modules[name]) is not type(sys)]
from jax._src import xla_bridge
print(json.dumps({
    "changed": changed, "own_class": own_class, "devices": sorted(xla_bridge._backends),
    "ours": len(ours), "others": [name for name in sys.modules if name not in ours],
}))
"""


def python(code: str, *args: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    given = [sys.executable, "-c", code, *args]
    return subprocess.run(given, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


@pytest.mark.slow
def test_importing_specjax_changes_nothing_in_the_interpreter():
    done = python(IMPORT_ALL, "[]")
    assert done.returncode == 0, done.stderr
    others = json.loads(done.stdout)["others"]
    assert {"jax", "transformers", "orbax.checkpoint"} <= set(others)
    found = json.loads(python(IMPORT_ALL, json.dumps(others)).stdout)
    assert found["ours"] > 60
    assert (found["changed"], found["own_class"], found["devices"]) == ({}, [], [])


def test_a_command_run_in_someone_elses_process_changes_nothing_there():
    code = (
        "import os, sys; before = dict(os.environ); from specjax import cli;"
        "assert cli.main(['families']) == 0; print(before == dict(os.environ), 'torch' in sys.modules)"
    )
    assert python(code).stdout.splitlines()[-1] == "True False"


@pytest.fixture
def asked(tmp_path) -> list[str]:
    """`specjax data` of one pair."""
    (tmp_path / "pairs.jsonl").write_text('{"instruction": "What?", "response": "That."}\n')
    return ["data", f"--config.data.train={tmp_path}/pairs.jsonl", "--config.data.eval_fraction=0.0"]


def loaded(asked: list[str], config: Path | str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command; its last line says whether transformers and torch were imported."""
    code = (
        f"import atexit, sys; sys.argv = ['specjax', *{asked}, '--config={config}']; from specjax.cli import entry;"
        "atexit.register(lambda: print('transformers' in sys.modules, 'torch.nn' in sys.modules)); entry()"
    )
    return python(code, **environment)


@pytest.mark.slow
def test_the_command_loads_no_torch_but_for_a_config_file_that_does(asked, tmp_path):
    done = loaded(asked, "configs/lora.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("True False\n")
    plain = (ROOT / "configs" / "lora.py").read_text()
    config = tmp_path / "config.py"
    config.write_text(plain + "\nimport torch\nassert torch.zeros(2).sum() == 0\n")
    done = loaded(asked, config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("True True\n")
    # transformers has found torch by now, and may load it whenever it needs it.
    config.write_text(plain + "\nfrom transformers.utils import is_torch_available\nassert is_torch_available()\n")
    done = loaded(asked, config)
    assert done.returncode == 0, done.stderr


def test_the_command_leaves_torch_to_transformers_where_it_is_told_to(asked):
    code = "import sys; from specjax import process; process.prepare(); print(sys.modules.get('torch', 'not left out'))"
    assert python(code).stdout == "None\n"
    assert python(code, SPECJAX_DISABLE="torch_block").stdout == "not left out\n"


@pytest.mark.slow
def test_a_method_of_compare_prepares_the_process_that_it_trains_in():
    code = (
        "import sys, jax; from types import SimpleNamespace; from specjax.compare import child\n"
        "try: child.train(SimpleNamespace(send=lambda said: None), {}, 'nowhere', 'a', '')\n"
        "except SystemExit: print(sys.modules.get('torch', 'not asked to stay away'), sys.unraisablehook.__name__)"
    )
    assert python(code).stdout.endswith("None hook\n")


def test_what_is_left_out_is_named_in_the_help_and_checked(capsys, monkeypatch):
    assert cli.main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in (process.DISABLE, *process.PARTS))
    monkeypatch.setenv(process.DISABLE, " huge_pages,quiet")
    assert {part for part in process.PARTS if not process.enabled(part)} == {"huge_pages", "quiet"}
    monkeypatch.setenv(process.DISABLE, "all")
    assert not any(process.enabled(part) for part in process.PARTS)
    monkeypatch.setenv(process.DISABLE, "huge_page")
    with pytest.raises(UserError, match=r"SPECJAX_DISABLE=huge_page: .* Did you mean 'huge_pages'\?"):
        process.enabled("quiet")


def test_a_wrong_part_is_one_sentence_of_the_command():
    given = [sys.executable, "-m", "specjax", "families"]
    done = subprocess.run(given, capture_output=True, text=True, cwd=ROOT, env=os.environ | {process.DISABLE: "torch"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("specjax: SPECJAX_DISABLE=torch: give all, or some of huge_pages") and (
        done.stderr.count("\n") == 1
    )


def test_all_left_out_leaves_the_process_as_it_was():
    code = (
        "import logging, os, sys; before = dict(os.environ); from specjax import process;"
        "process.ask_for_huge_pages(); process.prepare();"
        "print(before == dict(os.environ), 'torch' in sys.modules, logging.getLogger('absl').level,"
        "sys.unraisablehook is sys.__unraisablehook__)"
    )
    assert python(code, SPECJAX_DISABLE="all").stdout == "True False 0 True\n"


@pytest.mark.skipif(bool(process.tpu_devices()), reason="there is a TPU, which the library tells of")
def test_where_no_tpu_is_its_library_says_nothing_of_the_host():
    code = "from specjax import process; process.prepare(); import jax; print(jax.devices()[0].platform)"
    done = python(code, JAX_PLATFORMS="", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def test_train_starts_anew_with_huge_pages_once(monkeypatch):
    started = []
    monkeypatch.setattr(process.os, "execv", lambda *program: started.append(program))
    monkeypatch.setattr(process.sys, "platform", "linux")
    monkeypatch.setattr(process.sys, "orig_argv", ["python3", "-m", "specjax", "train"])
    monkeypatch.setattr(process.sys, "gettrace", lambda: None)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")  # what is set below goes with the test
    monkeypatch.setenv(process.DISABLE, "huge_pages")
    process.ask_for_huge_pages()
    monkeypatch.delenv(process.DISABLE)
    monkeypatch.setattr(process.sys, "gettrace", lambda: print)  # a debugger would lose its process
    process.ask_for_huge_pages()
    assert started == []
    monkeypatch.setattr(process.sys, "gettrace", lambda: None)
    process.ask_for_huge_pages()
    assert started == [(sys.executable, [sys.executable, "-m", "specjax", "train"])]
    process.ask_for_huge_pages()  # the environment has it now
    assert len(started) == 1 and os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_what_is_compiled_for_an_accelerator_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        process.keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        monkeypatch.setenv(process.DISABLE, "compile_cache")
        process.keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.delenv(process.DISABLE)
        process.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "specjax" / "xla")
        jax.config.update("jax_compilation_cache_dir", "mine")
        process.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == "mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("platform", "has_it", "disabled"),
    [("linux", True, ""), ("linux", False, ""), ("win32", False, ""), ("linux", True, "memory_trim")],
)
def test_memory_is_given_back_where_the_c_library_can(monkeypatch, platform, has_it, disabled):
    """Where the C library can: glibc; musl has no such function, and Windows no library without a name."""
    import ctypes

    asked: list[int] = []
    libraries = {"linux": SimpleNamespace(**({"malloc_trim": asked.append} if has_it else {}))}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libraries[platform])
    monkeypatch.setattr(process.sys, "platform", platform)
    monkeypatch.setenv(process.DISABLE, disabled)
    process.return_freed_memory()
    assert asked == [0] * (has_it and not disabled)


def test_a_warning_of_ours_is_a_sentence_and_another_stays_as_it_was():
    code = (
        "import warnings; from specjax import files, process; process.hush();"
        "exec(compile('warnings.warn(\"the disk is full\")', files.__file__, 'exec'));"
        "warnings.warn('theirs')"
    )
    assert python(code).stderr == "specjax: the disk is full\n<string>:1: UserWarning: theirs\n"
