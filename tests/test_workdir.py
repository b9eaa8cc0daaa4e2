"""A run's folder is its own: another's is left as it was, byte for byte; a broken file in it is one sentence."""

import fcntl
import json
import os
import socket
import sys
import threading

import pytest
from helpers import data, model, on_devices
from run_fixtures import flags, specjax, tree, write_base, write_data

import specjax as sj
from specjax import files
from specjax.errors import UserError
from specjax.hf.tokenizer import load_tokenizer
from specjax.lock import NAME, Lock
from specjax.models import Origin


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdir")
    write_data(folder / "data")
    return write_base(folder / "base")


def refused(capfd, base, workdir, *untouched, train=None):
    """What `specjax train` says of a workdir, in one sentence, when neither it nor anything else has changed."""
    before = [tree(folder) for folder in (workdir, base.parent, *untouched)]
    capfd.readouterr()
    assert specjax("train", *flags(base, workdir, "lora", train=train)) == 2
    assert [tree(folder) for folder in (workdir, base.parent, *untouched)] == before
    out, err = capfd.readouterr()
    assert err.startswith("specjax: ") and err.count("\n") == 1, out + err
    return err


def written(folder, **contents):
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "contents",
    [
        {"config_json": {"name": "a web shop"}, "metrics.jsonl": "years of work"},
        {"config_json": {"model_type": "llama"}, "model.safetensors": "weights"},
        {"config_json": {}, "data_json": {}, "checkpoints__100__weights": "another's"},
    ],
)
def test_a_folder_that_no_run_made_is_left_as_it_was(capfd, base, tmp_path, contents):
    workdir = written(tmp_path / "theirs", **contents)
    assert "theirs is not empty and holds no run: it has " in refused(capfd, base, workdir)


def test_the_folder_that_a_run_reads_is_no_workdir(capfd, base):
    assert "base is the folder that config.model.path reads" in refused(capfd, base, base)
    rows = base.parent / "data"
    assert "data is the folder that config.data.train reads" in refused(capfd, base, rows, train=rows)
    # What lies in a folder of data is data, and the run would write JSON there.
    inside = rows / "run"
    assert specjax("train", *flags(base, inside, "lora", train=rows)) == 2
    assert not inside.exists()
    assert "run lies in the folder that config.data.train reads" in capfd.readouterr().err


@on_devices(1)
def test_a_run_that_ended_before_its_first_checkpoint_is_known_by_its_mark(capfd, base, tmp_path):
    workdir = tmp_path / "run"
    assert specjax("train", *flags(base, workdir, "lora", **{"lora.targets": "['q_porj']"})) == 2
    assert (workdir / files.MARK).is_file() and (workdir / "config.json").is_file()
    assert "is not empty" not in capfd.readouterr().err
    assert specjax("train", *flags(base, workdir, "lora")) == 0
    # An empty export is none, and a summary that is cut short is named.
    for file in (workdir / "export").iterdir():
        file.unlink()
    assert specjax("train", *flags(base, workdir, "lora")) == 0
    assert (workdir / "export" / "adapter_model.safetensors").is_file()
    (workdir / "export" / "adapter_model.safetensors").rename(workdir / "export" / "mine")
    assert "export holds something else than weights" in refused(capfd, base, workdir)
    (workdir / "export" / "mine").rename(workdir / "export" / "adapter_model.safetensors")
    summary = workdir / "summary.json"
    for content, said in (("[1]", "does not hold a JSON object"), ("{}", "has no step"), ("{", "is not JSON")):
        summary.write_text(content)
        assert f"summary.json {said}" in refused(capfd, base, workdir)


@pytest.mark.usefixtures("steps_made_once")
def test_fit_leaves_files_that_no_run_wrote(tmp_path):
    run = {"steps": 1, "tensorboard": False, "workdir": tmp_path}
    (tmp_path / "notes.txt").write_text("mine")
    sj.fit(model(), data(), sj.adamw(1e-3), **run)  # beside other files, yes
    assert (tmp_path / files.MARK).is_file()
    (tmp_path / files.MARK).unlink()
    for step in (tmp_path / "checkpoints").iterdir():
        step.rename(tmp_path / "moved")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"holds no run: it has checkpoints but no {files.MARK}"):
        sj.fit(model(), data(), sj.adamw(1e-3), **run)
    assert tree(tmp_path) == before
    (tmp_path / "moved").rename(tmp_path / "checkpoints" / "1")  # as a run of specjax 0.1, which had no mark
    assert sj.fit(model(), data(), sj.adamw(1e-3), **run).step == 1


BROKEN = {
    "cut short": (b'{"a": 1', "is not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "is not JSON"),
    "too deep": (b"[" * 100_000, "is not JSON (it is nested too deeply)"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "a list": (b"[1]", "does not hold a JSON object"),
    "a text": (b'"a"', "does not hold a JSON object"),
    "empty": (b"", "is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_json_file_is_one_sentence_wherever_it_lies(capfd, base, tmp_path, case):
    content, said = BROKEN[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        files.read_object(path)
    assert str(raised.value).startswith(f"{path} {said}") and str(raised.value).endswith(": restore the file.")
    capfd.readouterr()
    for argv in (
        ("train", *flags(tmp_path, tmp_path / "out", "sft")),  # of a base
        ("data", f"--config={path}"),  # of a run, as a config
        ("export", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"),
    ):
        if argv[0] == "train":
            argv = (*(flag for flag in argv if "data.train" not in flag), f"--config.data.train={base.parent / 'data'}")
        assert specjax(*argv) == 2
        assert f"{path} {said}" in capfd.readouterr().err
    (tmp_path / "adapter_config.json").write_bytes(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert specjax("generate", f"--model={base}", f"--adapter={tmp_path}", "--prompt=x") == 2
    assert f"adapter_config.json {said}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "row", ["[" * 100_000, '{"n": ' + "9" * 5000 + "}"], ids=["nested too deeply", "a number of 5000 digits"]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_that_no_json_reader_takes_is_one_sentence(capfd, base, tmp_path, name, row):
    (tmp_path / name).write_text(row + "\n")
    said = refused(capfd, base, tmp_path / "out", train=tmp_path / name)
    assert f"{name}" in said and "is not JSON that can be read" in said


CODE = "open({canary!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Own, LlamaConfig as Config\n"
REMOTE = {
    "a tokenizer": ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["code.Own", None]}}}, False),
    "a fast tokenizer": ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "code.Own"]}}}, False),
    "a tokenizer of another class": (
        {"tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}},
        True,
    ),
    "a tokenizer in the model's config": ({"config.json": {"auto_map": {"AutoTokenizer": ["code.Own", None]}}}, False),
    "a config": ({"config.json": {"auto_map": {"AutoConfig": "code.Config"}}}, False),
    "a config of an unknown kind": (
        {
            "config.json": {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}},
            "tokenizer_config.json": {"tokenizer_class": None},
        },
        False,
    ),
}


@pytest.mark.parametrize("case", REMOTE)
def test_code_that_a_folder_brings_along_is_never_run_nor_asked_about(base, tmp_path, monkeypatch, case):
    changes, refuses = REMOTE[case]
    canary = tmp_path / "canary"
    folder = write_base(tmp_path / "base")
    (folder / "code.py").write_text(CODE.format(canary=str(canary)))
    for name, change in changes.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    class Asked:
        """Standard input that says yes, and tells that it was read."""

        def readline(self, *size):
            raise AssertionError("standard input was read")

        read = readline

    monkeypatch.setattr(sys, "stdin", Asked())
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it was asked about"))
    try:
        assert load_tokenizer(folder)("What").input_ids
    except UserError as error:
        assert refuses and "its tokenizer is code of its own (auto_map), which is not run here" in str(error)
    else:
        assert not refuses
    assert not canary.exists()


def test_a_second_run_is_refused_and_told_of_the_first(capfd, base, tmp_path):
    files.mark(tmp_path)
    held, done = threading.Event(), threading.Event()

    def first():
        with Lock(tmp_path) as lock:
            lock.take()
            held.set()
            done.wait()

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    try:
        before = (tmp_path / NAME).read_bytes()
        who = f"is in use by process {os.getpid()} on {socket.gethostname()}, since "
        assert who in refused(capfd, base, tmp_path)
        with pytest.raises(UserError, match=who):
            sj.fit(model(), data(), sj.adamw(1e-3), steps=1, workdir=tmp_path)
        assert (tmp_path / NAME).read_bytes() == before
    finally:
        done.set()
        thread.join()
    files.claim(written(tmp_path / "killed", **{f"{files.MARK}.partial": {}}))  # while it marked the folder
    with Lock(tmp_path) as outer, Lock(tmp_path) as inner:  # `fit` in a run
        assert outer.take(make=False) and inner.take()
    with Lock(tmp_path / "none") as lock:
        assert not lock.take(make=False) and not (tmp_path / "none").exists()


def test_a_filesystem_without_locks_is_said(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with Lock(tmp_path) as lock, pytest.warns(UserWarning, match="its filesystem has no locks"):
        assert lock.take()


def test_what_a_killed_writer_left_goes_with_the_next_and_what_a_living_one_has_stays(tmp_path):
    left, living, mine = (tmp_path / name for name in (".out.specjax-dead", ".out.specjax-alive", ".out.backup"))
    for folder in (left, living, mine):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
    owner = os.open(living, os.O_RDONLY)
    fcntl.flock(owner, fcntl.LOCK_EX)
    with files.new_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
        with files.new_folder(tmp_path / "out2"):
            assert staging.is_dir()
        files.sweep(tmp_path / "out")
    os.close(owner)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.backup", ".out.specjax-alive", "out", "out2"]


@pytest.mark.parametrize("save", [sj.export, sj.lora.save], ids=["export", "adapter"])
def test_the_base_and_a_run_are_not_written_over(tmp_path, save):
    of = model()
    of.origin = Origin(source=str(tmp_path / "base"), config_json=of.origin.config_json)
    if save is sj.lora.save:
        sj.lora.inject(of, rank=2)
    given = (None,) if save is sj.export else ()
    written(tmp_path / "base", config_json={"model_type": "llama"})
    files.mark(tmp_path / "run")
    before = tree(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for out, said in (
        ("base", "is the folder of the base"),
        ("link", "is the folder of the base"),
        ("run", "of a run"),
    ):
        with pytest.raises(UserError, match=said):
            save(of, *given, tmp_path / out, overwrite=True)
        assert {name: content for name, content in tree(tmp_path).items() if "link" not in name} == before


@pytest.mark.parametrize("kind", ["a dangling link", "a looping link", "below a file", "a name too long"])
def test_a_workdir_that_cannot_be_is_one_sentence(capfd, base, tmp_path, kind):
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "looping").symlink_to(tmp_path / "looping")
    (tmp_path / "file").write_text("x")
    name = {"below a file": "file/run", "a name too long": "x" * 300}.get(kind, kind.split()[1])
    assert specjax("train", *flags(base, tmp_path / name)) == 2
    err = capfd.readouterr().err
    assert err.startswith("specjax: ") and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "looping"]
